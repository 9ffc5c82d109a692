"""rmsnorm_quantize: dequantized results against float64 within derived bounds, chained into the matmuls, mutants.

Bounds. u = 2^-24. A sum of K squares in f32, in any order, is within K u of itself relative; its root's reciprocal halves that,
adds u for the mean and eps and 2^-20 for ScalarE's rsqrt (undocumented on the device; a few ulp in the simulator).
Each product adds u. So every value before quantization is within RHO = K u / 2 + 2^-20 + 8 u of exact, relative.
Rounding to a format with s mantissa bits is within 2^-(s+1) relative, or half the subnormal step.
"""

from __future__ import annotations

import sys

import harness
import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(harness.KERNELS / "sim"))
import lint  # noqa: E402
import mx_ref  # noqa: E402
from nkisim import config  # noqa: E402
from rmsnorm_quantize_ref import TOP, TYPES, rmsnorm, rmsnorm_quantize_fp8, rmsnorm_quantize_mx  # noqa: E402

BF16 = ml_dtypes.bfloat16
U = 2.0**-24
# element: relative rounding, half a subnormal step, exponent of the largest power of two
GRID = {"e4m3": (2.0**-4, 2.0**-10, 7), "e4m3fn": (2.0**-4, 2.0**-10, 8), "e5m2": (2.0**-3, 2.0**-17, 15)}
# name: M, K, dtype of x, dtype of gamma, eps, rows that are zero
CASES = {
    "gpt_oss": (128, 2880, BF16, BF16, 1e-5, ()),
    "ragged": (131, 544, BF16, np.float32, 1e-6, (5,)),
    "one_row": (1, 64, BF16, BF16, 1e-5, ()),
    "f32": (60, 1024, np.float32, np.float32, 1e-5, (0, 59)),
    "two_scale_tiles": (34, 2560, BF16, BF16, 1e-5, ()),
    "large_eps": (20, 96, BF16, BF16, 0.5, (3,)),
    "groups": (515, 32, BF16, BF16, 1e-5, ()),
}
ODD = {"odd_k": (129, 77, BF16, BF16, 1e-5, (128,))}  # FP8 only: MX needs whole groups


def problem(name: str, seed: int = 11):
    """x, gamma, eps; rows of very different size, zeros where the case says so."""
    m, k, x_type, gamma_type, eps, zeros = (CASES | ODD)[name]
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * np.exp2(rng.integers(-12, 12, (m, 1)))
    x[list(zeros)] = 0
    gamma = 1 + 0.3 * rng.standard_normal((1, k))
    return x.astype(np.float32).astype(x_type), gamma.astype(np.float32).astype(gamma_type), eps


def rho(k: int) -> float:
    return k * U / 2 + 2.0**-20 + 8 * U


def fp8_agrees(module, name, element, target) -> bool:
    """codes * scale within the bound of y, the scale within RHO, codes within range."""
    x, gamma, eps = problem(name)
    codes, scale = harness.launch(module.rmsnorm_quantize_fp8, x, gamma, eps=eps, element=element, target=target)
    y, (_, want_scale) = rmsnorm(x, gamma, eps), rmsnorm_quantize_fp8(x, gamma, eps, element)
    values = codes.view(TYPES[element]).astype(np.float64)
    relative, half, _ = GRID[element]
    scale = scale.astype(np.float64)
    close = rho(x.shape[1])
    limit = np.maximum(relative * np.abs(y) * (1 + close), half * scale) + 2 * close * np.abs(y)
    return bool(
        np.all(np.abs(values) <= TOP[element])
        and harness.within(scale, want_scale, 2 * close * want_scale)
        and harness.within(values * scale, y, limit)
    )


def mx_agrees(module, name, element, rule) -> bool:
    """Dequantized values within the bound of y; bytes are not compared (facts: nki-api section 6)."""
    x, gamma, eps = problem(name)
    with config.configured(mx_scale=rule):
        words, rows = harness.launch(module.rmsnorm_quantize_mx, x, gamma, eps=eps, element=element, target="trn3")
    m, k = x.shape
    got = mx_ref.unpack(words, rows, element)
    y = rmsnorm(x, gamma, eps)
    relative, half, emax = GRID[element]
    close = rho(k) + 2.0**-8  # y is rounded to bf16 before it is quantized
    top = np.abs(y).reshape(m, -1, 32).max(axis=2)
    # The group's scale follows the exponent of its largest bf16 value, which may have crossed a power of two.
    def scale(largest):
        exponent = np.frexp(np.maximum(largest, 2.0**-140))[1] - 1 - emax + (1 if rule == "neuron" else 0)
        return np.repeat(np.exp2(np.maximum(exponent, -127).astype(np.float64)), 32, axis=1)

    high, low = scale(top * (1 + close)), scale(top * (1 - close))
    clipped = np.maximum(0, np.abs(y) * (1 + close) - TOP[element] * low)
    limit = np.maximum(relative * np.abs(y) * (1 + close), half * high) + close * np.abs(y) + clipped
    padded = not got[m:].any() and not got[:, k:].any() and words.shape[2] == m + m % 2
    return padded and harness.within(got[:m, :k], y, limit)


@pytest.fixture(scope="module")
def kernel():
    return harness.load("rmsnorm_quantize")


@pytest.mark.parametrize(("element", "target"), [("e4m3", "trn2"), ("e5m2", "trn2"), ("e4m3", "trn3"), ("e4m3fn", "trn3")])
@pytest.mark.parametrize("name", CASES | ODD)
def test_fp8_within_the_derived_bound(kernel, name, element, target):
    assert fp8_agrees(kernel, name, element, target)


@pytest.mark.parametrize("rule", ["neuron", "ocp"])
@pytest.mark.parametrize("element", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("name", CASES)
def test_mx_within_the_derived_bound(kernel, name, element, rule):
    assert mx_agrees(kernel, name, element, rule)


@pytest.mark.parametrize("rule", ["neuron", "ocp"])
def test_mx_reference_is_within_its_own_bound(kernel, rule):
    """The bound is not vacuous: the reference's own words pass it in the place of the kernel's."""

    class Reference:
        @staticmethod
        def rmsnorm_quantize_mx(*args, **kwargs):
            return None

    x, gamma, eps = problem("ragged")
    words, rows = rmsnorm_quantize_mx(x, gamma, eps, "e4m3fn", rule)
    before = harness.launch
    harness.launch = lambda *args, **kwargs: (words, rows)
    try:
        assert mx_agrees(Reference, "ragged", "e4m3fn", rule)
        words = words ^ np.uint32(0x08)  # one bit of one element of each word: an error of a whole binade
        assert not mx_agrees(Reference, "ragged", "e4m3fn", rule)
    finally:
        harness.launch = before


def test_zero_rows_have_zero_codes_and_a_scale(kernel):
    x, gamma, eps = problem("f32")
    codes, scale = harness.launch(kernel.rmsnorm_quantize_fp8, x, gamma, eps=eps, target="trn2")
    assert not codes[0].any() and not codes[59].any() and np.all(scale > 0)


def test_chained_into_matmul_mx(kernel):
    """The words go straight into matmul_mx: its product is that of the dequantized values."""
    matmul = harness.load("matmul_mx")
    x, gamma, eps = problem("ragged")
    words, rows = harness.launch(kernel.rmsnorm_quantize_mx, x, gamma, eps=eps, target="trn3")
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, x.shape[1]))
    w_codes, w_scale = mx_ref.quantize(w, "e2m1")
    w_words, w_rows = mx_ref.pack(w_codes, w_scale, "e2m1")
    (got,) = harness.launch(
        matmul.matmul_mx, words, w_words, w_rows, x_scale=rows, m=len(x), n=40, out="f32", target="trn3"
    )
    a = mx_ref.unpack(words, rows, "e4m3fn")[: len(x), : x.shape[1]]
    b = mx_ref.dequantize(w_codes, w_scale, "e2m1")
    limit = (x.shape[1] + 8) * U * (np.abs(a) @ np.abs(b).T) + 1e-30
    assert harness.within(got, a @ b.T, limit)


def test_chained_into_matmul_fp8(kernel):
    """The codes and scales go straight into matmul_fp8."""
    matmul = harness.load("matmul_fp8")
    x, gamma, eps = problem("ragged")
    codes, scale = harness.launch(kernel.rmsnorm_quantize_fp8, x, gamma, eps=eps, target="trn2")
    k = x.shape[1]
    rng = np.random.default_rng(0)
    w = np.clip(rng.standard_normal((k, 32)) * 60, -240, 240).astype(np.float32).astype(TYPES["e4m3"])
    packed = np.zeros((-(-k // 128) * 128, 32), np.uint8)
    packed[:k] = w.view(np.uint8)
    packed = np.ascontiguousarray(packed.reshape(-1, 128, 32).transpose(1, 0, 2))
    (got,) = harness.launch(
        matmul.matmul_fp8, codes, packed, scale, np.ones((1, 1), np.float32), out="f32", target="trn2"
    )
    a = codes.view(TYPES["e4m3"]).astype(np.float64) * scale
    limit = (k + 8) * U * (np.abs(a) @ np.abs(w.astype(np.float64))) + 1e-30
    assert harness.within(got, a @ w.astype(np.float64), limit)


# -- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "instructions", "columns", "moved", "descriptors"),
    [
        (
            "rmsnorm_quantize_fp8",
            {"dma": 4, "gpsimd": 2, "scalar": 6, "tensor": 7, "vector": 10},
            {"half": 2880, "transpose": 128},
            (743040, 369152), 258,
        ),
        (
            "rmsnorm_quantize_mx",
            {"dma": 7, "gpsimd": 3, "scalar": 8, "tensor": 18, "vector": 10},
            {"half": 2880, "transpose": 1536},
            (743040, 409600), 321,
        ),
    ],
)  # fmt: skip
def test_work_is_pinned(kernel, entry, instructions, columns, moved, descriptors):
    x, gamma, eps = problem("gpt_oss")
    harness.launch(getattr(kernel, entry), x, gamma, eps=eps, target="trn3")
    counters = getattr(kernel, entry).report.counters
    assert dict(counters.instructions) == instructions
    assert dict(counters.matmul_columns) == columns
    assert (counters.dma_bytes_read["hbm"], counters.dma_bytes_written["hbm"]) == moved
    assert counters.dma_descriptors == descriptors


# -- mutants ------------------------------------------------------------------------------------------------------

MUTANTS = {
    "eps outside the root": ("scale=1.0 / k, bias=eps", "scale=1.0 / k, bias=eps * eps"),
    "sum, not mean": ("scale=1.0 / k, bias=eps", "scale=1.0, bias=eps"),
    "mean over the padded row": ("scale=1.0 / k, bias=eps", "scale=1.0 / (ceil_div(k, 512) * 512), bias=eps"),
    "not squared": ("op=nl.square, data=rows[:m]", "op=nl.abs, data=rows[:m]"),
    "root, not its reciprocal": ("op=nl.rsqrt, data=total", "op=nl.sqrt, data=total"),
    "gamma added": ("data2=weight[:m], op=nl.multiply", "data2=weight[:m], op=nl.add"),
    "signed maximum": ("op0=nl.abs, operand0=None, reduce_op", "op0=nl.multiply, operand0=1.0, reduce_op"),
    "no floor under the maximum": ("op0=nl.maximum, operand0=TINY", "op0=nl.maximum, operand0=0.0"),
    "scale not normalised": ("op1=nl.multiply, operand1=factor\n", "op1=nl.maximum, operand1=factor\n"),
    "scale upside down": ("op0=nl.multiply, operand0=1.0 / top", "op0=nl.multiply, operand0=top"),
    "negative codes clamped away": ("operand1=-top", "operand1=0.0"),
    "no clamp and the wrong maximum": ("return nl.float8_e4m3, 240.0", "return nl.float8_e4m3, 448.0"),
    "e5m2 to the range of e4m3": ("return nl.float8_e5m2, 57344.0", "return nl.float8_e5m2, 240.0"),
    "scales of full tiles only": ("src=lines[full, :rest]", "src=lines[0, :rest]"),
    "MX rows not normalised": ("operand0=factors[tile][:m]", "operand0=1.0"),
    "MX gamma dropped": ("op1=nl.multiply,\n            operand1=weight[:m]", "op1=nl.maximum,\n            operand1=weight[:m]"),
    "MX factor of another tile": ("operand0=factors[tile][:m]", "operand0=factors[0][:m]"),
    "MX padding columns not cleared": ("elif k < 512 * tiles:", "elif k < 0:"),
    "MX padding row not cleared": ("if even > m:", "if even < m:"),
    "MX scale tile of another row": ("scale[:, :, at])], banks", "scale[:, :, 0:even])], banks"),
    "MX quadrant rows": ("src=scale[32 * quadrant : 32 * quadrant + QUADRANT_ROWS]", "src=scale[16 * quadrant : 16 * quadrant + QUADRANT_ROWS]"),
    "MX missing scale rows": ("if tiles % 4 > 0:", "if tiles % 4 > 4:"),
    "MX group stored over another": ("dst=data_out.view(kind)[:, :, group : group + here]", "dst=data_out.view(kind)[:, :, 0:here]"),
}  # fmt: skip


def small_cases(module) -> bool:
    """Cases that between them reach every line of the kernels."""
    names = ("ragged", "large_eps", "groups")
    fp8 = all(fp8_agrees(module, name, element, "trn2") for name in names for element in ("e4m3", "e5m2"))
    return fp8 and all(mx_agrees(module, name, "e4m3fn", "neuron") for name in names)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name):
    assert harness.killed("rmsnorm_quantize", MUTANTS[name], small_cases) is not None


def test_the_original_lives(kernel):
    assert small_cases(kernel)


def test_lint():
    assert lint.lint_file(harness.KERNELS / "rmsnorm_quantize.py") == []
