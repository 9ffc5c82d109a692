"""Export kernels as programs: the flat instruction list that is left when a kernel's loops have run.

    python kernels/trace.py --all            # every example of kernels/examples, written to kernels/programs
    python kernels/trace.py matmul_fp8       # those of one kernel
    python kernels/trace.py --all --check    # write nothing; exit 1 if a checked-in file is not what would be written
    python kernels/trace.py --kernel matmul_mx --shape m=2048,n=2048,k=2048 --target trn3   # any shape, to standard output

For every example two files are written:

* `programs/KERNEL.EXAMPLE.json`, the program: tensors, instructions, constants as data, runtime offsets as references
  to the tensor or register that holds them, the compile-time arguments, and the sha256 of every source file that the
  kernel is made of;
* `programs/KERNEL.EXAMPLE.safetensors`, one set of inputs (`in.NAME`) and the simulator's outputs (`out.NAME`, and
  `out.NAME@ocp` under the other documented block scale of `quantize_mx`), as bytes. Where an executor may sum in another
  order, `bound.NAME` (float64, element by element) says how far from that output it may be; without it, not at all.

An input that the kernel changes in place is an output too, the same tensor under the same name; other outputs are
`output_0`, `output_1`... by their place among what the kernel returns.

For every shape of LARGE one file is written, `programs/large/KERNEL.TARGET.SHAPE.json`: a program without data, for the cost
model. `--kernel` prints such a program (or writes it, with `--out DIR`). What a shape of a kernel may say is in
`kernels/shapes.toml`. It exits with 2 if the shape says something else, and with 3 if the kernel refuses it; the last line
on standard error says why.

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
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np

KERNELS = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(KERNELS), str(KERNELS / "sim")) if p not in sys.path]

import run as backend  # noqa: E402  (kernels/sim/run.py)

FORMAT = "trn-kernels.program.1"
PROGRAMS = KERNELS / "programs"
EXAMPLES = KERNELS / "examples"
# A run of at least this many equal elements of a constant is written once with its length.
SHORTEST_RUN = 8
# What `bf16` and `f32` are in a shape.
FLOATS = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
# Kernel, target and shape whose engine shares tests/emulator_cost.rs pins: compute bound, and bound by DMA.
LARGE = (
    ("matmul_fp8", "trn2", "m=2048,n=2048,k=2048"),
    ("matmul_fp8", "trn2", "m=4,n=4096,k=4096"),
    ("matmul_mx", "trn3", "m=2048,n=2048,k=2048"),
    ("matmul_mx", "trn3", "m=4,n=4096,k=4096"),
    ("matmul_mx", "trn3", "m=4,n=14336,k=4096"),
    ("attention_decode", "trn2", "b=4,hq=64,hkv=8,d=64,m=256"),
)


class TraceError(Exception):
    """A kernel cannot be exported."""


class ShapeError(TraceError):
    """A shape does not say what its kernel needs."""


class Refused(TraceError):
    """A kernel does not serve a shape."""


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


def program(example: Example, with_data: bool = True) -> tuple[dict, dict[str, np.ndarray]]:
    """The program of an example, and its data by name (nothing unless `with_data`)."""
    report, tensors, outputs, after = simulate(example, "neuron")
    core = report.cores[0]
    if getattr(core, "data_dependent", False):
        raise TraceError(f"{example.stem}: a loop's length depends on data, so there is no one instruction list")
    numbers = Numbering()
    storages = {s.id: s for s in core.storages}
    inputs = [s for s in core.storages if s.kind == "input" or (s.kind == "output" and s.name in after)]
    ports_in = [{"name": s.name, "tensor": numbers.tensor(s.id)} for s in inputs]
    names = {p["tensor"]: p["name"] for p in ports_in}
    whole = [numbers.tensor(_whole(t, example)) for t in tensors]
    ports_out = [{"name": names.get(number, f"output_{i}"), "tensor": number} for i, number in enumerate(whole)]
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
    if not with_data:
        return made, {}
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


def checked_in() -> dict[str, Path]:
    """Files below kernels/programs, by their path from there."""
    found = (p for p in PROGRAMS.rglob("*") if p.suffix in (".json", ".safetensors"))
    return {p.relative_to(PROGRAMS).as_posix(): p for p in found}


# -- shapes -------------------------------------------------------------------------------------------------------------


def dimensions(kernel: str, shape: str) -> dict[str, int | str]:
    """What a shape such as `m=4,n=96,k=64,out=f32` says, with the defaults of kernels/shapes.toml."""
    kernels = tomllib.loads((KERNELS / "shapes.toml").read_text())
    if kernel not in kernels:
        raise ShapeError(f"no kernel called {kernel!r}; there are {', '.join(kernels)}")
    known = kernels[kernel]
    dims = dict(known["extents"]) | {name: values[0] for name, values in known["choices"].items()}
    given = set()
    for part in filter(None, shape.split(",")):
        name, _, value = part.partition("=")
        if name in given:
            raise ShapeError(f"{name} is given twice")
        given.add(name)
        if name in known["choices"]:
            if value not in known["choices"][name]:
                raise ShapeError(f"{name}: got {value!r}, need {' or '.join(known['choices'][name])}")
            dims[name] = value
        elif name in known["needed"] or name in known["extents"]:
            if not (value.isascii() and value.isdigit()):
                raise ShapeError(f"{name}: got {value!r}, need a number")
            dims[name] = int(value)
            if dims[name] == 0 and name in known["needed"]:
                raise ShapeError(f"{name}: got 0, need at least 1")
        else:
            names = [*known["needed"], *known["extents"], *known["choices"]]
            raise ShapeError(f"{kernel} has no dimension {name!r}; it has {', '.join(names)}")
    missing = [name for name in known["needed"] if name not in dims]
    if missing:
        raise ShapeError(f"{kernel} needs {', '.join(missing)}")
    return dims


def of_shape(kernel: str, target: str, shape: str) -> Example:
    """The example that `--kernel` exports; its name is the shape."""
    dims = dimensions(kernel, shape)
    manifest = tomllib.loads((KERNELS / "manifest.toml").read_text())["kernel"]
    entry = next(k for k in manifest if k["name"] == kernel)
    module = importlib.import_module(f"examples.{entry['file'].removesuffix('.py')}")
    try:
        args = module.shaped(kernel, target, dims)
    except (MemoryError, ValueError, OverflowError) as error:  # what numpy says of sizes beyond memory, or beyond its index
        raise Refused(f"too large to make here: {error}") from error
    return Example(shape, target, entry["file"], entry["entry"], args)


def shaped_program(kernel: str, target: str, shape: str) -> tuple[str, bytes]:
    """File name and text of the program of a shape."""
    from nkisim.errors import NkiValidationError

    try:
        made, _ = program(of_shape(kernel, target, shape), with_data=False)
    except AssertionError as error:
        raise Refused(str(error)) from error
    except NkiValidationError as error:
        raise Refused(str(error.reason)) from error
    except MemoryError as error:
        raise Refused(f"too large to run here: {error}") from error
    return f"{kernel}.{target}.{shape}.json", as_json(made).encode()


def large(only: list[str] | None = None) -> dict[str, bytes]:
    """The programs of LARGE (of these kernels alone), by path below kernels/programs."""
    backend.backend("sim")
    made = {}
    for kernel, target, shape in LARGE:
        if not only or kernel in only:
            name, text = shaped_program(kernel, target, shape)
            print(f"{name}: {len(text)} bytes of program", file=sys.stderr)
            made[f"large/{name}"] = text
    return made


def export_shape(kernel: str, target: str, shape: str, folder: Path | None) -> int:
    """`--kernel`: the program of a shape, to a file in `folder` or to standard output."""
    backend.backend("sim")
    try:
        name, text = shaped_program(kernel, target, shape)
    except (ShapeError, Refused) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ShapeError) else 3
    if folder is None:
        sys.stdout.buffer.write(text)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return 0


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export kernels as programs.")
    parser.add_argument("kernel", nargs="*", help="modules of kernels/examples")
    parser.add_argument("--all", action="store_true", help="every example; files of examples that are gone are removed")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file would change")
    parser.add_argument("--kernel", dest="shaped", metavar="KERNEL", help="the program of one shape of this kernel")
    parser.add_argument("--shape", help="with --kernel: m=2048,n=2048,k=2048 (kernels/shapes.toml)")
    parser.add_argument("--target", choices=("trn1", "trn2", "trn3"), default="trn3", help="with --kernel; trn3 if not given")
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --kernel: write to DIR, not to standard output")
    options = parser.parse_args(argv)
    if sum((bool(options.kernel), options.all, options.shaped is not None)) != 1:
        parser.error("name kernels, or --all, or --kernel KERNEL --shape SHAPE")
    if options.shaped is not None:
        return export_shape(options.shaped, options.target, options.shape or "", options.out)
    made: dict[str, bytes] = {}
    for example in examples(options.kernel):
        made |= files(example)
        print(f"{example.stem}: {len(made[example.stem + '.json'])} bytes of program", file=sys.stderr)
    made |= large(options.kernel)
    (PROGRAMS / "large").mkdir(parents=True, exist_ok=True)
    there = checked_in()
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
