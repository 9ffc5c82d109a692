"""`NkiTensor`: a strided, typed view of a storage. Views move no data."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from . import config, view
from .dtypes import DType, resolve
from .errors import BoundsError, DtypeError, LanguageError, PartitionError, ShapeError, UnspecifiedError
from .memory import Access, MemoryRegion, Storage, check_bounds
from .registers import VirtualRegister


class DynamicSlice:
    """`nl.ds(start, size)`: the slice start..start+size."""

    def __init__(self, start: int, size: int):
        for what, value in (("start", start), ("size", size)):
            if isinstance(value, (VirtualRegister, NkiTensor)):
                raise LanguageError(f"nl.ds {what} is a runtime value; use ap(scalar_offset=...)")
        self.start, self.size = int(start), int(size)

    def as_slice(self) -> slice:
        """The equivalent Python slice."""
        return slice(self.start, self.start + self.size)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A runtime part of an address: kind `scalar`, `vector` or `indirect`, its source, and elements for each unit.

    `extent` is the size of the indexed dimension.
    """

    kind: str
    source: object
    scale: int
    extent: int


class NkiTensor:
    """A tensor or a view of one.

    Attributes: `shape`, `strides` and `offset` in elements of `dtype` over the storage's flat rows, `dtype`, `buffer`,
    `name`, `ndim`, `size`.
    """

    def __init__(self, storage: Storage, dtype: DType, shape, strides, offset: int = 0, dynamic: Dynamic | None = None):
        self.storage = storage
        self.dtype = dtype
        self.shape = tuple(int(n) for n in shape)
        self.strides = tuple(int(s) for s in strides)
        self.offset = int(offset)
        self.dynamic = dynamic
        if dynamic is None:
            check_bounds(storage, dtype, self.shape, self.strides, self.offset, "view")

    # -- queries ------------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> MemoryRegion:
        """Memory region."""
        return self.storage.buffer

    @property
    def name(self) -> str:
        """Name given at allocation, or a generated one."""
        return self.storage.name

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def on_chip(self) -> bool:
        """True in SBUF and PSUM, where axis 0 is the partition axis."""
        return self.buffer.on_chip

    @property
    def row_elements(self) -> int:
        """Elements of this dtype in one row of the storage (one partition on chip)."""
        return self.storage.row_bytes // self.dtype.itemsize

    @property
    def start_partition(self) -> int:
        """Physical partition of the first element."""
        return self.storage.start_partition + self.offset // self.row_elements

    @property
    def start_byte(self) -> int:
        """Byte within its partition of the first element."""
        return self.storage.start_byte + (self.offset % self.row_elements) * self.dtype.itemsize

    @property
    def free_size(self) -> int:
        """Elements in one partition of the view (product of all axes but the first)."""
        return math.prod(self.shape[1:])

    def get_pattern(self) -> list[list[int]]:
        """The view as [[stride, count], ...], outermost first."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    def is_contiguous(self) -> bool:
        """True if the free axes (all axes in HBM) are row-major without gaps."""
        skip = 1 if self.on_chip else 0
        wanted = view.contiguous_strides(self.shape)
        return all(n == 1 or s == w for n, s, w in list(zip(self.shape, self.strides, wanted, strict=True))[skip:])

    def is_indirect(self) -> bool:
        """True if part of the address is known only at run time."""
        return self.dynamic is not None

    # -- views --------------------------------------------------------------------------------------------------

    def _with(self, shape, strides, offset=None, dynamic=None) -> NkiTensor:
        if self.dynamic is not None and self.dynamic.kind == "indirect":
            raise BoundsError("an indirect() view cannot be viewed again")
        return NkiTensor(
            self.storage, self.dtype, shape, strides, self.offset if offset is None else offset, dynamic or self.dynamic
        )

    def _axis(self, dim: int, free: str | None = None) -> int:
        """Validate an axis number; `free` names what may not be done to the partition (or gathered) axis."""
        if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
            raise ShapeError(f"axis {dim!r} is not an int")
        axis = dim + self.ndim if dim < 0 else int(dim)
        if not 0 <= axis < self.ndim:
            raise ShapeError(f"axis {dim} of a tensor with {self.ndim} axes")
        if free and axis == 0:
            self._guard_axis0(free)
        return axis

    def _guard_axis0(self, verb: str) -> None:
        if self.on_chip:
            raise PartitionError(f"the partition axis cannot be {verb}")
        if self.dynamic is not None and self.dynamic.kind == "vector":
            raise BoundsError(f"the gathered axis cannot be {verb}")

    def __getitem__(self, key) -> NkiTensor:
        key = key if isinstance(key, tuple) else (key,)
        if key.count(Ellipsis) > 1:
            raise BoundsError("more than one ... in an index")
        if Ellipsis in key:
            at = key.index(Ellipsis)
            key = key[:at] + (slice(None),) * (self.ndim - len(key) + 1) + key[at + 1 :]
        if len(key) > self.ndim:
            raise BoundsError(f"{len(key)} indices into a tensor with {self.ndim} axes")
        key = key + (slice(None),) * (self.ndim - len(key))
        shape, strides, offset = [], [], self.offset
        for axis, (item, extent, stride) in enumerate(zip(key, self.shape, self.strides, strict=True)):
            if isinstance(item, DynamicSlice):
                item = item.as_slice()
            if isinstance(item, slice):
                if any(isinstance(v, (NkiTensor, VirtualRegister)) for v in (item.start, item.stop, item.step)):
                    raise LanguageError(f"axis {axis}: a runtime value cannot bound a slice; use ap(scalar_offset=...)")
                start, count, step = view.parse_slice(item, extent, axis)
                if (start, count, step) != (0, extent, 1) and axis == 0:
                    self._guard_gather()
                offset += start * stride
                shape.append(count)
                strides.append(stride * step)
                continue
            if isinstance(item, (NkiTensor, VirtualRegister)):
                raise LanguageError(
                    f"axis {axis}: a runtime value is not an index; use select or ap(scalar_offset=...)"
                )
            if isinstance(item, bool) or not isinstance(item, (int, np.integer)):
                raise LanguageError(f"axis {axis}: index {item!r} is not an int, a slice, nl.ds or ...")
            index = int(item) + extent if item < 0 else int(item)
            if not 0 <= index < extent:
                raise BoundsError(f"axis {axis}: index {item} is outside 0..{extent}")
            if axis == 0:
                self._guard_gather()
            offset += index * stride
            if axis == 0 and self.on_chip:
                shape.append(1)
                strides.append(stride)
        if self.on_chip and len(shape) < 2:
            shape.append(1)
            strides.append(1)
        if not shape:
            shape, strides = [1], [1]
        if self.on_chip and shape[0] > 1 and strides[0] != self.row_elements:
            raise PartitionError(
                f"the partition axis is contiguous; a step of {strides[0] // self.row_elements} is not possible"
            )
        return self._with(shape, strides, offset)

    def _guard_gather(self) -> None:
        if self.dynamic is not None and self.dynamic.kind == "vector":
            raise BoundsError("a gathered axis cannot be sliced or selected again")

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> NkiTensor:
        """Elements start..end of one axis."""
        axis = self._axis(dim)
        return self[(slice(None),) * axis + (slice(start, end, step),)]

    def select(self, dim: int, index) -> NkiTensor:
        """One element of an axis, which is removed; `index` may be a (1,1) tensor or register."""
        if not isinstance(index, (NkiTensor, VirtualRegister)):
            axis = self._axis(dim, "removed" if self.on_chip else None)
            n = self.shape[axis]
            position = int(index) + n if index < 0 else int(index)
            if not 0 <= position < n:
                raise BoundsError(f"axis {axis}: index {index} is outside 0..{n}")
            if axis == 0:
                self._guard_gather()
            offset = self.offset + position * self.strides[axis]
            dynamic = None
        else:
            axis = self._axis(dim, "selected at run time")
            if self.dynamic is not None:
                raise BoundsError("a view can have one runtime index")
            offset = self.offset
            dynamic = Dynamic("scalar", _scalar_source(index), self.strides[axis], self.shape[axis])
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        strides = self.strides[:axis] + self.strides[axis + 1 :]
        if self.on_chip and len(shape) < 2:
            shape, strides = shape + (1,), strides + (1,)
        return self._with(shape or (1,), strides or (1,), offset, dynamic)

    def vector_select(self, dim: int, vector_offset: NkiTensor) -> NkiTensor:
        """Partition p reads row `vector_offset[p]` of axis 0 (HBM only)."""
        if dim != 0:
            raise BoundsError(f"vector_select works on axis 0, got {dim}")
        pattern = [[self.strides[0], _vector_count(vector_offset)], *self.get_pattern()[1:]]
        if self.offset:
            raise UnspecifiedError("vector_select on a view with an offset of its own")
        return self.ap(pattern, offset=0, vector_offset=vector_offset)

    def permute(self, dims) -> NkiTensor:
        """Reorder axes."""
        dims = tuple(dims)
        if sorted(dims) != list(range(self.ndim)):
            raise ShapeError(f"{dims} is not a permutation of the {self.ndim} axes")
        if dims[0] != 0:
            self._guard_axis0("moved")
        return self._with([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def broadcast(self, dim: int, size: int) -> NkiTensor:
        """Repeat an axis of size 1."""
        axis = self._axis(dim, "broadcast")
        if self.shape[axis] != 1:
            raise ShapeError(f"axis {axis} has {self.shape[axis]} elements; only an axis of 1 can be broadcast")
        shape, strides = list(self.shape), list(self.strides)
        shape[axis], strides[axis] = size, 0
        return self._with(shape, strides)

    def expand_dim(self, dim: int) -> NkiTensor:
        """Insert an axis of size 1."""
        axis = dim + self.ndim + 1 if dim < 0 else dim
        if not 0 <= axis <= self.ndim:
            raise ShapeError(f"axis {dim} of a tensor with {self.ndim} axes")
        if axis == 0:
            self._guard_axis0("preceded")
        stride = self.strides[axis] * self.shape[axis] if axis < self.ndim else 1
        return self._with(
            self.shape[:axis] + (1,) + self.shape[axis:], self.strides[:axis] + (stride,) + self.strides[axis:]
        )

    def squeeze_dim(self, dim: int) -> NkiTensor:
        """Remove an axis of size 1."""
        axis = self._axis(dim, "removed")
        if self.shape[axis] != 1:
            raise ShapeError(f"axis {axis} has {self.shape[axis]} elements, need 1")
        shape, strides = self.shape[:axis] + self.shape[axis + 1 :], self.strides[:axis] + self.strides[axis + 1 :]
        if self.on_chip and len(shape) < 2:
            raise ShapeError("an on-chip tensor keeps at least 2 axes")
        return self._with(shape, strides)

    def reshape_dim(self, dim: int, shape) -> NkiTensor:
        """Split one axis."""
        axis = self._axis(dim)
        part = view.infer(shape, self.shape[axis])
        if axis == 0 and len(part) > 1:
            self._guard_axis0("split")
        strides = [s * self.strides[axis] for s in view.contiguous_strides(part)]
        return self._with(
            self.shape[:axis] + part + self.shape[axis + 1 :],
            self.strides[:axis] + tuple(strides) + self.strides[axis + 1 :],
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> NkiTensor:
        """Merge axes start_dim..end_dim (inclusive), which must be contiguous."""
        first, last = self._axis(start_dim), self._axis(end_dim)
        if last < first:
            raise ShapeError(f"axes {first}..{last} are empty")
        if first == 0 and last > 0:
            self._guard_axis0("merged")
        count = math.prod(self.shape[first : last + 1])
        merged = view.reshape_strides(self.shape[first : last + 1], self.strides[first : last + 1], (count,))
        return self._with(
            self.shape[:first] + (count,) + self.shape[last + 1 :],
            self.strides[:first] + merged + self.strides[last + 1 :],
        )

    def reshape(self, *shape) -> NkiTensor:
        """The same elements under another shape; on chip axis 0 stays."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)) else shape
        new = view.infer(shape, self.size)
        keep = self.on_chip or (self.dynamic is not None and self.dynamic.kind == "vector")
        if not keep:
            return self._with(new, view.reshape_strides(self.shape, self.strides, new))
        if new[0] != self.shape[0]:
            raise PartitionError(f"reshape to {new} changes the partition axis of {self.shape}")
        rest = view.reshape_strides(self.shape[1:], self.strides[1:], new[1:])
        if self.on_chip and len(new) < 2:
            new, rest = new + (1,), (1,)
        return self._with(new, (self.strides[0], *rest))

    def rearrange(self, src_pattern, dst_pattern, fixed_sizes=None) -> NkiTensor:
        """Split, permute and merge axes by name, einops style."""
        split, order, merged = view.rearrange_plan(self.shape, src_pattern, dst_pattern, dict(fixed_sizes or {}))
        return self.reshape(split).permute(order).reshape(merged)

    def view(self, dtype) -> NkiTensor:
        """Reinterpret bits; the last axis scales with the size ratio and must be contiguous."""
        new = resolve(dtype)
        if self.dynamic is not None:
            raise BoundsError("view is not possible on a view with a runtime index")
        old_size, new_size = self.dtype.itemsize, new.itemsize
        if old_size == new_size:
            return NkiTensor(self.storage, new, self.shape, self.strides, self.offset)
        if self.strides[-1] != 1 and self.shape[-1] != 1:
            raise ShapeError("view: the last axis is not contiguous")
        span = self.shape[-1] * old_size
        outer = [s * old_size for s in self.strides[:-1]] + [self.offset * old_size, self.storage.row_bytes]
        if span % new_size or any(b % new_size for b in outer):
            raise ShapeError(
                f"view: {self.dtype} of shape {self.shape} does not divide into elements of {new_size} bytes"
            )
        strides = [s * old_size // new_size for s in self.strides[:-1]] + [1]
        shape = self.shape[:-1] + (span // new_size,)
        return NkiTensor(self.storage, new, shape, strides, self.offset * old_size // new_size)

    reinterpret_cast = view

    def ap(self, pattern, offset=None, scalar_offset=None, vector_offset=None, indirect_dim: int = 0, dtype=None):
        """An explicit access pattern [[stride, count], ...] over the flat storage, in elements of `dtype`.

        The switch `ap_on_view` decides what an explicit offset means on a view that has one of its own.
        """
        new = self.dtype if dtype is None else resolve(dtype)
        if self.dynamic is not None:
            raise BoundsError("ap on a view that already has a runtime index")
        if scalar_offset is not None and vector_offset is not None:
            raise BoundsError("scalar_offset and vector_offset exclude each other")
        if self.storage.row_bytes % new.itemsize:
            raise ShapeError(f"ap: a row of {self.storage.row_bytes} bytes is not a whole number of {new} elements")
        shape, strides = _split_pattern(pattern)
        start = self._ap_base(offset, new)
        if self.on_chip:
            row = self.storage.row_bytes // new.itemsize
            if len(shape) < 2:
                raise ShapeError("ap: an on-chip pattern needs the partition level and at least one free level")
            if shape[0] > 1 and strides[0] != row:
                raise PartitionError(
                    f"ap: the first stride is {strides[0]}, the partition stride of this tensor is {row}"
                )
            strides = (row, *strides[1:])
        dynamic = self._dynamic(scalar_offset, vector_offset, indirect_dim, new, shape)
        return NkiTensor(self.storage, new, shape, strides, start, dynamic)

    def _ap_base(self, offset, new: DType) -> int:
        base = self.offset * self.dtype.itemsize
        if base % new.itemsize:
            raise ShapeError(f"ap: the view starts at byte {base}, not a multiple of {new} elements")
        base //= new.itemsize
        if offset is None or base == 0:
            return base + int(offset or 0)
        rule = config.current().ap_on_view
        if rule == "error":
            raise UnspecifiedError(
                f"ap(offset={offset}) on a view that starts at element {base}: the documents disagree whether the two "
                "add (switch ap_on_view)"
            )
        return int(offset) + (base if rule == "compose" else 0)

    def _dynamic(self, scalar, vector, indirect_dim, new: DType, shape) -> Dynamic | None:
        source = vector if scalar is None else scalar
        if source is None:
            return None
        axis = self._axis(indirect_dim)
        unit = self.strides[axis] * self.dtype.itemsize
        if unit % new.itemsize:
            raise ShapeError(f"ap: a step along axis {axis} is {unit} bytes, not a whole number of {new} elements")
        if vector is not None:
            if self.on_chip:
                raise BoundsError("vector_offset needs a tensor in HBM")
            if axis != 0:
                raise BoundsError(f"vector_offset needs indirect_dim=0, got {indirect_dim}")
            _vector_count(vector)
            return Dynamic("vector", vector, unit // new.itemsize, self.shape[0])
        if self.on_chip and axis == 0:
            raise PartitionError("scalar_offset cannot move the partition axis; pass indirect_dim of a free axis")
        return Dynamic("scalar", _scalar_source(scalar), unit // new.itemsize, self.shape[axis])

    def indirect(self, index, num_elem=None):
        """Tensor indirection of the compute engines: column i of the result is read from (or written to) the free
        element that offset i names. Offset i of a group of partitions is `index[i % G, i // G]` within the group, G is
        16 (vector, scalar, gpsimd) or 32 (tensor)."""
        if self.dynamic is not None:
            raise BoundsError("indirect on a view that already has a runtime index")
        if self.buffer is not MemoryRegion.sbuf or not self.is_contiguous():
            raise UnspecifiedError("indirect() is documented for contiguous rows in SBUF; this view is something else")
        if not isinstance(index, NkiTensor) or index.buffer is not MemoryRegion.sbuf:
            raise BoundsError("indirect: index must be a tensor in SBUF")
        if index.dtype != "uint16":
            raise DtypeError(f"indirect: index has dtype {index.dtype}, need uint16")
        if index.shape[0] != self.shape[0]:
            raise PartitionError(f"indirect: index has {index.shape[0]} partitions, the tensor has {self.shape[0]}")
        count = index.size if num_elem is None else num_elem
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ShapeError(f"indirect: num_elem is {num_elem!r}, need an int of at least 1")
        dynamic = Dynamic("indirect", index, 1, self.free_size)
        return NkiTensor(self.storage, self.dtype, (self.shape[0], count), (self.row_elements, 1), self.offset, dynamic)

    # -- resolution ---------------------------------------------------------------------------------------------

    def access(self) -> Access:
        """The access with no runtime part (static views only)."""
        if self.dynamic is not None:
            raise BoundsError("a view with a runtime index is not possible here")
        return Access(self.storage, self.dtype, self.shape, self.strides, self.offset)

    # -- what NKI does not have ---------------------------------------------------------------------------------

    def __bool__(self):
        raise LanguageError("a tensor has no truth value at compile time; use nl.while_loop or nl.fori_loop")

    def __iter__(self):
        raise LanguageError("a tensor is not iterable")

    def __setitem__(self, key, value):
        """`t[...] = tile`: a copy on chip, as library kernels commit loop-carried state. Nothing else is assignable."""
        from .isa.move import tensor_copy  # the instructions are built on this class

        if not isinstance(value, NkiTensor) or not self.on_chip or not value.on_chip:
            raise LanguageError("only an on-chip tile can be assigned to an on-chip tile; use nisa.dma_copy or memset")
        tensor_copy(self[key], value)

    def _no_operator(self, *_):
        raise LanguageError("tensors have no operators; use nisa.tensor_tensor or nisa.tensor_scalar")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_operator
    __matmul__ = __neg__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = __pow__ = _no_operator
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = __invert__ = _no_operator

    def __repr__(self):
        return f"NkiTensor({self.name!r}, shape={self.shape}, dtype={self.dtype}, buffer={self.buffer.value})"


def whole(storage: Storage) -> NkiTensor:
    """The tensor that covers a storage."""
    return NkiTensor(storage, storage.dtype, storage.shape, view.contiguous_strides(storage.shape))


def _split_pattern(pattern) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Counts and strides of [[stride, count], ...]."""
    shape, strides = [], []
    for level in pattern:
        if not isinstance(level, (list, tuple)) or len(level) != 2:
            raise ShapeError(f"ap: level {level!r} is not [stride, count]")
        stride, count = level
        if not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in level):
            raise ShapeError(f"ap: level {level!r} is not two ints")
        if count < 1 or stride < 0:
            raise BoundsError(f"ap: level {level!r} needs stride >= 0 and count >= 1")
        shape.append(int(count))
        strides.append(int(stride))
    if not shape:
        raise ShapeError("ap: empty pattern")
    return tuple(shape), tuple(strides)


def _vector_count(index) -> int:
    if not isinstance(index, NkiTensor) or index.buffer is not MemoryRegion.sbuf:
        raise BoundsError("vector_offset must be a tensor in SBUF")
    if not index.dtype.is_integer:
        raise DtypeError(f"vector_offset has dtype {index.dtype}, need an integer type")
    return index.shape[0]


def _scalar_source(source):
    if isinstance(source, VirtualRegister):
        return source
    if not isinstance(source, NkiTensor):
        raise BoundsError(f"scalar_offset is {source!r}, need a (1, 1) SBUF tensor or a register")
    if source.buffer is not MemoryRegion.sbuf or source.size != 1:
        raise BoundsError(f"scalar_offset has shape {source.shape} in {source.buffer.value}, need (1, 1) in sbuf")
    if not source.dtype.is_integer:
        raise DtypeError(f"scalar_offset has dtype {source.dtype}, need an integer type")
    return source
