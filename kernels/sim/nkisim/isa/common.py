"""Enums of `nki.isa` and what every instruction does first."""

from __future__ import annotations

import enum
import functools

from .. import config, errors, program
from ..dtypes import resolve
from ..errors import DtypeError, EngineError, LanguageError
from ..tensor import NkiTensor


class engine(enum.Enum):
    """Engines of a NeuronCore."""

    tensor = "tensor"
    vector = "vector"
    scalar = "scalar"
    gpsimd = "gpsimd"
    dma = "dma"
    sync = "sync"
    unknown = "unknown"


class reduce_cmd(enum.Enum):
    """What an instruction does with its engine's reduction registers."""

    idle = "idle"
    reset = "reset"
    reduce = "reduce"
    reset_reduce = "reset_reduce"
    load_reduce = "load_reduce"


class dge_mode(enum.Enum):
    """Who generates DMA descriptors."""

    unknown = "unknown"
    swdge = "swdge"
    hwdge = "hwdge"
    none = "none"


class oob_mode(enum.Enum):
    """Out-of-range runtime index: an error, or that access skipped."""

    error = "error"
    skip = "skip"


class matmul_perf_mode(enum.Enum):
    """TensorE performance mode."""

    none = "none"
    double_row = "double_row"


class nc_version(enum.IntEnum):
    """NeuronCore generation: gen2 Trn1, gen3 Trn2, gen4 Trn3. Ordered: kernels write `>= nc_version.gen3`."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(enum.Enum):
    """How `sendrecv` moves data."""

    dma = "dma"
    gpsimd_dma = "gpsimd_dma"


# The names above are also parameter names of instructions; these stand for the types inside them.
Engine, ReduceCmd, DgeMode, OobMode, PerfMode, DmaEngine = (
    engine, reduce_cmd, dge_mode, oob_mode, matmul_perf_mode, dma_engine,
)  # fmt: skip


# What Python raises when an argument is of a kind that no check foresaw.
_BAD_ARGUMENT = (TypeError, ValueError, KeyError, IndexError, AttributeError)


def instruction(fn):
    """Wrap an instruction: name it in errors, and accept the `dtype=`/`mask=` of NKI 0.2 where they say nothing new."""
    name = fn.__name__

    @functools.wraps(fn)
    def call(*args, **kwargs):
        program.current()
        before = errors.set_instruction(name)
        try:
            if kwargs.pop("mask", None) is not None:
                raise LanguageError("mask= was removed with NKI 0.2; slice the operands")
            if "dtype" in kwargs:
                _legacy_dtype(kwargs.pop("dtype"), kwargs.get("dst", args[0] if args else None))
            try:
                return fn(*args, **kwargs)
            except _BAD_ARGUMENT as error:
                raise LanguageError(f"bad argument: {error}") from error
        finally:
            errors.set_instruction(before)

    return call


def _legacy_dtype(dtype, dst) -> None:
    if dtype is not None and isinstance(dst, NkiTensor) and resolve(dtype) != dst.dtype:
        raise DtypeError(f"dtype={dtype} contradicts dst, which is {dst.dtype}")


def member(value, kind, role: str):
    """`value` is a member of the enum `kind` (not its name, not an int)."""
    if not isinstance(value, kind):
        raise LanguageError(f"{role} is {value!r}, need a member of nisa.{kind.__name__}")
    return value


def pick(asked, default: engine, *allowed: engine) -> engine:
    """The engine that executes: the one asked for if it can, else the default for `unknown`."""
    member(asked, engine, "engine")
    if asked is engine.unknown:
        return default
    if asked not in allowed:
        raise EngineError(f"engine {asked.name} cannot execute this; need {' or '.join(e.name for e in allowed)}")
    return asked


def switches() -> config.Settings:
    """The switches in force."""
    return config.current()
