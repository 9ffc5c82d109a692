"""matmul_mx: reference, goldens, refusals, counts, mutants."""

import ml_dtypes
import numpy as np
import pytest

import harness
import matmul_mx_ref as ref
import mx_ref
from scale_rule import RULES, scale_rule

KERNEL = harness.load("matmul_mx")
BF16, F32 = ml_dtypes.bfloat16, np.float32
WEIGHTS = ("e2m1", "e4m3fn", "e5m2")
# (M, K, N): one group of k, decode with padded k, ragged everything, several row tiles, several column blocks.
SHAPES = ((1, 32, 1), (5, 320, 70), (16, 2880, 96), (131, 544, 600), (257, 512, 300), (128, 2592, 513), (3, 64, 2100))


def problem(seed, m, k, n, w_element="e2m1", x_element="e4m3fn", packed=False, bias=None, out="f32", x_terms=1):
    """Arguments of the kernel, by name."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-6, 7, (n, k // 32))).repeat(32, axis=1)
    w, w_scale = mx_ref.pack(*mx_ref.quantize(rng.standard_normal((n, k)) * spread, w_element, "ocp"), w_element)
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-6, 7, (m, k // 32))).repeat(32, axis=1)).astype(BF16)
    x_scale = None
    if packed:
        x, x_scale = mx_ref.pack(*mx_ref.quantize(x, x_element, "ocp"), x_element)
    columns = w.shape[2]
    return {
        "x": x,
        "w": w,
        "w_scale": w_scale,
        "x_scale": x_scale,
        "bias": None if bias is None else rng.standard_normal((1, columns)).astype(bias),
        "m": m,
        "n": n,
        "w_element": w_element,
        "x_element": x_element,
        "out": out,
        "x_terms": x_terms,
    }


def agrees(module, args, rule="neuron") -> bool:
    with scale_rule(rule):
        (got,) = harness.launch(module.matmul_mx, target="trn3", **args)
    assert got.dtype == ref.OUTPUTS[args["out"]]
    return harness.within(got, ref.matmul_mx(**args, rule=rule), ref.bound(**args, rule=rule))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("w_element", WEIGHTS)
@pytest.mark.parametrize("rule", RULES)
def test_shapes(shape, w_element, rule):
    assert agrees(KERNEL, problem(1, *shape, w_element), rule)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_two_terms(shape, rule):
    assert agrees(KERNEL, problem(11, *shape, "e4m3fn", bias=F32, x_terms=2), rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exponents", [4, 13, 30])
def test_two_terms_are_the_value(exponents, rule):
    """The result is that of bfloat16 x: within summation error, and what `terms_error` allows to elements far below their
    group's maximum (none with a spread of 4 bits) or, under `ocp`, at the top of the range."""
    args = problem(12, 33, 544, 80, x_terms=2)
    rng = np.random.default_rng(12)
    x = args["x"] = (rng.standard_normal((33, 544)) * np.exp2(rng.integers(-exponents, 1, (33, 544)))).astype(BF16)
    if exponents == 4:
        x[np.abs(x) < 2.0**-8] = 0
    with scale_rule(rule):
        (got,) = harness.launch(KERNEL.matmul_mx, target="trn3", **args)
    w = mx_ref.unpack(args["w"], args["w_scale"], args["w_element"])[:80, :544].T
    lost = mx_ref.terms_error(x, rule)
    assert (not lost.any()) == (exponents == 4 and rule == "neuron")
    x = x.astype(np.float64)
    assert harness.within(got, x @ w, ref.bound(**args, rule=rule) + lost @ np.abs(w))
    (one,) = harness.launch(KERNEL.matmul_mx, target="trn3", **(args | {"x_terms": 1}))
    assert np.abs(got - x @ w).max() < np.abs(one - x @ w).max() * (2.0**-3 if rule == "neuron" else 2.0)


@pytest.mark.parametrize("rule", RULES)
def test_every_significand_survives_in_two_terms(rule):
    """All 2^8 significands, both signs, at each distance from the group's maximum: what the header of `split` says."""
    bits = np.arange(128, dtype=np.uint16)
    significands = (bits | np.uint16(127 << 7)).view(BF16).astype(np.float64)
    limit = 13 if rule == "neuron" else 14
    for below in range(limit + 8):
        x = np.zeros((256, 32))
        x[:128, 0], x[128:, 0] = 1.0, 1.75  # the group's maximum, whose exponent is 0 whatever is beside it
        x[:, 1] = np.tile(significands, 2) * 2.0**-below * np.where(np.arange(256) % 2, 1, -1)
        got = mx_ref.quantized(x, "e4m3fn", rule, 2)
        lost = mx_ref.terms_error(x, rule)
        assert (np.abs(got - x) <= lost).all()
        saturated = np.zeros(256, bool)
        if rule == "ocp":  # a low term alone in its group with all four bits set; a high one beside no larger one
            saturated = np.tile((bits & 15 == 15) | ((below == 0) & (bits >> 4 == 7)), 2)
        exact = (got == x).all(axis=1)
        assert np.array_equal(exact, ~saturated) if below <= limit else not exact.all()


@pytest.mark.parametrize("w_element", WEIGHTS)
@pytest.mark.parametrize("x_element", WEIGHTS)
def test_packed_activations(w_element, x_element):
    for shape in ((5, 320, 70), (131, 544, 300), (40, 2592, 40)):
        assert agrees(KERNEL, problem(2, *shape, w_element, x_element, packed=True))


@pytest.mark.parametrize("x_element", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("rule", RULES)
def test_device_quantization_meets_its_own_bound(x_element, rule):
    """Whatever the scale byte, the result is the product of the unrounded x within the quantization error.

    With a group maximum in [2^e, 2^(e+1)): an element of at least the smallest normal rounds by at most 2^-4 (e4m3fn) or
    2^-3 (e5m2) of itself; below that the step is fixed; `ocp` may clamp a maximum of almost 2^(Emax+1) to 448 or 57344, which
    loses at most 1/8 of it.
    """
    args = problem(3, 33, 1056, 80, x_element=x_element)
    with scale_rule(rule):
        (got,) = harness.launch(KERNEL.matmul_mx, target="trn3", **args)
    w = mx_ref.unpack(args["w"], args["w_scale"], args["w_element"])[:80, :1056].T
    x = args["x"].astype(np.float64)
    relative, smallest = (2.0**-4, 2.0**-10) if x_element == "e4m3fn" else (2.0**-3, 2.0**-17)
    if rule == "ocp":
        relative = max(relative, 1.0 / 8.0)
    top = np.abs(x).reshape(33, -1, 32).max(axis=2).repeat(32, axis=1)
    step = smallest * np.exp2(np.floor(np.log2(top)) - mx_ref.EMAX[x_element] + 1)
    error = (np.abs(x) * relative + step) @ np.abs(w)
    assert harness.within(got, x @ w, error + ref.bound(**args, rule=rule))


@pytest.mark.parametrize("bias", [None, F32, BF16])
@pytest.mark.parametrize("out", ["f32", "bf16"])
def test_epilogue(bias, out):
    assert agrees(KERNEL, problem(4, 37, 544, 2100, bias=bias, out=out))


def test_weights_stay_or_stream():
    """Every column block width and several groups of row tiles, by a smaller budget."""
    for budget in (8, 4, 2, 1):
        module = harness.load("matmul_mx", ("WEIGHT_BYTES = 64 * 1024", f"WEIGHT_BYTES = {budget * 1024}"))
        assert agrees(module, problem(5, 260, 544, 2100, bias=F32))
    module = harness.load("matmul_mx", ("ROW_BYTES = 72 * 1024", "ROW_BYTES = 1280"))
    assert agrees(module, problem(5, 390, 544, 600))


def test_k_in_several_pieces():
    """x longer than one DMA piece, and more than one scale tile."""
    module = harness.load("matmul_mx", ("PIECE = 8", "PIECE = 2"))
    assert agrees(module, problem(6, 9, 2880, 64))


def test_integers_are_exact():
    """Codes whose sums are exact: the result is the reference's, bit for bit."""
    rng = np.random.default_rng(7)
    w_codes = rng.integers(0, 16, (70, 640)).astype(np.uint8)
    w, w_scale = mx_ref.pack(w_codes, rng.integers(125, 130, (70, 20)).astype(np.uint8), "e2m1")
    x = rng.integers(-15, 16, (11, 640)).astype(BF16)
    args = {"x": x, "w": w, "w_scale": w_scale, "n": 70, "out": "f32"}
    (got,) = harness.launch(KERNEL.matmul_mx, target="trn3", **args)
    assert np.array_equal(got, ref.matmul_mx(**args))
    values = mx_ref.dequantize(w_codes, mx_ref.unpack_scales(w_scale, 640)[:70], "e2m1")
    assert np.array_equal(got, x.astype(np.float64) @ values.T)


GOLDEN = {"mxfp4": "e2m1", "mxfp8_e4m3": "e4m3fn", "mxfp8_e5m2": "e5m2"}


def test_goldens():
    """Every case of matmul.json whose two operands are MX, against f64, within the manifest's own bound."""
    manifest, file = harness.golden("matmul")
    ran = 0
    for case in manifest["cases"]:
        if case["act"] not in GOLDEN or case["weight"] not in GOLDEN:
            continue
        at = f"s{case['shape']}"
        operands = []
        for side, name in (("a", case["act"]), ("w", case["weight"])):
            element = GOLDEN[name]
            if element == "e2m1":
                packed = file.get_tensor(f"{at}.{side}.{name}.packed")
                codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
            else:
                codes = file.get_tensor(f"{at}.{side}.{name}.codes")
            operands.append(mx_ref.pack(codes, file.get_tensor(f"{at}.{side}.{name}.scale"), element))
        (x, x_scale), (w, w_scale) = operands
        args = {"x": x, "w": w, "w_scale": w_scale, "x_scale": x_scale, "m": case["M"], "n": case["N"], "out": "f32"}
        args |= {"w_element": GOLDEN[case["weight"]], "x_element": GOLDEN[case["act"]]}
        (got,) = harness.launch(KERNEL.matmul_mx, target="trn3", **args)
        bound = (case["K"] + 8) * 2.0**-24 * file.get_tensor(f"{at}.abs.{case['act']}.{case['weight']}").astype(
            np.float64
        ) + 1e-30
        assert harness.within(got, file.get_tensor(f"{at}.y.{case['act']}.{case['weight']}"), bound), case
        ran += 1
    assert ran > 0


# Pinned: a change that makes the kernel do more work fails here.
COUNTS = {
    # 2 row tiles (the second of 2 rows), 2 k tiles, 2 PSUM tiles; 4 transposes a row tile.
    "ragged": (
        problem(9, 130, 544, 600, bias=BF16, out="bf16"),
        {
            "instructions": {"dma": 11, "gpsimd": 3, "scalar": 3, "tensor": 18, "vector": 9},
            "matmul_columns": {"half": 600, "mx": 2 * 2 * 600, "transpose": 4 * 130},
            "dma_bytes_read": {
                "hbm": 2 * 128 * 600 * 2 + 2 * 16 * 600 + 2 * 130 * 544 + 2 * 600,
                "sbuf": 2 * 130 * 600,
            },
            "dma_descriptors": 549,
            "psum_banks_high_water": 2,
            "sbuf_high_water": 6618,
        },
    ),
    # 8 k tiles x 4 PSUM tiles; every weight byte read once, in runs of 4 KiB, every scale byte once.
    "decode": (
        problem(9, 4, 4096, 2048, out="bf16"),
        {
            "instructions": {"dma": 18, "scalar": 6, "tensor": 48, "vector": 10},
            "matmul_columns": {"mx": 8 * 2048, "transpose": 16 * 4},
            "dma_bytes_read": {"hbm": 4096 * 2048 // 2 + 4096 * 2048 // 32 + 4 * 4096 * 2, "sbuf": 2 * 4 * 2048},
        },
    ),
    # As decode, in two terms: the same loads, twice the matmuls, and two passes of VectorE and a quantization more for each.
    "decode in two terms": (
        problem(9, 4, 4096, 2048, out="bf16", x_terms=2),
        {
            "instructions": {"dma": 18, "scalar": 6, "tensor": 48 + 32, "vector": 10 + 8 + 2 * 4},
            "matmul_columns": {"mx": 2 * 8 * 2048, "transpose": 16 * 4},
            "dma_bytes_read": {"hbm": 4096 * 2048 // 2 + 4096 * 2048 // 32 + 4 * 4096 * 2, "sbuf": 2 * 4 * 2048},
        },
    ),
    # Nothing but loads, matmuls and copies.
    "packed": (
        problem(9, 64, 1024, 512, "e4m3fn", "e4m3fn", packed=True),
        {
            "instructions": {"dma": 12, "scalar": 1, "tensor": 2},
            "matmul_columns": {"mx": 2 * 512},
        },
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts(case):
    args, expected = COUNTS[case]
    harness.launch(KERNEL.matmul_mx, target="trn3", **args)
    counted = harness.counters(KERNEL.matmul_mx)
    assert {name: counted[name] for name in expected} == expected


MUTANTS = {
    "scales of the first k tile": ("moving_scale=tile_scale[4 * (t % 4) :", "moving_scale=tile_scale[0:"),
    "row scales of the first k tile": ("stationary_scale=scale[4 * (t % 4) :", "stationary_scale=scale[0:"),
    "row scales of the first scale tile": (
        "stationary_scale=scale[4 * (t % 4) :, t // 4, :]",
        "stationary_scale=scale[4 * (t % 4) :, 0, :]",
    ),
    "no accumulation": ("accumulate=(t + j > 0)", "accumulate=False"),
    "accumulates what the bank held": ("accumulate=(t + j > 0)", "accumulate=True"),
    "low term overwrites": ("accumulate=(t + j > 0)", "accumulate=(t > 0)"),
    "low term forgotten": ("for j in range(x_terms)", "for j in range(1)"),
    "high term twice": ("data, scale = rows[r][j]", "data, scale = rows[r][0]"),
    "data of the high term with the low term's scale": (
        "data, scale = rows[r][j]",
        "data, scale = rows[r][j][0], rows[r][x_terms - 1][1]",
    ),
    "high term not masked": ("matmul_tiles", "HIGH_BITS = 0xFFF0", "HIGH_BITS = 0xFFFF"),
    "three mantissa bits": ("matmul_tiles", "HIGH_BITS = 0xFFF0", "HIGH_BITS = 0xFFE0"),
    "five mantissa bits": ("matmul_tiles", "HIGH_BITS = 0xFFF0", "HIGH_BITS = 0xFFF8"),
    "low term is the value": (
        "matmul_tiles",
        "data1=values, data2=high, op=nl.subtract",
        "data1=values, data2=values, op=nl.maximum",
    ),
    "low term added": ("matmul_tiles", "data2=high, op=nl.subtract", "data2=high, op=nl.add"),
    "low term quantized into the high term's scales": (
        "matmul_tiles",
        "data, scale = terms[j]",
        "data, scale = terms[j][0], terms[0][1]",
    ),
    "k tail not cleared": ("elif have < width:", "elif False:"),
    "odd row not cleared": ("if even > m:", "if False:"),
    "weights of the first block": ("tile = weights[number * tiles + t]", "tile = weights[t]"),
    "scales of the first block": ("scales[number * ceil_div(tiles, 4) + t // 4]", "scales[t // 4]"),
    "first scale tile for all": ("load_scales(w_scale, s, s + 1,", "load_scales(w_scale, 0, 1,"),
    "bias of the first bank": ("column_bias[0:count, at : at + part]", "column_bias[0:count, 0:part]"),
    "bias forgotten": ("matmul_tiles", "data1=acc, data2=bias, op=nl.add", "data1=acc, data2=bias, op=nl.maximum"),
    "rows of the first tile": ("data, scale = rows[r][j]", "data, scale = rows[0][j]"),
    "output of the first tile": ("dst=y[row : row + count", "dst=y[0:count"),
    "banks not rotated": ("dst=banks[(first_bank + i) % BANKS][0:even", "dst=banks[first_bank % BANKS][0:even"),
    "pairs swapped": ("matmul_tiles", "data=pairs[:, start + half :", "data=pairs[:, start + 1 - half :"),
    "pairs not interleaved": (
        "matmul_tiles",
        "dst=bank[:, 2 * m * i + half : 2 * m * (i + 1) : 2]",
        "dst=bank[:, 2 * m * i + half * m : 2 * m * i + half * m + m]",
    ),
    "quantized in place of the neighbour": ("matmul_tiles", "start_tile + first + i, parts", "start_tile + first, parts"),
    "scale rows not shifted": ("matmul_tiles", "dst_scale=scale[4 * (t % 4) :", "dst_scale=scale[0:"),
    "quadrants adjacent": (
        "matmul_tiles",
        "dst=out[32 * quadrant : 32 * quadrant + rows",
        "dst=out[16 * quadrant : 16 * quadrant + rows",
    ),
    "scale rows of a k tile forgotten": (
        "matmul_tiles",
        "return 4 * min(4, tiles - 4 * s)",
        "return 4 * min(3, tiles - 4 * s)",
    ),
    "one quadrant four times": ("matmul_tiles", "row = QUADRANT_ROWS * quadrant", "row = 0"),
}


def probes():
    """Problems that between them exercise every line that a mutant changes."""
    yield problem(10, 133, 2592, 2100, bias=F32)
    yield problem(10, 3, 544, 600, "e4m3fn", "e5m2")
    yield problem(10, 7, 2592, 40, "e4m3fn", x_terms=2)


def passes(module) -> bool:
    return all(agrees(module, args) for args in probes())


def test_original_raises_no_alarm():
    assert passes(harness.load("matmul_mx"))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant):
    assert harness.killed("matmul_mx", MUTANTS[mutant], passes) is not None
