"""The known answers that follow from the public documentation."""

import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl


def through_sbuf(fill):
    """A kernel body that fills an SBUF tile and returns it from shared HBM."""

    def body(*args):
        out = fill(*args)
        hbm = nl.ndarray(out.shape, dtype=out.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=hbm, src=out)
        return hbm

    return body


@pytest.mark.parametrize(
    ("op", "x", "y", "want"),
    [
        ("abs_max", -5.0, 3.0, -5.0),
        ("abs_max", 1.0, -1.0, -1.0),
        ("abs_min", 5.0, -3.0, -3.0),
        ("abs_min", 1.0, -1.0, -1.0),
    ],
)
def test_abs_max_returns_the_operand_itself_and_y_on_ties(sim, op, x, y, want):
    def fill():
        a, b = (nl.ndarray((1, 4), nl.float32) for _ in range(2))
        out = nl.ndarray((1, 4), nl.float32)
        nisa.memset(a, x)
        nisa.memset(b, y)
        nisa.tensor_tensor(out, a, b, op=getattr(nl, op))
        return out

    assert (sim(through_sbuf(fill)) == want).all()


@pytest.mark.parametrize(("value", "want"), [(2.5, 2), (3.5, 4), (-2.5, 0), (300.0, 255), (-7.0, 0)])
def test_float_to_uint8_rounds_to_even_then_saturates(sim, value, want):
    def fill():
        a, out = nl.ndarray((2, 3), nl.float32), nl.ndarray((2, 3), nl.uint8)
        nisa.memset(a, value)
        nisa.tensor_copy(out, a)
        return out

    assert (sim(through_sbuf(fill)) == want).all()


def quantized(sim, values, rule, dtype=nl.float8_e4m3fn_x4):
    """Codes [32, 4] and scale byte of one group whose values are `values` [8, 4] (other groups zero)."""
    import ml_dtypes

    src = np.zeros((32, 4), ml_dtypes.bfloat16)
    src[:8] = values

    def body(x):
        sb, codes, scale = nl.ndarray((32, 4), nl.bfloat16), nl.ndarray((32, 1), dtype), nl.ndarray((4, 1), nl.uint8)
        nisa.dma_copy(sb, x)
        nisa.quantize_mx(dst=codes, src=sb, dst_scale=scale)
        out, out_scale = nl.ndarray((32, 1), nl.uint32, nl.shared_hbm), nl.ndarray((4, 1), nl.uint8, nl.shared_hbm)
        nisa.dma_copy(out, codes.view(nl.uint32))
        nisa.dma_copy(out_scale, scale)
        return out, out_scale

    codes, scale = sim(body, src, mx_scale=rule)
    return codes.view(np.uint8).reshape(32, 4), scale.reshape(-1)


@pytest.mark.parametrize(
    ("rule", "amax", "byte", "code"),
    [
        ("neuron", 1.0, 120, 0x70),
        ("ocp", 1.0, 119, 0x78),
        ("neuron", 1.9375, 120, 0x78),
        ("ocp", 1.9375, 119, 0x7E),
    ],
)
def test_quantize_mx_of_the_group_maximum(sim, rule, amax, byte, code):
    values = np.full((8, 4), 0.25)
    values[3, 2] = amax
    codes, scale = quantized(sim, values, rule)
    assert scale[0] == byte
    assert codes[3, 2] == code


@pytest.mark.parametrize(("rule", "codes"), [("ocp", (0x7E, 0x78, 0xF0, 0x6B)), ("neuron", (0x78, 0x70, 0xE8, 0x63))])
def test_quantize_mx_of_the_documented_group(sim, rule, codes):
    values = np.zeros((8, 4))
    values[0] = (1.9375, 1.0, -0.5, 0.3330078125)
    got, _ = quantized(sim, values, rule)
    assert tuple(got[0]) == codes


@pytest.mark.parametrize("rule", ["neuron", "ocp"])
@pytest.mark.parametrize("dtype", [nl.float8_e4m3fn_x4, nl.float8_e5m2_x4])
def test_quantize_mx_of_zeros_is_all_zero_bytes(sim, rule, dtype):
    codes, scale = quantized(sim, np.zeros((8, 4)), rule, dtype)
    assert not codes.any()
    assert not scale.any()


def ones_mx(sim, bump_group=None):
    """nc_matmul_mx of all-ones operands, P = 128; optionally the stationary scales of one group are 128."""
    words = np.full((128, 16), 0x38383838, np.uint32)
    scales = np.full((128, 16), 127, np.uint8)
    bumped = scales.copy()
    if bump_group is not None:
        bumped[32 * (bump_group // 4) + bump_group % 4] = 128

    def body(a, sa, sb):
        t, s1, s2 = (
            nl.ndarray((128, 16), nl.float8_e4m3fn_x4),
            nl.ndarray((128, 16), nl.uint8),
            nl.ndarray((128, 16), nl.uint8),
        )
        nisa.dma_copy(t, a.ap([[16, 128], [1, 16]], offset=0, dtype=nl.float8_e4m3fn_x4))
        nisa.dma_copy(s1, sa)
        nisa.dma_copy(s2, sb)
        acc, out = nl.ndarray((16, 16), nl.float32, nl.psum), nl.ndarray((16, 16), nl.float32)
        nisa.nc_matmul_mx(acc, t, t, s1, s2, accumulate=False)
        nisa.tensor_copy(out, acc)
        hbm = nl.ndarray((16, 16), nl.float32, nl.shared_hbm)
        nisa.dma_copy(hbm, out)
        return hbm

    return sim(body, words, bumped, scales)


def test_nc_matmul_mx_of_ones_is_512(sim):
    assert (ones_mx(sim) == 512).all()


@pytest.mark.parametrize("group", range(16))
def test_nc_matmul_mx_with_one_group_doubled_is_544(sim, group):
    assert (ones_mx(sim, group) == 544).all()


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_double_row_of_ones_contracts_twice_the_partitions(sim, target):
    def fill():
        a, b = nl.ndarray((128, 2, 8), nl.float8_e4m3), nl.ndarray((128, 2, 24), nl.float8_e4m3)
        nisa.memset(a, 1.0)
        nisa.memset(b, 1.0)
        acc, out = nl.ndarray((8, 24), nl.float32, nl.psum), nl.ndarray((8, 24), nl.float32)
        nisa.nc_matmul(acc, a, b, accumulate=False, perf_mode=nisa.matmul_perf_mode.double_row)
        nisa.tensor_copy(out, acc)
        return out

    assert (sim(through_sbuf(fill), target=target) == 256).all()


def test_iota(sim):
    def fill():
        out = nl.ndarray((4, 4), nl.int32)
        nisa.iota(out, pattern=[[1, 4]], offset=10, channel_multiplier=100)
        return out

    assert sim(through_sbuf(fill))[2].tolist() == [210, 211, 212, 213]


def test_affine_select_keeps_the_causal_part(sim):
    def fill():
        x, out = nl.ndarray((2, 4), nl.float32), nl.ndarray((2, 4), nl.float32)
        nisa.memset(x, 7.0)
        nisa.affine_select(
            out, [[-1, 4]], channel_multiplier=1, on_true_tile=x, on_false_value=-1.0, cmp_op=nl.greater_equal, offset=0
        )
        return out

    assert sim(through_sbuf(fill))[1].tolist() == [7, 7, -1, -1]
