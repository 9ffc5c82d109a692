"""Statistics and search along the free axes: batch-norm statistics, top 8, segment bounds, nonzero indices."""

from __future__ import annotations

import numpy as np

from .. import legal, operand, program
from ..errors import BoundsError, DtypeError, ShapeError, UnspecifiedError
from ..memory import SBUF
from .common import Engine, instruction


@instruction
def bn_stats(dst, data, name=None):
    """(count, mean, variance * count) of the even elements, then of the odd ones, of each partition."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    legal.same_partitions(dst, "dst", data, "data")
    legal.arithmetic(data, "data")
    if data.free_size > 512:
        raise ShapeError(f"data has {data.free_size} elements a partition, the limit is 512")
    if dst.free_size != 6:
        raise ShapeError(f"dst has {dst.free_size} elements a partition, need 6")

    def run():
        values = operand.f32(data, "data").astype(np.float64)
        out = []
        for part in (values[:, 0::2], values[:, 1::2]):
            count = part.shape[1]
            mean = part.mean(axis=1) if count else np.zeros(part.shape[0])
            out += [np.full(part.shape[0], float(count)), mean, ((part - mean[:, None]) ** 2).sum(axis=1)]
        operand.store_f32(dst, np.stack(out, axis=1).astype(np.float32))

    return prog.issue("bn_stats", Engine.vector, {"dst": dst}, {"data": data}, {}, run, label=name)


@instruction
def bn_aggr(dst, data, name=None):
    """Mean and variance of each partition from (count, mean, variance * count) triples."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    legal.same_partitions(dst, "dst", data, "data")
    if data.free_size % 3:
        raise ShapeError(f"data has {data.free_size} elements a partition, need a multiple of 3")
    if dst.free_size != 2:
        raise ShapeError(f"dst has {dst.free_size} elements a partition, need 2")

    def run():
        triples = operand.f32(data, "data").astype(np.float64).reshape(data.shape[0], -1, 3)
        count, mean, spread = triples[..., 0], triples[..., 1], triples[..., 2]
        total = count.sum(axis=1)
        if (total <= 0).any():
            raise UnspecifiedError("the counts of a partition add up to nothing")
        overall = (count * mean).sum(axis=1) / total
        variance = (spread + count * (mean - overall[:, None]) ** 2).sum(axis=1) / total
        operand.store_f32(dst, np.stack([overall, variance], axis=1).astype(np.float32))

    return prog.issue("bn_aggr", Engine.vector, {"dst": dst}, {"data": data}, {}, run, label=name)


def _eight(t, role: str) -> None:
    if t.free_size != 8:
        raise ShapeError(f"{role} has {t.free_size} elements a partition, need 8")


def _searchable(t, role: str) -> None:
    if not 8 <= t.free_size <= 16384:
        raise ShapeError(f"{role} has {t.free_size} elements a partition, need 8..16384")


@instruction
def max8(dst, src, name=None):
    """The 8 largest values of each partition, descending."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(src, "src")
    legal.same_partitions(dst, "dst", src, "src")
    _searchable(src, "src")
    _eight(dst, "dst")

    def run():
        values = operand.f32(src, "src")
        _no_nan(values, "src")
        operand.store_f32(dst, -np.sort(-values, axis=1)[:, :8])

    return prog.issue("max8", Engine.vector, {"dst": dst}, {"src": src}, {}, run, label=name)


def _no_nan(values: np.ndarray, role: str) -> None:
    if np.isnan(values).any():
        raise UnspecifiedError(f"{role} holds NaN; the documents give no order for it")


def _first_matches(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the first occurrence of each wanted value; equal wanted values take successive occurrences."""
    out = np.empty(wanted.shape, np.int64)
    for p in range(values.shape[0]):
        taken: dict[float, int] = {}
        for i, value in enumerate(wanted[p]):
            places = np.flatnonzero(values[p] == value)
            used = taken.get(float(value), 0)
            if used >= len(places):
                raise UnspecifiedError(f"partition {p}: value {value} is not in the data (often enough)")
            out[p, i] = places[used]
            taken[float(value)] = used + 1
    return out


@instruction
def nc_find_index8(dst, data, vals, name=None):
    """Index of the first occurrence of each of 8 values in each partition."""
    prog = program.current()
    for t, role in ((dst, "dst"), (data, "data"), (vals, "vals")):
        legal.on_chip(t, role)
        legal.same_partitions(dst, "dst", t, role)
    _searchable(data, "data")
    _eight(vals, "vals")
    _eight(dst, "dst")
    legal.dtype_in(dst, "dst", "uint16", "uint32")

    def run():
        wanted = operand.f32(vals, "vals")
        if any(len(np.unique(row)) != 8 for row in wanted):
            raise UnspecifiedError("vals holds equal values; the documents do not say which occurrence each finds")
        found = _first_matches(operand.f32(data, "data"), wanted)
        operand.store_bits(dst, found.astype(dst.dtype.np).reshape(dst.shape))

    return prog.issue("nc_find_index8", Engine.vector, {"dst": dst}, {"data": data, "vals": vals}, {}, run, label=name)


@instruction
def nc_match_replace8(dst, data, vals, imm, dst_idx=None, name=None):
    """data with the first occurrence of each of 8 values replaced by `imm`; optionally their indices."""
    prog = program.current()
    for t, role in ((dst, "dst"), (data, "data"), (vals, "vals")):
        legal.on_chip(t, role)
        legal.same_partitions(dst, "dst", t, role)
    legal.same_elements(dst, "dst", data, "data")
    _searchable(data, "data")
    _eight(vals, "vals")
    value = legal.number(imm, "imm")
    if dst_idx is not None:
        legal.on_chip(dst_idx, "dst_idx")
        _eight(dst_idx, "dst_idx")
        legal.dtype_in(dst_idx, "dst_idx", "uint16", "uint32")

    def run():
        values = operand.f32(data, "data").copy()
        found = _first_matches(values, operand.f32(vals, "vals"))
        np.put_along_axis(values, found, np.float32(value), axis=1)
        operand.store_f32(dst, values)
        if dst_idx is not None:
            operand.store_bits(dst_idx, found.astype(dst_idx.dtype.np).reshape(dst_idx.shape), "dst_idx")

    writes = {"dst": dst, "dst_idx": dst_idx}
    return prog.issue(
        "nc_match_replace8", Engine.vector, writes, {"data": data, "vals": vals}, {"imm": imm}, run, label=name
    )


@instruction
def sequence_bounds(dst, segment_ids, name=None):
    """Start and end of the segment of each element; padding (id 0) gets (n, -1)."""
    prog = program.current()
    for t, role in ((dst, "dst"), (segment_ids, "segment_ids")):
        legal.in_buffers(t, role, SBUF)
        legal.dtype_in(t, role, "float32", "int32")
        if t.shape[0] != 1:
            raise ShapeError(f"{role} has {t.shape[0]} partitions, need 1")
    n = segment_ids.free_size
    if dst.free_size != 2 * n:
        raise ShapeError(f"dst has {dst.free_size} elements, need {2 * n}")

    def run():
        ids = operand.raw(segment_ids, "segment_ids").reshape(-1)
        if (ids < 0).any():
            raise DtypeError("segment_ids must not be negative")
        edges = np.flatnonzero(np.diff(ids)) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [n]])
        if len(np.unique(ids[starts][ids[starts] != 0])) != np.count_nonzero(ids[starts]):
            raise UnspecifiedError("a segment id comes in two pieces")
        piece = np.searchsorted(starts, np.arange(n), side="right") - 1
        out = np.stack([np.where(ids == 0, n, starts[piece]), np.where(ids == 0, -1, ends[piece])])
        operand.store_bits(dst, out.astype(dst.dtype.np).reshape(dst.shape))

    return prog.issue("sequence_bounds", Engine.gpsimd, {"dst": dst}, {"segment_ids": segment_ids}, {}, run, label=name)


@instruction
def nonzero_with_count(dst, src, index_offset=0, padding_val=-1, name=None):
    """In partitions 0, 16, ..., 112: indices of nonzero elements, padding, and their count at the end."""
    prog = program.current()
    legal.needs(prog, 3, "nonzero_with_count")
    legal.dtype_in(legal.in_buffers(src, "src", SBUF), "src", "float32", "int32")
    legal.dtype_in(legal.in_buffers(dst, "dst", SBUF), "dst", "int32")
    legal.same_partitions(dst, "dst", src, "src")
    if dst.free_size != src.free_size + 1:
        raise ShapeError(f"dst has {dst.free_size} elements a partition, need {src.free_size + 1}")
    if src.start_partition % 16 or dst.start_partition % 16:
        raise BoundsError("src and dst must start at a multiple of 16 partitions")
    offset, padding = legal.integer(index_offset, "index_offset"), legal.integer(padding_val, "padding_val")

    def run():
        rows = np.arange(0, src.shape[0], 16)
        out = np.full((dst.shape[0], dst.free_size), padding, np.int32)
        for row in rows:
            found = np.flatnonzero(operand.raw(src[int(row)], "src").reshape(-1))
            out[row, : len(found)] = found + offset
            out[row, -1] = len(found)
        where = np.zeros(out.shape, bool)
        where[rows] = True
        operand.store_bits(dst, out.reshape(dst.shape), where=where)

    attrs = {"index_offset": offset, "padding_val": padding}
    return prog.issue("nonzero_with_count", Engine.gpsimd, {"dst": dst}, {"src": src}, attrs, run, label=name)


@instruction
def topk(val_dst, idx_dst, src, n, sorted=False, name=None):
    """The K largest of a snake of 16 partitions: refused, two editions of its page disagree."""
    raise UnspecifiedError(
        "topk: one edition of the API page writes results row by row in ascending order, a later one writes them as a "
        "snake over 16 partitions; use max8, nc_find_index8 and nc_match_replace8"
    )
