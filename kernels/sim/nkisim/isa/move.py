"""On-chip data movement: copies, memset, transposes, shuffles, gathers."""

from __future__ import annotations

import numpy as np

from .. import cast, legal, operand, program
from ..errors import (
    BoundsError,
    BufferKindError,
    CastError,
    DtypeError,
    EngineError,
    LanguageError,
    ShapeError,
    UnspecifiedError,
)
from ..memory import PSUM, SBUF
from ..tensor import NkiTensor
from .common import Engine, instruction, pick, switches


def copy_bits_or_cast(dst: NkiTensor, src: NkiTensor) -> None:
    """The copy itself: bit for bit between equal dtypes, through float32 otherwise; definedness travels."""
    values, written, access = operand.bits(src, "src")
    del access
    if src.dtype == dst.dtype:
        operand.store_bits(dst, values.reshape(dst.shape), written=written.reshape(dst.shape + (-1,)))
        return
    out, mask = operand.converted(values, written, src.dtype, dst.dtype)
    operand.store_bits(dst, out.reshape(dst.shape), written=mask.reshape(dst.shape + (1,)))


@instruction
def tensor_copy(dst, src, engine=Engine.unknown, name=None):
    """Copy or cast an on-chip tile; equal partitions and elements in each partition."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(src, "src")
    legal.same_elements(dst, "dst", src, "src")
    legal.dtype_on_target(prog, dst, "dst")
    if src.dtype != dst.dtype:
        legal.arithmetic(src, "src")
        legal.arithmetic(dst, "dst")
    chosen = _copy_engine(prog, engine, dst, src)
    return prog.issue(
        "tensor_copy", chosen, {"dst": dst}, {"src": src}, {}, lambda: copy_bits_or_cast(dst, src), label=name
    )


def _copy_engine(prog, asked, dst: NkiTensor, src: NkiTensor):
    chosen = pick(asked, Engine.vector, Engine.vector, Engine.scalar, Engine.gpsimd)
    if chosen is Engine.gpsimd and (dst.buffer is PSUM or src.buffer is PSUM):
        raise BufferKindError("gpsimd cannot reach psum")
    if chosen is Engine.scalar and prog.chip.gen < 3:
        raise EngineError("tensor_copy on ScalarE needs NeuronCore-v3; use activation with nl.copy")
    return chosen


@instruction
def memset(dst, value, engine=Engine.unknown, name=None):
    """Fill with a compile-time constant that dst's dtype can hold."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.dtype_on_target(prog, dst, "dst")
    chosen = pick(engine, _memset_engine(dst), Engine.vector, Engine.gpsimd)
    if chosen is Engine.gpsimd and dst.buffer is PSUM:
        raise BufferKindError("gpsimd cannot reach psum")
    element = constant(value, dst)

    def run():
        operand.store_bits(dst, np.broadcast_to(element, dst.shape))

    return prog.issue("memset", chosen, {"dst": dst}, {}, {"value": value}, run, label=name)


def _memset_engine(dst: NkiTensor):
    return Engine.vector


def constant(value, dst: NkiTensor) -> np.ndarray:
    """`value` as one storage element of dst."""
    if isinstance(value, bool) and dst.dtype == "bool":
        return np.array(value, np.uint8)
    legal.number(value, "value")
    if dst.dtype.is_packed or dst.dtype.kind == "e8m0":
        if value != 0:
            raise CastError(f"value {value}: only 0 can be set into {dst.dtype}")
        return np.zeros((), dst.dtype.np)
    if dst.dtype.is_integer:
        if not isinstance(value, (int, np.integer)):
            raise DtypeError(f"value {value!r} is not an int, dst is {dst.dtype}")
        low, high = cast.int_range(dst.dtype)
        if not low <= value <= high:
            raise CastError(f"value {value} does not fit {dst.dtype} ({low}..{high})")
        return np.array(value, dst.dtype.np)
    return cast.from_f32(np.asarray(value, np.float32).reshape(1), dst.dtype)[0]


@instruction
def tensor_copy_predicated(dst, src, predicate, reverse_pred=False, name=None):
    """Write src (tile or number) where the predicate is true (not zero)."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(predicate, "predicate")
    legal.same_elements(dst, "dst", predicate, "predicate")
    legal.dtype_in(predicate, "predicate", "uint8", "uint16", "uint32")
    tile = isinstance(src, NkiTensor)
    if tile:
        legal.on_chip(src, "src")
        legal.same_elements(dst, "dst", src, "src")
        legal.not_both_psum(src, "src", predicate, "predicate")
        if src.dtype != dst.dtype:
            raise DtypeError(f"src is {src.dtype}, dst is {dst.dtype}; they must agree")
    element = None if tile else constant(src, dst)

    def run():
        take = (operand.raw(predicate, "predicate") != 0) != bool(reverse_pred)
        if tile:
            values, written, _ = operand.bits(src, "src")
            operand.store_bits(
                dst,
                values.reshape(dst.shape),
                written=written.reshape(dst.shape + (-1,)),
                where=take.reshape(dst.shape),
            )
        else:
            operand.store_bits(dst, np.broadcast_to(element, dst.shape), where=take.reshape(dst.shape))

    reads = {"src": src if tile else None, "predicate": predicate}
    attrs = {"reverse_pred": bool(reverse_pred)} | ({} if tile else {"src": src})
    return prog.issue("tensor_copy_predicated", Engine.vector, {"dst": dst}, reads, attrs, run, label=name)


def fp8_transpose(data: NkiTensor) -> None:
    """TensorE transposes of FP8: two documents, two results (switch `fp8_transpose`)."""
    if data.dtype.is_fp8 and switches().fp8_transpose == "error":
        raise UnspecifiedError(f"TensorE transpose of {data.dtype}: cast to bfloat16 first (switch fp8_transpose)")


@instruction
def nc_transpose(dst, data, engine=Engine.unknown, name=None):
    """Swap the partition axis with the flattened free axes: TensorE to 128 x 128 into PSUM, VectorE to 32 x 32."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    if (dst.shape[0], dst.free_size) != (data.free_size, data.shape[0]):
        raise ShapeError(f"data is {data.shape[0]} x {data.free_size}, dst is {dst.shape[0]} x {dst.free_size}")
    if dst.dtype != data.dtype:
        raise DtypeError(f"data is {data.dtype}, dst is {dst.dtype}; they must agree")
    small = max(data.shape[0], data.free_size) <= 32
    on_tensor = data.buffer is SBUF and dst.buffer is PSUM
    chosen = pick(engine, Engine.tensor if on_tensor else Engine.vector, Engine.tensor, Engine.vector)
    if chosen is Engine.tensor:
        if not on_tensor:
            raise BufferKindError(f"TensorE transposes sbuf into psum, got {data.buffer.value} into {dst.buffer.value}")
        if data.free_size > 128:
            raise ShapeError(f"data has {data.free_size} elements a partition, TensorE transposes up to 128")
        fp8_transpose(data)
        first, last = legal.bank_of(dst)
        if first != last:
            raise BoundsError(f"dst crosses PSUM banks {first}..{last}")
    elif not small:
        raise ShapeError(f"data is {data.shape[0]} x {data.free_size}, VectorE transposes up to 32 x 32")

    def run():
        values, written, _ = operand.bits(data, "data")
        flat = values.reshape(data.shape[0], -1)
        if chosen is Engine.tensor and prog.chip.gen < 3 and data.dtype.is_float:
            if not np.isfinite(cast.to_f32(flat, data.dtype)).all():
                raise CastError("TensorE on NeuronCore-v2 transposes by multiplying: NaN or infinity would spread")
        mask = written.reshape(data.shape[0], data.free_size, -1).transpose(1, 0, 2)
        operand.store_bits(dst, flat.T.reshape(dst.shape), written=mask.reshape(dst.shape + (-1,)))
        if chosen is Engine.tensor:
            prog.counters.matmul_columns["transpose"] += data.shape[0]

    return prog.issue("nc_transpose", chosen, {"dst": dst}, {"data": data}, {}, run, label=name)


@instruction
def nc_stream_shuffle(dst, src, shuffle_mask, name=None):
    """Within each quadrant of 32 partitions, partition i takes partition shuffle_mask[i]; 255 leaves it alone."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(src, "src")
    if dst.dtype != src.dtype:
        raise DtypeError(f"src is {src.dtype}, dst is {dst.dtype}; they must agree")
    if dst.free_size != src.free_size:
        raise ShapeError(f"src has {src.free_size} elements a partition, dst has {dst.free_size}")
    mask = [legal.integer(m, f"shuffle_mask[{i}]") for i, m in enumerate(shuffle_mask)]
    if len(mask) != 32 or any(not (0 <= m < 32 or m == 255) for m in mask):
        raise ShapeError("shuffle_mask needs 32 entries of 0..31 or 255")
    active = -(-max(dst.shape[0], src.shape[0]) // 32) * 32
    allowed = (0,) if active > 64 else (0, 64) if active == 64 else (0, 32, 64, 96)
    for t, role in ((src, "src"), (dst, "dst")):
        if t.start_partition not in allowed:
            raise BoundsError(f"{role} starts at partition {t.start_partition}; {active} partitions start at {allowed}")

    def run():
        values, written, _ = operand.bits(src, "src")
        out, out_mask, _ = operand.bits(dst, "dst")
        out_mask = out_mask.copy()
        for p in range(dst.shape[0]):
            source = mask[p % 32]
            if source == 255:
                continue
            row = p // 32 * 32 + source
            if row >= src.shape[0]:
                raise BoundsError(f"partition {p} takes partition {row}, src has {src.shape[0]}")
            out[p] = values[row].reshape(out[p].shape)
            out_mask[p] = written[row].reshape(out_mask[p].shape)
        operand.store_bits(dst, out, written=out_mask)

    attrs = {"shuffle_mask": mask}
    return prog.issue("nc_stream_shuffle", Engine.vector, {"dst": dst}, {"src": src}, attrs, run, label=name)


@instruction
def nc_n_gather(dst, data, indices, name=None):
    """Within each partition, element i of dst is element indices[i] of data (GpSimd, SBUF, uint32 indices)."""
    prog = program.current()
    for t, role in ((dst, "dst"), (data, "data"), (indices, "indices")):
        legal.in_buffers(t, role, SBUF)
    legal.dtype_in(indices, "indices", "uint32")
    legal.same_elements(dst, "dst", indices, "indices")
    legal.same_partitions(dst, "dst", data, "data")
    if dst.dtype != data.dtype:
        raise DtypeError(f"data is {data.dtype}, dst is {dst.dtype}; they must agree")

    def run():
        at = operand.ints(indices, "indices").reshape(data.shape[0], -1)
        if (at >= data.free_size).any():
            raise BoundsError(f"index {int(at.max())} is outside 0..{data.free_size}")
        values, written, _ = operand.bits(data, "data")
        rows = np.arange(data.shape[0])[:, None]
        out = values.reshape(data.shape[0], -1)[rows, at]
        mask = written.reshape(data.shape[0], data.free_size, -1)[rows, at]
        operand.store_bits(dst, out.reshape(dst.shape), written=mask.reshape(dst.shape + (-1,)))

    return prog.issue(
        "nc_n_gather", Engine.gpsimd, {"dst": dst}, {"data": data, "indices": indices}, {}, run, label=name
    )


@instruction
def local_gather(dst, src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, name=None):
    """Each GpSimd core gathers columns of its 16 partitions by the indices of those partitions, partition first."""
    prog = program.current()
    for t, role in ((dst, "dst"), (src_buffer, "src_buffer"), (index, "index")):
        legal.in_buffers(t, role, SBUF)
    legal.dtype_in(index, "index", "uint16")
    legal.same_partitions(src_buffer, "src_buffer", index, "index")
    legal.same_partitions(src_buffer, "src_buffer", dst, "dst")
    if dst.dtype != src_buffer.dtype:
        raise DtypeError(f"src_buffer is {src_buffer.dtype}, dst is {dst.dtype}; they must agree")
    if src_buffer.shape[0] % 16:
        raise ShapeError(f"src_buffer has {src_buffer.shape[0]} partitions, need a multiple of 16")
    if num_elem_per_idx not in (1, 2, 4, 8, 16, 32):
        raise LanguageError(f"num_elem_per_idx is {num_elem_per_idx}, need 1, 2, 4, 8, 16 or 32")
    most = index.free_size * 16
    valid = most if num_valid_indices is None else legal.integer(num_valid_indices, "num_valid_indices")
    if not 0 < valid <= min(most, 4096):
        raise ShapeError(f"num_valid_indices is {valid}, need 1..{min(most, 4096)}")
    if dst.free_size != valid * num_elem_per_idx:
        raise ShapeError(f"dst has {dst.free_size} elements a partition, need {valid} x {num_elem_per_idx}")

    def run():
        values, written, _ = operand.bits(src_buffer, "src_buffer")
        values = values.reshape(src_buffer.shape[0], -1)
        written = written.reshape(values.shape + (-1,))
        at = operand.ints(index, "index").reshape(index.shape[0], -1)
        out, mask = [], []
        for core in range(0, src_buffer.shape[0], 16):
            flat = at[core : core + 16].T.reshape(-1)[:valid]  # element offsets, partition first
            flat = (flat[:, None] + np.arange(num_elem_per_idx)).reshape(-1)
            if (flat >= values.shape[1]).any():
                raise BoundsError(f"core {core // 16}: index {int(flat.max())} is outside 0..{values.shape[1]}")
            out.append(values[core : core + 16][:, flat])
            mask.append(written[core : core + 16][:, flat])
        operand.store_bits(
            dst, np.concatenate(out).reshape(dst.shape), written=np.concatenate(mask).reshape(dst.shape + (-1,))
        )

    attrs = {"num_elem_per_idx": num_elem_per_idx, "num_valid_indices": valid}
    return prog.issue(
        "local_gather", Engine.gpsimd, {"dst": dst}, {"src_buffer": src_buffer, "index": index}, attrs, run, label=name
    )
