"""Operand legality of each instruction: a legal call runs, each broken rule raises."""

import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl
from nkisim import errors

P, F = nl.psum, nl.float32


def sb(shape=(8, 16), dtype=nl.float32, fill=1, **kw):
    """A tile of one value (undefined with fill=None)."""
    t = nl.ndarray(shape, dtype, **kw)
    if fill is not None:
        nisa.memset(t, float(fill) if t.dtype.is_float else fill)
    return t


def col(n=8, dtype=nl.float32, fill=1, **kw):
    """A (n, 1) vector operand."""
    return sb((n, 1), dtype, fill, **kw)


def hbm(shape=(8, 16), dtype=nl.float32):
    """A tensor in HBM."""
    return nl.ndarray(shape, dtype, nl.hbm)


E, L, D, B, S, T, G, PE = (
    errors.EngineError, errors.LanguageError, errors.DtypeError, errors.BufferKindError, errors.ShapeError,
    errors.TargetError, errors.ReductionStateError, errors.PartitionError,
)  # fmt: skip
eng = nisa.engine
cmd = nisa.reduce_cmd

LEGAL = [
    ("copy", lambda: nisa.tensor_copy(sb(), sb())),
    ("copy shapes", lambda: nisa.tensor_copy(sb((8, 4, 4)), sb((8, 16)))),
    ("copy psum", lambda: nisa.tensor_copy(sb(buffer=P), sb(), engine=eng.scalar)),
    ("copy gpsimd", lambda: nisa.tensor_copy(sb(), sb(), engine=eng.gpsimd)),
    ("copy legacy dtype", lambda: nisa.tensor_copy(dst=sb(), src=sb(), dtype=nl.float32)),
    ("tt", lambda: nisa.tensor_tensor(sb(), sb(), sb(buffer=P), op=nl.add)),
    ("tt int", lambda: nisa.tensor_tensor(sb(dtype=nl.int32), sb(dtype=nl.int32), sb(dtype=nl.int32), op=nl.add)),
    ("tt bits", lambda: nisa.tensor_tensor(sb(dtype=nl.int8), sb(dtype=nl.uint8), sb(dtype=nl.int8), op=nl.bitwise_or)),
    ("ts", lambda: nisa.tensor_scalar(sb(), sb(), nl.multiply, col(), op1=nl.add, operand1=2.0)),
    ("ts unary", lambda: nisa.tensor_scalar(sb(), sb(), nl.abs, None)),
    ("ts shift", lambda: nisa.tensor_scalar(sb(dtype=nl.uint8), sb(dtype=nl.uint8), nl.right_shift, 4)),
    ("stt", lambda: nisa.scalar_tensor_tensor(sb(), sb(), nl.multiply, col(), nl.add, sb(buffer=P))),
    ("reduce", lambda: nisa.tensor_reduce(col(), nl.add, sb((8, 4, 4)), axis=(1, 2))),
    ("reduce last", lambda: nisa.tensor_reduce(sb((8, 4)), nl.maximum, sb((8, 4, 4)), axis=2, negate=True)),
    ("reduce negative axis", lambda: nisa.tensor_reduce(sb((8, 4)), nl.add, sb((8, 4, 4)), axis=-1)),
    ("activation", lambda: nisa.activation(sb(), nl.exp, sb(), bias=col(dtype=nl.bfloat16), scale=col())),
    ("reciprocal", lambda: nisa.reciprocal(sb(), sb(buffer=P))),
    ("exponential", lambda: nisa.exponential(sb(), sb(), max_value=col())),
    ("tsr", lambda: nisa.tensor_scalar_reduce(sb(), sb(), nl.multiply, 2.0, nl.max, col())),
    ("predicated", lambda: nisa.tensor_copy_predicated(sb(), 3.0, sb(dtype=nl.uint8))),
    ("select_reduce", lambda: nisa.select_reduce(sb(), sb(dtype=nl.int8), sb(), -1.0)),
    ("transpose vector", lambda: nisa.nc_transpose(sb((32, 16)), sb((16, 32)), engine=eng.vector)),
    ("dma transpose", lambda: nisa.dma_transpose(sb((4, 3, 2, 8), nl.bfloat16), sb((8, 3, 2, 4), nl.bfloat16))),
    ("partition reduce", lambda: nisa.tensor_partition_reduce(sb((1, 16)), nl.add, sb())),
    ("local_gather", lambda: nisa.local_gather(sb((16, 32)), sb((16, 4)), sb((16, 2), nl.uint16))),
    ("n_gather", lambda: nisa.nc_n_gather(sb((8, 4)), sb(), sb((8, 4), nl.uint32))),
]


def _discard(call):
    """A kernel body that makes one call and returns nothing."""

    def body():
        call()

    return body


@pytest.mark.parametrize("call", [c for _, c in LEGAL], ids=[n for n, _ in LEGAL])
def test_legal_calls_run(sim, call):
    sim(_discard(call))


ILLEGAL = [
    # tensor_copy
    (lambda: nisa.tensor_copy(sb((7, 16)), sb()), PE, "dst has 7 partitions"),
    (lambda: nisa.tensor_copy(sb((8, 15)), sb()), S, "15 elements a partition"),
    (lambda: nisa.tensor_copy(hbm(), sb()), B, "dst is in private_hbm"),
    (lambda: nisa.tensor_copy(sb(buffer=P), sb(), engine=eng.gpsimd), B, "gpsimd cannot reach psum"),
    (lambda: nisa.tensor_copy(sb(), sb(), engine=eng.tensor), E, "tensor cannot execute"),
    (lambda: nisa.tensor_copy(sb(), sb(), engine="vector"), L, "need a member of nisa.engine"),
    (lambda: nisa.tensor_copy(sb(), sb(), engine=2), L, "need a member of nisa.engine"),
    (lambda: nisa.tensor_copy(sb(), 1.0), L, "need a tensor"),
    (lambda: nisa.tensor_copy(sb(), sb(dtype=nl.float8_e4m3fn_x4, fill=0)), D, "arithmetic does not"),
    (lambda: nisa.tensor_copy(dst=sb(), src=sb(), dtype=nl.bfloat16), D, "contradicts dst"),
    (lambda: nisa.tensor_copy(dst=sb(), src=sb(), mask=sb()), L, "mask= was removed"),
    (lambda: nisa.tensor_copy(dst=sb(), src=sb(), wrong=1), L, "unexpected keyword"),
    (lambda: nisa.tensor_reduce(col(), nl.add, sb(), axis=None), L, "bad argument"),
    (lambda: nisa.iota(sb(), 5), L, "bad argument"),
    # tensor_tensor
    (lambda: nisa.tensor_tensor(sb(), sb(), col(), op=nl.add), S, "data2 has 1"),
    (lambda: nisa.tensor_tensor(sb(), sb(buffer=P), sb(buffer=P), op=nl.add), B, "both in psum"),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(), op=nl.bitwise_and), D, "needs integers"),
    (lambda: nisa.tensor_tensor(sb(dtype=nl.int8), sb(dtype=nl.int16), sb(dtype=nl.int16), op=nl.bitwise_and), D, "does not convert"),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(buffer=P), op=nl.power), B, "power runs on gpsimd"),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(), op=nl.power, engine=eng.vector), E, "power runs on gpsimd"),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(), op=nl.exp), errors.UnspecifiedError, "not an operator"),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(), op=np.add), L, "need an operator"),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(), op=nl.abs), L, "takes one input"),
    # tensor_scalar
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.add, col(dtype=nl.bfloat16)), D, "must be float32"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.add, col(4)), S, r"need \(8, 1\)"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.add, sb((8, 2))), S, r"need \(8, 1\)"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.abs, 1.0), L, "must be None or 0"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.add, None), L, "need a number"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.add, 1.0, operand1=2.0), L, "operand1 without op1"),
    (lambda: nisa.tensor_scalar(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.bitwise_and, 1, op1=nl.add, operand1=1), L, "both be bitwise"),
    (lambda: nisa.tensor_scalar(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.bitwise_and, 1.0), L, "need an int"),
    (lambda: nisa.tensor_scalar(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.bitwise_and, 256), D, "does not fit"),
    (lambda: nisa.tensor_scalar(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.left_shift, 8), errors.UnspecifiedError, "by the width"),
    (lambda: nisa.tensor_scalar(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.bitwise_or, 1, engine=eng.gpsimd), E, "run on vector"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.add, 1.0, engine=eng.gpsimd), E, "rsqrt alone"),
    (lambda: nisa.tensor_scalar(sb(), sb(), nl.subtract, 1.0, engine=eng.scalar), E, "multiply then add"),
    # scalar_tensor_tensor
    (lambda: nisa.scalar_tensor_tensor(sb(), sb(), nl.multiply, 1.0, nl.add, col()), S, "operand1 has 1"),
    (lambda: nisa.scalar_tensor_tensor(sb(), sb(buffer=P), nl.multiply, 1.0, nl.add, sb(buffer=P)), B, "both in psum"),
    (lambda: nisa.scalar_tensor_tensor(sb(), sb(), nl.bitwise_or, 1, nl.add, sb()), L, "bitwise"),
    # tensor_reduce
    (lambda: nisa.tensor_reduce(sb((8, 4)), nl.add, sb((8, 4, 4)), axis=1), S, "last free axes"),
    (lambda: nisa.tensor_reduce(col(), nl.add, sb((8, 4)), axis=0), S, "last free axes"),
    (lambda: nisa.tensor_reduce(col(), nl.add, sb((8, 4)), axis=(0, 1)), PE, "partition axis"),
    (lambda: nisa.tensor_reduce(sb((8, 4)), nl.add, sb((8, 4, 4)), axis=(1, 2)), S, "leaves 1"),
    (lambda: nisa.tensor_reduce(col(), nl.subtract, sb((8, 4)), axis=1), errors.UnspecifiedError, "defined order"),
    (lambda: nisa.tensor_reduce(col(), nl.bitwise_or, sb((8, 4)), axis=1), D, "needs integers"),
    # activation
    (lambda: nisa.activation(sb(), nl.add, sb()), errors.UnspecifiedError, "not a ScalarE"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), scale=col(dtype=nl.bfloat16)), D, "need float32"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), bias=sb()), S, r"need \(8, 1\)"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), reduce_op=nl.maximum, reduce_cmd=cmd.reset_reduce), L, "need nl.add"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), reduce_cmd=cmd.reset_reduce), L, "needs reduce_op"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), reduce_op=nl.add, reduce_cmd=cmd.load_reduce), L, "is not one of"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), reduce_op=nl.add, reduce_res=col(), reduce_cmd=cmd.reduce), G, "nothing has reset"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), reduce_res=col()), G, "nothing has set"),
    (lambda: nisa.activation(sb(), nl.sin, sb(fill=4)), errors.CastError, "switch activation_range"),
    (lambda: nisa.activation(sb(), nl.log, sb(fill=0)), errors.CastError, "switch activation_range"),
    (lambda: nisa.activation(sb(), nl.prelu, sb()), L, "relu_param"),
    # vector accumulators
    (lambda: nisa.exponential(sb(), sb(), reduce_res=col()), G, "unknown state"),
    (lambda: nisa.exponential(sb(), sb(), reduce_cmd=cmd.reduce), G, "nothing has reset"),
    (lambda: nisa.exponential(sb(), sb(), reduce_init=1.0), L, "is for reduce_cmd.load_reduce"),
    (lambda: nisa.exponential(sb(), sb(), max_value=col(dtype=nl.bfloat16)), D, "need float32"),
    (lambda: nisa.tensor_scalar_reduce(sb(), sb(), nl.multiply, 1.0, nl.add, col(), reverse0=True), L, "not supported"),
    (lambda: nisa.tensor_scalar_reduce(sb(), sb(), nl.multiply, 1.0, nl.subtract, col()), L, "reduce_op is"),
    (lambda: nisa.tensor_scalar_reduce(sb(), sb(), nl.multiply, 1.0, nl.add, col(), reduce_cmd=cmd.load_reduce), L, "needs reduce_init"),
    (lambda: nisa.tensor_scalar_reduce(sb(), sb(), nl.multiply, 1.0, nl.add, sb((8, 2))), S, r"need \(8, 1\)"),
    (lambda: nisa.tensor_scalar_cumulative(sb(dtype=nl.int32), sb(dtype=nl.int32), nl.add, nl.add, 0.0), D, "32-bit"),
    # range_select, select_reduce, predicated
    (lambda: nisa.range_select(sb(), sb(), nl.less, nl.less, col(), col(), on_false_value=0.0), L, "only FP32_MIN"),
    (lambda: nisa.range_select(sb(), sb(), nl.add, nl.less, col(), col()), L, "comp_op0"),
    (lambda: nisa.range_select(sb(), sb(), nl.less, nl.less, col(dtype=nl.bfloat16), col()), D, "need float32"),
    (lambda: nisa.range_select(sb(), sb(), nl.less, nl.less, col(), col(4)), S, r"need \(8, 1\)"),
    (lambda: nisa.range_select(sb(), sb(), nl.less, nl.less, col(), col(), range_start=2**24), L, "counts to 2"),
    (lambda: nisa.range_select(sb(dtype=nl.int32), sb(dtype=nl.int32), nl.less, nl.less, col(), col()), D, "need a float"),
    (lambda: nisa.select_reduce(sb(), sb(dtype=nl.uint32), sb(), 0.0), D, "need int8"),
    (lambda: nisa.select_reduce(sb(), sb(dtype=nl.int8, buffer=P), sb(buffer=P), 0.0), B, "both in psum"),
    (lambda: nisa.tensor_copy_predicated(sb(), sb(dtype=nl.bfloat16), sb(dtype=nl.uint8)), D, "must agree"),
    (lambda: nisa.tensor_copy_predicated(sb(), sb(), sb(dtype=nl.int8)), D, "need uint8"),
    # affine
    (lambda: nisa.iota(sb(buffer=P), [[1, 16]]), B, "dst is in psum"),
    (lambda: nisa.iota(sb(), [[1, 15]]), L, "pattern has 15 elements"),
    (lambda: nisa.iota(sb(), [[1, 16]], offset=1.5), L, "need an int"),
    (lambda: nisa.affine_select(sb(), [[1, 16]], 1, sb(buffer=P), 0.0), B, "on_true_tile is in psum"),
    (lambda: nisa.affine_select(sb(), [[1, 16]], 1, sb(), 0.0, cmp_op=nl.add), L, "need a comparison"),
    # transposes and shuffles
    (lambda: nisa.nc_transpose(sb((16, 8)), sb((8, 17))), S, "data is 8 x 17"),
    (lambda: nisa.nc_transpose(sb((16, 8), nl.bfloat16), sb()), D, "must agree"),
    (lambda: nisa.nc_transpose(sb((33, 8)), sb((8, 33))), S, "up to 32 x 32"),
    (lambda: nisa.nc_transpose(sb((16, 8)), sb(), engine=eng.tensor), B, "sbuf into psum"),
    (lambda: nisa.nc_transpose(sb((16, 8), buffer=P), sb(buffer=P), engine=eng.tensor), B, "sbuf into psum"),
    (lambda: nisa.nc_stream_shuffle(sb(), sb(), list(range(31))), S, "32 entries"),
    (lambda: nisa.nc_stream_shuffle(sb(), sb(), [32] * 32), S, "0..31 or 255"),
    (lambda: nisa.nc_stream_shuffle(sb(), sb(dtype=nl.int32), [0] * 32), D, "must agree"),
    (lambda: nisa.nc_stream_shuffle(sb((32, 4)), sb((8, 4)), [9] * 32), errors.BoundsError, "takes partition 9"),
    (lambda: nisa.nc_n_gather(sb((8, 4)), sb(), sb((8, 4), nl.uint32, fill=16)), errors.BoundsError, "index 16"),
    (lambda: nisa.nc_n_gather(sb((8, 4)), sb(), sb((8, 4), nl.int32)), D, "need uint32"),
    (lambda: nisa.local_gather(sb((16, 32)), sb((16, 4)), sb((16, 2), nl.uint16, fill=4)), errors.BoundsError, "index 4"),
    (lambda: nisa.local_gather(sb((16, 32)), sb((16, 4)), sb((16, 2), nl.uint16), num_elem_per_idx=2), errors.ShapeError, "32 x 2"),
    (lambda: nisa.tensor_partition_reduce(sb((2, 16)), nl.add, sb()), S, "need 1 partition"),
    (lambda: nisa.tensor_partition_reduce(sb((1, 16)), nl.multiply, sb()), L, "op is"),
    # DMA
    (lambda: nisa.dma_copy(sb(), sb(buffer=P)), B, "src is in psum"),
    (lambda: nisa.dma_copy(sb(buffer=P), sb()), B, "dst is in psum"),
    (lambda: nisa.dma_copy(sb((8, 15)), sb()), S, "src has 128 elements"),
    (lambda: nisa.dma_copy(sb(), sb(dtype=nl.float8_e5m2_x4, fill=0)), D, "arithmetic does not"),
    (lambda: nisa.dma_copy(sb(), sb(dtype=nl.bfloat16), dge_mode=nisa.dge_mode.hwdge), D, "does not convert"),
    (lambda: nisa.dma_copy(sb(), sb(), engine=eng.sync), E, "needs dge_mode=hwdge"),
    (lambda: nisa.dma_copy(sb(), sb(), dge_mode=nisa.dge_mode.hwdge, engine=eng.vector), E, "need sync or scalar"),
    (lambda: nisa.dma_copy(sb(), sb(), oob_mode=nisa.oob_mode.skip), L, "needs a runtime index"),
    (lambda: nisa.dma_copy(sb(), sb(), oob_mode="skip"), L, "need a member of nisa.oob_mode"),
    (lambda: nisa.dma_copy(sb(), sb(), priority=4), L, r"need 0\.\.3"),
    (lambda: nisa.dma_transpose(sb((16, 8)), sb(), axes=(0, 1)), S, "is transposed by"),
    (lambda: nisa.dma_transpose(sb((16, 9)), sb()), S, r"need \(16, 8\)"),
    (lambda: nisa.dma_transpose(sb((16, 8), nl.int8), sb(dtype=nl.int8)), D, "2- and 4-byte"),
    (lambda: nisa.dma_transpose(sb((16, 8), nl.bfloat16), sb()), D, "must agree"),
    (lambda: nisa.dma_transpose(sb((16, 8)), sb(), dge_mode=nisa.dge_mode.hwdge), S, "hardware DGE transposes"),
    (lambda: nisa.dma_transpose(sb((16, 8)), sb(), dge_mode=nisa.dge_mode.swdge), L, "unknown or hwdge"),
    (lambda: nisa.dma_transpose(sb((16, 8), buffer=P), sb()), B, "dst is in psum"),
    (lambda: nisa.dma_compute(sb(), [sb(), sb()], nl.multiply), L, "need nl.add"),
    (lambda: nisa.dma_compute(sb(), [sb(), sb()], nl.add, scales=[1.0, 2.0]), L, "must all be 1.0"),
    # registers
    (lambda: nisa.register_load(nisa.register_alloc(), col(fill=1)), S, "need 1"),
    (lambda: nisa.register_load(nisa.register_alloc(), sb((1, 1))), D, "integer"),
    (lambda: nisa.register_store(sb((1, 1), nl.int32), nisa.register_alloc()), errors.UninitializedError, "never set"),
    (lambda: nisa.register_move(1, 2), L, "need a register"),
    (lambda: nisa.register_alloc(1) + 1, L, "runtime value"),
    (lambda: nisa.core_barrier(hbm(), (0, 1)), L, "two cores"),
]  # fmt: skip


@pytest.mark.parametrize("case", ILLEGAL, ids=[f"{i}-{c[2][:24]}" for i, c in enumerate(ILLEGAL)])
def test_illegal_calls_raise(sim, case):
    call, kind, match = case
    with pytest.raises(kind, match=match) as caught:
        sim(_discard(call))
    assert caught.value.filename == __file__


TARGETS = [
    (lambda: nisa.exponential(sb(), sb()), ("trn1", "trn2")),
    (lambda: nisa.range_select(sb(), sb(), nl.less, nl.less, col(), col()), ("trn1",)),
    (
        lambda: nisa.quantize_mx(sb((32, 4), nl.uint32, 0), sb((32, 16), nl.bfloat16), sb((4, 4), nl.uint8)),
        ("trn1", "trn2"),
    ),
    (lambda: nisa.tensor_copy(sb(), sb(), engine=eng.scalar), ("trn1",)),
    (lambda: nisa.activation(sb(), nl.exp, sb(), bias=1.0), ("trn1",)),
    (lambda: nisa.dma_copy(sb(), sb(), dge_mode=nisa.dge_mode.hwdge), ("trn1",)),
    (lambda: nisa.dma_copy(sb(), sb(), priority=1), ("trn1", "trn2")),
    (lambda: nisa.tensor_tensor(sb(), sb(), sb(), op=nl.abs_max), ("trn1", "trn2")),
    (lambda: nisa.activate2(sb(), nl.copy, sb(), 1.0, 1.0, nl.multiply, nl.add), ("trn1", "trn2")),
    (lambda: sb(dtype=nl.float8_e4m3fn), ("trn1", "trn2")),
    (lambda: nisa.nonzero_with_count(sb((16, 9), nl.int32), sb((16, 8))), ("trn1",)),
    (lambda: nisa.rand2(sb(), 0.0, 1.0), ("trn1", "trn2")),
]


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("case", TARGETS, ids=range(len(TARGETS)))
def test_instructions_exist_only_on_their_targets(sim, case, target):
    call, missing = case
    if target in missing:
        with pytest.raises((T, errors.EngineError), match="needs NeuronCore|does not have"):
            sim(_discard(call), target=target)
    elif call is not TARGETS[2][0]:  # its operands here are of the wrong dtype on purpose
        sim(_discard(call), target=target)


def test_activation_range_is_a_switch(sim):
    def body():
        nisa.activation(sb(), nl.sin, sb(fill=4))

    sim(body, activation_range="ignore")


def test_unknown_names_say_so():
    with pytest.raises(AttributeError, match="not modelled"):
        nisa.no_such_instruction  # noqa: B018
    with pytest.raises(AttributeError, match="removed with NKI 0.2"):
        nl.mgrid  # noqa: B018


def test_outside_a_kernel():
    with pytest.raises(errors.NkiValidationError, match="only inside a kernel"):
        nl.ndarray((2, 2), nl.float32)
    with pytest.raises(errors.NkiValidationError, match="only inside a kernel"):
        nisa.memset(None, 0)
