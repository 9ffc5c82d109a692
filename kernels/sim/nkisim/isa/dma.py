"""DMA: copies, gathers and scatters, transposes, accumulating copies."""

from __future__ import annotations

import math

import numpy as np

from .. import cast, legal, operand, program, view
from ..alu import Op
from ..errors import (
    BoundsError,
    BufferKindError,
    DtypeError,
    EngineError,
    LanguageError,
    RaceError,
    ShapeError,
    UnspecifiedError,
)
from ..memory import HBM, SBUF, SHARED_HBM
from ..tensor import NkiTensor
from .common import DgeMode, Engine, OobMode, instruction, member

_MEMORIES = (HBM, SHARED_HBM, SBUF)
_TRANSPOSES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def _check_common(prog, priority, dge, oob) -> None:
    member(dge, DgeMode, "dge_mode")
    member(oob, OobMode, "oob_mode")
    if dge is DgeMode.hwdge:
        legal.needs(prog, 3, "dge_mode.hwdge")
    if priority is not None:
        legal.needs(prog, 4, "priority")
        if not 0 <= legal.integer(priority, "priority") <= 3:
            raise LanguageError(f"priority is {priority}, need 0..3")
        if dge is DgeMode.none:
            raise LanguageError("priority needs descriptor generation (dge_mode is none)")


def _run_bytes(t: NkiTensor) -> int:
    """Bytes that lie next to each other in the memory of one side; a partition ends a run."""
    if t.on_chip:
        return view.contiguous_run(t.shape[1:], t.strides[1:]) * t.itemsize
    if t.dynamic is not None and t.dynamic.kind == "vector":
        return view.contiguous_run(t.shape[1:], t.strides[1:]) * t.itemsize
    return view.contiguous_run(t.shape, t.strides) * t.itemsize


def _count(prog, dst: NkiTensor, sources: list[NkiTensor], transposed: bool = False) -> None:
    """Bytes by memory, and descriptors: pieces contiguous on every side (of a transpose: of the source alone)."""
    c = prog.counters
    c.dma_transfers += 1
    runs = []
    for t in [dst, *sources]:
        amount = t.size * t.itemsize
        where = "sbuf" if t.on_chip else "hbm"
        (c.dma_bytes_written if t is dst else c.dma_bytes_read)[where] += amount
        if not (transposed and t is dst):
            runs.append(_run_bytes(t) // t.itemsize)
    c.dma_descriptors += dst.size // math.gcd(*runs)


@instruction
def dma_copy(
    dst, src, priority=None, oob_mode=OobMode.error, dge_mode=DgeMode.unknown, engine=Engine.unknown, name=None
):
    """dst = src between HBM and SBUF, element by element in row-major order; dtypes convert through float32."""
    prog = program.current()
    legal.in_buffers(dst, "dst", *_MEMORIES)
    legal.in_buffers(src, "src", *_MEMORIES)
    _check_common(prog, priority, dge_mode, oob_mode)
    if dst.size != src.size:
        raise ShapeError(f"src has {src.size} elements {src.shape}, dst has {dst.size} {dst.shape}")
    if src.dtype != dst.dtype:
        legal.arithmetic(src, "src")
        legal.arithmetic(dst, "dst")
        if dge_mode is DgeMode.hwdge:
            raise DtypeError(f"hardware DGE does not convert {src.dtype} to {dst.dtype}")
    member(engine, Engine, "engine")
    if engine is not Engine.unknown:
        if dge_mode is not DgeMode.hwdge:
            raise EngineError("engine= needs dge_mode=hwdge")
        if engine not in (Engine.sync, Engine.scalar):
            raise EngineError(f"engine {engine.name} does not trigger hardware DGE; need sync or scalar")
    dynamic = [t for t in (dst, src) if t.dynamic is not None]
    if dge_mode is DgeMode.none and dynamic:
        raise LanguageError("a runtime address needs descriptor generation (dge_mode is none)")
    if oob_mode is OobMode.skip and not dynamic:
        raise LanguageError("oob_mode.skip needs a runtime index")
    skip = oob_mode is OobMode.skip

    def run():
        _copy(dst, src, skip)
        _count(prog, dst, [src])

    attrs = {"oob_mode": oob_mode, "dge_mode": dge_mode, "priority": priority, "trigger": engine}
    return prog.issue("dma_copy", Engine.dma, {"dst": dst}, {"src": src}, attrs, run, label=name)


def _copy(dst: NkiTensor, src: NkiTensor, skip: bool) -> None:
    values, written, source = operand.bits(src, "src", skip)
    target = operand.resolve(dst, "dst", skip)
    if src.dtype == dst.dtype:
        values, mask = values.reshape(dst.shape), written.reshape(dst.shape + (-1,))
    else:
        values, mask = operand.converted(values, written, src.dtype, dst.dtype)
        values, mask = values.reshape(dst.shape), mask.reshape(dst.shape + (1,))
    where = None
    if source.skipped is not None and source.skipped.any():
        where = ~source.skipped.reshape(dst.shape)
    _check_scatter(target, values)
    target.write(values, mask, where)


def _check_scatter(target, values: np.ndarray) -> None:
    """Rows written twice with different values have no defined result."""
    if target.index is None:
        return
    rows = target.index.reshape(target.index.shape[0], -1)[:, 0]
    kept = np.flatnonzero(rows >= 0)
    _, first, inverse = np.unique(rows[kept], return_index=True, return_inverse=True)
    if len(first) == len(kept):
        return
    raw = np.ascontiguousarray(values).reshape(values.shape[0], -1).view(np.uint8)[kept]
    if not np.array_equal(raw, raw[first][inverse]):
        raise RaceError("dst: two partitions scatter different data to one row; the order is not defined")


@instruction
def dma_transpose(dst, src, axes=None, priority=None, dge_mode=DgeMode.unknown, oob_mode=OobMode.error, name=None):
    """dst = src with its axes permuted: (1,0), (2,1,0) or (3,1,2,0); with vector_offset, rows are gathered first."""
    prog = program.current()
    legal.in_buffers(dst, "dst", SBUF)
    legal.in_buffers(src, "src", *_MEMORIES)
    _check_common(prog, priority, dge_mode, oob_mode)
    if src.ndim not in _TRANSPOSES:
        raise ShapeError(f"src has {src.ndim} axes, need 2, 3 or 4")
    order = _TRANSPOSES[src.ndim]
    if axes is not None and tuple(axes) != order:
        raise ShapeError(f"axes are {tuple(axes)}, a tensor with {src.ndim} axes is transposed by {order}")
    wanted = tuple(src.shape[a] for a in order)
    if dst.shape != wanted:
        raise ShapeError(f"dst has shape {dst.shape}, need {wanted}")
    if dst.dtype != src.dtype:
        raise DtypeError(f"src is {src.dtype}, dst is {dst.dtype}; they must agree")
    if src.itemsize not in (2, 4):
        raise DtypeError(f"src is {src.dtype}; DMA transposes 2- and 4-byte types")
    gather = src.dynamic is not None and src.dynamic.kind == "vector"
    if gather:
        _check_gather_transpose(prog, src, dge_mode)
    elif dge_mode not in (DgeMode.unknown, DgeMode.hwdge):
        raise LanguageError(f"dge_mode {dge_mode.name}: a direct transpose takes unknown or hwdge")
    elif dge_mode is DgeMode.hwdge and (src.shape[0] != 16 or src.shape[-1] % 128 or src.itemsize != 2):
        raise ShapeError(f"hardware DGE transposes [16, ..., multiple of 128] of 2 bytes, got {src.shape} {src.dtype}")
    if oob_mode is OobMode.skip and not gather:
        raise LanguageError("oob_mode.skip needs vector_offset")
    skip = oob_mode is OobMode.skip

    def run():
        values, written, source = operand.bits(src, "src", skip)
        where = None if source.skipped is None else ~source.skipped.transpose(order)
        target = operand.resolve(dst, "dst")
        target.write(values.transpose(order), written.transpose(order + (src.ndim,)), where)
        _count(prog, dst, [src], transposed=True)

    attrs = {"axes": order, "oob_mode": oob_mode, "dge_mode": dge_mode, "priority": priority}
    return prog.issue("dma_transpose", Engine.dma, {"dst": dst}, {"src": src}, attrs, run, label=name)


def _check_gather_transpose(prog, src: NkiTensor, dge) -> None:
    legal.needs(prog, 3, "indirect dma_transpose")
    index = src.dynamic.source
    if dge not in (DgeMode.unknown, DgeMode.swdge):
        raise LanguageError(f"dge_mode {dge.name}: an indirect transpose takes unknown or swdge")
    if src.ndim == 4 and src.shape[1] != 1 and src.shape[2] != 1:
        raise ShapeError(f"src has shape {src.shape}; axis 1 or axis 2 must be 1")
    if src.shape[-1] > 128 or src.itemsize != 2:
        raise ShapeError(f"src is {src.shape} {src.dtype}; need a last axis of at most 128 elements of 2 bytes")
    if src.on_chip:
        raise BufferKindError("src of an indirect transpose must be in HBM")
    rows, columns = index.shape[0], index.free_size
    if str(index.dtype) != "uint32":
        raise DtypeError(f"vector_offset has dtype {index.dtype}, need uint32")
    if index.ndim != 2 or rows % 16 or not 16 <= rows <= 128 or (columns > 1 and rows != 128):
        raise ShapeError(
            f"vector_offset has shape {index.shape}; need 16..128 partitions, a multiple of 16 (128 if wider than 1)"
        )
    if rows * columns < src.shape[0] or src.shape[0] % 16:
        raise ShapeError(
            f"{src.shape[0]} rows with {rows * columns} indices; need enough of them and a multiple of 16 rows"
        )


@instruction
def dma_compute(dst, srcs, reduce_op, scales=None, unique_indices=True, oob_mode=OobMode.error, name=None):
    """dst = sum of the sources in float32; with one indirect operand, a read-modify-write of rows."""
    prog = program.current()
    legal.in_buffers(dst, "dst", *_MEMORIES)
    member(oob_mode, OobMode, "oob_mode")
    sources = list(srcs)
    if not 1 <= len(sources) <= 16:
        raise ShapeError(f"{len(sources)} sources, need 1..16")
    if not isinstance(reduce_op, Op) or reduce_op.key != "add":
        raise LanguageError(f"reduce_op is {reduce_op!r}, need nl.add")
    if scales is not None and any(s != 1.0 for s in scales):
        raise LanguageError("scales must all be 1.0")
    for i, t in enumerate(sources):
        legal.in_buffers(t, f"srcs[{i}]", *_MEMORIES)
        legal.arithmetic(t, f"srcs[{i}]")
        if t.size != dst.size:
            raise ShapeError(f"srcs[{i}] has {t.size} elements, dst has {dst.size}")
    legal.arithmetic(dst, "dst")
    indirect = any(t.dynamic is not None for t in [dst, *sources])
    if indirect and (len(sources) != 2 or not unique_indices):
        raise LanguageError("an indirect dma_compute takes exactly 2 sources and unique_indices=True")
    if len(sources) == 1:
        raise UnspecifiedError(
            "one source: the page of dma_compute makes that dst = src, AWS's guide to NKI 0.3 dst += src; "
            "call dma_copy, or pass srcs=[dst, src]"
        )
    skip = oob_mode is OobMode.skip

    def run():
        total = np.zeros(dst.shape, np.float32)
        where = np.ones(dst.shape, bool)
        for i, t in enumerate(sources):
            total = total + operand.f32(t, f"srcs[{i}]", skip).reshape(dst.shape)
            skipped = operand.resolve(t, f"srcs[{i}]", skip).skipped
            if skipped is not None:
                where &= ~skipped.reshape(dst.shape)
        target = operand.resolve(dst, "dst", skip)
        if target.index is not None:
            rows = target.index.reshape(target.index.shape[0], -1)[:, 0]
            kept = rows[rows >= 0]
            if len(np.unique(kept)) != len(kept):
                raise BoundsError("dst: indices are not unique")
        target.write(cast.from_f32(total, dst.dtype, where), True, where)
        _count(prog, dst, sources)

    attrs = {"reduce_op": reduce_op, "oob_mode": oob_mode}
    reads = {f"src{i}": t for i, t in enumerate(sources)}
    return prog.issue("dma_compute", Engine.dma, {"dst": dst}, reads, attrs, run, label=name)
