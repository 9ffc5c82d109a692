"""Rules on operands that every instruction shares."""

from __future__ import annotations

import math
import numbers

import numpy as np

from . import chip as chips
from . import view
from .errors import (
    BoundsError,
    BufferKindError,
    CastError,
    DtypeError,
    EngineError,
    LanguageError,
    PartitionError,
    ShapeError,
    TargetError,
)
from .memory import PSUM, MemoryRegion
from .tensor import NkiTensor

MAX_FREE_LEVELS = 4


def pattern(t: NkiTensor, role: str, start: bool) -> None:
    """The access pattern of an on-chip operand: at most 4 free levels, and a start partition the hardware has."""
    if not t.on_chip:
        return
    levels = view.collapse(t.shape[1:], t.strides[1:])
    if len(levels) > MAX_FREE_LEVELS:
        raise ShapeError(
            f"{role} needs {len(levels)} free levels of access pattern, the hardware has {MAX_FREE_LEVELS}"
        )
    if start:
        start_partition(t, role)


def start_partition(t: NkiTensor, role: str) -> None:
    """More than 64 partitions start at 0, 33 to 64 at 0 or 64, up to 32 at a quadrant."""
    count, first = t.shape[0], t.start_partition
    allowed = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    if first not in allowed:
        raise PartitionError(
            f"{role} accesses {count} partitions from {first}; that many start at {' or '.join(map(str, allowed))}"
        )


def indirect(program, t: NkiTensor, role: str, engine: str) -> None:
    """Tensor indirection is read and written by the compute engines of NeuronCore-v4."""
    if t.dynamic is None or t.dynamic.kind != "indirect":
        return
    needs(program, 4, f"{role}: indirect()")
    if engine not in ("tensor", "vector", "scalar", "gpsimd"):
        raise EngineError(f"{role} is an indirect() view; {engine} cannot use one, only the compute engines can")


def distinct(t: NkiTensor, role: str) -> None:
    """A written operand names each element once."""
    if t.dynamic is None and view.overlaps(t.shape, t.strides):
        raise BoundsError(f"{role} writes some element twice (pattern {t.get_pattern()})")


def tensor(t, role: str) -> NkiTensor:
    """The operand is a tensor."""
    if not isinstance(t, NkiTensor):
        raise LanguageError(f"{role} is {t!r}, need a tensor")
    return t


def in_buffers(t, role: str, *allowed: MemoryRegion) -> NkiTensor:
    """The operand is a tensor in one of the given memories."""
    tensor(t, role)
    if t.buffer not in allowed:
        raise BufferKindError(f"{role} is in {t.buffer.value}, need {' or '.join(b.value for b in allowed)}")
    return t


def on_chip(t, role: str) -> NkiTensor:
    """The operand is in SBUF or PSUM."""
    return in_buffers(t, role, MemoryRegion.sbuf, MemoryRegion.psum)


def same_partitions(a: NkiTensor, role_a: str, b: NkiTensor, role_b: str) -> None:
    """Equal partition counts."""
    if a.shape[0] != b.shape[0]:
        raise PartitionError(f"{role_a} has {a.shape[0]} partitions, {role_b} has {b.shape[0]}")


def same_elements(a: NkiTensor, role_a: str, b: NkiTensor, role_b: str) -> None:
    """Equal partition counts and elements in each partition; shapes may differ."""
    same_partitions(a, role_a, b, role_b)
    if a.free_size != b.free_size:
        raise ShapeError(
            f"{role_a} has {a.free_size} elements a partition {a.shape}, {role_b} has {b.free_size} {b.shape}"
        )


def column(t: NkiTensor, role: str, partitions: int) -> NkiTensor:
    """A vector operand or result: one element in each of `partitions` partitions."""
    on_chip(t, role)
    if t.shape[0] != partitions or t.free_size != 1:
        raise ShapeError(f"{role} has shape {t.shape}, need ({partitions}, 1)")
    return t


def number(value, role: str) -> float | int:
    """A compile-time number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise LanguageError(f"{role} is {value!r}, need a number")
    with np.errstate(over="ignore"):
        if np.isinf(np.float32(value)) and not math.isinf(value):
            raise CastError(f"{role} is {value!r}, which float32 does not hold")
    return value


def integer(value, role: str) -> int:
    """A compile-time int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise LanguageError(f"{role} is {value!r}, need an int")
    return int(value)


def dtype_in(t: NkiTensor, role: str, *allowed) -> None:
    """The operand's dtype is one of those given."""
    if t.dtype not in allowed:
        raise DtypeError(f"{role} has dtype {t.dtype}, need {' or '.join(map(str, allowed))}")


def arithmetic(t: NkiTensor, role: str) -> None:
    """The dtype has values that arithmetic understands."""
    if not (t.dtype.is_float or t.dtype.is_integer):
        raise DtypeError(f"{role} has dtype {t.dtype}, which arithmetic does not read or write")


def not_both_psum(a: NkiTensor, role_a: str, b: NkiTensor, role_b: str) -> None:
    """A two-input VectorE instruction has one PSUM port."""
    if a.buffer is PSUM and b.buffer is PSUM:
        raise BufferKindError(f"{role_a} and {role_b} are both in psum; one must be in sbuf")


def needs(program, gen: int, what: str) -> None:
    """The target is of generation `gen` (2, 3, 4) or newer."""
    if program.chip.gen < gen:
        raise TargetError(f"{what} needs NeuronCore-v{gen} (gen{gen}) or newer, the target is {program.chip.name}")


def dtype_on_target(program, t: NkiTensor, role: str) -> None:
    """OCP e4m3fn, the x4 types and e8m0 exist from NeuronCore-v4 on."""
    if program.chip.gen < 4 and (t.dtype.kind in ("x4", "e8m0") or t.dtype == "float8_e4m3fn"):
        raise TargetError(f"{role} has dtype {t.dtype}, which {program.chip.name} does not have")


def bank_of(t: NkiTensor) -> tuple[int, int]:
    """First and last PSUM bank touched in each partition (a tensor without an address starts a bank)."""
    last = (
        t.start_byte + (sum(s * (n - 1) for s, n in zip(t.strides[1:], t.shape[1:], strict=True)) + 1) * t.itemsize - 1
    )
    return t.start_byte // chips.PSUM_BANK_BYTES, last // chips.PSUM_BANK_BYTES
