"""Reading and writing operands with definedness.

Arithmetic refuses unwritten elements; copies carry them along.
"""

from __future__ import annotations

import numpy as np

from . import cast, config, program
from .dtypes import DType
from .errors import BoundsError, UninitializedError
from .memory import PSUM, PSUM_MATMUL, PSUM_OTHER, Access, everywhere
from .registers import VirtualRegister
from .tensor import NkiTensor


def scalar_value(source) -> int:
    """The runtime int in a register or a (1, 1) tensor."""
    if isinstance(source, VirtualRegister):
        return source.value()
    return int(ints(source, "scalar_offset").reshape(-1)[0])


def resolve(t: NkiTensor, role: str, skip: bool = False) -> Access:
    """The access with runtime offsets filled in.

    With `skip`, rows whose index is out of range are left out (`oob_mode.skip`); otherwise they are BoundsErrors.
    """
    if t.dynamic is None:
        return t.access()
    if t.dynamic.kind == "scalar":
        return _resolve_scalar(t, role, skip)
    if t.dynamic.kind == "indirect":
        return _resolve_indirect(t, role)
    return _resolve_vector(t, role, skip)


def _resolve_scalar(t: NkiTensor, role: str, skip: bool) -> Access:
    value = scalar_value(t.dynamic.source)
    offset = t.offset + value * t.dynamic.scale
    try:
        if value < 0:
            raise BoundsError("is negative")
        if t.on_chip and t.offset % t.row_elements + value * t.dynamic.scale >= t.row_elements:
            raise BoundsError(f"leaves the {t.row_elements} elements of a partition")
        moved = NkiTensor(t.storage, t.dtype, t.shape, t.strides, offset)
    except BoundsError as error:
        if not skip:
            raise BoundsError(f"{role}: scalar_offset {value}: {error.reason}") from None
        flat = np.full(t.shape, -1, np.int64)
        return Access(t.storage, t.dtype, t.shape, t.strides, 0, flat)
    return moved.access()


def _resolve_vector(t: NkiTensor, role: str, skip: bool) -> Access:
    rows = t.shape[0]
    index = ints(t.dynamic.source, "vector_offset")
    flat_index = index.reshape(index.shape[0], -1).T.reshape(-1)  # column by column: partition first
    if flat_index.size < rows:
        raise BoundsError(f"{role}: {rows} rows are gathered with {flat_index.size} indices")
    wanted = flat_index[:rows].astype(np.int64)
    bad = (wanted < 0) | (wanted >= t.dynamic.extent)
    if bad.any() and not skip:
        at = int(np.argmax(bad))
        raise BoundsError(f"{role}: index {int(wanted[at])} of partition {at} is outside 0..{t.dynamic.extent}")
    offsets = np.zeros(t.shape[1:], np.int64)
    for axis, (stride, count) in enumerate(zip(t.strides[1:], t.shape[1:], strict=True)):
        steps = np.arange(count, dtype=np.int64) * stride
        offsets = offsets + steps.reshape((-1,) + (1,) * (len(t.shape) - 2 - axis))
    flat = t.offset + wanted.reshape((-1,) + (1,) * (len(t.shape) - 1)) * t.dynamic.scale + offsets
    total = t.storage.row_bytes // t.dtype.itemsize
    beyond = (flat >= total) & ~bad.reshape((-1,) + (1,) * (len(t.shape) - 1))
    if beyond.any():
        raise BoundsError(f"{role}: a gathered row reaches element {int(flat[beyond].max())}, the tensor has {total}")
    flat[bad] = -1
    return Access(t.storage, t.dtype, t.shape, t.strides, 0, flat)


def _resolve_indirect(t: NkiTensor, role: str) -> Access:
    """Offset i of a group of partitions is in its row i mod G, column i div G; G is the group size of the engine."""
    group, count, extent = program.current().indirect_group, t.shape[1], t.dynamic.extent
    index = ints(t.dynamic.source, "index")
    index = index.reshape(index.shape[0], -1)
    if index.shape[0] % group or count > group * index.shape[1]:
        raise BoundsError(
            f"{role}: {count} offsets from groups of {group} partitions; index is {index.shape[0]} x {index.shape[1]}"
        )
    if (index >= extent).any() or (index < 0).any():
        raise BoundsError(f"{role}: offset {int(index.max())} is outside 0..{extent}")
    snake = index.reshape(-1, group, index.shape[1]).transpose(0, 2, 1).reshape(-1, group * index.shape[1])[:, :count]
    rows = np.arange(t.shape[0], dtype=np.int64)[:, None] * t.row_elements
    return Access(t.storage, t.dtype, t.shape, t.strides, 0, t.offset + rows + np.repeat(snake, group, axis=0))


def _require_written(access: Access, role: str) -> None:
    written = access.written() if access.skipped is None else access.written() | access.skipped
    if not everywhere(written) and not written.all():
        at = tuple(int(i) for i in np.argwhere(~written)[0])
        raise UninitializedError(
            f"{role} reads element {at} of {access.storage.name!r} {access.shape}, which was never written (or was "
            "overwritten through another tensor at the same address; switch uninitialized)"
        )


def raw(t: NkiTensor, role: str, skip: bool = False) -> np.ndarray:
    """Storage values, all of them written. With `skip`, those of rows that are left out mean nothing."""
    access = resolve(t, role, skip)
    fill = config.current().uninitialized == "fill"
    if not fill:
        _require_written(access, role)
    if access.storage.buffer is PSUM:
        access.mark_evicted()
    values, written = access.read(), access.written() if fill else True
    return values if everywhere(written) else np.where(written, values, cast.fresh(t.dtype))


def f32(t: NkiTensor, role: str, skip: bool = False) -> np.ndarray:
    """Values as float32 in shape (partitions, elements); `skip` as in `raw`."""
    return cast.to_f32(raw(t, role, skip), t.dtype).reshape(t.shape[0], -1)


def ints(t: NkiTensor, role: str) -> np.ndarray:
    """Integer values of an index operand."""
    return raw(t, role).astype(np.int64)


def bits(t: NkiTensor, role: str, skip: bool = False) -> tuple[np.ndarray, np.ndarray, Access]:
    """Storage values with a byte mask of what is written, for copies."""
    access = resolve(t, role, skip)
    if access.storage.buffer is PSUM:
        access.mark_evicted()
    return access.read().copy(), access.written_bytes(), access


def store_f32(t: NkiTensor, values: np.ndarray, role: str = "dst", written=None, where=None) -> None:
    """Round float32 values into an operand.

    `written` (elements) is the definedness of the result (default: all), `where` limits what is touched.
    """
    mask = None if written is None else np.asarray(written).reshape(t.shape)
    checked = mask
    if where is not None:
        checked = where.reshape(t.shape) if mask is None else mask & where.reshape(t.shape)
    out = cast.from_f32(np.asarray(values, np.float32).reshape(t.shape), t.dtype, checked)
    store_bits(t, out, role, True if mask is None else mask[..., None], where)


def store_bits(t: NkiTensor, values: np.ndarray, role: str = "dst", written=True, where=None, by_matmul=False) -> None:
    """Store raw values; `written` is True or a mask that broadcasts to bytes."""
    access = resolve(t, role)
    if t.dynamic is not None and t.dynamic.kind == "indirect" and np.unique(access.index).size != access.index.size:
        raise BoundsError(f"{role}: two offsets of indirect() are equal; which value stays is not defined")
    access.write(values, written, None if where is None else where.reshape(t.shape))
    if access.storage.buffer is PSUM:
        access.set_psum_state(PSUM_MATMUL if by_matmul else PSUM_OTHER)


def converted(values: np.ndarray, written: np.ndarray, source: DType, target: DType) -> tuple[np.ndarray, np.ndarray]:
    """A converting copy: values through float32, and the byte mask of the result."""
    elements = written.all(axis=-1)
    out = cast.from_f32(np.where(elements, cast.to_f32(values, source), np.float32(0)), target, elements)
    return out, elements[..., None]
