"""The rarer checks and paths: every remaining refusal of the simulator is reached here."""

import ml_dtypes
import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl
from nkisim import config, dtypes, errors, view

F32, BF16, P = nl.float32, nl.bfloat16, nl.psum
U, L, D, B, S, BO = (
    errors.UnspecifiedError,
    errors.LanguageError,
    errors.DtypeError,
    errors.BufferKindError,
    errors.ShapeError,
    errors.BoundsError,
)
cmd = nisa.reduce_cmd


def sb(shape=(8, 16), dtype=F32, fill=1, **kw):
    """A tile of one value."""
    t = nl.ndarray(shape, dtype, **kw)
    nisa.memset(t, float(fill) if t.dtype.is_float else fill)
    return t


def load(h):
    """HBM to SBUF."""
    t = nl.ndarray(h.shape, h.dtype)
    nisa.dma_copy(t, h)
    return t


def save(t):
    """SBUF or PSUM to shared HBM."""
    s, h = nl.ndarray(t.shape, t.dtype), nl.ndarray(t.shape, t.dtype, nl.shared_hbm)
    nisa.tensor_copy(s, t)
    nisa.dma_copy(h, s)
    return h


def hbm(shape=(8, 16), dtype=F32):
    """A tensor in HBM."""
    return nl.ndarray(shape, dtype, nl.hbm)


def index(n=4, dtype=nl.int32, value=0, width=1):
    """An index column."""
    return sb((n, width), dtype, value)


def gathered(dtype=BF16, rows=16, columns=128, idx=None, shape=(32, 128)):
    """A row gather of an HBM table, for dma_transpose."""
    return hbm(shape, dtype).ap(
        [[shape[-1], rows], [1, columns]], vector_offset=index(rows, nl.uint32) if idx is None else idx
    )


def tr(src, **kw):
    """dma_transpose into a fitting tile."""
    return nisa.dma_transpose(nl.ndarray(tuple(reversed(src.shape)), src.dtype), src, **kw)


def search(n=16, dtype=F32):
    """Data that 8 values can be searched in."""
    t = nl.ndarray((4, n), dtype)
    nisa.iota(t, [[1, n]])
    return t


ILLEGAL = [
    # views
    (lambda: hbm()[..., ...], BO, "more than one"),
    (lambda: hbm()[nisa.register_alloc(1) :], L, "cannot bound a slice"),
    (lambda: hbm().slice(2, 0, 1), S, "axis 2 of a tensor with 2 axes"),
    (lambda: hbm().slice(0.0, 0, 1), S, "is not an int"),
    (lambda: hbm().select(0, 8), BO, r"outside 0\.\.8"),
    (lambda: hbm().select(0, index(1)).select(0, index(1)), BO, "one runtime index"),
    (lambda: hbm().vector_select(1, index()), BO, "works on axis 0"),
    (lambda: hbm()[1:].vector_select(0, index()), U, "offset of its own"),
    (lambda: hbm().vector_select(0, index()).permute((1, 0)), BO, "gathered axis cannot be moved"),
    (lambda: hbm().vector_select(0, index()).view(BF16), BO, "not possible on a view"),
    (lambda: hbm().vector_select(0, index()).ap([[1, 1]]), BO, "already has a runtime index"),
    (lambda: hbm().vector_select(0, index()).access(), BO, "not possible here"),
    (lambda: hbm().vector_select(0, index()).select(0, 1), BO, "sliced or selected again"),
    (lambda: hbm().permute((0, 0)), S, "not a permutation"),
    (lambda: hbm().expand_dim(5), S, "axis 5"),
    (lambda: hbm().squeeze_dim(1), S, "need 1"),
    (lambda: sb((8, 1)).squeeze_dim(1), S, "at least 2 axes"),
    (lambda: hbm((2, 3, 4)).flatten_dims(2, 1), S, "are empty"),
    (lambda: hbm((2, 3), nl.uint8).ap([[1, 1]], dtype=F32), S, "not a whole number of float32"),
    (lambda: hbm((4, 8), nl.uint8)[:, 2:].ap([[1, 1]], dtype=F32), S, "starts at byte 2"),
    (lambda: hbm((4, 6), nl.uint8).ap([[1, 1]], scalar_offset=index(1), dtype=F32), S, "a step along axis 0 is 6"),
    (lambda: sb().ap([[16, 8]]), S, "at least one free level"),
    (lambda: sb().ap([]), S, "empty pattern"),
    (lambda: sb().ap([[16, 8.0], [1, 1]]), S, "two ints"),
    (lambda: hbm().ap([[1, 1]], offset=-1), BO, "negative"),
    (lambda: hbm().ap([[1, 1]], scalar_offset=3), BO, "register"),
    (lambda: hbm().ap([[1, 1]], scalar_offset=sb((1, 1))), D, "integer"),
    (lambda: hbm().__setitem__(0, 1), L, "on-chip tile can be assigned"),
    (lambda: hbm().reshape((-1, -1)), S, "more than one -1"),
    (lambda: hbm().reshape((-1, 7)), S, "does not divide"),
    (lambda: hbm().rearrange(("a",), ("a",)), S, "has 1 groups"),
    (lambda: hbm().rearrange(("a", "b"), ("b", "a"), {"a": 7}), S, "7 were given"),
    (lambda: hbm().rearrange(("a", "b"), ("b", "b")), S, "same axes once"),
    (lambda: nl.ndarray((), F32), S, "at least one axis"),
    # runtime addresses
    (lambda: nisa.dma_copy(sb((1, 16)), hbm().ap([[16, 1], [1, 16]], scalar_offset=index(1, value=-1))), BO, "is negative"),
    (lambda: nisa.dma_copy(sb((4, 16)), hbm().ap([[16, 4], [1, 16]], vector_offset=index(2))), BO, "4 rows are gathered with 2"),
    (lambda: nisa.dma_copy(sb((4, 16)), hbm().ap([[16, 4], [1, 16]], offset=8, vector_offset=index(value=7))), BO, "gathered row reaches"),
    # DMA
    (lambda: nisa.dma_copy(sb(), sb(), priority=1, dge_mode=nisa.dge_mode.none), L, "priority needs"),
    (lambda: nisa.dma_copy(sb((1, 16)), hbm().select(0, index(1)), dge_mode=nisa.dge_mode.none), L, "runtime address needs"),
    (lambda: nisa.dma_transpose(sb(), hbm((1, 1, 1, 1, 2))), S, "need 2, 3 or 4"),
    (lambda: tr(hbm((16, 128), BF16), oob_mode=nisa.oob_mode.skip), L, "needs vector_offset"),
    (lambda: tr(gathered(), dge_mode=nisa.dge_mode.hwdge), L, "unknown or swdge"),
    (lambda: tr(gathered(F32)), S, "2 bytes"),
    (lambda: tr(gathered(idx=index(16))), D, "need uint32"),
    (lambda: tr(gathered(idx=index(24, nl.uint32))), S, "a multiple of 16"),
    (lambda: tr(gathered(rows=24, idx=index(32, nl.uint32))), S, "multiple of 16 rows"),
    (lambda: tr(gathered(idx=index(16, nl.uint32, width=2))), S, "128 if wider"),
    (lambda: nisa.dma_transpose(sb((4, 2, 2, 16), BF16), hbm((16, 2, 2, 4), BF16).vector_select(0, index(16, nl.uint32))), S, "must be 1"),
    (lambda: nisa.dma_compute(sb(), [], nl.add), S, "0 sources"),
    (lambda: nisa.dma_compute(sb(), [sb((2, 2))], nl.add), S, "has 4 elements"),
    (lambda: nisa.dma_compute(sb(), [sb()], nl.add), errors.UnspecifiedError, "dst += src"),
    (lambda: nisa.dma_compute(sb((4, 16)), [hbm().vector_select(0, index())], nl.add), L, "exactly 2 sources"),
    # moves
    (lambda: nisa.memset(sb(buffer=P), 1.0, engine=nisa.engine.gpsimd), B, "gpsimd cannot reach"),
    (lambda: nisa.nc_transpose(sb((2, 8), buffer=P), sb((8, 2)), engine=nisa.engine.gpsimd), errors.EngineError, "cannot execute"),
    (lambda: nisa.nc_transpose(nl.ndarray((100, 130), F32, P)[:, 0:8], sb((8, 130))), S, "data is 8 x 130"),
    (lambda: nisa.nc_transpose(nl.ndarray((16, 600), F32, P)[:, 508:516], sb((8, 16))), BO, "crosses PSUM banks"),
    (lambda: nisa.nc_stream_shuffle(sb((8, 4)), sb((8, 5)), [0] * 32), S, "5 elements a partition"),
    (lambda: nisa.nc_stream_shuffle(sb((64, 4))[32:64], sb((64, 4)), [0] * 32), BO, "starts at partition 32"),
    (lambda: nisa.nc_n_gather(sb((8, 4), BF16), sb(), sb((8, 4), nl.uint32)), D, "must agree"),
    (lambda: nisa.local_gather(sb((16, 32), BF16), sb((16, 4)), sb((16, 2), nl.uint16)), D, "must agree"),
    (lambda: nisa.local_gather(sb((8, 32)), sb((8, 4)), sb((8, 2), nl.uint16)), S, "multiple of 16"),
    (lambda: nisa.local_gather(sb((16, 32)), sb((16, 4)), sb((16, 2), nl.uint16), num_elem_per_idx=3), L, "need 1, 2, 4"),
    (lambda: nisa.local_gather(sb((16, 32)), sb((16, 4)), sb((16, 2), nl.uint16), num_valid_indices=33), S, r"need 1\.\.32"),
    (lambda: nisa.local_gather(sb((16, 31)), sb((16, 4)), sb((16, 2), nl.uint16)), S, "need 32"),
    # TensorE
    (lambda: nisa.nc_matmul(sb((2, 2), BF16, buffer=P), sb((2, 2), BF16), sb((2, 2), BF16), is_transpose=True, accumulate=True), errors.PsumError, "does not accumulate"),
    (lambda: nisa.nc_matmul(sb((2, 2), buffer=P), sb((2, 2), BF16), nl.shared_identity_matrix(2, BF16), is_transpose=True), D, "keeps bfloat16"),
    (lambda: nisa.nc_matmul(sb((2, 2), buffer=P), sb((2, 2, 2), nl.float8_e5m2), sb((2, 2, 2), nl.float8_e5m2), is_transpose=True, perf_mode=nisa.matmul_perf_mode.double_row), L, "does not combine"),
    # VectorE, ScalarE
    (lambda: nisa.tensor_tensor(sb(dtype=nl.int32), sb(dtype=nl.int32, fill=2**30), sb(dtype=nl.int32, fill=2**30), op=nl.add), U, "overflows int32"),
    (lambda: nisa.tensor_tensor(sb(dtype=nl.int32), sb(dtype=nl.int32), sb(dtype=nl.int32), op=nl.power), U, "power of 32-bit"),
    (lambda: nisa.tensor_scalar(sb(), sb(buffer=P), nl.rsqrt, engine=nisa.engine.gpsimd), B, "gpsimd cannot reach"),
    (lambda: nisa.scalar_tensor_tensor(sb(), sb(), nl.add, 1.0, nl.abs, sb()), L, "takes one input"),
    (lambda: nisa.tensor_reduce(sb((8, 1), nl.int8), nl.bitwise_or, sb(dtype=nl.int8), axis=1, negate=True), L, "arithmetic op"),
    (lambda: nisa.tensor_reduce(sb((8, 1), nl.int8), nl.left_shift, sb(dtype=nl.int8), axis=1), U, "not a documented reduction"),
    (lambda: nisa.tensor_partition_reduce(sb((1, 16)), nl.add, sb(buffer=P)), B, "gpsimd cannot reach"),
    (lambda: nisa.tensor_tensor_scan(sb(), sb(), sb(), 0.0, nl.abs, nl.add), L, "binary arithmetic"),
    (lambda: nisa.activation(sb(), np.exp, sb()), L, "need an activation"),
    (lambda: nisa.activation(sb(), nl.exp, sb(), bias=sb((8, 1), nl.tfloat32)), D, "tfloat32"),
    (lambda: nisa.activate2(sb(), nl.copy, sb(), 1.0, 1.0, nl.add, nl.add), L, "documented pair"),
    (lambda: nisa.activate2(sb(), nl.copy, sb(), 1.0, 1.0, nl.add, nl.bypass, reduce_cmd=cmd.reset_reduce), L, "needs reduce_op"),
    (lambda: nisa.tensor_scalar_reduce(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.bitwise_or, 1, nl.add), L, "is bitwise"),
    (lambda: nisa.tensor_scalar_cumulative(sb(dtype=nl.int8), sb(dtype=nl.int8), nl.bitwise_or, nl.add, 1), L, "is bitwise"),
    (lambda: nisa.tensor_scalar_cumulative(sb(), sb(), nl.add, nl.add, 0.0, reduce_cmd=cmd.reduce), errors.ReductionStateError, "nothing has reset"),
    (lambda: nisa.range_select(sb(dtype=nl.float8_e5m2), sb(), nl.less, nl.less, sb((8, 1)), sb((8, 1))), errors.CastError, "fill value"),
    (lambda: nisa.select_reduce(sb(), sb(dtype=nl.int8), sb(dtype=nl.int32), 0.0), D, "not supported"),
    # GpSimd patterns
    (lambda: nisa.iota(sb((2, 1)), [[1, 1]] * 5), L, "5 levels"),
    (lambda: nisa.iota(sb((2, 2), nl.int32), [[2**31, 2]]), U, "int32 range"),
    (lambda: nisa.iota(sb((2, 2), nl.uint32), [[-1, 2]]), errors.CastError, "negative value"),
    # search and statistics
    (lambda: nisa.bn_stats(sb((4, 6)), sb((4, 513))), S, "the limit is 512"),
    (lambda: nisa.bn_stats(sb((4, 5)), sb((4, 8))), S, "need 6"),
    (lambda: nisa.bn_aggr(sb((4, 2)), sb((4, 7))), S, "multiple of 3"),
    (lambda: nisa.bn_aggr(sb((4, 3)), sb((4, 6))), S, "need 2"),
    (lambda: nisa.bn_aggr(sb((4, 2)), sb((4, 6), fill=0)), U, "add up to nothing"),
    (lambda: nisa.max8(sb((4, 7)), search()), S, "need 8"),
    (lambda: nisa.max8(sb((4, 8)), sb((4, 7))), S, r"need 8\.\.16384"),
    (lambda: nisa.nc_find_index8(sb((4, 8), nl.uint32), search(), sb((4, 8))), U, "equal values"),
    (lambda: nisa.nc_find_index8(sb((4, 8), nl.uint32), search(9), search(16)[:, 2:10]), U, "not in the data"),
    (lambda: nisa.sequence_bounds(sb((2, 2, 4), nl.int32), sb((2, 4), nl.int32)), S, "need 1"),
    (lambda: nisa.sequence_bounds(sb((1, 3), nl.int32), sb((1, 4), nl.int32)), S, "need 8"),
    (lambda: nisa.sequence_bounds(sb((1, 2, 4), nl.int32), sb((1, 4), nl.int32, -1)), D, "negative"),
    (lambda: nisa.nonzero_with_count(sb((16, 8), nl.int32), sb((16, 8), nl.int32)), S, "need 9"),
    # control
    (lambda: nisa.register_store(sb((1, 1), nl.int8), nisa.register_alloc(300)), D, "does not fit int8"),
    (lambda: list(nl.dynamic_range(0, 4, 0)), L, "at least 1"),
    (lambda: nl.program_id(1), L, "one axis"),
    # whole-tile functions
    (lambda: nl.load_transpose2d(hbm(), dtype=BF16), U, "another dtype"),
    (lambda: nl.load_transpose2d(hbm((2, 2, 2))), S, "need 2"),
    (lambda: nl.transpose(sb(), dtype=BF16), U, "another dtype"),
    (lambda: nl.softmax(sb((2, 2, 2)), axis=2), U, "part of the free axes"),
    (lambda: nl.rms_norm(sb((2, 2, 2)), sb((2, 2, 2)), axis=2, n=2), U, "part of the free axes"),
    # random
    (lambda: nisa.rng(sb()), D, "need an integer"),
    (lambda: nisa.set_rng_seed(sb((1, 2), nl.int32)), S, "one 32-bit value"),
    (lambda: nisa.rand2(sb(), 2.0, 1.0), S, "min must be below max"),
    (lambda: nisa.dropout(sb(), sb(dtype=BF16), 0.5), D, "must agree"),
    (lambda: nisa.rand_set_state(sb((4, 5), nl.uint32)), S, "has 6"),
]  # fmt: skip


@pytest.mark.parametrize("case", ILLEGAL, ids=[f"{i}-{c[2][:20]}" for i, c in enumerate(ILLEGAL)])
def test_illegal_calls_raise(sim, case):
    call, kind, match = case

    def body():
        call()

    with pytest.raises(kind, match=match) as caught:
        sim(body)
    assert caught.value.filename == __file__


def test_data_dependent_refusals(sim):
    nan = np.full((4, 8), np.nan, np.float32)
    with pytest.raises(U, match="holds NaN"):
        sim(lambda x: nisa.max8(sb((4, 8)), load(x)) and None, nan)
    with pytest.raises(U, match="two pieces"):
        ids = np.array([[1, 2, 1]], np.int32)
        sim(lambda x: nisa.sequence_bounds(sb((1, 6), nl.int32), load(x)) and None, ids)
    with pytest.raises(errors.MxError, match="stationary holds NaN"):
        words = np.full((32, 2), 0x7F7F7F7F, np.uint32)

        def body(x):
            t = load(x).view(nl.float8_e4m3fn_x4)
            s = sb((4, 2), nl.uint8, 127)
            nisa.nc_matmul_mx(nl.ndarray((2, 2), F32, P), t, t, s, s, accumulate=False)

        sim(body, words)


def test_accumulating_onto_partly_written_psum(sim):
    """A transposed tile carries unwritten elements into PSUM; adding to them is refused."""

    def body():
        t = nl.ndarray((2, 2), F32)
        nisa.memset(t[:, 0:1], 1.0)
        acc = nl.ndarray((2, 2), F32, P)
        nisa.nc_transpose(acc, t)
        nisa.nc_matmul(acc, sb((1, 2)), sb((1, 2)), accumulate=True)

    with pytest.raises(errors.UninitializedError, match="never written"):
        sim(body)


def test_row_tiles(sim):
    def body():
        a, b, acc = sb((128, 4), BF16), sb((128, 8), BF16), nl.ndarray((4, 8), F32, P)
        for i, start in enumerate((0, 64)):
            rows = slice(start, start + 64)
            nisa.nc_matmul(acc, a[rows], b[rows], accumulate=(i > 0), tile_position=(start, 0), tile_size=(64, 128))
        return save(acc)

    assert (sim(body) == 128).all()


def test_tfloat32_keeps_ten_bits(sim):
    x = np.array([[1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-12, np.inf, 3.4028235e38]], np.float32)

    def body(x):
        t = nl.ndarray((1, 6), nl.tfloat32)
        nisa.dma_copy(t, x)
        return save(t)

    assert sim(body, x).tolist() == [[1 + 2**-10, 1, 1 + 2**-9, -1, np.inf, np.inf]]


def test_reductions_of_bits_and_truth(sim):
    x = np.random.default_rng(5).integers(0, 256, (8, 6)).astype(np.uint8)

    def body(x):
        t, out = load(x), []
        for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
            d = nl.ndarray((8, 1), nl.uint8)
            nisa.tensor_reduce(d, getattr(nl, name), t, axis=1)
            out.append(save(d))
        for name in ("logical_and", "logical_or", "logical_xor", "abs_max", "abs_min"):
            d = nl.ndarray((8, 1), F32)
            nisa.tensor_reduce(d, getattr(nl, name), t, axis=1)
            out.append(save(d))
        across = nl.ndarray((1, 6), nl.uint8)
        nisa.tensor_partition_reduce(across, nl.bitwise_or, t)
        return (*out, save(across))

    *rows, across = sim(body, x)
    ufuncs = [np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.logical_and, np.logical_or, np.logical_xor]
    for got, ufunc in zip(rows, [*ufuncs, np.maximum, np.minimum], strict=True):
        assert np.array_equal(got[:, 0], ufunc.reduce(x, axis=1))
    assert np.array_equal(across[0], np.bitwise_or.reduce(x, axis=0))


def test_bitwise_vector_operands_and_invert(sim):
    x, v = np.arange(16, dtype=np.uint8).reshape(2, 8), np.array([[3], [5]], np.uint8)

    def body(x, v):
        a, b = nl.ndarray((2, 8), nl.uint8), nl.ndarray((2, 8), nl.uint8)
        nisa.tensor_scalar(a, load(x), nl.bitwise_xor, load(v))
        nisa.tensor_scalar(b, load(x), nl.invert)
        return save(a), save(b), save(nl.invert(load(x))), save(nl.logical_not(load(x)))

    a, b, c, d = sim(body, x, v)
    assert np.array_equal(a, x ^ v)
    assert np.array_equal(b, ~x)
    assert np.array_equal(c, ~x)
    assert np.array_equal(d, x == 0)


def test_accumulators_of_other_partitions_stay_unset(sim):
    def body():
        t, d = sb((64, 4)), nl.ndarray((64, 4), F32)
        nisa.exponential(d[0:32], t[0:32], reduce_cmd=cmd.load_reduce, reduce_init=1.0)
        nisa.exponential(d[32:64], t[32:64], reduce_cmd=cmd.reduce)

    with pytest.raises(errors.ReductionStateError, match="were never set"):
        sim(body)


def test_vector_initial_values(sim):
    x = np.random.default_rng(6).standard_normal((8, 4)).astype(np.float32)
    v = np.arange(8, dtype=np.float32).reshape(8, 1)

    def body(x, v):
        t, start, res, d = load(x), load(v), nl.ndarray((8, 1), F32), nl.ndarray((8, 4), F32)
        nisa.tensor_scalar_reduce(d, t, nl.add, 0.0, nl.add, res, reduce_cmd=cmd.load_reduce, reduce_init=start)
        total = save(res)
        nisa.tensor_scalar_cumulative(d, t, nl.add, nl.maximum, 0.0, start, reduce_cmd=cmd.load_reduce)
        running = save(d)
        nisa.tensor_tensor_scan(d, t, t, start, nl.multiply, nl.add)
        return total, running, save(d)

    total, running, scan = sim(body, x, v)
    assert np.allclose(total, v + x.sum(1, keepdims=True), rtol=1e-5)
    assert np.array_equal(running, np.maximum(np.maximum.accumulate(x, axis=1), v))
    assert np.allclose(scan[:, 0], x[:, 0] * v[:, 0] + x[:, 0])


@pytest.mark.parametrize(("name", "fn"), [("add", np.sum), ("maximum", np.max), ("minimum", np.min)])
def test_activate2_reduces(sim, name, fn):
    x = np.random.default_rng(8).standard_normal((8, 6)).astype(np.float32)

    def body(x):
        d, res, slope = nl.ndarray((8, 6), F32), nl.ndarray((8, 1), F32), sb((8, 1), fill=0.25)
        nisa.activate2(
            d, nl.prelu, load(x), 0.0, 0.0, nl.bypass, nl.bypass,
            relu_param=slope, reduce_op=getattr(nl, name), reduce_res=res, reduce_cmd=cmd.reset_reduce,
        )  # fmt: skip
        return save(res)

    want = np.where(x >= 0, x, x * 0.25)
    assert np.allclose(sim(body, x)[:, 0], fn(want, axis=1), rtol=1e-5, atol=1e-6)


def test_affine_select_with_a_cast(sim):
    def body():
        t, d = nl.ndarray((2, 4), BF16), nl.ndarray((2, 4), F32)
        nisa.memset(t[:, 0:2], 3.0)
        nisa.affine_select(d, [[1, 4]], 0, t, -1.0, cmp_op=nl.less, offset=-2)
        return save(d)

    assert sim(body).tolist() == [[3, 3, -1, -1]] * 2


def test_skipped_accesses(sim):
    x = np.arange(24, dtype=np.float32).reshape(3, 8)

    def body(x):
        past = sb((1, 1), nl.int32, 9)
        t = sb((1, 8), fill=-1)
        nisa.dma_copy(t, x.ap([[8, 1], [1, 8]], scalar_offset=past), oob_mode=nisa.oob_mode.skip)
        nisa.dma_copy(x.ap([[8, 1], [1, 8]], scalar_offset=past), t, oob_mode=nisa.oob_mode.skip)
        rows = sb((2, 1), nl.int32, 1)
        nisa.memset(rows[0:1], 7)
        view_ = x.ap([[8, 2], [1, 8]], vector_offset=rows)
        nisa.dma_compute(view_, [view_, sb((2, 8))], nl.add, oob_mode=nisa.oob_mode.skip)
        return save(t)

    before = x.copy()
    assert (sim(body, x) == -1).all()
    before[1] += 1
    assert np.array_equal(x, before)


@pytest.mark.parametrize("oob_mode", [nisa.oob_mode.error, nisa.oob_mode.skip])
def test_compute_with_rows_that_nothing_has_written_is_refused(sim, oob_mode):
    def body():
        table = nl.ndarray((3, 8), F32, buffer=nl.hbm)
        view_ = table.ap([[8, 2], [1, 8]], vector_offset=sb((2, 1), nl.int32, 1))
        nisa.dma_compute(view_, [view_, sb((2, 8))], nl.add, oob_mode=oob_mode)

    with pytest.raises(errors.UninitializedError, match=r"srcs\[0\] reads element"):
        sim(body)


def test_compute_onto_one_row_twice_is_refused(sim):
    def body(x):
        v = x.ap([[8, 2], [1, 8]], vector_offset=sb((2, 1), nl.int32, 1))
        nisa.dma_compute(v, [v, sb((2, 8))], nl.add)

    with pytest.raises(BO, match="not unique"):
        sim(body, np.zeros((3, 8), np.float32))


def test_match_replace_reports_indices(sim):
    x = np.random.default_rng(9).permutation(16).astype(np.float32).reshape(1, 16)

    def body(x):
        t, top, out, at = load(x), nl.ndarray((1, 8), F32), nl.ndarray((1, 16), F32), nl.ndarray((1, 8), nl.uint16)
        nisa.max8(top, t)
        nisa.nc_match_replace8(out, t, top, -1.0, dst_idx=at)
        return save(at)

    assert np.array_equal(sim(body, x), np.argsort(-x, axis=1)[:, :8])


def test_dropout_extremes_and_whole_tile_random(sim):
    x = np.ones((4, 8), np.float32)

    def body(x, p):
        d = nl.ndarray((4, 8), F32)
        nisa.dropout(d, load(x), p)
        mixed = nl.ndarray((4, 8), F32)
        nisa.dropout(mixed, load(x), sb((4, 1), fill=p))
        seed = sb((1, 1), nl.int32, 7)
        nl.random_seed(seed)
        state = sb((4, 6), nl.uint32, 5)
        nisa.rand_set_state(state)
        return save(d), save(mixed), save(nl.rand((4, 8), F32))

    for p, want in ((0.0, 1.0), (1.0, 0.0)):
        whole, mixed, uniform = sim(body, x, p)
        assert (whole == want).all()
        assert (mixed == want).all()
        assert ((uniform >= 0) & (uniform < 1)).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cores": (0,)}, r"need \(0, 1\)"),
        ({"shape": (2, 3)}, "must agree"),
        ({"to": 2}, "need 0 or 1"),
        ({"engine": nisa.dma_engine.gpsimd_dma}, "up to 256"),
        ({"to": 0}, "sent nothing"),
        ({"allocate": True}, "allocate different"),
    ],
)
def test_two_core_rules(sim, options, match):
    def body(x):
        core = nl.program_id(0)
        shape = (2, 3 + core) if options.get("allocate") else x.shape
        scratch = nl.ndarray(shape, x.dtype, nl.shared_hbm)
        if "cores" in options:
            nisa.core_barrier(scratch, options["cores"])
        a, b = sb(x.shape), nl.ndarray(options.get("shape", x.shape), F32)
        to = options.get("to", 1 - core)
        nisa.sendrecv(a, b, to, 1 - core, 0, dma_engine=options.get("engine", nisa.dma_engine.dma))

    with pytest.raises(errors.NkiValidationError, match=match):
        sim(body, np.ones((2, 300), np.float32), cores=2)


def test_small_language_functions(sim):
    def body(x):
        assert nl.program_ndim() == 0
        t = nl.empty_like(load(x))
        assert t.shape == x.shape
        assert nl.expand_dims(t, 1).shape == (4, 1, 8)
        assert repr(t).startswith("NkiTensor(")
        assert nl.ndarray(5, F32, nl.hbm).shape == (5,)
        assert load(x).reshape((4, 8)).reshape((4,) + (2, 4)).shape == (4, 2, 4)
        flags = nl.ndarray((2, 2), nl.bool_)
        nisa.memset(flags, True)
        with nl.no_reorder():
            return save(flags)

    assert sim(body, np.ones((4, 8), np.float32)).all()
    assert repr(nl.add) == "nl.add"
    assert repr(nl.float32) == "nl.float32"
    assert nl.float32 != object()
    assert dtypes.resolve(ml_dtypes.bfloat16) is nl.bfloat16
    with pytest.raises(ValueError, match="switch mx_scale"):
        config.Settings(mx_scale="other")
    with pytest.raises(errors.ShapeError):
        view.infer((2, 3), 7)


def test_switches_from_the_environment(monkeypatch):
    monkeypatch.setenv("NKI_SIM_MX_SCALE", "ocp")
    assert config.current().mx_scale == "ocp"
    with config.configured(mx_scale="neuron") as inside:
        assert inside.mx_scale == config.current().mx_scale == "neuron"
    assert config.current().mx_scale == "ocp"
