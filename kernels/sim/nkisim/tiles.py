"""The experimental whole-tile functions of `nki.language`: each allocates a tile and issues instructions.

They exist so that kernels which use them run; shipped kernels use `nki.isa`. What the documentation says fails on
hardware (`divide`, `mod`, `matmul` without `transpose_x`) is refused.
"""

from __future__ import annotations

import numpy as np

from . import dtypes, legal, operand, program
from .alu import TOKENS
from .dtypes import resolve
from .errors import ShapeError, UnspecifiedError
from .isa import move, reduce, vector
from .isa.common import Engine
from .isa.dma import dma_copy, dma_transpose
from .isa.matmul import nc_matmul
from .isa.random import rng, set_rng_seed
from .memory import PSUM, SBUF
from .tensor import NkiTensor


def new(shape, dtype, buffer=SBUF, name="") -> NkiTensor:
    """A tile with undefined contents."""
    return program.current().allocate(shape, dtype, buffer, name)


def _result(x: NkiTensor, dtype) -> NkiTensor:
    return new(x.shape, x.dtype if dtype is None else dtype)


def binary(name: str):
    """nl.add(x, y): tile with tile, tile with number, or tile with a (P, 1) float32 vector."""
    op = TOKENS[name]

    def call(x, y, dtype=None):
        reverse = not isinstance(x, NkiTensor)
        tile, other = (y, x) if reverse else (x, y)
        legal.on_chip(tile, "x")
        dst = _result(tile, dtype)
        if isinstance(other, NkiTensor) and (other.free_size != 1 or tile.free_size == 1):
            vector.tensor_tensor(dst, tile, other, op)
        else:
            vector.tensor_scalar(dst, tile, op, other, reverse0=reverse)
        return dst

    return call


def activated(name: str):
    """nl.exp(x): one ScalarE function over a tile."""
    op = TOKENS[name]

    def call(x, dtype=None):
        legal.on_chip(x, "x")
        dst = _result(x, dtype)
        reduce.activation(dst, op, x)
        return dst

    return call


def rsqrt(x, dtype=None):
    """1 / sqrt(x) on GpSimd, which reaches SBUF only; `nisa.activation(op=nl.rsqrt)` also takes PSUM."""
    dst = _result(x, dtype)
    vector.tensor_scalar(dst, x, TOKENS["rsqrt"], engine=Engine.gpsimd)
    return dst


def invert(x, dtype=None):
    """Bitwise not."""
    dst = _result(x, dtype)
    vector.tensor_scalar(dst, x, TOKENS["invert"])
    return dst


def logical_not(x, dtype=None):
    """1 where x is 0."""
    return binary("equal")(x, 0.0, dtype)


def negative(x, dtype=None):
    """-x."""
    return binary("multiply")(x, -1.0, dtype)


def reducing(name: str):
    """nl.max(x, axis): reduce the last free axes."""
    op = TOKENS[name]

    def call(x, axis, dtype=None, keepdims=False):
        axes = vector.reduce_axes(axis, x.ndim)
        kept = x.shape[: axes[0]] + ((1,) * len(axes) if keepdims else ())
        dst = new(kept if len(kept) > 1 else kept + (1,), x.dtype if dtype is None else dtype)
        vector.tensor_reduce(dst, op, x, axes, keepdims=keepdims)
        return dst

    return call


def mean(x, axis, dtype=None, keepdims=False):
    """Mean over the last free axes, in float32."""
    axes = vector.reduce_axes(axis, x.ndim)
    count = int(np.prod([x.shape[a] for a in axes]))
    total = reducing_sum(x, axes, dtypes.float32, keepdims)
    return binary("multiply")(total, 1.0 / count, x.dtype if dtype is None else dtype)


def load(src, dtype=None):
    """HBM to a new SBUF tile."""
    shape = src.shape if src.ndim > 1 else src.shape + (1,)
    dst = new(shape, src.dtype if dtype is None else dtype)
    dma_copy(dst, src)
    return dst


def store(dst, value):
    """A tile to HBM."""
    dma_copy(dst, value)


def load_transpose2d(src, dtype=None):
    """HBM [M, N] to a new SBUF tile [N, M]."""
    if dtype is not None and resolve(dtype) != src.dtype:
        raise UnspecifiedError("load_transpose2d with another dtype is not modelled")
    if src.ndim != 2:
        raise ShapeError(f"src has {src.ndim} axes, need 2")
    dst = new((src.shape[1], src.shape[0]), src.dtype)
    dma_transpose(dst, src)
    return dst


def transpose(x, dtype=None):
    """A PSUM tile with partition and free axes swapped."""
    if dtype is not None and resolve(dtype) != x.dtype:
        raise UnspecifiedError("transpose with another dtype is not modelled")
    dst = new((x.free_size, x.shape[0]), x.dtype, PSUM)
    move.nc_transpose(dst, x)
    return dst


def matmul(x, y, transpose_x=False):
    """x.T @ y into PSUM; only with transpose_x=True (the other form fails on hardware)."""
    if not transpose_x:
        raise UnspecifiedError("nl.matmul without transpose_x=True does not compile for hardware; use nisa.nc_matmul")
    dst = new((x.free_size, y.free_size), dtypes.float32, PSUM)
    nc_matmul(dst, x, y)
    return dst


def filled(shape, value, dtype, buffer=SBUF, name=""):
    """A tensor of one value. HBM tensors are filled through SBUF."""
    kind = resolve(dtype)
    dst = new(shape, kind, buffer, name)
    constant = value if kind.is_float else int(value)
    if dst.on_chip:
        move.memset(dst, constant)
        return dst
    flat = dst.reshape((dst.size,))
    done = 0
    while done < dst.size:
        rows = min(128, dst.size - done)
        columns = max(1, min((dst.size - done) // rows, 4096))
        tile = new((rows, columns), kind)
        move.memset(tile, constant)
        dma_copy(flat[done : done + rows * columns], tile)
        done += rows * columns
    return dst


def rand(shape, dtype, buffer=SBUF, name=""):
    """Uniform values in [0, 1)."""
    bits = new(shape, dtypes.uint16)
    rng(bits)
    dst = new(shape, dtype, buffer, name)
    vector.tensor_scalar(dst, bits, TOKENS["multiply"], 1.0 / 65536.0)
    return dst


def where(condition, x, y, dtype=None):
    """x where condition is not 0, else y."""
    for t, role in ((condition, "condition"), (x, "x"), (y, "y")):
        legal.on_chip(t, role)
    dst = _result(x, dtype)
    mask = new(condition.shape, dtypes.uint8)
    vector.tensor_scalar(mask, condition, TOKENS["not_equal"], 0.0)
    move.tensor_copy(dst, y)
    taken = new(x.shape, dst.dtype)
    move.tensor_copy(taken, x)
    move.tensor_copy_predicated(dst, taken, mask)
    return dst


def softmax(x, axis=-1, dtype=None):
    """exp(x - max) / sum over the last free axes."""
    axes = vector.reduce_axes(axis, x.ndim)
    if axes[0] != 1:
        raise UnspecifiedError("softmax over part of the free axes is not modelled")
    top = new((x.shape[0], 1), dtypes.float32)
    vector.tensor_reduce(top, TOKENS["maximum"], x, axes, negate=True)
    total, powers = new((x.shape[0], 1), dtypes.float32), new(x.shape, dtypes.float32)
    reduce.activation_reduce(powers, TOKENS["exp"], x, TOKENS["add"], total, bias=top)
    vector.reciprocal(total, total)
    dst = _result(x, dtype)
    vector.tensor_scalar(dst, powers, TOKENS["multiply"], total)
    return dst


def rms_norm(x, w, axis, n, epsilon=1e-06, dtype=None, compute_dtype=None):
    """x / sqrt(mean(x^2) + epsilon) * w over the last free axes."""
    axes = vector.reduce_axes(axis, x.ndim)
    if axes[0] != 1:
        raise UnspecifiedError("rms_norm over part of the free axes is not modelled")
    total, squares = new((x.shape[0], 1), dtypes.float32), new(x.shape, dtypes.float32)
    reduce.activation_reduce(squares, TOKENS["square"], x, TOKENS["add"], total)
    vector.tensor_scalar(total, total, TOKENS["multiply"], 1.0 / n, op1=TOKENS["add"], operand1=float(epsilon))
    reduce.activation(total, TOKENS["rsqrt"], total)
    dst = _result(x, dtype)
    vector.scalar_tensor_tensor(dst, x, TOKENS["multiply"], total, TOKENS["multiply"], w)
    return dst


def broadcast_to(x, shape, dtype=None):
    """A tile of `shape` with axes of size 1 repeated (free axes only)."""
    view = x
    for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)):
        if have != want:
            view = view.broadcast(axis, want)
    dst = new(tuple(shape), x.dtype if dtype is None else dtype)
    move.tensor_copy(dst, view)
    return dst


def gather_flattened(data, indices, axis=0, dtype=None):
    """Within each partition, data's free elements (flattened) at `indices`, in the shape of `indices`."""
    if axis != 0:
        raise UnspecifiedError(f"gather_flattened along axis {axis}: the page describes the flattened free axes only")
    gathered = new(indices.shape, data.dtype)
    move.nc_n_gather(gathered, data, indices)
    if dtype is None or resolve(dtype) == data.dtype:
        return gathered
    dst = new(indices.shape, dtype)
    move.tensor_copy(dst, gathered)
    return dst


def random_seed(seed):
    """Seed the vector engine's generator."""
    set_rng_seed(seed)


def device_print(print_prefix, tensor):
    """Print a tensor's values; unwritten elements are an error, as in any other read."""
    print(print_prefix, operand.raw(tensor, "tensor"))


reducing_sum = reducing("add")

for _name in ("add", "subtract", "multiply", "maximum", "minimum", "abs_max", "abs_min", "power", "equal", "not_equal",
              "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or", "logical_xor",
              "bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift"):  # fmt: skip
    TOKENS[_name].wrapper = binary(_name)
for _name in ("copy", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "abs", "sign", "relu", "sigmoid", "tanh",
              "silu", "silu_dx", "gelu", "gelu_dx", "gelu_apprx_tanh", "gelu_apprx_sigmoid", "gelu_apprx_sigmoid_dx",
              "softplus", "mish", "erf", "erf_dx", "sin", "arctan"):  # fmt: skip
    TOKENS[_name].wrapper = activated(_name)
TOKENS["invert"].wrapper = invert
TOKENS["rsqrt"].wrapper = rsqrt
TOKENS["logical_not"].wrapper = logical_not
TOKENS["negative"].wrapper = negative
TOKENS["max"].wrapper = reducing("maximum")
TOKENS["min"].wrapper = reducing("minimum")
TOKENS["sum"].wrapper = reducing_sum
TOKENS["prod"].wrapper = reducing("multiply")
TOKENS["mean"].wrapper = mean
