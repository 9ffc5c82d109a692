"""Launching a kernel: arguments in, one or two cores, results out."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import threading

import numpy as np

from . import blas, config, dtypes, program
from . import chip as chips
from .chip import Chip
from .counters import Counters
from .errors import BufferKindError, LanguageError, NkiValidationError, UninitializedError
from .memory import SHARED_HBM
from .nkiobject import NKIObject
from .operand import resolve
from .program import Program, Shared
from .tensor import NkiTensor
from .trace import Instruction, tensor_table

_last = threading.local()


@dataclasses.dataclass
class Report:
    """What a launch did: one `Program` for each core.

    `counters` and `instructions` are those of core 0; `cores[i]` has every core's.
    """

    kernel: str
    chip: Chip
    cores: list[Program]

    @property
    def counters(self) -> Counters:
        """Counters of core 0."""
        return self.cores[0].counters

    @property
    def instructions(self) -> list[Instruction]:
        """Executed instructions of core 0."""
        return self.cores[0].instructions

    def tensors(self, core: int = 0) -> list[dict]:
        """Tensor table of a core (see `trace.tensor_table`)."""
        return tensor_table(self.cores[core].storages)

    def constants(self, core: int = 0) -> dict[int, np.ndarray]:
        """Contents of the compile-time constants, by tensor id."""
        stored = [s for s in self.cores[core].storages if s.kind == "constant"]
        return {s.id: s.data.view(s.dtype.np).reshape(s.shape) for s in stored}


def last_report() -> Report | None:
    """The report of the last launch that finished on this thread."""
    return getattr(_last, "report", None)


class Turnstile:
    """Lets one core run at a time, in order; a waiting core goes on when every core has arrived."""

    def __init__(self, cores: int):
        self.condition = threading.Condition()
        self.state = ["ready"] * cores
        self.turn = 0
        self.error: BaseException | None = None
        self._me = threading.local()

    def enter(self, core: int) -> None:
        """Block until it is this core's turn."""
        self._me.core = core
        with self.condition:
            self._await_turn(core)

    def wait(self) -> None:
        """A barrier: go on when all cores have arrived."""
        core = self._me.core
        with self.condition:
            self.state[core] = "waiting"
            self._pass_on()
            self._await_turn(core)

    def leave(self, core: int, error: BaseException | None = None) -> None:
        """This core has finished, or failed."""
        with self.condition:
            self.state[core] = "done"
            self.error = self.error or error
            self._pass_on()

    def _await_turn(self, core: int) -> None:
        while self.error is None and not (self.turn == core and self.state[core] == "ready"):
            self.condition.wait()
        if self.error is not None:
            raise _Stopped

    def _pass_on(self) -> None:
        ready = [i for i, s in enumerate(self.state) if s == "ready"]
        if not ready and "waiting" in self.state:
            if "done" in self.state:
                self.error = self.error or LanguageError("one core waits for another that has finished")
            self.state = ["ready" if s == "waiting" else s for s in self.state]
            ready = [i for i, s in enumerate(self.state) if s == "ready"]
        if ready:
            self.turn = ready[0]
        self.condition.notify_all()


class _Stopped(Exception):
    """Another core of the launch has failed."""


class Kernel:
    """A function decorated with `nki.jit`. `kernel(...)` runs it, `kernel[2](...)` on two cores."""

    def __init__(self, fn, target: str | None = None, cores: int = 1, grid: bool = False):
        self.fn = fn
        self.target = target
        self.cores = cores
        self.grid = grid
        self.__name__ = getattr(fn, "__name__", "kernel")
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn
        self.report: Report | None = None

    def __getitem__(self, grid) -> Kernel:
        cores = grid[0] if isinstance(grid, tuple) and len(grid) == 1 else grid
        if isinstance(cores, bool) or not isinstance(cores, (int, np.integer)) or cores not in (1, 2):
            raise LanguageError(f"launch grid {grid!r}: need 1 or 2 cores")
        return Kernel(self.fn, self.target, int(cores), grid=True)

    def __call__(self, *args, **kwargs):
        if program.active():
            return self.fn(*args, **kwargs)
        with blas.one_thread():
            result, self.report = _launch(self, args, kwargs)
        _last.report = self.report
        return result


def _launch(kernel: Kernel, args, kwargs):
    chip = chips.by_name(kernel.target) if kernel.target else chips.from_environment()
    if kernel.cores > 1 and chip.gen < 3:
        raise LanguageError(f"{chip.name} has no launches on two cores")
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
    shared = Shared()
    programs = [Program(chip, i, kernel.cores, kernel.grid, shared) for i in range(kernel.cores)]
    inputs: list[tuple[NkiTensor, np.ndarray]] = []
    torch_out = any(_is_torch(a) for a in bound.arguments.values())
    for name, value in bound.arguments.items():
        variadic = bound.signature.parameters[name].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if variadic:
            raise LanguageError(f"parameter {name!r}: a kernel takes no *args or **kwargs")
        bound.arguments[name] = _argument(name, value, programs[0], inputs)
    for other in programs[1:]:
        other.storages = list(programs[0].storages)
    returned = _run(kernel.fn, bound, programs, shared)
    results = _outputs(returned, programs[0])
    for tensor, original in inputs:
        if tensor.storage.dirty:
            original[...] = _host_array(tensor, "input").reshape(original.shape)
    for p in programs:
        with program.running(p):
            p.finish()
    return _to_torch(results) if torch_out else results, Report(kernel.__name__, chip, programs)


def _run(fn, bound, programs, shared):
    if len(programs) == 1:
        with program.running(programs[0]):
            return fn(*bound.args, **bound.kwargs)
    shared.turnstile = turnstile = Turnstile(len(programs))
    settings = config.current()
    returned: list = [None] * len(programs)

    def core(i: int) -> None:
        error = None
        try:
            turnstile.enter(i)
            with config.configured(settings), program.running(programs[i]):
                returned[i] = fn(*bound.args, **bound.kwargs)
        except _Stopped:
            pass
        except BaseException as failure:  # handed to the launching thread, which raises it
            error = failure
        turnstile.leave(i, error)

    threads = [threading.Thread(target=core, args=(i,), name=f"core{i}") for i in range(len(programs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if turnstile.error is not None:
        raise turnstile.error
    return returned[0]


def _is_torch(value) -> bool:
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach")


def _from_torch(value) -> np.ndarray:
    import torch

    tensor = value.detach().cpu().contiguous()
    name = str(tensor.dtype)[len("torch.") :]
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        words = tensor.view(torch.int16 if name == "bfloat16" else torch.uint8).numpy()
        return words.view(dtypes.resolve(name).np)
    return tensor.numpy()


def _to_torch(results):
    import torch

    if isinstance(results, tuple):
        return tuple(_to_torch(r) for r in results)
    if results is None:
        return None
    kind = dtypes.resolve(results.dtype)
    if kind in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        words = torch.from_numpy(results.view(np.int16 if kind == "bfloat16" else np.uint8))
        return words.view(getattr(torch, str(kind)))
    return torch.from_numpy(np.ascontiguousarray(results))


def _argument(name: str, value, prog: Program, inputs: list):
    """A kernel argument as the kernel sees it."""
    if isinstance(value, np.generic):
        value = value.item()
    if _is_torch(value):
        value = _from_torch(value)
    elif hasattr(value, "__array__") and not isinstance(value, (np.ndarray, type)):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        with program.running(prog):
            kind = dtypes.resolve(value.dtype)
            tensor = prog.adopt(value.view(np.uint8) if kind == "bool" else value, kind, name, "input")
        inputs.append((tensor, value))
        return tensor
    if isinstance(value, tuple):
        return tuple(_argument(f"{name}[{i}]", v, prog, inputs) for i, v in enumerate(value))
    if isinstance(value, (list, dict, set)):
        raise LanguageError(f"argument {name!r} is a {type(value).__name__}; pass a tuple or an NKIObject")
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**31) <= value < 2**32:
        raise LanguageError(f"argument {name!r} is {value}, which is not a 32-bit int")
    plain = value is None or isinstance(value, (bool, int, float, str, enum.Enum, NKIObject, np.dtype, type))
    if not plain and not callable(value):
        raise LanguageError(f"argument {name!r} is {type(value).__name__}, which a kernel does not take")
    return value


def _host_array(tensor: NkiTensor, what: str) -> np.ndarray:
    """A tensor's values for the caller; all must be written."""
    access = resolve(tensor, what)
    written = access.written()
    if not written.all() and config.current().uninitialized == "error":
        at = tuple(int(i) for i in np.argwhere(~written)[0])
        count = int(np.size(written) - np.count_nonzero(written))
        raise UninitializedError(
            f"{what} {tensor.name!r}: {count} elements were never written, the first is {at} (switch uninitialized)"
        )
    values = access.read().copy()
    outer = dtypes.outer(tensor.dtype)
    return values if values.dtype == outer else values.view(outer)


def _outputs(returned, prog: Program):
    """The returned tensors as arrays: one array, or a tuple."""
    if returned is None:
        return None
    many = isinstance(returned, (tuple, list))
    tensors = list(returned) if many else [returned]
    arrays = []
    for i, tensor in enumerate(tensors):
        if tensor is None:
            arrays.append(None)
            continue
        if not isinstance(tensor, NkiTensor):
            raise LanguageError(f"return value {i} is {type(tensor).__name__}, need a tensor")
        if tensor.buffer is not SHARED_HBM and tensor.storage.kind != "input":
            raise BufferKindError(f"output {i} {tensor.name!r} is in {tensor.buffer.value}; outputs live in shared_hbm")
        if tensor.storage.kind == "internal":
            tensor.storage.kind = "output"
        arrays.append(_host_array(tensor, f"output {i}"))
    return tuple(arrays) if many else arrays[0]


def jit(fn=None, mode=None, platform_target: str | None = None, **options):
    """Decorate a kernel. `platform_target` overrides the environment; other options have no effect here."""
    if fn is None:
        return lambda f: Kernel(f, platform_target)
    return Kernel(fn, platform_target)


def simulate(kernel):
    """The kernel as a callable that runs on this simulator; a plain function is wrapped."""
    if isinstance(kernel, Kernel):
        return kernel
    if not callable(kernel):
        raise NkiValidationError(f"{kernel!r} is not a kernel")
    return Kernel(kernel)
