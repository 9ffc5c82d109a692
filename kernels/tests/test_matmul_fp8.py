"""matmul_fp8: reference, goldens, refusals, counts, mutants."""

import ml_dtypes
import numpy as np
import pytest

import harness
import matmul_fp8_ref as ref
import matmul_tiles as tiles_module

KERNEL = harness.load("matmul_fp8")
BF16 = ml_dtypes.bfloat16
# (target, x element, w element): every pair that the targets multiply.
PAIRS = (
    ("trn2", "e4m3", "e4m3"),
    ("trn2", "e5m2", "e4m3"),
    ("trn3", "e4m3", "e4m3"),
    ("trn3", "e4m3fn", "e4m3fn"),
    ("trn3", "e4m3fn", "e5m2"),
    ("trn3", "e5m2", "e5m2"),
)
# (M, K, N): one element, decode, odd H, ragged everything, several row tiles, several column blocks.
SHAPES = ((1, 1, 1), (5, 300, 70), (16, 384, 2080), (130, 640, 600), (257, 256, 300), (128, 2304, 512), (300, 129, 33))


def codes(rng, shape, element):
    return rng.standard_normal(shape).astype(ref.ELEMENTS[element]).view(np.uint8)


def problem(
    seed, m, k, n, x_element="e4m3", w_element="e4m3", scales="channel", bias=None, activation="none", out="f32"
):
    """Arguments of the kernel, by name."""
    rng = np.random.default_rng(seed)
    w = ref.pack(codes(rng, (k, n), w_element))
    halves, columns = w.shape[1:]
    shapes = {
        "tensor": ((1, 1), (1, 1)),
        "row": ((m, 1), (1, 1)),
        "column": ((1, 1), (1, columns)),
        "channel": ((m, 1), (1, columns)),
        "blocks": ((m, halves), (-(-n // 128), halves)),
    }
    x_scale, w_scale = (rng.uniform(0.1, 2.0, shape).astype(np.float32) for shape in shapes[scales])
    return {
        "x": codes(rng, (m, k), x_element),
        "w": w,
        "x_scale": x_scale,
        "w_scale": w_scale,
        "bias": None if bias is None else rng.standard_normal((1, columns)).astype(bias),
        "n": n,
        "x_element": x_element,
        "w_element": w_element,
        "blocks": scales == "blocks",
        "activation": activation,
        "out": out,
    }


def agrees(module, target, args) -> bool:
    (got,) = harness.launch(module.matmul_fp8, target=target, **args)
    assert got.dtype == ref.OUTPUTS[args["out"]]
    return harness.within(got, ref.matmul_fp8(**args), ref.bound(**args))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("scales", ["tensor", "channel", "blocks"])
def test_shapes(shape, target, scales):
    assert agrees(KERNEL, target, problem(1, *shape, scales=scales))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_elements(pair):
    target, x_element, w_element = pair
    for scales in ("row", "column", "blocks"):
        assert agrees(KERNEL, target, problem(2, 19, 400, 150, x_element, w_element, scales))


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
@pytest.mark.parametrize("bias", [None, np.float32, BF16])
@pytest.mark.parametrize("scales", ["tensor", "channel", "blocks"])
def test_epilogue(activation, bias, scales):
    for out in ("f32", "bf16"):
        assert agrees(
            KERNEL, "trn2", problem(3, 37, 256, 600, scales=scales, bias=bias, activation=activation, out=out)
        )


def test_weights_stay_or_stream(monkeypatch):
    """Every column block width and several groups of row tiles, by a smaller budget."""
    for budget in (16, 8, 4, 2, 1):
        module = harness.load("matmul_fp8", ("WEIGHT_BYTES = 64 * 1024", f"WEIGHT_BYTES = {budget * 512}"))
        assert agrees(module, "trn2", problem(4, 260, 512, 2100, bias=np.float32))
    module = harness.load("matmul_fp8", ("ROW_BYTES = 40 * 1024", "ROW_BYTES = 1024"))
    assert agrees(module, "trn2", problem(4, 520, 512, 2100, scales="blocks"))


def test_integers_are_exact():
    """Small integers with power-of-two scales have exact sums: the result is the reference's, bit for bit."""
    rng = np.random.default_rng(5)
    args = problem(5, 40, 700, 90)
    args["x"] = rng.integers(-8, 9, args["x"].shape).astype(ref.ELEMENTS["e4m3"]).view(np.uint8)
    args["w"] = ref.pack(rng.integers(-8, 9, (700, 90)).astype(ref.ELEMENTS["e4m3"]).view(np.uint8))
    for name in ("x_scale", "w_scale"):
        args[name] = np.exp2(rng.integers(-3, 4, args[name].shape)).astype(np.float32)
    (got,) = harness.launch(KERNEL.matmul_fp8, target="trn2", **args)
    assert np.array_equal(got, ref.matmul_fp8(**args))


def test_every_code_passes_the_transposes():
    """All finite codes of each element reach TensorE as they are: x is a permuted identity of codes, w is 1."""
    for target, element, _ in PAIRS:
        all_codes = np.arange(256, dtype=np.uint8)
        values = all_codes.view(ref.ELEMENTS[element]).astype(np.float32)
        finite = all_codes[np.isfinite(values)]
        m = finite.size
        x = np.zeros((m, m), np.uint8)
        x[np.arange(m), np.random.default_rng(6).permutation(m)] = finite
        one = np.ones((1, 1), ref.ELEMENTS[element]).view(np.uint8)
        args = {"x": x, "w": ref.pack(np.repeat(one, m, axis=0)), "x_scale": np.ones((1, 1), np.float32)}
        args |= {
            "w_scale": np.ones((1, 1), np.float32),
            "n": 1,
            "x_element": element,
            "w_element": element,
            "out": "f32",
        }
        (got,) = harness.launch(KERNEL.matmul_fp8, target=target, **args)
        assert np.array_equal(got[:, 0], finite.view(ref.ELEMENTS[element]).astype(np.float32))


# golden name -> (element, blocks)
GOLDEN_ACTIVATIONS = {
    "fp8_e4m3_row": ("e4m3fn", False),
    "fp8_e4m3_tensor": ("e4m3fn", False),
    "fp8_e4m3_g128": ("e4m3fn", True),
    "fp8_ieee_row": ("e4m3", False),
    "fp8_e5m2_tensor": ("e5m2", False),
}
GOLDEN_WEIGHTS = {
    "fp8_e4m3_row": ("e4m3fn", False),
    "fp8_e4m3_tensor": ("e4m3fn", False),
    "fp8_e4m3_block128": ("e4m3fn", True),
    "fp8_ieee_row": ("e4m3", False),
}


def test_goldens():
    """Every case of matmul.json whose two operands are FP8, against f64, within the manifest's own bound."""
    manifest, file = harness.golden("matmul")
    ran = 0
    for case in manifest["cases"]:
        if case["act"] not in GOLDEN_ACTIVATIONS or case["weight"] not in GOLDEN_WEIGHTS:
            continue
        (x_element, x_blocks), (w_element, w_blocks) = GOLDEN_ACTIVATIONS[case["act"]], GOLDEN_WEIGHTS[case["weight"]]
        assert x_blocks == w_blocks
        at = f"s{case['shape']}"
        a, w = f"{at}.a.{case['act']}", f"{at}.w.{case['weight']}"
        packed = ref.pack(np.ascontiguousarray(file.get_tensor(f"{w}.codes").T))
        w_scale = file.get_tensor(f"{w}.scale").astype(np.float32)
        if not w_blocks and w_scale.size > 1:
            w_scale = np.pad(w_scale.T, ((0, 0), (0, packed.shape[2] - w_scale.size)), constant_values=1.0)
        args = {
            "x": file.get_tensor(f"{a}.codes"),
            "w": packed,
            "x_scale": file.get_tensor(f"{a}.scale").astype(np.float32),
            "w_scale": np.ascontiguousarray(w_scale),
            "n": case["N"],
            "x_element": x_element,
            "w_element": w_element,
            "blocks": w_blocks,
            "out": "f32",
        }
        bound = (case["K"] + 8) * 2.0**-24 * file.get_tensor(f"{at}.abs.{case['act']}.{case['weight']}").astype(
            np.float64
        ) + 1e-30
        want = file.get_tensor(f"{at}.y.{case['act']}.{case['weight']}")
        for target in ("trn3",) if "e4m3fn" in (x_element, w_element) else ("trn2", "trn3"):
            (got,) = harness.launch(KERNEL.matmul_fp8, target=target, **args)
            assert harness.within(got, want, bound), case
        ran += 1
    assert ran > 0


# Pinned: a change that makes the kernel do more work fails here.
COUNTS = {
    # 2 row tiles x 1 column block of 2 PSUM tiles, 3 chunks (2 double-row, 1 plain), 5 transposes a row tile, 2 spread rows.
    "channel": (
        problem(8, 130, 640, 600, bias=np.float32, activation="silu", out="bf16"),
        {
            "instructions": {"dma": 11, "gpsimd": 6, "scalar": 7, "tensor": 26, "vector": 7},
            "matmul_columns": {"double_row": 2 * 2 * 600, "fp32": 2 * 600, "fp8": 2 * 600, "transpose": 5 * 130},
            "dma_bytes_read": {"hbm": 472520, "sbuf": 2 * 130 * 600},
            "dma_descriptors": 1032,
            "psum_banks_high_water": 4,
            "sbuf_high_water": 11914,
        },
    ),
    # 4 chunks x 4 PSUM tiles; each weight byte is read once, in runs of 2 KiB.
    "decode": (
        problem(8, 4, 1024, 2048, scales="row", out="bf16"),
        {
            "instructions": {"dma": 8, "scalar": 3, "tensor": 24, "vector": 3},
            "matmul_columns": {"double_row": 4 * 2048, "transpose": 8 * 4},
            "dma_bytes_read": {"hbm": 1024 * 2048 + 4 * 1024 + 4 * 4 * 2, "sbuf": 2 * 4 * 2048},
            "dma_descriptors": 528,
            "psum_banks_high_water": 4,
            "sbuf_high_water": 16420,
        },
    ),
    # 2 half chunks x 1 PSUM tile, each scaled in 4 column blocks.
    "blocks": (
        problem(8, 64, 256, 512, scales="blocks", out="f32"),
        {
            "instructions": {"dma": 5, "gpsimd": 3, "scalar": 8, "tensor": 5, "vector": 7},
            "matmul_columns": {"fp32": 8, "fp8": 2 * 512, "transpose": 2 * 64},
            "dma_bytes_read": {"hbm": 256 * 512 + 64 * 256 + 64 * 2 * 4 + 8 * 4, "sbuf": 4 * 64 * 512},
            "dma_descriptors": 321,
            "psum_banks_high_water": 1,
            "sbuf_high_water": 4096,
        },
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts(case):
    args, expected = COUNTS[case]
    harness.launch(KERNEL.matmul_fp8, target="trn2", **args)
    counted = harness.counters(KERNEL.matmul_fp8)
    assert {name: counted[name] for name in expected} == expected


MUTANTS = {
    "double-row halves swapped": (
        "2 * chunk : 2 * chunk + count, start",
        "2 * chunk + 1 - count % 2 : 2 * chunk + 1 - count % 2 + count, start",
    ),
    "first chunk accumulates": (
        "accumulate=(chunk > 0),\n            perf_mode",
        "accumulate=True,\n            perf_mode",
    ),
    "no accumulation": ("accumulate=(chunk > 0),\n            perf_mode", "accumulate=False,\n            perf_mode"),
    "leftover chunk overwrites": (
        "accumulate=(chunk > 0),\n        )\n\n",
        "accumulate=False,\n        )\n\n",
    ),
    "k tail not cleared": ("if have < width:", "if False:"),
    "row scale of the first tile": ("src=x_scale[row : row + m, 0:1]", "src=x_scale[0:m, 0:1]"),
    "weight scale forgotten": ("data1=scale, data2=factor, op=nl.multiply", "data1=scale, data2=factor, op=nl.maximum"),
    "column scale of the first bank": ("column_scale[0:m, at : at + part]", "column_scale[0:m, 0:part]"),
    "bias before scale": (
        "op0=nl.multiply, operand0=row_scale, op1=nl.add, operand1=bias",
        "op0=nl.multiply, operand0=row_scale, op1=nl.multiply, operand1=bias",
    ),
    "bias subtracted": ("data1=tile, data2=bias, op=nl.add", "data1=tile, data2=bias, op=nl.subtract"),
    "block factor of the next column block": ("factors, b * halves + h, h == 0", "factors, h, h == 0"),
    "block factor of the first half": ("b * halves + h, h == 0", "b * halves, h == 0"),
    "block sum restarts": ("h == 0, b % 2", "h == 2, b % 2"),
    "GpSimd term dropped": ("data1=total, data2=term, op=nl.add", "data1=total, data2=term, op=nl.maximum"),
    "banks not rotated": (
        "acc = banks[(first_bank + i) % BANKS][0:m, 0:part]\n                            multiply",
        "acc = banks[first_bank % BANKS][0:m, 0:part]\n                            multiply",
    ),
    "activation skipped": (
        "    if op != nl.copy:\n        nisa.activation(dst=dst, op=op, data=tile)\n",
        "    if op != nl.copy:\n        nisa.tensor_copy(dst=dst, src=tile)\n",
    ),
    "stale weights": ("tile = weights[number * chunks + c]", "tile = weights[c]"),
    "transposes overlap": ("dst=bank[:, m * i : m * (i + 1)]", "dst=bank[:, 0:m]"),
    "spread starts at 0": ("matmul_tiles", "src=row[0:1, start : start + n]", "src=row[0:1, 0:n]"),
    "spread by zero": ("matmul_tiles", "value=1.0", "value=0.5"),
}


def probes():
    """Problems that between them exercise every line that a mutant changes."""
    shape = (130, 640, 2100)
    yield problem(9, *shape, scales="channel", bias=np.float32, activation="silu")
    yield problem(9, *shape, scales="row", bias=np.float32)
    yield problem(9, 20, 640, 600, scales="blocks")
    yield problem(9, 20, 129, 600, scales="tensor")


def passes(module) -> bool:
    return all(agrees(module, "trn2", args) for args in probes())


def test_original_raises_no_alarm():
    assert passes(harness.load("matmul_fp8"))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant):
    assert harness.killed("matmul_fp8", MUTANTS[mutant], passes) is not None


def test_tile_sizes_are_the_chips():
    import nki.language as nl

    assert (tiles_module.PARTITIONS, 4 * tiles_module.BANK) == (nl.tile_size.pmax, nl.tile_size.psum_bank_fmax_bytes)
    assert tiles_module.BANKS == nl.tile_size.psum_num_banks
