"""GpSimd instructions driven by an affine pattern of the element's position."""

from __future__ import annotations

import numpy as np

from .. import alu, cast, legal, operand, program
from ..errors import CastError, LanguageError, UnspecifiedError
from ..memory import SBUF
from ..registers import VirtualRegister
from ..tensor import NkiTensor
from .common import Engine, instruction
from .move import constant


def affine_values(pattern, offset: int, channel_multiplier: int, t: NkiTensor) -> np.ndarray:
    """offset + p * channel_multiplier + sum of i * step, as int64 (partitions, elements)."""
    levels = [(legal.integer(s, "step"), legal.integer(n, "count")) for s, n in pattern]
    if not 1 <= len(levels) <= 4:
        raise LanguageError(f"pattern has {len(levels)} levels, need 1 to 4")
    total = 1
    values = np.zeros(1, np.int64)
    for step_size, count in levels:
        total *= count
        values = (values[:, None] + np.arange(count, dtype=np.int64) * step_size).reshape(-1)
    if total != t.free_size:
        raise LanguageError(f"pattern has {total} elements, the tile has {t.free_size} a partition")
    out = offset + np.arange(t.shape[0], dtype=np.int64)[:, None] * channel_multiplier + values
    if (np.abs(out) >= 2**31).any():
        raise UnspecifiedError("affine values leave the int32 range")
    return out


def _runtime_int(value, role: str):
    """A compile-time int, or a register."""
    return value if isinstance(value, VirtualRegister) else legal.integer(value, role)


def _int_value(value) -> int:
    return value if isinstance(value, int) else value.value()


@instruction
def iota(dst, pattern, offset=0, channel_multiplier=0, name=None):
    """dst[p, i...] = offset + p * channel_multiplier + sum of i * step, in int32, then cast."""
    prog = program.current()
    legal.in_buffers(dst, "dst", SBUF)
    legal.arithmetic(dst, "dst")
    offset = _runtime_int(offset, "offset")
    multiplier = legal.integer(channel_multiplier, "channel_multiplier")

    def run():
        values = affine_values(pattern, _int_value(offset), multiplier, dst)
        if dst.dtype in ("int32", "uint32"):
            if dst.dtype == "uint32" and (values < 0).any():
                raise CastError("negative value into uint32")
            operand.store_bits(dst, values.astype(dst.dtype.np).reshape(dst.shape))
        else:
            operand.store_f32(dst, values.astype(np.float32))

    attrs = {"pattern": [list(p) for p in pattern], "offset": offset, "channel_multiplier": multiplier}
    return prog.issue("iota", Engine.gpsimd, {"dst": dst}, {}, attrs, run, label=name)


@instruction
def affine_select(
    dst,
    pattern,
    channel_multiplier,
    on_true_tile,
    on_false_value,
    cmp_op=alu.TOKENS["equal"],
    offset=0,
    name=None,
):
    """Keep elements whose affine value compares true with 0; the others become on_false_value."""
    prog = program.current()
    legal.in_buffers(dst, "dst", SBUF)
    legal.in_buffers(on_true_tile, "on_true_tile", SBUF)
    legal.same_elements(dst, "dst", on_true_tile, "on_true_tile")
    legal.arithmetic(dst, "dst")
    legal.arithmetic(on_true_tile, "on_true_tile")
    if not isinstance(cmp_op, alu.Op) or not cmp_op.comparison:
        raise LanguageError(f"cmp_op is {cmp_op!r}, need a comparison")
    legal.number(on_false_value, "on_false_value")
    offset = _runtime_int(offset, "offset")
    multiplier = legal.integer(channel_multiplier, "channel_multiplier")

    def run():
        index = affine_values(pattern, _int_value(offset), multiplier, on_true_tile)
        keep = alu.apply(cmp_op, index, 0) != 0
        values, written, _ = operand.bits(on_true_tile, "on_true_tile")
        written = written.reshape(keep.shape + (-1,))
        if on_true_tile.dtype == dst.dtype:
            fill = constant(int(on_false_value) if dst.dtype.is_integer else on_false_value, dst)
            out = np.where(keep, values.reshape(keep.shape), fill)
            mask = np.where(keep[..., None], written, True)
            operand.store_bits(dst, out.reshape(dst.shape), written=mask.reshape(dst.shape + (-1,)))
            return
        defined = written.all(axis=-1) | ~keep
        chosen = np.where(keep, cast.to_f32(values.reshape(keep.shape), on_true_tile.dtype), np.float32(on_false_value))
        operand.store_f32(dst, chosen, written=defined)

    attrs = {"pattern": [list(p) for p in pattern], "offset": offset, "channel_multiplier": multiplier}
    attrs |= {"cmp_op": cmp_op, "on_false_value": on_false_value}
    return prog.issue(
        "affine_select", Engine.gpsimd, {"dst": dst}, {"on_true_tile": on_true_tile}, attrs, run, label=name
    )
