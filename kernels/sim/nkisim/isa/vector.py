"""Element-wise and reducing instructions of VectorE (and GpSimd, ScalarE where they share them)."""

from __future__ import annotations

import numpy as np

from .. import alu, legal, operand, program
from ..errors import (
    BufferKindError,
    DtypeError,
    EngineError,
    LanguageError,
    PartitionError,
    ShapeError,
    UnspecifiedError,
)
from ..memory import PSUM
from ..tensor import NkiTensor
from .common import Engine, instruction, pick

_INT32 = ("int32", "uint32")


def check_bit_operands(tensors: dict[str, NkiTensor]) -> None:
    """Bitwise operators see bit patterns: integer dtypes of one width, no cast."""
    for role, t in tensors.items():
        if not t.dtype.is_integer:
            raise DtypeError(f"{role} is {t.dtype}; a bitwise operator needs integers")
    if len({t.itemsize for t in tensors.values()}) > 1:
        raise DtypeError(
            f"a bitwise operator does not convert: {', '.join(f'{r} {t.dtype}' for r, t in tensors.items())}"
        )


def vector_or_number(value, role: str, data: NkiTensor, op: alu.Op):
    """Check operand0/operand1 of a tensor_scalar kind of instruction; returns it."""
    if op.unary:
        if value is not None and value != 0:
            raise LanguageError(f"{role} is {value!r}; {op!r} takes one input, so it must be None or 0")
        return None
    if isinstance(value, NkiTensor):
        legal.column(value, role, data.shape[0])
        if op.bitwise:
            check_bit_operands({"data": data, role: value})
        elif value.dtype != "float32":
            raise DtypeError(f"{role} is {value.dtype}; a vector operand must be float32")
        return value
    if op.bitwise:
        alu.bit_operand(value, data.dtype, role)
    return legal.number(value, role)


def operand_values(value, role: str, data: NkiTensor, op: alu.Op):
    """The operand as an array that broadcasts over (partitions, elements)."""
    if value is None:
        return None
    if isinstance(value, NkiTensor):
        if op.bitwise:
            return operand.raw(value, role).reshape(-1, 1).view(data.dtype.np)
        return operand.f32(value, role)
    return alu.bit_operand(value, data.dtype, role) if op.bitwise else np.float32(value)


def step(op: alu.Op, x, y, reverse: bool):
    """x op y, or y op x."""
    if op.bitwise:
        return alu.apply_bits(op, y, x) if reverse and y is not None else alu.apply_bits(op, x, y)
    if reverse and y is not None:
        return alu.apply(op, np.broadcast_to(y, x.shape), x)
    return alu.apply(op, x, y)


@instruction
def tensor_tensor(dst, data1, data2, op, engine=Engine.unknown, name=None):
    """dst = data1 op data2, element by element."""
    prog = program.current()
    for t, role in ((dst, "dst"), (data1, "data1"), (data2, "data2")):
        legal.on_chip(t, role)
    legal.same_elements(data1, "data1", data2, "data2")
    legal.same_elements(dst, "dst", data1, "data1")
    legal.not_both_psum(data1, "data1", data2, "data2")
    alu.check(op, "op", prog)
    if op.unary:
        raise LanguageError(f"op {op!r} takes one input")
    tiles = {"data1": data1, "data2": data2, "dst": dst}
    if op.bitwise:
        check_bit_operands(tiles)
    else:
        for role, t in tiles.items():
            legal.arithmetic(t, role)
    in_psum = any(t.buffer is PSUM for t in tiles.values())
    word = not op.bitwise and all(t.dtype in _INT32 for t in tiles.values())
    default = Engine.gpsimd if op.key == "power" or (word and not in_psum) else Engine.vector
    chosen = pick(engine, default, Engine.vector, Engine.gpsimd)
    if chosen is Engine.gpsimd and in_psum:
        raise BufferKindError(
            f"{'power runs on' if op.key == 'power' else 'engine is'} gpsimd, which cannot reach psum"
        )
    if op.key == "power" and chosen is not Engine.gpsimd:
        raise EngineError("power runs on gpsimd")
    exact = word and chosen is Engine.gpsimd

    def run():
        if op.bitwise or exact:
            x, y = operand.raw(data1, "data1"), operand.raw(data2, "data2").reshape(data1.shape)
            y = y.view(x.dtype) if op.bitwise else y
            out = alu.apply_bits(op, x, y) if op.bitwise else _exact(op, x, y, dst.dtype)
            operand.store_bits(dst, out.reshape(dst.shape).view(dst.dtype.np))
        else:
            operand.store_f32(dst, alu.apply(op, operand.f32(data1, "data1"), operand.f32(data2, "data2")))

    return prog.issue(
        "tensor_tensor", chosen, {"dst": dst}, {"data1": data1, "data2": data2}, {"op": op}, run, label=name
    )


def _exact(op: alu.Op, x: np.ndarray, y: np.ndarray, dtype) -> np.ndarray:
    """32-bit integer arithmetic; a result outside the type is not documented."""
    if op.key == "power":
        raise UnspecifiedError("power of 32-bit integers")
    wide = alu.apply_integer(op, x.astype(np.int64), y.astype(np.int64))
    info = np.iinfo(dtype.np)
    if (wide < info.min).any() or (wide > info.max).any():
        raise UnspecifiedError(f"{op!r} overflows {dtype}; the documents do not say whether it wraps")
    return wide.astype(dtype.np)


def tensor_scalar_ops(prog, data, op0, operand0, op1, operand1):
    """Check the one or two operators of a tensor_scalar; returns [(op, operand, role), ...]."""
    alu.check(op0, "op0", prog)
    steps = [(op0, vector_or_number(operand0, "operand0", data, op0), "operand0")]
    if op1 is None:
        if operand1 is not None:
            raise LanguageError("operand1 without op1")
        return steps
    alu.check(op1, "op1", prog)
    if op0.bitwise != op1.bitwise:
        raise LanguageError(f"op0 {op0!r} and op1 {op1!r} must both be bitwise or both arithmetic")
    return [*steps, (op1, vector_or_number(operand1, "operand1", data, op1), "operand1")]


@instruction
def tensor_scalar(
    dst,
    data,
    op0,
    operand0=None,
    reverse0=False,
    op1=None,
    operand1=None,
    reverse1=False,
    engine=Engine.unknown,
    name=None,
):
    """dst = (data op0 operand0) op1 operand1, operands broadcast along the free axes."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    legal.same_elements(dst, "dst", data, "data")
    steps = tensor_scalar_ops(prog, data, op0, operand0, op1, operand1)
    reverses = (bool(reverse0), bool(reverse1))
    if op0.bitwise:
        check_bit_operands({"data": data, "dst": dst})
    else:
        legal.arithmetic(data, "data")
        legal.arithmetic(dst, "dst")
    chosen = _tensor_scalar_engine(prog, engine, op0, op1, dst, data, operand0, operand1)

    def run():
        if op0.bitwise:
            values = operand.raw(data, "data").reshape(data.shape[0], -1)
        else:
            values = operand.f32(data, "data")
        for (op, value, role), reverse in zip(steps, reverses, strict=False):
            values = step(op, values, operand_values(value, role, data, op), reverse)
        if op0.bitwise:
            operand.store_bits(dst, values.reshape(dst.shape).view(dst.dtype.np))
        else:
            operand.store_f32(dst, values)

    reads = {"data": data, "operand0": operand0, "operand1": operand1}
    attrs = {"op0": op0, "op1": op1, "reverse0": reverses[0], "reverse1": reverses[1]}
    attrs |= {r: v for r, v in (("operand0", operand0), ("operand1", operand1)) if not isinstance(v, NkiTensor)}
    return prog.issue("tensor_scalar", chosen, {"dst": dst}, reads, attrs, run, label=name)


def _tensor_scalar_engine(prog, asked, op0, op1, dst, data, *operands):
    in_psum = any(isinstance(t, NkiTensor) and t.buffer is PSUM for t in (dst, data, *operands))
    chosen = pick(asked, Engine.vector, Engine.vector, Engine.scalar, Engine.gpsimd)
    if op0.bitwise and chosen is not Engine.vector:
        raise EngineError("bitwise operators run on vector")
    if chosen is Engine.gpsimd:
        if in_psum:
            raise BufferKindError("gpsimd cannot reach psum")
        if op0.key != "rsqrt" or op1 is not None:
            raise EngineError("tensor_scalar on gpsimd is for rsqrt alone")
    if chosen is Engine.scalar:
        legal.needs(prog, 3, "tensor_scalar on scalar")
        pair = (op0.key, None if op1 is None else op1.key)
        if pair not in (("multiply", "add"), ("multiply", None), ("add", None)):
            raise EngineError(f"ScalarE does multiply then add, multiply, or add; got {pair}")
    return chosen


@instruction
def scalar_tensor_tensor(dst, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False, name=None):
    """dst = (data op0 operand0) op1 operand1; operand0 a number or vector, operand1 a tile. Arithmetic only."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    legal.on_chip(operand1, "operand1")
    legal.same_elements(data, "data", operand1, "operand1")
    legal.same_elements(dst, "dst", data, "data")
    legal.not_both_psum(data, "data", operand1, "operand1")
    for op, role in ((op0, "op0"), (op1, "op1")):
        alu.check(op, role, prog)
        if op.bitwise:
            raise LanguageError(f"{role} {op!r} is bitwise; only arithmetic operators here")
    if op1.unary:
        raise LanguageError(f"op1 {op1!r} takes one input")
    for t, role in ((dst, "dst"), (data, "data"), (operand1, "operand1")):
        legal.arithmetic(t, role)
    first = vector_or_number(operand0, "operand0", data, op0)

    def run():
        values = step(op0, operand.f32(data, "data"), operand_values(first, "operand0", data, op0), bool(reverse0))
        operand.store_f32(dst, step(op1, values, operand.f32(operand1, "operand1"), bool(reverse1)))

    reads = {"data": data, "operand0": operand0, "operand1": operand1}
    attrs = {"op0": op0, "op1": op1, "reverse0": bool(reverse0), "reverse1": bool(reverse1)}
    if not isinstance(operand0, NkiTensor):
        attrs["operand0"] = operand0
    return prog.issue("scalar_tensor_tensor", Engine.vector, {"dst": dst}, reads, attrs, run, label=name)


@instruction
def reciprocal(dst, data, name=None):
    """dst = 1 / data on VectorE."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    legal.same_elements(dst, "dst", data, "data")
    legal.arithmetic(dst, "dst")
    legal.arithmetic(data, "data")

    def run():
        with np.errstate(all="ignore"):
            operand.store_f32(dst, (1.0 / operand.f32(data, "data").astype(np.float64)).astype(np.float32))

    return prog.issue("reciprocal", Engine.vector, {"dst": dst}, {"data": data}, {}, run, label=name)


@instruction
def tensor_reduce(dst, op, data, axis, negate=False, keepdims=False, name=None):
    """Reduce the last free axes named by `axis`; with `negate` the result is multiplied by -1."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    alu.check(op, "op", prog)
    axes = reduce_axes(axis, data.ndim)
    kept = int(np.prod(data.shape[1 : axes[0]], dtype=np.int64))
    legal.same_partitions(dst, "dst", data, "data")
    if dst.free_size != kept:
        raise ShapeError(
            f"dst has {dst.free_size} elements a partition, reducing axes {axes} of {data.shape} leaves {kept}"
        )
    if op.bitwise:
        check_bit_operands({"data": data, "dst": dst})
        if negate:
            raise LanguageError("negate needs an arithmetic op")
    else:
        legal.arithmetic(dst, "dst")
        legal.arithmetic(data, "data")

    def run():
        if op.bitwise:
            values = operand.raw(data, "data").reshape(data.shape[0], kept, -1)
            operand.store_bits(dst, alu.reduce_bits(op, values).reshape(dst.shape).view(dst.dtype.np))
            return
        values = alu.reduce_values(op, operand.f32(data, "data").reshape(data.shape[0], kept, -1))
        operand.store_f32(dst, -values if negate else values)

    attrs = {"op": op, "axis": axes, "negate": bool(negate), "keepdims": bool(keepdims)}
    return prog.issue("tensor_reduce", Engine.vector, {"dst": dst}, {"data": data}, attrs, run, label=name)


def reduce_axes(axis, ndim: int) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    axes = tuple(sorted(legal.integer(a, "axis") + (ndim if a < 0 else 0) for a in axes))
    if not axes or axes != tuple(range(axes[0], ndim)):
        raise ShapeError(f"axis {axis} of a tensor with {ndim} axes: need the last free axes, without gaps")
    if axes[0] == 0:
        raise PartitionError("axis 0 is the partition axis; it is not reduced here")
    return axes


@instruction
def tensor_partition_reduce(dst, op, data, name=None):
    """Reduce across partitions (GpSimd): add, maximum, bitwise_or, bitwise_and."""
    prog = program.current()
    for t, role in ((dst, "dst"), (data, "data")):
        legal.on_chip(t, role)
        if t.buffer is PSUM:
            raise BufferKindError(f"{role} is in psum, which gpsimd cannot reach")
    alu.check(op, "op", prog)
    if op.key not in ("add", "maximum", "bitwise_or", "bitwise_and"):
        raise LanguageError(f"op is {op!r}, need nl.add, nl.maximum, nl.bitwise_or or nl.bitwise_and")
    if dst.shape[0] != 1 or dst.free_size != data.free_size:
        raise ShapeError(f"dst has shape {dst.shape}, need 1 partition of {data.free_size} elements")
    if op.bitwise:
        check_bit_operands({"data": data, "dst": dst})

    def run():
        if op.bitwise:
            operand.store_bits(dst, alu.reduce_bits(op, operand.raw(data, "data"), axis=0).reshape(dst.shape))
        else:
            operand.store_f32(dst, alu.reduce_values(op, operand.f32(data, "data"), axis=0))

    return prog.issue(
        "tensor_partition_reduce", Engine.gpsimd, {"dst": dst}, {"data": data}, {"op": op}, run, label=name
    )


@instruction
def tensor_tensor_scan(dst, data0, data1, initial, op0, op1, reverse0=False, reverse1=False, name=None):
    """result[i] = (data0[i] op0 result[i-1]) op1 data1[i], starting from `initial`."""
    prog = program.current()
    for t, role in ((dst, "dst"), (data0, "data0"), (data1, "data1")):
        legal.on_chip(t, role)
        legal.arithmetic(t, role)
    legal.same_elements(data0, "data0", data1, "data1")
    legal.same_elements(dst, "dst", data0, "data0")
    legal.not_both_psum(data0, "data0", data1, "data1")
    for op, role in ((op0, "op0"), (op1, "op1")):
        alu.check(op, role, prog)
        if op.bitwise or op.unary:
            raise LanguageError(f"{role} {op!r} must be a binary arithmetic operator")
    if isinstance(initial, NkiTensor):
        legal.column(initial, "initial", data0.shape[0])
    else:
        legal.number(initial, "initial")

    def run():
        a, b = operand.f32(data0, "data0"), operand.f32(data1, "data1")
        tile = isinstance(initial, NkiTensor)
        state = operand.f32(initial, "initial")[:, 0] if tile else np.full(a.shape[0], initial, np.float32)
        out = np.empty_like(a)
        for i in range(a.shape[1]):
            state = step(op0, a[:, i], state, bool(reverse0))
            state = step(op1, state, b[:, i], bool(reverse1))
            out[:, i] = state
        operand.store_f32(dst, out)

    reads = {"data0": data0, "data1": data1, "initial": initial}
    attrs = {"op0": op0, "op1": op1, "reverse0": bool(reverse0), "reverse1": bool(reverse1)}
    if not isinstance(initial, NkiTensor):
        attrs["initial"] = initial
    return prog.issue("tensor_tensor_scan", Engine.vector, {"dst": dst}, reads, attrs, run, label=name)
