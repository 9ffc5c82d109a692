"""Byte-addressed storage, with a definedness tag for each byte.

HBM is one row of bytes; SBUF and PSUM are rows (partitions) of bytes. A tensor without an address gets bytes of its
own. Tensors with an address share the core's physical SBUF or PSUM, so buffers placed over each other really clobber
each other: a byte counts as written for a tensor only while that tensor was the last to write it.
"""

from __future__ import annotations

import enum
import math

import numpy as np

from . import chip as chips
from .dtypes import DType
from .errors import BoundsError, CapacityError, PartitionError, PsumError, ShapeError, user_location


class MemoryRegion(enum.Enum):
    """Where a tensor lives."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    @property
    def on_chip(self) -> bool:
        """True for SBUF and PSUM."""
        return self in (MemoryRegion.sbuf, MemoryRegion.psum)


SBUF, PSUM = MemoryRegion.sbuf, MemoryRegion.psum
HBM, SHARED_HBM = MemoryRegion.private_hbm, MemoryRegion.shared_hbm

PSUM_ALIGN = 4  # nl.tile_size.psum_min_align

# State of a PSUM byte, as matmul accumulation sees it.
PSUM_UNTOUCHED, PSUM_MATMUL, PSUM_OTHER, PSUM_EVICTED = 0, 1, 2, 4


class Physical:
    """The SBUF or PSUM of one core, used by tensors placed with `address=`."""

    def __init__(self, row_bytes: int):
        self.row_bytes = row_bytes
        self.data = np.zeros(chips.PARTITIONS * row_bytes, np.uint8)
        self.tags = np.zeros(chips.PARTITIONS * row_bytes, np.int32)


class Storage:
    """The bytes behind one `nl.ndarray`.

    `rows` x `row_bytes`; byte (r, b) is `data[base + r * row_stride + b]`. `tags` runs parallel to `data`: a byte is
    written if it equals `tag`. `first_use` and `last_use` are instruction numbers. `kind` is one of internal, input,
    output, constant. `complete` promises that every byte is written, `dirty` that an instruction wrote here.
    """

    def __init__(self, number: int, name: str, shape: tuple[int, ...], dtype: DType, buffer: MemoryRegion):
        self.id = number
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.buffer = buffer
        self.kind = "internal"
        self.address: tuple[int, int] | None = None
        self.first_use: int | None = None
        self.last_use: int | None = None
        self.where = user_location()
        if buffer.on_chip:
            self.rows, self.row_bytes = shape[0], math.prod(shape[1:]) * dtype.itemsize
        else:
            self.rows, self.row_bytes = 1, math.prod(shape) * dtype.itemsize
        self.row_stride, self.base, self.tag = self.row_bytes, 0, 1
        self.data = self.tags = None
        self.complete = False
        self.dirty = False
        self.psum_state = np.zeros(self.rows * self.row_bytes, np.uint8) if buffer is PSUM else None

    def own_bytes(self) -> None:
        """Give the storage bytes of its own, all unwritten."""
        self.data = np.zeros(self.rows * self.row_bytes, np.uint8)
        self.tags = np.zeros(self.rows * self.row_bytes, np.uint8)

    def place(self, physical: Physical, address: tuple[int, int]) -> None:
        """Put the storage at (partition, byte) of a physical memory."""
        partition, byte = address
        if partition < 0 or partition + self.rows > chips.PARTITIONS:
            raise PartitionError(
                f"address partition {partition} with {self.rows} partitions leaves the {chips.PARTITIONS} there are"
            )
        if byte < 0 or byte + self.row_bytes > physical.row_bytes:
            raise CapacityError(
                f"address byte {byte} with {self.row_bytes} bytes a partition leaves the {physical.row_bytes} of "
                f"{self.buffer.value}"
            )
        if self.buffer is PSUM and byte % PSUM_ALIGN:
            raise PsumError(f"address byte {byte} is not a multiple of {PSUM_ALIGN}, which psum needs")
        self.address = (partition, byte)
        self.data, self.tags, self.tag = physical.data, physical.tags, self.id
        self.row_stride = physical.row_bytes
        self.base = partition * physical.row_bytes + byte

    def fill_from(self, array: np.ndarray) -> None:
        """Take the bytes of an array (row-major); everything is written."""
        self.data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        self.tags = np.ones(self.data.size, np.uint8)
        self.complete = True

    @property
    def start_partition(self) -> int:
        """First physical partition (0 unless placed elsewhere)."""
        return self.address[0] if self.address else 0

    @property
    def start_byte(self) -> int:
        """First byte within a partition (0 unless placed elsewhere)."""
        return self.address[1] if self.address else 0


def check_extents(shape, buffer: MemoryRegion, dtype: DType, sbuf_bytes: int) -> tuple[int, ...]:
    """Validate a tensor shape for a buffer; returns it as a tuple of ints."""
    if isinstance(shape, (int, np.integer)):
        shape = (shape,)
    out = []
    for axis, extent in enumerate(shape):
        if not isinstance(extent, (int, np.integer)) or isinstance(extent, bool):
            raise ShapeError(f"shape axis {axis} is {extent!r}, need a compile-time int")
        if extent <= 0:
            raise ShapeError(f"shape axis {axis} is {extent}, need at least 1")
        out.append(int(extent))
    if not out:
        raise ShapeError("a tensor needs at least one axis")
    if buffer.on_chip:
        if len(out) < 2:
            raise ShapeError(f"on-chip tensor of shape {tuple(out)} needs at least 2 axes (partition, free)")
        if out[0] > chips.PARTITIONS:
            raise PartitionError(f"partition axis is {out[0]}, the limit is {chips.PARTITIONS}")
        size = math.prod(out[1:]) * dtype.itemsize
        limit = chips.PSUM_BYTES if buffer is PSUM else sbuf_bytes
        if size > limit:
            raise CapacityError(f"{size} bytes a partition, {buffer.value} has {limit}")
    return tuple(out)


def everywhere(mask) -> bool:
    """True if a definedness mask is one True repeated, which costs nothing to see."""
    if not isinstance(mask, np.ndarray):
        return mask is True
    return mask.size > 0 and not any(mask.strides) and bool(mask.flat[0])


class Access:
    """A resolved access: shape, dtype and where each element is, with every dynamic offset known.

    Either strided (`offset`, `strides` in elements of `dtype` over the storage's flat rows) or, for a per-partition
    gather, `index`: the flat element number of every element (-1 where the access was out of range and is skipped).
    """

    def __init__(self, storage: Storage, dtype: DType, shape, strides, offset: int, index: np.ndarray | None = None):
        self.storage, self.dtype, self.shape = storage, dtype, tuple(shape)
        self.strides, self.offset, self.index = tuple(strides), offset, index

    def _layout(self, row_stride: int, base: int):
        """Byte offset and byte strides for data whose rows are `row_stride` apart."""
        item = self.dtype.itemsize
        if not self.storage.buffer.on_chip:
            return base + self.offset * item, tuple(s * item for s in self.strides)
        row = self.storage.row_bytes // item
        partition, free = divmod(self.offset, row)
        first = (self.strides[0] // row) * row_stride
        return base + partition * row_stride + free * item, (first, *(s * item for s in self.strides[1:]))

    def _elements(self, memory: np.ndarray, np_dtype, row_stride: int, base: int) -> np.ndarray:
        offset, strides = self._layout(row_stride, base)
        return np.ndarray(self.shape, np_dtype, memory, offset, strides)

    def _bytes_of(self, memory: np.ndarray, row_stride: int, base: int) -> np.ndarray:
        """One entry for each byte: shape + (itemsize,)."""
        offset, strides = self._layout(row_stride, base)
        step = memory.itemsize
        strides = tuple(s * step for s in strides) + (step,)
        return np.ndarray(self.shape + (self.dtype.itemsize,), memory.dtype, memory, offset * step, strides)

    def _tags(self) -> np.ndarray:
        """The tags of a strided access, with adjacent elements of the last axis merged into one run of bytes."""
        s, item = self.storage, self.dtype.itemsize
        offset, strides = self._layout(s.row_stride, s.base)
        shape, step = self.shape + (item,), s.tags.itemsize
        if strides and (strides[-1] == item or self.shape[-1] == 1):
            shape, strides = self.shape[:-1] + (self.shape[-1] * item,), strides[:-1]
        return np.ndarray(shape, s.tags.dtype, s.tags, offset * step, (*(n * step for n in strides), step))

    def _gathered(self) -> np.ndarray:
        """Byte positions of a gather: shape + (itemsize,); skipped elements point at the first byte."""
        s, item = self.storage, self.dtype.itemsize
        at = np.maximum(self.index, 0) * item
        if s.row_stride != s.row_bytes:
            partition, within = np.divmod(at, s.row_bytes)
            at = partition * s.row_stride + within
        return at[..., None] + np.arange(item) + s.base

    @property
    def skipped(self) -> np.ndarray | None:
        """Mask of the elements skipped as out of range, or None."""
        return None if self.index is None else self.index < 0

    def read(self) -> np.ndarray:
        """Storage values; a view where possible."""
        s = self.storage
        if self.index is None:
            return self._elements(s.data, self.dtype.np, s.row_stride, s.base)
        return np.ascontiguousarray(s.data[self._gathered()]).view(self.dtype.np)[..., 0]

    def written_bytes(self) -> np.ndarray:
        """Which bytes are written: bool, shape + (itemsize,)."""
        s = self.storage
        if s.complete or (self.index is None and (self._tags() == s.tag).all()):
            return np.broadcast_to(np.True_, self.shape + (self.dtype.itemsize,))
        if self.index is None:
            return self._bytes_of(s.tags, s.row_stride, s.base) == s.tag
        return s.tags[self._gathered()] == s.tag

    def written(self) -> np.ndarray:
        """Which elements are wholly written: bool of the access's shape."""
        mask = self.written_bytes()
        return np.broadcast_to(np.True_, self.shape) if everywhere(mask) else mask.all(axis=-1)

    def write(self, raw: np.ndarray, written=True, where: np.ndarray | None = None) -> None:
        """Store values; `written` (bool or bytes mask) becomes their definedness; `where` limits what is touched."""
        s = self.storage
        s.dirty = True
        written = True if everywhere(written) else written
        raw = np.asarray(raw).reshape(self.shape)
        if self.index is not None:
            keep = self.index >= 0 if where is None else (self.index >= 0) & where
            at = self._gathered()[keep]
            s.data[at] = np.ascontiguousarray(raw[keep])[..., None].view(np.uint8).reshape(at.shape)
            mask = np.broadcast_to(written, self.shape + (self.dtype.itemsize,))[keep]
            s.tags[at] = np.where(mask, s.tag, 0)
            return
        data = self._elements(s.data, self.dtype.np, s.row_stride, s.base)
        if where is None and written is True:
            data[...] = raw
            self._tags()[...] = s.tag
            return
        tags = self._bytes_of(s.tags, s.row_stride, s.base)
        if where is None:
            data[...] = raw
            tags[...] = np.where(written, s.tag, 0)
        else:
            data[where] = raw[where]
            tags[where] = s.tag if written is True else np.where(written, s.tag, 0)[where]
        if written is not True:
            s.complete = s.complete and bool(np.all(written))

    def psum_states(self) -> np.ndarray:
        """State of each element's first byte."""
        return self._bytes_of(self.storage.psum_state, self.storage.row_bytes, 0)[..., 0]

    def set_psum_state(self, state: int) -> None:
        """Set the state of every byte of the access."""
        self._bytes_of(self.storage.psum_state, self.storage.row_bytes, 0)[...] = state

    def mark_evicted(self) -> None:
        """Note that something other than a matmul has read these PSUM bytes."""
        self._bytes_of(self.storage.psum_state, self.storage.row_bytes, 0)[...] |= PSUM_EVICTED


def check_bounds(storage: Storage, dtype: DType, shape, strides, offset: int, what: str) -> None:
    """Raise unless every element of the pattern lies in the storage (and, on chip, in its row)."""
    item = dtype.itemsize
    if offset < 0:
        raise BoundsError(f"{what}: offset {offset} is negative")
    if not storage.buffer.on_chip:
        last = offset + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
        total = storage.row_bytes // item
        if last >= total:
            raise BoundsError(f"{what}: reaches element {last} of {storage.name!r}, which has {total}")
        return
    row = storage.row_bytes // item
    partition, free = divmod(offset, row)
    end = partition + (strides[0] // row) * (shape[0] - 1)
    if end >= storage.rows:
        raise BoundsError(f"{what}: reaches partition {end} of {storage.name!r}, which has {storage.rows}")
    last = free + sum(s * (n - 1) for s, n in zip(strides[1:], shape[1:], strict=True))
    if last >= row:
        raise BoundsError(f"{what}: reaches element {last} of a partition of {storage.name!r}, which has {row}")
