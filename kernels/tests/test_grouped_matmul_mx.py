"""grouped_matmul_mx: reference, refusals, counts, mutants."""

import ml_dtypes
import numpy as np
import pytest

import harness  # first: it makes kernels/ importable

import grouped_matmul_mx_ref as ref
import mx_ref
from scale_rule import RULES, scale_rule

KERNEL = harness.load("grouped_matmul_mx")
BF16, F32 = ml_dtypes.bfloat16, np.float32
WEIGHTS = ("e2m1", "e4m3fn", "e5m2")
# (row offsets of the experts, slots of a block, H, I): an idle expert, one row, odd slots, several row tiles, several k
# tiles of each kind with ragged ends, several groups of I tiles, several column blocks of H.
SHAPES = (
    ((0, 3, 3, 8), 4, 64, 96),
    ((0, 1), 1, 32, 32),
    ((0, 5, 14), 9, 544, 608),
    ((0, 140, 150), 131, 64, 544),
    ((0, 7, 12), 8, 96, 2592),
    ((0, 6), 6, 2592, 64),
)


def problem(seed, offsets, slots, hidden, inter, element="e2m1", out="f32", limit=7.0, x_terms=1):
    """Arguments of the kernel by name. Gates and ups of a few units, so that all clamps act."""
    rng = np.random.default_rng(seed)
    experts, rows = len(offsets) - 1, offsets[-1]
    gate_up, down = [], []
    for _ in range(experts):
        w = rng.standard_normal((2 * inter, hidden)) * (5.0 / np.sqrt(hidden))
        bias = rng.standard_normal(2 * inter).astype(F32)
        gate_up.append(ref.pack_gate_up(*mx_ref.quantize(w, element, "ocp"), bias, element))
        down.append(mx_ref.pack(*mx_ref.quantize(rng.standard_normal((hidden, inter)), element, "ocp"), element))
    take, block_expert = ref.blocks_of(offsets, slots, rows)
    return {
        "x": rng.standard_normal((rows, hidden)).astype(BF16),
        "take": take,
        "put": take.copy(),
        "block_expert": block_expert,
        "w_gate_up": np.stack([g[0] for g in gate_up]),
        "s_gate_up": np.stack([g[1] for g in gate_up]),
        "b_gate_up": np.stack([g[2] for g in gate_up]),
        "w_down": np.stack([d[0] for d in down]),
        "s_down": np.stack([d[1] for d in down]),
        "b_down": rng.standard_normal((experts, down[0][0].shape[2])).astype(BF16),
        "rows_out": rows,
        "intermediate": inter,
        "w_element": element,
        "limit": limit,
        "out": out,
        "x_terms": x_terms,
    }


def agrees(module, args, rule="neuron") -> bool:
    with scale_rule(rule):
        (got,) = harness.launch(module.grouped_matmul_mx, target="trn3", **args)
    assert got.dtype == ref.OUTPUTS[args["out"]]
    return harness.within(got, ref.grouped_matmul_mx(**args, rule=rule), ref.bound(**args, rule=rule))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_shapes(shape, rule):
    assert agrees(KERNEL, problem(1, *shape), rule)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_two_terms(shape, rule):
    assert agrees(KERNEL, problem(11, *shape, x_terms=2), rule)


def test_two_terms_keep_bf16():
    """With two terms the result is that of bfloat16 activations: nothing of x, and of the product only what is 2^13 below
    its group's maximum. One term is far from it."""
    args = problem(12, (0, 5, 14), 9, 96, 96, x_terms=2)
    args["x"][np.abs(args["x"]) < 2.0**-9] = 0  # standard normal: nothing is left 2^13 below a maximum
    (got,) = harness.launch(KERNEL.grouped_matmul_mx, target="trn3", **args)
    (one,) = harness.launch(KERNEL.grouped_matmul_mx, target="trn3", **(args | {"x_terms": 1}))
    want, allowed = ref.with_bf16_activations(**args)
    assert harness.within(got, want, allowed)
    assert np.abs(got - want).max() < np.abs(one - want).max() / 8


@pytest.mark.parametrize("element", WEIGHTS)
@pytest.mark.parametrize("out", ["f32", "bf16"])
def test_elements(element, out):
    assert agrees(KERNEL, problem(2, *SHAPES[2], element, out))


@pytest.mark.parametrize("limit", [0.5, 7.0, 1e30])
def test_limits(limit):
    assert agrees(KERNEL, problem(3, *SHAPES[0], limit=limit))


def test_rows_are_gathered_and_scattered():
    """Each token goes to two experts: x is read through one index, y written through another."""
    args = problem(4, (0, 6, 11, 16), 4, 64, 96)
    tokens = 8
    rng = np.random.default_rng(4)
    order = rng.permutation(16)
    used = args["take"] < 16
    args["x"] = args["x"][:tokens]
    args["put"] = np.where(used, order[np.minimum(args["take"], 15)], 16).astype(np.int32)
    args["take"] = np.where(used, args["put"] // 2, tokens).astype(np.int32)
    assert agrees(KERNEL, args)


def test_a_row_does_not_depend_on_its_block():
    """The same rows in blocks of other sizes give the same bits."""
    whole = problem(5, (0, 9, 20), 12, 96, 544)
    (want,) = harness.launch(KERNEL.grouped_matmul_mx, target="trn3", **whole)
    for slots in (1, 5, 130):
        take, block_expert = ref.blocks_of((0, 9, 20), slots, 20)
        args = whole | {"take": take, "put": take, "block_expert": block_expert}
        (got,) = harness.launch(KERNEL.grouped_matmul_mx, target="trn3", **args)
        assert np.array_equal(got, want)


def test_weights_in_smaller_sets():
    for budget in (8, 2):
        module = harness.load("grouped_matmul_mx", ("WEIGHT_BYTES = 48 * 1024", f"WEIGHT_BYTES = {budget} * 1024"))
        assert agrees(module, problem(6, (0, 140), 140, 544, 1120))


def test_an_expert_that_does_not_exist_is_an_error():
    args = problem(7, (0, 3, 5), 4, 64, 96) | {"block_expert": np.array([[0, 2]], np.int32)}
    with pytest.raises(Exception, match="scalar_offset 2"):
        harness.launch(KERNEL.grouped_matmul_mx, target="trn3", **args)


# Pinned: a change that makes the kernel do more work fails here.
COUNTS = {
    # 2 blocks of 6 slots: 2 I tiles x 4 lanes x 2 halves x 2 k tiles x 6 columns, then 2 k tiles x 544 columns.
    "blocks": (
        problem(9, (0, 3, 8), 6, 544, 608),
        {
            "instructions": {"dma": 47, "gpsimd": 4, "scalar": 22, "tensor": 86, "vector": 64},
            "matmul_columns": {"half": 2 * 544, "mx": 2 * (2 * 4 * 2 * 2 * 6 + 2 * 544), "transpose": 80},
            "psum_banks_high_water": 8,
        },
    ),
    # Every weight byte is read once; of the scales only the rows that k tiles use.
    "decode": (
        problem(9, (0, 4), 4, 2048, 512),
        {
            "instructions": {"dma": 28, "gpsimd": 2, "scalar": 9, "tensor": 49, "vector": 24},
            "matmul_columns": {"half": 2048, "mx": 4 * 2 * 4 * 4 + 2048, "transpose": 40},
            "dma_bytes_read": {
                "hbm": (2048 * 1024 + 2048 * 512) // 2
                + (2048 * 1024 + 2048 * 512) // 32
                + 2 * 4 * 2048
                + 4 * 1024
                + 2 * 2048
                + 4 * 9,
                "sbuf": 4 * 4 * 2048,
            },
        },
    ),
    # As decode, in two terms: the same loads, twice the MX matmuls; VectorE splits and quantizes.
    "decode in two terms": (
        problem(9, (0, 4), 4, 2048, 512, x_terms=2),
        {
            "instructions": {"dma": 28, "gpsimd": 2, "scalar": 9, "tensor": 49 + 36, "vector": 24 + 4 + 4 + 2 + 1},
            "matmul_columns": {"half": 2048, "mx": 2 * (4 * 2 * 4 * 4 + 2048), "transpose": 40},
        },
    ),
    # Two row tiles share the down weights.
    "prefill": (
        problem(9, (0, 130), 130, 64, 96, "e4m3fn", "bf16"),
        {
            "instructions": {"dma": 26, "gpsimd": 3, "scalar": 7, "tensor": 16, "vector": 19},
            "matmul_columns": {"half": 64, "mx": 4 * 2 * 130 + 2 * 64, "transpose": 268},
        },
    ),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts(case):
    args, expected = COUNTS[case]
    harness.launch(KERNEL.grouped_matmul_mx, target="trn3", **args)
    counted = harness.counters(KERNEL.grouped_matmul_mx)
    assert {name: counted[name] for name in expected} == expected


MUTANTS = {
    "gate for up": ("K_TILE * (i_tiles + t), width", "K_TILE * t, width"),
    "gate not clamped": ("op1=nl.minimum, operand1=limit)", "op1=nl.maximum, operand1=-limit)"),
    "gate clamped from below": (
        "operand0=gate_bias, op1=nl.minimum, operand1=limit)",
        "operand0=gate_bias, op1=nl.abs_min, operand1=limit)",
    ),
    "up not clamped from below": ("operand0=1.0 - limit", "operand0=-1e30"),
    "up clamp without the 1": ("operand1=limit + 1.0", "operand1=limit"),
    "silu": ("op=nl.gelu_apprx_sigmoid", "op=nl.silu"),
    "up bias without the 1": ("op0=nl.add, operand0=1.0)", "op0=nl.add, operand0=0.0)"),
    "gate bias for up": ("bias[:, up_at : up_at + 1]", "bias[:, at : at + 1]"),
    "bias of the first quad lane": ("at = LANES * t + q\n", "at = LANES * t\n"),
    "lanes reversed": ("swiglu(quads[:, :, q]", "swiglu(quads[:, :, LANES - 1 - q]"),
    "weights of the first lane": ("+ PARTITIONS * q\n", "\n"),
    "first expert for all": ("experts[0:1, block : block + 1]", "experts[0:1, 0:1]"),
    "rows of this block again": ("gather(x, take_rows, block + 1", "gather(x, take_rows, block"),
    "take for put": ("put_rows = load_slots(put)", "put_rows = load_slots(take)"),
    "slots transposed": ("[[1, m], [slots, blocks]]", "[[blocks, m], [1, blocks]]"),
    "gather not cleared": ("        clear(rows)\n", ""),
    "weight scales of the first k tile": (
        "stationary_scale=weight_scales[t // 4][4 * (t % 4) :, column",
        "stationary_scale=weight_scales[t // 4][0:, column",
    ),
    "inner scales of the first k tile": (
        "stationary_scale=inner_scale[4 * (t % 4) :",
        "stationary_scale=inner_scale[0:",
    ),
    "scale rows not shifted": ("matmul_tiles", "dst_scale=scale[4 * (t % 4) :", "dst_scale=scale[0:"),
    "row scales of the first scale tile": (
        "moving_scale=scale[4 * (t % 4) :, t // 4, :]",
        "moving_scale=scale[4 * (t % 4) :, 0, :]",
    ),
    "down bias of the first block": (
        "of_expert(bias, expert, start, [[columns",
        "of_expert(bias, expert, 0, [[columns",
    ),
    "down columns of the first block": (
        "weights.append(load_weights(w, kind, expert, t, start, width))\n                for",
        "weights.append(load_weights(w, kind, expert, t, 0, width))\n                for",
    ),
    "low term of x forgotten": ("        for j in range(len(terms)):\n", "        for j in range(1):\n"),
    "low term of the product forgotten": (
        "                for j in range(len(inner)):\n",
        "                for j in range(1):\n",
    ),
    "high term of x twice": ("data, scale = terms[j]\n            nisa", "data, scale = terms[0]\n            nisa"),
    "high term of the product twice": (
        "inner_data, inner_scale = inner[j]\n                    for",
        "inner_data, inner_scale = inner[0]\n                    for",
    ),
    "low term of the product quantized into the high term's scales": (
        "inner_data, inner_scale = inner[j]\n            quantize_tile",
        "inner_data, inner_scale = inner[j][0], inner[0][1]\n            quantize_tile",
    ),
    "product not split": ("quantize_tile(inner_data, inner_scale, t, parts[j])", "quantize_tile(inner_data, inner_scale, t, parts[0])"),
    "x not masked": ("matmul_tiles", "HIGH_BITS = 0xFFF0", "HIGH_BITS = 0xFFFF"),
    "low term overwrites": (
        "moving_scale=scale[4 * (t % 4) :, t // 4, :],\n                accumulate=(t + j > 0)",
        "moving_scale=scale[4 * (t % 4) :, t // 4, :],\n                accumulate=(t > 0)",
    ),
    "scale quadrants run together": (
        "QUADRANT_ROWS * quadrant * depth * columns + s",
        "QUADRANT_ROWS * quadrant * columns + s",
    ),
}


def probes():
    """Problems that between them exercise every line that a mutant changes."""
    shuffled = problem(8, (0, 3, 8), 4, 64, 2592)
    shuffled["put"] = np.where(shuffled["put"] < 8, 7 - shuffled["put"], 8).astype(np.int32)
    yield shuffled
    # Deep k with few terms that are not zero: a tight bound, so that a wrong bias or scale cannot hide in it.
    sparse = problem(8, (0, 2), 2, 2592, 64)
    sparse["x"][:, 32:2560] = 0
    yield sparse
    yield problem(8, (0, 5, 12), 6, 544, 608)
    yield problem(8, (0, 131, 133), 131, 64, 96)
    yield problem(8, (0, 3, 8), 4, 64, 96, x_terms=2)


def passes(module) -> bool:
    return all(agrees(module, args) for args in probes())


def test_original_raises_no_alarm():
    assert passes(harness.load("grouped_matmul_mx"))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant):
    assert harness.killed("grouped_matmul_mx", MUTANTS[mutant], passes) is not None
