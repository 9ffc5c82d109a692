"""TensorE: products, dtypes, tile limits, PSUM banks and accumulation; MX scale placement."""

import ml_dtypes
import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl
from nkisim import errors

DOUBLE = nisa.matmul_perf_mode.double_row
BF16, F32 = nl.bfloat16, nl.float32


def sb(shape, dtype=BF16, fill=1.0):
    """A tile of one value."""
    t = nl.ndarray(shape, dtype)
    nisa.memset(t, fill)
    return t


def psum(shape, dtype=F32, **kw):
    """An untouched PSUM tile."""
    return nl.ndarray(shape, dtype, nl.psum, **kw)


def out_of(tile):
    """Copy a tile out to shared HBM."""
    s, h = nl.ndarray(tile.shape, tile.dtype), nl.ndarray(tile.shape, tile.dtype, nl.shared_hbm)
    nisa.tensor_copy(s, tile)
    nisa.dma_copy(h, s)
    return h


ILLEGAL = [
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((32, 16))), "partitions", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 9)), sb((64, 16))), "the product is 9 x 16", "trn3"),
    (lambda: nisa.nc_matmul(psum((128, 16)), sb((64, 129)), sb((64, 16))), "the limit is 128", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 513)), sb((64, 8)), sb((64, 513))), "the limit on trn2", "trn2"),
    (lambda: nisa.nc_matmul(psum((8, 1024))[:, 256:768], sb((64, 8)), sb((64, 512))), r"crosses PSUM banks 0\.\.1", "trn2"),
    (lambda: nisa.nc_matmul(psum((8, 512), address=(0, 1024)), sb((64, 8)), sb((64, 512))), "crosses PSUM banks", "trn2"),
    (lambda: nisa.nc_matmul(psum((8, 4097), nl.bfloat16), sb((64, 8)), sb((64, 4097), fill=1.0)), None, "trn3"),
    (lambda: nisa.nc_matmul(sb((8, 16), F32), sb((64, 8)), sb((64, 16))), "dst is in sbuf", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), psum((64, 8)), sb((64, 16))), "stationary is in psum", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16), BF16), sb((64, 8)), sb((64, 16))), "need float32", "trn2"),
    (lambda: nisa.nc_matmul(psum((8, 16), nl.float16), sb((64, 8)), sb((64, 16))), "need float32 or bfloat16", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8), F32), sb((64, 16))), "fp32 goes with fp32", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8), nl.float8_e4m3), sb((64, 16), nl.float8_e4m3fn)), "do not mix", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8), nl.int8, 1), sb((64, 16))), "multiplies floats", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), tile_size=(64, 128)), "go together", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), tile_size=(32, 128), tile_position=(0, 0)), "row tile has 32", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), tile_size=(64, 64), tile_position=(0, 0)), "need .32, 64 or 128", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), tile_size=(64, 128), tile_position=(32, 0)), "multiple of 64", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 2, 8)), sb((64, 2, 16)), perf_mode=DOUBLE), "needs FP8", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 16), nl.float8_e5m2), sb((64, 2, 16), nl.float8_e5m2), perf_mode=DOUBLE), r"needs \[K, 2", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 2, 8), nl.float8_e5m2), sb((64, 2, 16), nl.float8_e5m2), perf_mode=DOUBLE), "gen3", "trn1"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), perf_mode="double_row"), "need a member", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16), BF16), sb((16, 8)), sb((16, 16)), is_transpose=True), "identity", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), accumulate=1.5), "need True, False or None", "trn3"),
    (lambda: nisa.nc_matmul(psum((8, 16)), sb((64, 8)), sb((64, 16)), accumulate=True), "no instruction has written", "trn3"),
]  # fmt: skip


@pytest.mark.parametrize("case", ILLEGAL, ids=range(len(ILLEGAL)))
def test_matmul_rules(sim, case):
    call, match, target = case

    def body():
        call()

    if match is None:  # legal, but only on this target
        sim(body, target=target)
        with pytest.raises(errors.NkiValidationError):
            sim(body, target="trn2")
        return
    with pytest.raises(errors.NkiValidationError, match=match) as caught:
        sim(body, target=target)
    assert caught.value.instruction == "nc_matmul"


@pytest.mark.parametrize("dtype", [BF16, nl.float16, F32, nl.float8_e4m3, nl.float8_e5m2, nl.float8_e4m3fn])
def test_matmul_of_small_integers_is_exact(sim, dtype):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-4, 5, size=s).astype(dtype.np) for s in ((96, 24), (96, 40)))

    def body(a, b):
        ta, tb, acc = nl.ndarray(a.shape, a.dtype), nl.ndarray(b.shape, b.dtype), psum((24, 40))
        nisa.dma_copy(ta, a)
        nisa.dma_copy(tb, b)
        nisa.nc_matmul(acc, ta, tb, accumulate=False)
        nisa.nc_matmul(acc, ta, tb, accumulate=True)
        return out_of(acc)

    want = 2 * a.astype(np.float64).T @ b.astype(np.float64)
    assert np.array_equal(sim(body, a, b), want)


def test_double_row_contracts_partition_times_two(sim):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-4, 5, size=s).astype(nl.float8_e4m3.np) for s in ((2, 64, 24), (2, 64, 40)))

    def body(a, b):
        ta, tb, acc = nl.ndarray((64, 2, 24), a.dtype), nl.ndarray((64, 2, 40), b.dtype), psum((24, 40))
        nisa.dma_copy(ta, a.permute((1, 0, 2)))
        nisa.dma_copy(tb, b.permute((1, 0, 2)))
        nisa.nc_matmul(acc, ta, tb, accumulate=False, perf_mode=DOUBLE)
        return out_of(acc)

    want = a.reshape(128, 24).astype(np.float64).T @ b.reshape(128, 40).astype(np.float64)
    assert np.array_equal(sim(body, a, b, target="trn2"), want)


def test_bfloat16_psum_rounds_at_every_instruction(sim):
    def body():
        a, b, one, acc = sb((1, 1), BF16, 256.0), sb((1, 1), BF16, 1.0), sb((1, 1), BF16, 1.0), psum((1, 1), BF16)
        nisa.nc_matmul(acc, a, one, accumulate=False)
        for _ in range(4):
            nisa.nc_matmul(acc, b, one, accumulate=True)
        return out_of(acc)

    assert sim(body).astype(np.float32) == 256.0  # each + 1 is lost; one rounding of the sum would give 260


# -- accumulation --------------------------------------------------------------------------------------------------


def accumulating(steps):
    """A body that runs steps on one PSUM tile: bool/None is a matmul (adds 1), or evict, set, zero."""

    def body():
        a, acc, spare = sb((1, 1)), psum((1, 1)), nl.ndarray((1, 1), F32)
        for step in steps:
            if step == "evict":
                nisa.tensor_copy(spare, acc)
            elif step == "set":
                nisa.memset(acc, 5.0)
            elif step == "zero":
                nisa.memset(acc, 0.0)
            else:
                nisa.nc_matmul(acc, a, a, accumulate=step)
        return out_of(acc)

    return body


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        ([False], 1),
        ([False, False], 1),
        ([False, True, True], 3),
        ([None], 1),
        ([None, None, None], 3),
        ([False, None], 2),
        (["zero", None, None], 2),
        (["set", False], 1),
        ([False, "evict", True], 2),
        ([False, "evict", False], 1),
        ([None, None, "set", False], 1),
    ],
)
def test_accumulation(sim, steps, want):
    assert sim(accumulating(steps), target="trn2").item() == want


@pytest.mark.parametrize(
    ("steps", "target", "match"),
    [
        ([True], "trn3", "no instruction has written"),
        (["set", True], "trn2", "undefined on trn2"),
        (["set", None], "trn3", "pass accumulate"),
        ([None, "evict", None], "trn3", "switch psum_after_eviction"),
    ],
)
def test_accumulation_rules(sim, steps, target, match):
    with pytest.raises(errors.PsumError, match=match):
        sim(accumulating(steps), target=target)


def test_accumulating_after_an_eviction_is_a_switch(sim):
    steps = accumulating([None, "evict", None])
    assert sim(steps, psum_after_eviction="accumulate").item() == 2
    assert sim(steps, psum_after_eviction="overwrite").item() == 1


def test_accumulating_onto_a_memset_is_defined_on_trn3(sim):
    assert sim(accumulating(["set", True]), target="trn3").item() == 6


def test_automatic_accumulation_is_decided_for_each_location(sim):
    def body():
        a, acc = sb((1, 1)), psum((1, 4))
        nisa.nc_matmul(acc[:, 0:2], a, sb((1, 2)))
        nisa.nc_matmul(acc, a, sb((1, 4)))
        return out_of(acc)

    assert sim(body).tolist() == [[2, 2, 1, 1]]


def test_tiles_at_one_address_start_afresh(sim):
    def body():
        a = sb((1, 1))
        for _ in range(2):
            acc = psum((1, 1), address=(0, 2048))
            nisa.nc_matmul(acc, a, a)
        return out_of(acc)

    assert sim(body).item() == 1


def test_matmul_reads_only_written_elements(sim):
    def body():
        a = nl.ndarray((4, 4), BF16)
        nisa.memset(a[:, 0:3], 1.0)
        nisa.nc_matmul(psum((4, 2)), a, sb((4, 2)), accumulate=False)

    with pytest.raises(errors.UninitializedError, match="stationary reads element"):
        sim(body)


# -- transposes on TensorE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nc_transpose", "is_transpose"])
def test_transposes_keep_bits(sim, how):
    x = np.arange(1, 1 + 24 * 40, dtype=np.uint16).reshape(24, 40).view(ml_dtypes.bfloat16)
    x.view(np.uint16)[0, 0] = 0x7FA1  # a NaN with a payload

    def body(x):
        t, acc = nl.ndarray(x.shape, x.dtype), psum((40, 24), BF16)
        nisa.dma_copy(t, x)
        if how == "nc_transpose":
            nisa.nc_transpose(acc, t)
        else:
            nisa.nc_matmul(acc, t, nl.shared_identity_matrix(24, BF16), is_transpose=True)
        return out_of(acc)

    assert np.array_equal(sim(body, x).view(np.uint16), x.view(np.uint16).T)


def test_trn1_transposes_by_multiplying(sim):
    def body(x):
        t = nl.ndarray((2, 2), F32)
        nisa.dma_copy(t, x)
        nisa.nc_transpose(psum((2, 2)), t)

    x = np.array([[1.0, np.inf], [2.0, 3.0]], np.float32)
    sim(body, x, target="trn2")
    with pytest.raises(errors.CastError, match="would spread"):
        sim(body, x, target="trn1")


def test_fp8_transposes_are_a_switch(sim):
    def body(how):
        t, acc = sb((4, 4), nl.float8_e5m2), psum((4, 4), nl.float8_e5m2)
        if how == "nc_transpose":
            nisa.nc_transpose(acc, t)
        else:
            nisa.nc_matmul(acc, t, nl.shared_identity_matrix(4, nl.bfloat16), is_transpose=True)

    for how in ("nc_transpose", "is_transpose"):
        sim(body, how)
        with pytest.raises(errors.UnspecifiedError, match="switch fp8_transpose"):
            sim(body, how, fp8_transpose="error")


@pytest.mark.parametrize("side", ["stationary", "moving"])
def test_a_onezero_promise_is_checked(sim, side):
    def body(value):
        operands = {"stationary": sb((4, 2), F32), "moving": sb((4, 3), F32)}
        nisa.memset(operands[side], value)
        nisa.nc_matmul(psum((2, 3)), **operands, accumulate=False, **{f"is_{side}_onezero": True})

    sim(body, 0.0)
    with pytest.raises(errors.LanguageError, match=f"is_{side}_onezero promises"):
        sim(body, 0.5)


# -- MX --------------------------------------------------------------------------------------------------------------


def mx(shape, dtype=nl.float8_e4m3fn_x4):
    """A packed tile of zeros."""
    return sb(shape, dtype, 0)


def scale(shape, dtype=nl.uint8):
    """A scale tile of 2^0."""
    t = nl.ndarray(shape, nl.uint8)
    nisa.memset(t, 127)
    return t if dtype == nl.uint8 else t.view(dtype)


MX_ILLEGAL = [
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), sb((32, 8), nl.uint32, 0), mx((32, 6)), scale((4, 8)), scale((4, 6))), "need an x4"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((16, 8)), mx((16, 6)), scale((4, 8)), scale((4, 6))), "multiple of 32"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((64, 6)), scale((4, 8)), scale((64, 6))), "partitions"),
    (lambda: nisa.nc_matmul_mx(psum((7, 6)), mx((32, 7)), mx((32, 6)), scale((4, 7)), scale((4, 6))), "even number"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), scale((4, 7)), scale((4, 6))), "7 columns"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((64, 8)), mx((64, 6)), scale((8, 8)), scale((64, 6))), "keeps its scale at partition 35"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), scale((3, 8)), scale((4, 6))), "keeps its scale at partition 3"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), scale((8, 8))[1:], scale((4, 6))), "need row 0, 4, 8 or 12"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), scale((64, 8))[32:], scale((4, 6))), "starts in quadrant 1"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), scale((20, 8))[16:], scale((4, 6))), "need row 0, 4, 8 or 12"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), sb((4, 8), nl.int8, 1), scale((4, 6))), "need uint8"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6), nl.float16), mx((32, 8)), mx((32, 6)), scale((4, 8)), scale((4, 6))), "need float32 or bfloat16"),
    (lambda: nisa.nc_matmul_mx(sb((8, 6), F32), mx((32, 8)), mx((32, 6)), scale((4, 8)), scale((4, 6))), "dst is in sbuf"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((32, 8)), mx((32, 6)), psum((4, 8)), scale((4, 6))), "in psum"),
    (lambda: nisa.nc_matmul_mx(psum((8, 6)), mx((64, 8)), mx((64, 6)), scale((64, 8)), scale((64, 6)), tile_size=(32, 128), tile_position=(0, 0)), "row tile has 32"),
    (lambda: nisa.quantize_mx(mx((32, 4)), sb((32, 16), F32), scale((4, 4))), "need bfloat16 or float16"),
    (lambda: nisa.quantize_mx(mx((32, 4), nl.float4_e2m1fn_x4), sb((32, 16)), scale((4, 4))), "need float8_e4m3fn_x4"),
    (lambda: nisa.quantize_mx(mx((32, 4)), sb((32, 12)), scale((4, 4))), "need 4 to 1"),
    (lambda: nisa.quantize_mx(mx((64, 4)), sb((64, 16)), scale((8, 4))), "keeps its scale at partition 35"),
    (lambda: nisa.quantize_mx(mx((16, 4)), sb((16, 16)), scale((4, 4))), "multiple of 32"),
]  # fmt: skip


@pytest.mark.parametrize("case", MX_ILLEGAL, ids=range(len(MX_ILLEGAL)))
def test_mx_rules(sim, case):
    call, match = case

    def body():
        call()

    with pytest.raises(errors.NkiValidationError, match=match):
        sim(body)


def test_scales_may_be_e8m0_and_only_live_rows_are_read(sim):
    def body():
        s = nl.ndarray((128, 4), nl.uint8)
        for q in range(4):
            nisa.memset(s[32 * q : 32 * q + 4], 127)
        tile = nl.ndarray((128, 4), nl.uint8)
        nisa.tensor_copy(tile, s)  # carries the unwritten rows along
        acc = psum((4, 4))
        nisa.nc_matmul_mx(acc, mx((128, 4)), mx((128, 4)), tile.view(nl.float8_e8m0fnu), tile, accumulate=False)
        return out_of(acc)

    assert not sim(body).any()


def test_a_live_scale_row_must_be_written(sim):
    def body():
        s = nl.ndarray((128, 4), nl.uint8)
        for q in range(3):
            nisa.memset(s[32 * q : 32 * q + 4], 127)
        nisa.nc_matmul_mx(psum((4, 4)), mx((128, 4)), mx((128, 4)), s, s, accumulate=False)

    with pytest.raises(errors.UninitializedError, match="stationary_scale"):
        sim(body)


def test_special_mx_values_are_a_switch(sim):
    def body(byte):
        s = nl.ndarray((4, 4), nl.uint8)
        nisa.memset(s, byte)
        acc = psum((4, 4))
        nisa.nc_matmul_mx(acc, mx((32, 4)), mx((32, 4)), s, scale((4, 4)), accumulate=False)
        return out_of(acc)

    sim(body, 254)
    with pytest.raises(errors.MxError, match="switch mx_special"):
        sim(body, 255)
    assert np.isnan(sim(body, 255, mx_special="propagate")).all()


def test_quantizing_infinity_is_refused(sim):
    x = np.full((32, 4), np.inf, ml_dtypes.bfloat16)

    def body(x):
        t = nl.ndarray((32, 4), BF16)
        nisa.dma_copy(t, x)
        nisa.quantize_mx(mx((32, 1)), t, scale((4, 1)))

    with pytest.raises(errors.MxError, match="NaN or infinity"):
        sim(body, x)


def test_96_partitions_is_a_switch(sim):
    def body():
        nisa.nc_matmul_mx(psum((4, 4)), mx((96, 4)), mx((96, 4)), scale((96, 4)), scale((96, 4)), accumulate=False)

    sim(body)
    with pytest.raises(errors.MxError, match="switch mx_96_partitions"):
        sim(body, mx_96_partitions="error")
