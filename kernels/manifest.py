"""What each kernel takes, gives and refuses: the Python reading of manifest.toml.

    entry = manifest.kernels()["matmul_fp8"]
    bound = manifest.check(entry, "trn2", {"x": ("uint8", (8, 256)), ...}, {"blocks": False})

The language of shapes and checks is a part of Python's expression grammar (src/trainium/manifest/expression.rs describes it and
is the other reading); it is walked here, never evaluated by Python itself.
"""

from __future__ import annotations

import ast
import functools
import operator
import tomllib
from pathlib import Path

KERNELS = Path(__file__).resolve().parent

# NKI type -> (libnrt's name, bytes). Types that libnrt has no name for cannot be inputs or outputs.
TYPES = {
    "int8": ("i8", 1),
    "int16": ("i16", 2),
    "int32": ("i32", 4),
    "uint8": ("u8", 1),
    "uint16": ("u16", 2),
    "uint32": ("u32", 4),
    "float16": ("f16", 2),
    "float32": ("f32", 4),
    "bfloat16": ("bf16", 2),
    "float8_e4m3": ("fp8_e4", 1),
    "float8_e4m3fn": ("fp8_e4", 1),
    "float8_e5m2": ("fp8_e5", 1),
}
_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_LARGEST = 2**127 - 1
_MAX_SEARCH = 4096


class Refused(ValueError):
    """A call that the kernel does not serve. `constraint` is the name of what does not hold."""

    def __init__(self, constraint: str, message: str):
        super().__init__(f"{constraint}: {message}")
        self.constraint = constraint


class Unknown(Exception):
    """An expression has no value in this call."""


def kernels(path: Path = KERNELS / "manifest.toml") -> dict[str, dict]:
    """The entries of the manifest by name."""
    return {entry["name"]: entry for entry in tomllib.loads(path.read_text())["kernel"]}


def check(entry: dict, target: str, inputs: dict[str, tuple[str, tuple[int, ...]]], parameters: dict[str, object]) -> dict:
    """What a call binds: `dims` by name and the `outputs` as {name: (dtype, shape)}; Refused if the kernel does not serve it.

    `inputs` has (NKI dtype, shape) of each tensor given, `parameters` the compile-time arguments; None is as good as absent.
    """
    call = _Call.of(entry, target, inputs, parameters)
    for refused in call.refusals():
        raise refused
    return call.bound()


def refusals(entry: dict, target: str, inputs: dict[str, tuple[str, tuple[int, ...]]], parameters: dict[str, object]) -> list[str]:
    """The names of all constraints that do not hold, in order; `check` names the first."""
    return [refused.constraint for refused in _Call.of(entry, target, inputs, parameters).refusals()]


def _present(entry: dict, kind: str, given: dict) -> dict:
    """Arguments by name without the absent ones, defaults filled in."""
    known = {row["name"]: row for row in entry[kind]}
    for name in given:
        if name not in known:
            raise Refused(name, f"{entry['name']} has none of that name")
    values = {name: row["default"] for name, row in known.items() if "default" in row}
    values |= {name: value for name, value in given.items() if value is not None}
    for name, row in known.items():
        if name not in values and not row.get("optional", False):
            raise Refused(name, f"missing, needed by {entry['name']}")
    return values


@functools.cache
def _parsed(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def alternatives(formula: str) -> list[list[ast.expr]]:
    """The extents of each alternative of a shape formula."""

    def of(node: ast.expr) -> list[list[ast.expr]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return of(node.left) + of(node.right)
        if not isinstance(node, ast.List) or not node.elts:
            raise SyntaxError(f"a shape is a list: {formula}")
        return [node.elts]

    return of(_parsed(formula))


class _Call:
    """What the names of an entry are worth in a call."""

    def __init__(self, entry: dict, target: str, tensors: dict, parameters: dict):
        self.entry, self.target, self.tensors, self.parameters = entry, target, tensors, parameters
        self.inputs = {row["name"]: row for row in entry["inputs"]}
        definitions = entry.get("definitions", [])
        taken = {row["name"] for row in [*entry["parameters"], *definitions]}
        self.dims: dict[str, object] = {}
        # A dimension is the extent of the first tensor in whose shape it stands alone.
        for row in entry["inputs"]:
            shape = tensors.get(row["name"], (None, None))[1]
            fitting = [] if shape is None else [a for a in alternatives(row["shape"]) if len(a) == len(shape)]
            for node, extent in zip(fitting[0] if fitting else [], shape or (), strict=False):
                if isinstance(node, ast.Name) and node.id not in taken:
                    self.dims.setdefault(node.id, extent)
        for row in definitions:
            try:
                self.dims[row["name"]] = self.value(row["value"])
            except Unknown:
                pass

    @staticmethod
    def of(entry: dict, target: str, inputs: dict, parameters: dict) -> _Call:
        """The call, once its arguments are there and hold something."""
        tensors = _present(entry, "inputs", inputs)
        for name, (dtype, shape) in tensors.items():
            if 0 in shape:
                raise Refused(name, f"got {dtype} {list(shape)}, each axis needs at least 1")
        return _Call(entry, target, tensors, _present(entry, "parameters", parameters))

    def refusals(self):
        """Why the call is refused, for each constraint that does not hold."""
        for constraint in self.entry["constraints"]:
            need = f"need {constraint['text']}"
            try:
                if not self.value(constraint["check"]):
                    yield Refused(constraint["name"], need)
            except Unknown as unknown:
                yield Refused(constraint["name"], f"{need}; {unknown}")

    def value(self, text: str):
        """The value of an expression."""
        return self._of(_parsed(text), {})

    def fits(self, name: str) -> bool:
        """Whether a tensor's shape is one of its alternatives."""
        if name not in self.tensors:
            return True
        shape = self.tensors[name][1]
        unknown = None
        for extents in alternatives(self.inputs[name]["shape"]):
            try:
                if len(extents) == len(shape) and [self._of(e, {}) for e in extents] == list(shape):
                    return True
            except Unknown as why:
                unknown = why
        if unknown is not None:
            raise unknown
        return False

    def bound(self) -> dict:
        """What holds for every kernel, whether a constraint names it or not; then the outputs."""
        name = self.entry["name"]
        if self.target not in self.entry["targets"]:
            raise Refused(name, f"not for {self.target}")
        for row in self.entry["parameters"]:
            text = self.parameters.get(row["name"])
            if isinstance(text, str) and text not in [t.strip() for t in row["kind"].split("|")]:
                raise Refused(name, f"{row['name']} = {text}, need {row['kind']}")
        for tensor, (dtype, shape) in self.tensors.items():
            row = self.inputs[tensor]
            if not self.fits(tensor):
                raise Refused(name, f"{tensor} has shape {tuple(shape)}, need {row['shape']}")
            same = row["dtype"].removeprefix("dtype of ")
            wanted = [self.tensors[same][0]] if same in self.tensors else []
            if dtype not in wanted and TYPES.get(dtype, ("",))[0] not in [t.strip() for t in row["dtype"].split("|")]:
                raise Refused(name, f"{tensor} is {dtype}, need {row['dtype']}")
        outputs = {}
        for row in self.entry["outputs"]:
            short = self.parameters.get(row["dtype"].removeprefix("value of "), row["dtype"])
            (extents,) = alternatives(row["shape"])
            same = row["dtype"].removeprefix("dtype of ")
            if same in self.tensors:
                dtype = self.tensors[same][0]
            else:
                dtype = next(nki for nki, (nrt, _) in TYPES.items() if nrt == short)
            outputs[row["name"]] = (dtype, tuple(self._of(e, {}) for e in extents))
        return {"dims": self.dims, "outputs": outputs}

    def _of(self, node: ast.expr, local: dict[str, int]):
        of = lambda inner: self._of(inner, local)  # noqa: E731
        match node:
            case ast.Constant(value=int() | str()):
                return node.value
            case ast.Name(id=name):
                return self._name(name, local)
            case ast.UnaryOp(op=ast.Not()):
                return not of(node.operand)
            case ast.UnaryOp(op=ast.USub()):
                return -of(node.operand)
            case ast.BoolOp(op=ast.And()):
                return all(of(v) for v in node.values)
            case ast.BoolOp(op=ast.Or()):
                return any(of(v) for v in node.values)
            case ast.IfExp():
                return of(node.body) if of(node.test) else of(node.orelse)
            case ast.BinOp():
                return _arithmetic(node.op, of(node.left), of(node.right))
            case ast.Compare():
                return self._compare(node, local)
            case ast.Call(func=ast.Name(id=function), keywords=[]):
                return self._call(function, node.args, local)
        raise SyntaxError(f"not of this language: {ast.unparse(node)}")

    def _name(self, name: str, local: dict[str, int]):
        for values in (local, {"target": self.target}, self.dims, self.parameters):
            if name in values:
                return values[name]
        raise Unknown(f"{name} is not known")

    def _compare(self, node: ast.Compare, local: dict[str, int]) -> bool:
        left = self._of(node.left, local)
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, (ast.In, ast.NotIn)) and isinstance(right, ast.List):
                inside = any(left == self._of(e, local) for e in right.elts)
                return inside == isinstance(op, ast.In)
            value = self._of(right, local)
            if not _COMPARISONS[type(op)](left, value):
                return False
            left = value
        return True

    def _call(self, function: str, args: list[ast.expr], local: dict[str, int]):
        match function, args:
            case "ceil", [ast.BinOp(op=ast.Div(), left=a, right=b)]:
                a, b = self._of(a, local), _positive(self._of(b, local))
                return -(-a // b)
            case "max" | "min", [ast.GeneratorExp(elt=item, generators=[loop])]:
                best = max if function == "max" else min
                return best((self._of(item, inner) for inner in self._search(loop, local)), default=0)
            case "max" | "min", [_, _, *_]:
                return (max if function == "max" else min)(self._of(a, local) for a in args)
            case "shape", [ast.Name(id=name), ast.List(elts=extents)]:
                if name not in self.tensors:
                    return False
                return [self._of(e, local) for e in extents] == list(self.tensors[name][1])
            case "given", [ast.Name(id=name)]:
                return name in self.tensors or name in self.parameters
            case "fits", [ast.Name(id=name)]:
                return self.fits(name)
            case "dtype", [ast.Name(id=name)]:
                return self.tensors[name][0] if name in self.tensors else "none"
            case "size" | "rank", [ast.Name(id=name)]:
                if name not in self.tensors:
                    raise Unknown(f"{name} is not known")
                dtype, shape = self.tensors[name]
                return len(shape) if function == "rank" else TYPES[dtype][1]
        raise SyntaxError(f"not of this language: {function}")

    def _search(self, loop: ast.comprehension, local: dict[str, int]):
        match loop:
            case ast.comprehension(target=ast.Name(id=name), iter=ast.Call(func=ast.Name(id="range"), args=[low, high])):
                low, high = self._of(low, local), self._of(high, local)
                if high - low > _MAX_SEARCH:
                    raise Unknown("it takes too many steps")
                for value in range(low, high):
                    inner = local | {name: value}
                    if all(self._of(test, inner) for test in loop.ifs):
                        yield inner
            case _:
                raise SyntaxError("a search is: for t in range(a, b)")


def _positive(b: int) -> int:
    if b <= 0:
        raise Unknown("a division is by zero or leaves a remainder")
    return b


def _arithmetic(op: ast.operator, a, b):
    if not isinstance(a, int) or not isinstance(b, int):
        raise Unknown("arithmetic on a number that is not whole")
    match op:
        case ast.Add():
            result = a + b
        case ast.Sub():
            result = a - b
        case ast.Mult():
            result = a * b
        case ast.Mod():
            result = a % _positive(b)
        case ast.Div():
            result, rest = divmod(a, _positive(b))
            if rest:
                raise Unknown("a division is by zero or leaves a remainder")
        case ast.Pow():
            if b < 0:
                return float(a) ** b
            result = a**b if abs(a) < 2 or b < 128 else _LARGEST + 1
        case _:
            raise SyntaxError(f"not of this language: {op}")
    if not -_LARGEST - 1 <= result <= _LARGEST:
        raise Unknown("a number is too large")
    return result
