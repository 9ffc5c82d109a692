"""Instructions with engine reduction registers, and the activations.

VectorE keeps one float32 accumulator for each partition, shared by tensor_scalar_reduce, range_select, select_reduce,
exponential and tensor_scalar_cumulative. Even `idle` may disturb it, so a chain must start with `reset_reduce` or
`load_reduce`. ScalarE keeps another set for activations, which `idle` leaves alone.
"""

from __future__ import annotations

import numpy as np

from .. import activations, alu, legal, operand, program
from ..chip import PARTITIONS
from ..errors import CastError, DtypeError, LanguageError, ReductionStateError
from ..tensor import NkiTensor
from .common import Engine, ReduceCmd, instruction, member, switches
from .vector import operand_values, step, vector_or_number

FP32_MIN = -3.4028235e38
_COMPARE = ("equal", "less", "less_equal", "greater", "greater_equal")


def _accumulate(prog, which: str, op: alu.Op, cmd: ReduceCmd, rows: slice, values: np.ndarray, init=None) -> None:
    """Apply a reduce command to an engine's registers."""
    if cmd is ReduceCmd.idle:
        if which == "vector":
            prog.accumulators[which] = None
        return
    state = prog.accumulators[which]
    start = np.float32(alu.IDENTITY[op.key])
    if cmd in (ReduceCmd.reset, ReduceCmd.reset_reduce):
        state = np.full(PARTITIONS, start, np.float32) if state is None else state.copy()
        state[rows] = start
    elif cmd is ReduceCmd.load_reduce:
        state = np.full(PARTITIONS, np.nan, np.float32) if state is None else state.copy()
        state[rows] = np.broadcast_to(np.asarray(init, np.float32).reshape(-1), (values.shape[0],))
    elif state is None:
        raise ReductionStateError(
            f"reduce_cmd.reduce: nothing has reset the {which} accumulators since they were disturbed"
        )
    if cmd is not ReduceCmd.reset:
        if np.isnan(state[rows]).any() and not np.isnan(values).any():
            raise ReductionStateError(f"the {which} accumulators of some of these partitions were never set")
        state = state.copy()
        state[rows] = alu.combine(op, state[rows], alu.reduce_values(op, values))
    prog.accumulators[which] = state


def _rows(t: NkiTensor) -> slice:
    return slice(t.start_partition, t.start_partition + t.shape[0])


def _read_out(prog, which: str, result: NkiTensor, rows: slice, negate: bool = False) -> None:
    state = prog.accumulators[which]
    if state is None:
        raise ReductionStateError(f"reduce_res reads the {which} accumulators, which nothing has set")
    values = state[rows].reshape(-1, 1)
    operand.store_f32(result, -values if negate else values, "reduce_res")


def _commands(cmd, *allowed: ReduceCmd) -> ReduceCmd:
    member(cmd, ReduceCmd, "reduce_cmd")
    if cmd not in allowed:
        raise LanguageError(f"reduce_cmd.{cmd.name} is not one of {', '.join(c.name for c in allowed)}")
    return cmd


def _reduction(op, role: str, *allowed: str) -> alu.Op:
    if not isinstance(op, alu.Op) or op.key not in allowed:
        raise LanguageError(f"{role} is {op!r}, need {' or '.join('nl.' + a for a in allowed)}")
    return op


def _init(value, cmd: ReduceCmd, data: NkiTensor):
    """Check reduce_init: given exactly when the command loads it."""
    if cmd is not ReduceCmd.load_reduce:
        if value is not None and (isinstance(value, NkiTensor) or value != 0):
            raise LanguageError("reduce_init is for reduce_cmd.load_reduce")
        return None
    if isinstance(value, NkiTensor):
        legal.dtype_in(legal.column(value, "reduce_init", data.shape[0]), "reduce_init", "float32")
        return value
    if value is None:
        raise LanguageError("reduce_cmd.load_reduce needs reduce_init")
    return legal.number(value, "reduce_init")


def _init_values(value):
    return operand.f32(value, "reduce_init") if isinstance(value, NkiTensor) else value


def _bound_rows(bound, partitions: int) -> int:
    """Partitions that a bound of range_select must have: a longer one gives its first rows (switch `range_bounds`)."""
    longer = isinstance(bound, NkiTensor) and bound.shape[0] > partitions and switches().range_bounds == "first"
    return bound.shape[0] if longer else partitions


def _elementwise(dst, data, role: str = "data") -> None:
    legal.on_chip(dst, "dst")
    legal.on_chip(data, role)
    legal.same_elements(dst, "dst", data, role)
    legal.arithmetic(dst, "dst")
    legal.arithmetic(data, role)


# -- ScalarE ------------------------------------------------------------------------------------------------------


@instruction
def activation(
    dst, op, data, bias=None, scale=1.0, reduce_op=None, reduce_res=None, reduce_cmd=ReduceCmd.idle, name=None
):
    """dst = op(data * scale + bias) on ScalarE, with an optional sum over the free axes."""
    return _activation("activation", dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd, name)


@instruction
def activation_reduce(dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None):
    """activation with reduce_cmd.reset_reduce."""
    legal.on_chip(reduce_res, "reduce_res")
    return _activation(
        "activation_reduce", dst, op, data, bias, scale, reduce_op, reduce_res, ReduceCmd.reset_reduce, name
    )


def _activation(label, dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd, name):
    prog = program.current()
    _elementwise(dst, data)
    function = alu.activation(op, "op")
    if function == "prelu":
        raise LanguageError("prelu needs the relu_param of activate2")
    cmd = _commands(reduce_cmd, ReduceCmd.idle, ReduceCmd.reset, ReduceCmd.reduce, ReduceCmd.reset_reduce)
    _check_scale_bias(prog, data, scale, bias)
    if reduce_op is not None:
        _reduction(reduce_op, "reduce_op", "add")
    elif cmd in (ReduceCmd.reduce, ReduceCmd.reset_reduce):
        raise LanguageError(f"reduce_cmd.{cmd.name} needs reduce_op=nl.add")
    if reduce_res is not None:
        legal.column(reduce_res, "reduce_res", data.shape[0])
        legal.arithmetic(reduce_res, "reduce_res")

    def run():
        values = operand.f32(data, "data")
        with np.errstate(all="ignore"):
            values = values * (operand.f32(scale, "scale") if isinstance(scale, NkiTensor) else np.float32(scale))
            if bias is not None:
                values = values + (operand.f32(bias, "bias") if isinstance(bias, NkiTensor) else np.float32(bias))
        out = activations.evaluate(function, values)
        operand.store_f32(dst, out)
        _accumulate(prog, "scalar", alu.TOKENS["add"], cmd, _rows(data), out)
        if reduce_res is not None:
            _read_out(prog, "scalar", reduce_res, _rows(data))

    writes = {"dst": dst, "reduce_res": reduce_res}
    reads = {"data": data, "scale": scale, "bias": bias}
    attrs = {"op": op, "reduce_op": reduce_op, "reduce_cmd": cmd}
    attrs |= {r: v for r, v in (("scale", scale), ("bias", bias)) if not isinstance(v, NkiTensor)}
    return prog.issue(label, Engine.scalar, writes, reads, attrs, run, label=name)


def _check_scale_bias(prog, data, scale, bias) -> None:
    if isinstance(scale, NkiTensor):
        legal.dtype_in(legal.column(scale, "scale", data.shape[0]), "scale", "float32")
    else:
        legal.number(scale, "scale")
    if isinstance(bias, NkiTensor):
        legal.column(bias, "bias", data.shape[0])
        legal.arithmetic(bias, "bias")
        if bias.dtype == "tfloat32":
            raise DtypeError("bias is tfloat32; any other dtype is possible")
    elif bias is not None:
        legal.number(bias, "bias")
        legal.needs(prog, 3, "a number as bias")


@instruction
def activate2(
    dst,
    op,
    data,
    imm0,
    imm1,
    op0,
    op1,
    relu_param=0.0,
    reverse0=False,
    reverse1=False,
    reduce_op=None,
    reduce_res=None,
    reduce_cmd=ReduceCmd.idle,
    name=None,
):
    """dst = op((data op0 imm0) op1 imm1) on ScalarE of NeuronCore-v4, with an optional reduction."""
    prog = program.current()
    legal.needs(prog, 4, "activate2")
    _elementwise(dst, data)
    function = alu.activation(op, "op")
    pair = tuple(getattr(o, "op_name", None) for o in (op0, op1))
    allowed = [("multiply", "add"), ("multiply", "subtract"), ("multiply", "bypass"), ("add", "bypass")]
    if pair not in [*allowed, ("subtract", "bypass"), ("bypass", "bypass")]:
        raise LanguageError(f"(op0, op1) is {pair}, which is not a documented pair")
    cmd = _commands(reduce_cmd, ReduceCmd.idle, ReduceCmd.reset, ReduceCmd.reduce, ReduceCmd.reset_reduce)
    stages = [
        (o, imm, f"imm{i}", bool(r)) for i, (o, imm, r) in enumerate(((op0, imm0, reverse0), (op1, imm1, reverse1)))
    ]
    stages = [s for s in stages if s[0].op_name != "bypass"]
    for o, imm, role, _ in stages:
        vector_or_number(imm, role, data, o)
    if isinstance(relu_param, NkiTensor):
        legal.column(relu_param, "relu_param", data.shape[0])
    reduction = None
    if reduce_op is not None:
        reduction = _reduction(reduce_op, "reduce_op", "add", "maximum", "minimum", "abs_max", "abs_min")
    elif cmd is not ReduceCmd.idle:
        raise LanguageError(f"reduce_cmd.{cmd.name} needs reduce_op")
    if reduce_res is not None:
        legal.column(reduce_res, "reduce_res", data.shape[0])

    def run():
        values = operand.f32(data, "data")
        for o, imm, role, reverse in stages:
            values = step(o, values, operand_values(imm, role, data, o), reverse)
        slope = operand.f32(relu_param, "relu_param") if isinstance(relu_param, NkiTensor) else float(relu_param)
        out = activations.evaluate(function, values, slope)
        operand.store_f32(dst, out)
        if reduction is not None:
            _accumulate(prog, "scalar", reduction, cmd, _rows(data), out)
        if reduce_res is not None:
            _read_out(prog, "scalar", reduce_res, _rows(data))

    reads = {"data": data, "imm0": imm0, "imm1": imm1, "relu_param": relu_param}
    attrs = {"op": op, "op0": op0, "op1": op1, "reverse0": bool(reverse0), "reverse1": bool(reverse1)}
    attrs |= {"reduce_op": reduce_op, "reduce_cmd": cmd}
    attrs |= {
        r: v for r, v in (("imm0", imm0), ("imm1", imm1), ("relu_param", relu_param)) if not isinstance(v, NkiTensor)
    }
    return prog.issue("activate2", Engine.scalar, {"dst": dst, "reduce_res": reduce_res}, reads, attrs, run, label=name)


# -- VectorE ------------------------------------------------------------------------------------------------------


@instruction
def exponential(dst, src, max_value=0.0, reduce_res=None, reduce_cmd=ReduceCmd.idle, reduce_init=0.0, name=None):
    """dst = exp(src - max_value) on VectorE of NeuronCore-v4, with an optional running sum."""
    prog = program.current()
    legal.needs(prog, 4, "exponential")
    _elementwise(dst, src, "src")
    cmd = _commands(reduce_cmd, ReduceCmd.idle, ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.load_reduce)
    init = _init(reduce_init, cmd, src)
    if isinstance(max_value, NkiTensor):
        legal.dtype_in(legal.column(max_value, "max_value", src.shape[0]), "max_value", "float32")
    else:
        legal.number(max_value, "max_value")
    _check_result(reduce_res, cmd, src)

    def run():
        with np.errstate(all="ignore"):
            top = operand.f32(max_value, "max_value") if isinstance(max_value, NkiTensor) else np.float32(max_value)
            out = activations.evaluate("exp", operand.f32(src, "src") - top)
        operand.store_f32(dst, out)
        _accumulate(prog, "vector", alu.TOKENS["add"], cmd, _rows(src), out, _init_values(init))
        if reduce_res is not None:
            _read_out(prog, "vector", reduce_res, _rows(src))

    reads = {"src": src, "max_value": max_value, "reduce_init": init}
    attrs = {"reduce_cmd": cmd}
    attrs |= {r: v for r, v in (("max_value", max_value), ("reduce_init", init)) if not isinstance(v, NkiTensor)}
    return prog.issue(
        "exponential", Engine.vector, {"dst": dst, "reduce_res": reduce_res}, reads, attrs, run, label=name
    )


def _check_result(reduce_res, cmd: ReduceCmd, data: NkiTensor) -> None:
    if reduce_res is None:
        return
    legal.column(reduce_res, "reduce_res", data.shape[0])
    legal.arithmetic(reduce_res, "reduce_res")
    if cmd is ReduceCmd.idle:
        raise ReductionStateError("reduce_res with reduce_cmd.idle reads accumulators in an unknown state")


@instruction
def tensor_scalar_reduce(
    dst,
    data,
    op0,
    operand0,
    reduce_op,
    reduce_res=None,
    reverse0=False,
    reduce_cmd=ReduceCmd.reset_reduce,
    reduce_init=None,
    reduce_res_negate=False,
    name=None,
):
    """dst = data op0 operand0, and its reduction over the free axes; `reduce_res_negate` negates only the read-out."""
    prog = program.current()
    _elementwise(dst, data)
    alu.check(op0, "op0", prog)
    if op0.bitwise:
        raise LanguageError(f"op0 {op0!r} is bitwise; only arithmetic operators here")
    if reverse0:
        raise LanguageError("reverse0 is not supported by tensor_scalar_reduce")
    value = vector_or_number(operand0, "operand0", data, op0)
    reduction = _reduction(reduce_op, "reduce_op", "add", "multiply", "maximum", "minimum", "max", "min")
    cmd = _commands(reduce_cmd, ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.load_reduce)
    init = _init(reduce_init, cmd, data)
    _check_result(reduce_res, cmd, data)

    def run():
        out = step(op0, operand.f32(data, "data"), operand_values(value, "operand0", data, op0), False)
        operand.store_f32(dst, out)
        _accumulate(prog, "vector", reduction, cmd, _rows(data), out, _init_values(init))
        if reduce_res is not None:
            _read_out(prog, "vector", reduce_res, _rows(data), bool(reduce_res_negate))

    reads = {"data": data, "operand0": value, "reduce_init": init}
    attrs = {"op0": op0, "reduce_op": reduce_op, "reduce_cmd": cmd, "reduce_res_negate": bool(reduce_res_negate)}
    attrs |= {r: v for r, v in (("operand0", value), ("reduce_init", init)) if not isinstance(v, NkiTensor)}
    writes = {"dst": dst, "reduce_res": reduce_res}
    return prog.issue("tensor_scalar_reduce", Engine.vector, writes, reads, attrs, run, label=name)


@instruction
def tensor_scalar_cumulative(dst, src, op0, op1, imm0, imm1=None, reduce_cmd=ReduceCmd.reset_reduce, name=None):
    """dst[i] = running op1 over (src[i] op0 imm0)."""
    prog = program.current()
    _elementwise(dst, src, "src")
    for t, role in ((dst, "dst"), (src, "src")):
        if t.dtype in ("int32", "uint32"):
            raise DtypeError(f"{role} is {t.dtype}; 32-bit integers are not supported here")
    alu.check(op0, "op0", prog)
    if op0.bitwise:
        raise LanguageError(f"op0 {op0!r} is bitwise; only arithmetic operators here")
    running = _reduction(op1, "op1", "add", "subtract", "multiply", "maximum", "minimum", "max", "min")
    value = vector_or_number(imm0, "imm0", src, op0)
    cmd = _commands(reduce_cmd, ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.load_reduce)
    init = _init(imm1, cmd, src)

    def run():
        values = step(op0, operand.f32(src, "src"), operand_values(value, "imm0", src, op0), False)
        rows = _rows(src)
        accumulator = prog.accumulators["vector"]
        if cmd is ReduceCmd.reset_reduce:
            start = 0.0 if running.key in ("add", "subtract") else alu.IDENTITY[running.key]
            state = np.full(values.shape[0], start, np.float32)
        elif cmd is ReduceCmd.load_reduce:
            state = np.broadcast_to(np.asarray(_init_values(init), np.float32).reshape(-1), (values.shape[0],))
        elif accumulator is None:
            raise ReductionStateError(
                "reduce_cmd.reduce: nothing has reset the vector accumulators since they were disturbed"
            )
        else:
            state = accumulator[rows]
        out = np.empty_like(values)
        for i in range(values.shape[1]):
            state = alu.apply(running, values[:, i], state)
            out[:, i] = state
        operand.store_f32(dst, out)
        after = np.full(PARTITIONS, np.nan, np.float32) if accumulator is None else accumulator.copy()
        after[rows] = state
        prog.accumulators["vector"] = after

    reads = {"src": src, "imm0": value, "imm1": init}
    attrs = {"op0": op0, "op1": op1, "reduce_cmd": cmd}
    attrs |= {r: v for r, v in (("imm0", value), ("imm1", init)) if not isinstance(v, NkiTensor)}
    return prog.issue("tensor_scalar_cumulative", Engine.vector, {"dst": dst}, reads, attrs, run, label=name)


@instruction
def range_select(
    dst,
    on_true_tile,
    comp_op0,
    comp_op1,
    bound0,
    bound1,
    reduce_cmd=ReduceCmd.reset_reduce,
    reduce_res=None,
    reduce_op=alu.TOKENS["maximum"],
    range_start=0,
    on_false_value=FP32_MIN,
    name=None,
):
    """Keep elements whose index (range_start + position) passes both comparisons; the others become FP32_MIN."""
    prog = program.current()
    legal.needs(prog, 3, "range_select")
    _elementwise(dst, on_true_tile, "on_true_tile")
    if not on_true_tile.dtype.is_float:
        raise DtypeError(f"on_true_tile is {on_true_tile.dtype}, need a float")
    for op, role in ((comp_op0, "comp_op0"), (comp_op1, "comp_op1")):
        if not isinstance(op, alu.Op) or op.key not in _COMPARE:
            raise LanguageError(f"{role} is {op!r}, need one of {', '.join(_COMPARE)}")
    for bound, role in ((bound0, "bound0"), (bound1, "bound1")):
        legal.dtype_in(legal.column(bound, role, _bound_rows(bound, on_true_tile.shape[0])), role, "float32")
    bound0, bound1 = (b[: on_true_tile.shape[0]] for b in (bound0, bound1))
    _reduction(reduce_op, "reduce_op", "maximum", "max")
    if np.float32(legal.number(on_false_value, "on_false_value")) != np.float32(FP32_MIN):
        raise LanguageError(f"on_false_value is {on_false_value}, the hardware has only FP32_MIN ({FP32_MIN})")
    start = legal.integer(range_start, "range_start")
    if not 0 <= start + on_true_tile.free_size <= 2**24:
        raise LanguageError(f"indices reach {start + on_true_tile.free_size}, float32 counts to 2^24")
    cmd = _commands(reduce_cmd, ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.idle)
    if reduce_res is not None:
        _check_result(reduce_res, cmd, on_true_tile)

    def run():
        values = operand.f32(on_true_tile, "on_true_tile")
        index = np.broadcast_to(np.float32(start) + np.arange(values.shape[1], dtype=np.float32), values.shape)
        keep = alu.apply(comp_op0, index, operand.f32(bound0, "bound0")) != 0
        keep &= alu.apply(comp_op1, index, operand.f32(bound1, "bound1")) != 0
        out = np.where(keep, values, np.float32(FP32_MIN))
        if dst.dtype.is_fp8 and not keep.all():
            raise CastError(f"the fill value does not fit {dst.dtype}; use a 16- or 32-bit dst")
        operand.store_f32(dst, out)
        _accumulate(prog, "vector", alu.TOKENS["maximum"], cmd, _rows(on_true_tile), out)
        if reduce_res is not None:
            _read_out(prog, "vector", reduce_res, _rows(on_true_tile))

    reads = {"on_true_tile": on_true_tile, "bound0": bound0, "bound1": bound1}
    attrs = {"comp_op0": comp_op0, "comp_op1": comp_op1, "reduce_cmd": cmd, "range_start": start}
    return prog.issue(
        "range_select", Engine.vector, {"dst": dst, "reduce_res": reduce_res}, reads, attrs, run, label=name
    )


@instruction
def select_reduce(
    dst,
    predicate,
    on_true,
    on_false,
    reduce_res=None,
    reduce_cmd=ReduceCmd.idle,
    reduce_op=alu.TOKENS["maximum"],
    reverse_pred=False,
    name=None,
):
    """dst = on_true where the predicate holds, else on_false (number or vector), with an optional maximum."""
    prog = program.current()
    _elementwise(dst, on_true, "on_true")
    legal.on_chip(predicate, "predicate")
    legal.same_elements(on_true, "on_true", predicate, "predicate")
    legal.dtype_in(predicate, "predicate", "int8", "uint8", "int16", "uint16")
    legal.not_both_psum(on_true, "on_true", predicate, "predicate")
    if on_true.dtype in ("tfloat32", "int32", "uint32"):
        raise DtypeError(f"on_true is {on_true.dtype}, which is not supported here")
    if isinstance(on_false, NkiTensor):
        legal.column(on_false, "on_false", on_true.shape[0])
    else:
        legal.number(on_false, "on_false")
    _reduction(reduce_op, "reduce_op", "maximum", "max")
    cmd = _commands(reduce_cmd, ReduceCmd.idle, ReduceCmd.reset_reduce, ReduceCmd.reduce)
    _check_result(reduce_res, cmd, on_true)

    def run():
        take = (operand.raw(predicate, "predicate").reshape(on_true.shape[0], -1) != 0) != bool(reverse_pred)
        other = operand.f32(on_false, "on_false") if isinstance(on_false, NkiTensor) else np.float32(on_false)
        out = np.where(take, operand.f32(on_true, "on_true"), other)
        operand.store_f32(dst, out)
        _accumulate(prog, "vector", alu.TOKENS["maximum"], cmd, _rows(on_true), out)
        if reduce_res is not None:
            _read_out(prog, "vector", reduce_res, _rows(on_true))

    reads = {"predicate": predicate, "on_true": on_true, "on_false": on_false}
    attrs = {"reduce_cmd": cmd, "reverse_pred": bool(reverse_pred)}
    if not isinstance(on_false, NkiTensor):
        attrs["on_false"] = on_false
    return prog.issue(
        "select_reduce", Engine.vector, {"dst": dst, "reduce_res": reduce_res}, reads, attrs, run, label=name
    )
