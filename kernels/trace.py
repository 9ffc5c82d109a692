"""Export kernels as programs: the flat instruction list that is left when a kernel's loops have run.

    python kernels/trace.py --all            # every example of kernels/examples, written to kernels/programs
    python kernels/trace.py matmul_fp8       # those of one kernel
    python kernels/trace.py --all --check    # write nothing; exit 1 if a checked-in file is not what would be written
    python kernels/trace.py --large DIR      # programs of large shapes for the cost model, without data, written to DIR

For every example two files are written:

* `programs/KERNEL.EXAMPLE.json`, the program: tensors, instructions, constants as data, runtime offsets as references
  to the tensor or register that holds them, the compile-time arguments, and the sha256 of every source file that the
  kernel is made of;
* `programs/KERNEL.EXAMPLE.safetensors`, one set of inputs (`in.NAME`) and the simulator's outputs (`out.NAME`, and
  `out.NAME@ocp` under the other documented block scale of `quantize_mx`), as bytes. Where an executor may sum in another
  order, `bound.NAME` (float64, element by element) says how far from that output it may be; without it, not at all.

An operand is `[tensor, dtype, offset, [[stride, count], ...]]` in elements of dtype over the tensor's flat storage,
outermost axis first, and a fifth element if part of the address is known at run time only. The same input gives the
same program and the same inputs to the byte, and so it is with outputs that have no bound; outputs with one were summed by
this machine's numpy, in an order of its own, and are not compared (tests/emulator.rs replays them).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np

KERNELS = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(KERNELS), str(KERNELS / "sim")) if p not in sys.path]

import run as backend  # noqa: E402  (kernels/sim/run.py)

FORMAT = "trn-kernels.program.1"
PROGRAMS = KERNELS / "programs"
EXAMPLES = KERNELS / "examples"
# A run of at least this many equal elements of a constant is written once with its length.
SHORTEST_RUN = 8


class TraceError(Exception):
    """A kernel cannot be exported."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A kernel at one small shape, with inputs.

    `file` (below kernels/) and `entry` name the kernel; `args` are its arguments by name, arrays and compile-time
    values; `bounds` has for each output how far two correct executors may be apart, element by element (None: they must
    agree to the bit), derived where the example is defined.
    """

    name: str
    target: str
    file: str
    entry: str
    args: dict[str, object]
    bounds: tuple[np.ndarray | None, ...] = ()

    @property
    def stem(self) -> str:
        """Name of the example's files."""
        return f"{self.entry}.{self.name}"


# -- sources ----------------------------------------------------------------------------------------------------------


def sources(path: Path) -> dict[str, str]:
    """sha256 of a kernel's file and of every file below kernels/ that it imports, by path relative to kernels/."""
    found: dict[str, str] = {}
    queue = [path]
    while queue:
        file = queue.pop()
        name = file.relative_to(KERNELS).as_posix()
        if name in found:
            continue
        text = file.read_bytes()
        found[name] = hashlib.sha256(text).hexdigest()
        for module in _imports(ast.parse(text)):
            for folder in (KERNELS, file.parent):
                part = folder / (module.replace(".", "/") + ".py")
                if part.is_file():
                    queue.append(part)
                    break
    return dict(sorted(found.items()))


def _imports(tree: ast.AST) -> list[str]:
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            out += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return out


# -- running ----------------------------------------------------------------------------------------------------------


def simulate(example: Example, mx_scale: str):
    """Run an example on the simulator: (report, returned tensors, outputs as arrays, arguments after the run)."""
    backend.backend("sim")
    from nkisim import config
    from nkisim.launch import Kernel

    module = importlib.import_module(example.file.removesuffix(".py").replace("/", "."))
    kernel = getattr(module, example.entry)
    returned = []

    @functools.wraps(kernel.fn)
    def body(*args, **kwargs):
        result = kernel.fn(*args, **kwargs)
        returned.append(result)
        return result

    args = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in example.args.items()}
    launched = Kernel(body, example.target)
    with config.configured(config.Settings(mx_scale=mx_scale)):
        outputs = launched(**args)
    many = lambda x: list(x) if isinstance(x, (tuple, list)) else [x]  # noqa: E731
    return launched.report, many(returned[0]), many(outputs), args


# -- the program --------------------------------------------------------------------------------------------------------


class Numbering:
    """Dense numbers for tensors and registers, in the order in which the program first names them."""

    def __init__(self):
        self.tensors: dict[int, int] = {}
        self.registers: dict[int, int] = {}

    def tensor(self, number: int) -> int:
        """The tensor's number in the program."""
        return self.tensors.setdefault(number, len(self.tensors))

    def register(self, number: int) -> int:
        """The register's number in the program."""
        return self.registers.setdefault(number, len(self.registers))

    def operand(self, ref: dict) -> list:
        """An operand in the form of the module's docstring."""
        out = [self.tensor(ref["tensor"]), ref["dtype"], ref["offset"], ref["pattern"]]
        dynamic = ref.get("dynamic")
        if dynamic:
            extra = {"kind": dynamic["kind"], "scale": dynamic["scale"], "extent": dynamic["extent"]}
            if "register" in dynamic:
                extra["register"] = self.register(dynamic["register"])
            else:
                extra["index"] = self.operand(dynamic["index"])
            out.append(extra)
        return out

    def attr(self, value):
        """An immediate argument: floats as the float32 that the engines see, infinities and NaN by name."""
        if isinstance(value, dict) and "register" in value:
            return {"register": self.register(value["register"])}
        if isinstance(value, list):
            return [self.attr(v) for v in value]
        if isinstance(value, float):
            single = float(np.float32(value))
            return single if np.isfinite(single) else repr(single)
        return value


def program(example: Example) -> tuple[dict, dict[str, np.ndarray]]:
    """The program of an example, and its data by name."""
    report, tensors, outputs, after = simulate(example, "neuron")
    core = report.cores[0]
    if getattr(core, "data_dependent", False):
        raise TraceError(f"{example.stem}: a loop's length depends on data, so there is no one instruction list")
    numbers = Numbering()
    storages = {s.id: s for s in core.storages}
    inputs = [s for s in core.storages if s.kind == "input" or (s.kind == "output" and s.name in after)]
    ports_in = [{"name": s.name, "tensor": numbers.tensor(s.id)} for s in inputs]
    ports_out = [{"name": f"output_{i}", "tensor": numbers.tensor(_whole(t, example))} for i, t in enumerate(tensors)]
    returned = {p["tensor"] for p in ports_out}
    ports_out += [p for p, s in zip(ports_in, inputs) if s.dirty and p["tensor"] not in returned]
    instructions = [_instruction(i, numbers) for i in core.instructions]
    table = [_tensor(storages[number]) for number in numbers.tensors]
    made = {
        "format": FORMAT,
        "kernel": example.entry,
        "example": example.name,
        "target": example.target,
        "sources": sources(KERNELS / example.file),
        "parameters": {k: v for k, v in example.args.items() if isinstance(v, (bool, int, float, str))},
        "inputs": ports_in,
        "outputs": ports_out,
        "tensors": table,
        "instructions": instructions,
    }
    by_rule = {"": _results(outputs, ports_out, after)}
    if any(i.name == "quantize_mx" for i in core.instructions):
        _, _, outputs, after = simulate(example, "ocp")
        by_rule["@ocp"] = _results(outputs, ports_out, after)
    data = {f"in.{s.name}": _bytes(example.args[s.name]) for s in inputs}
    data |= {f"out.{name}{rule}": v for rule, found in by_rule.items() for name, v in found.items()}
    bounds = example.bounds or (None,) * len(ports_out)
    for port, bound in zip(ports_out, bounds, strict=True):
        if bound is not None:
            size = np.prod(table[port["tensor"]]["shape"])
            data[f"bound.{port['name']}"] = _bytes(np.broadcast_to(bound, size) if np.ndim(bound) == 0 else np.float64(bound))
    return made, data


def _whole(tensor, example: Example) -> int:
    if tensor is None or tensor.offset != 0 or tensor.shape != tensor.storage.shape or not tensor.is_contiguous():
        raise TraceError(f"{example.stem}: an output is not a whole tensor")
    return tensor.storage.id


def _results(outputs, ports_out, after) -> dict[str, np.ndarray]:
    named = dict(zip((p["name"] for p in ports_out), outputs))
    return {p["name"]: _bytes(named.get(p["name"], after.get(p["name"]))) for p in ports_out}


def _bytes(array) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _instruction(made, numbers: Numbering) -> dict:
    plain = made.as_dict()
    return {
        "name": plain["name"],
        "engine": plain["engine"],
        "writes": {k: numbers.operand(v) for k, v in plain["writes"].items()},
        "reads": {k: numbers.operand(v) for k, v in plain["reads"].items()},
        "attrs": {k: numbers.attr(v) for k, v in plain["attrs"].items() if v is not None},
    }


def _tensor(storage) -> dict:
    out = {
        "name": storage.name if storage.kind in ("input", "output") else "",
        "shape": list(storage.shape),
        "dtype": str(storage.dtype),
        "buffer": storage.buffer.value,
    }
    if storage.address is not None:
        out["address"] = list(storage.address)
    if storage.kind == "constant":
        out["data"] = _runs(storage.data[: storage.rows * storage.row_bytes], storage.dtype.itemsize)
    return out


def _runs(data: np.ndarray, itemsize: int) -> list:
    """Bytes as [repetitions, hex] pairs: long runs of one element, and what lies between them."""
    words = np.ascontiguousarray(data).reshape(-1, itemsize)
    changes = np.flatnonzero(np.any(words[1:] != words[:-1], axis=1)) + 1
    edges = [0, *changes.tolist(), len(words)]
    out: list = []
    literal = b""
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        if end - start >= SHORTEST_RUN:
            if literal:
                out.append([1, literal.hex()])
                literal = b""
            out.append([end - start, words[start].tobytes().hex()])
        else:
            literal += words[start:end].tobytes()
    if literal:
        out.append([1, literal.hex()])
    return out


# -- files --------------------------------------------------------------------------------------------------------------


def as_json(made: dict) -> str:
    """One line for each tensor and instruction, so that a change of a kernel is a readable change of its program."""
    compact = functools.partial(json.dumps, separators=(",", ":"), allow_nan=False)
    lines = []
    for key, value in made.items():
        if key in ("tensors", "instructions"):
            body = ",\n".join(compact(v) for v in value)
            lines.append(f"{compact(key)}:[\n{body}\n]")
        else:
            lines.append(f"{compact(key)}:{compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def files(example: Example) -> dict[str, bytes]:
    """The example's two files, by name."""
    from safetensors.numpy import save

    made, data = program(example)
    return {f"{example.stem}.json": as_json(made).encode(), f"{example.stem}.safetensors": save(data)}


def current(name: str, there: bytes, made: bytes) -> bool:
    """Whether a checked-in file is what would be written now, but for outputs that have a bound, and the bounds."""
    if name.endswith(".json"):
        return there == made
    from safetensors.numpy import load

    old, new = load(there), load(made)

    def fixed(key: str) -> bool:
        kind, _, rest = key.partition(".")
        return kind == "in" or (kind == "out" and f"bound.{rest.partition('@')[0]}" not in new)

    return {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()} and all(
        np.array_equal(old[k], new[k]) for k in new if fixed(k)
    )


def examples(only: list[str] | None = None) -> list[Example]:
    """The examples of every module in kernels/examples (or of the modules named), in a fixed order."""
    backend.backend("sim")
    names = only or sorted(p.stem for p in EXAMPLES.glob("*.py"))
    found = []
    for name in names:
        if not (EXAMPLES / f"{name}.py").is_file():
            raise TraceError(f"no examples called {name!r}; there are {', '.join(sorted(p.stem for p in EXAMPLES.glob('*.py')))}")
        found += importlib.import_module(f"examples.{name}").examples()
    stems = [e.stem for e in found]
    if len(set(stems)) != len(stems):
        raise TraceError("two examples have one name")
    return found


def write_large(folder: Path) -> None:
    """The programs that modules of kernels/examples offer for the cost model."""
    backend.backend("sim")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(EXAMPLES.glob("*.py")):
        module = importlib.import_module(f"examples.{path.stem}")
        for example in module.large() if hasattr(module, "large") else []:
            made, _ = program(example)
            (folder / f"{example.stem}.json").write_text(as_json(made))
            print(f"{example.stem}: {len(made['instructions'])} instructions", file=sys.stderr)


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export kernels as programs.")
    parser.add_argument("kernel", nargs="*", help="modules of kernels/examples")
    parser.add_argument("--all", action="store_true", help="every example; files of examples that are gone are removed")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file would change")
    parser.add_argument("--large", type=Path, metavar="DIR", help="write programs of large shapes, without data, to DIR")
    options = parser.parse_args(argv)
    if sum((bool(options.kernel), options.all, options.large is not None)) != 1:
        parser.error("name kernels, or --all, or --large DIR")
    if options.large is not None:
        write_large(options.large)
        return 0
    made: dict[str, bytes] = {}
    for example in examples(options.kernel):
        made |= files(example)
        print(f"{example.stem}: {len(made[example.stem + '.json'])} bytes of program", file=sys.stderr)
    PROGRAMS.mkdir(exist_ok=True)
    there = {p.name: p for p in PROGRAMS.iterdir() if p.suffix in (".json", ".safetensors")}
    stale = [n for n, text in made.items() if n not in there or not current(n, there[n].read_bytes(), text)]
    gone = sorted(set(there) - set(made)) if options.all else []
    if options.check:
        for name in stale + gone:
            print(f"stale: kernels/programs/{name}", file=sys.stderr)
        return 1 if stale or gone else 0
    for name in stale:
        (PROGRAMS / name).write_bytes(made[name])
    for name in gone:
        there[name].unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
