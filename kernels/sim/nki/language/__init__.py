"""`nki.language`: dtypes, buffers, allocation, loops and operator tokens."""

import contextlib as _contextlib
from builtins import range as _range

import numpy as _np

from nkisim import dtypes as _dtypes
from nkisim import program as _program
from nkisim import tiles as _tiles
from nkisim.alu import TOKENS as _TOKENS
from nkisim.dtypes import (
    DType,
    bfloat16,
    bool_,
    float4_e2m1fn_x4,
    float8_e4m3,
    float8_e4m3fn,
    float8_e4m3fn_x4,
    float8_e5m2,
    float8_e5m2_x4,
    float8_e8m0fnu,
    float16,
    float32,
    int8,
    int16,
    int32,
    tfloat32,
    uint8,
    uint16,
    uint32,
)
from nkisim.errors import LanguageError as _LanguageError
from nkisim.isa.control import dynamic_range, fori_loop, while_loop
from nkisim.limits import tile_size
from nkisim.memory import MemoryRegion
from nkisim.nkiobject import NKIObject
from nkisim.registers import VirtualRegister
from nkisim.tensor import DynamicSlice as _DynamicSlice
from nkisim.tensor import NkiTensor
from nkisim.tiles import (
    broadcast_to,
    device_print,
    gather_flattened,
    load,
    load_transpose2d,
    matmul,
    rand,
    random_seed,
    rms_norm,
    softmax,
    store,
    transpose,
    where,
)

sbuf = MemoryRegion.sbuf
psum = MemoryRegion.psum
hbm = private_hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm

globals().update(_TOKENS)


def ndarray(shape, dtype, buffer=sbuf, name="", address=None):
    """A new tensor with undefined contents; `address` is (partition, byte) in SBUF or PSUM."""
    return _program.current().allocate(shape, dtype, sbuf if buffer is None else buffer, name, address)


def zeros(shape, dtype, buffer=sbuf, name=""):
    """A new tensor of zeros."""
    return _tiles.filled(shape, 0, dtype, buffer or sbuf, name)


def ones(shape, dtype, buffer=sbuf, name=""):
    """A new tensor of ones."""
    return _tiles.filled(shape, 1, dtype, buffer or sbuf, name)


def full(shape, fill_value, dtype, buffer=sbuf, name=""):
    """A new tensor of one value."""
    return _tiles.filled(shape, fill_value, dtype, buffer or sbuf, name)


def zeros_like(x, dtype=None, buffer=None, name=""):
    """Zeros of x's shape."""
    return zeros(x.shape, x.dtype if dtype is None else dtype, x.buffer if buffer is None else buffer, name)


def empty_like(x, dtype=None, buffer=None, name=""):
    """Undefined contents of x's shape."""
    return ndarray(x.shape, x.dtype if dtype is None else dtype, x.buffer if buffer is None else buffer, name)


def expand_dims(x, axis):
    """x with an axis of size 1 inserted."""
    return x.expand_dim(axis)


def shared_constant(constant, dtype=None):
    """A tensor in shared HBM with compile-time contents: an array, or the path of a .npy file."""
    array = _np.load(constant) if isinstance(constant, str) else _np.asarray(constant)
    kind = _dtypes.resolve(array.dtype if dtype is None else dtype)
    return _program.current().adopt(array.astype(kind.np), kind, "constant", "constant", shared_hbm)


def shared_identity_matrix(n, dtype=uint8, dst=None):
    """The n x n identity in SBUF; `dst` names a tile to fill instead of a new one."""
    kind = _dtypes.resolve(dtype if dst is None else dst.dtype)
    identity = _np.eye(n, dtype=_np.float32).astype(kind.np)
    program = _program.current()
    if dst is None:
        return program.adopt(identity, kind, f"identity_{n}", "constant", sbuf)
    store(dst, program.adopt(identity, kind, f"identity_{n}", "constant", shared_hbm))
    return dst


def ds(start, size):
    """The slice start..start+size."""
    return _DynamicSlice(start, size)


def static_range(start, stop=None, step=1):
    """range(), unrolled."""
    for value, what in ((start, "start"), (stop, "stop"), (step, "step")):
        if isinstance(value, (VirtualRegister, NkiTensor)):
            raise _LanguageError(f"{what} of an unrolled loop is a runtime value; use nl.fori_loop")
    return _range(start) if stop is None else _range(start, stop, step)


affine_range = sequential_range = static_range
range = static_range  # nl.range, as library kernels write it


def program_id(axis=0):
    """Index of this core in the launch grid."""
    if axis != 0:
        raise _LanguageError(f"axis {axis}: a launch grid has one axis")
    return _program.current().core


def num_programs(axes=0):
    """Number of cores in the launch grid."""
    return _program.current().cores


def program_ndim():
    """Axes of the launch grid: 0 without one."""
    return 1 if _program.current().grid else 0


@_contextlib.contextmanager
def no_reorder():
    """Instructions inside run in program order (they always do here)."""
    yield


def is_hbm(buffer):
    """True for private and shared HBM."""
    return not buffer.on_chip


def is_on_chip(buffer):
    """True for SBUF and PSUM."""
    return buffer.on_chip


def is_psum(buffer):
    """True for PSUM."""
    return buffer is psum


def is_sbuf(buffer):
    """True for SBUF."""
    return buffer is sbuf


_REMOVED = ("arange", "mgrid", "par_dim", "zeros_psum", "atomic_rmw", "spmd_dim", "nc", "invoke_clc")


def __getattr__(name):
    hint = " (removed with NKI 0.2)" if name in _REMOVED else ""
    raise AttributeError(f"nl.{name} is not modelled by this simulator{hint}")
