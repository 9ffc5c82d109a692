"""attention_prefill: against its float64 reference within a derived bound, invariances, refusals, costs, mutants."""

from __future__ import annotations

import sys

import harness
import ml_dtypes
import numpy as np
import pytest
from attention_bounds import bound

sys.path.insert(0, str(harness.KERNELS / "sim"))
import lint  # noqa: E402

from attention_prefill_ref import attention_prefill_parts  # noqa: E402

BF16 = ml_dtypes.bfloat16

# name: B, SQ, SK, HQ, HKV, D, SP, prior_len, sinks, causal, window
CASES = {
    "gpt_oss": (1, 200, 200, 8, 2, 64, 0, None, True, True, 128),
    "gpt_oss_full": (1, 300, 300, 8, 2, 64, 0, None, True, True, 0),
    "llama": (1, 257, 257, 4, 1, 128, 0, None, False, True, 0),
    "one_query": (2, 1, 1, 4, 2, 64, 0, None, False, True, 0),
    "full": (1, 130, 1100, 3, 1, 96, 0, None, False, False, 0),
    "full_with_sinks": (2, 60, 70, 4, 4, 32, 0, None, True, False, 0),
    "sections": (1, 1155, 1155, 1, 1, 16, 0, None, False, True, 0),
    "prior": (2, 140, 140, 4, 2, 64, 200, (200, 77), False, True, 0),
    "prior_and_window": (2, 140, 140, 4, 2, 64, 200, (150, 20), True, True, 100),
    "prior_empty": (2, 50, 50, 2, 1, 80, 130, (0, 1), False, True, 0),
    "prior_full": (1, 20, 50, 2, 1, 80, 130, (100,), False, False, 0),
    "narrow_window": (1, 300, 300, 2, 2, 64, 0, None, False, True, 1),
    "wide_rows": (1, 300, 300, 32, 32, 128, 0, None, False, True, 0),
    "window_over_sections": (1, 600, 600, 16, 16, 128, 0, None, False, True, 300),
    "not_resident": (1, 520, 520, 8, 8, 128, 0, None, True, True, 0),
}


def problem(name: str, seed: int = 3, loud: float = 30.0):
    """Arguments of a case. Prior slots past prior_len hold numbers `loud` times larger, so that a leak is visible."""
    batch, sq, sk, hq, hkv, d, sp, used, with_sinks, causal, window = CASES[name]
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    args = {
        "q": normal(batch, sq, hq, d).astype(BF16),
        "k": normal(batch, sk, hkv, d).astype(BF16),
        "v": normal(batch, sk, hkv, d).astype(BF16),
        "sinks": 2 * normal(hq) if with_sinks else None,
        "sm_scale": float(np.float32(d**-0.5)),
        "causal": causal,
        "window": window,
    }
    if sp:
        factor = np.where(np.arange(sp)[None, :] < np.array(used)[:, None], 1.0, loud)[:, :, None, None]
        args["k_prior"] = (normal(batch, sp, hkv, d) * factor).astype(BF16)
        args["v_prior"] = (normal(batch, sp, hkv, d) * factor).astype(BF16)
        args["prior_len"] = np.array(used, np.int32)
    return args


def run(module, args, target):
    return harness.launch(module.attention_prefill, target=target, **args)[0]


def agrees(module, args, target) -> bool:
    """Whether the kernel is within the derived bound of the reference."""
    got = run(module, args, target)
    out, spread, reach = attention_prefill_parts(**args)
    keys = args["k"].shape[1] + (args["k_prior"].shape[1] if "k_prior" in args else 0)
    limit = bound(out, spread, reach, args["sinks"], args["q"].shape[3], keys, tiles=2 + keys // 128)
    return got.dtype == BF16 and harness.within(got, out, limit)


@pytest.fixture(scope="module")
def kernel():
    return harness.load("attention_prefill")


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("name", CASES)
def test_within_the_derived_bound(kernel, name, target):
    assert agrees(kernel, problem(name), target)


def test_large_logits(kernel):
    """Logits of some hundreds, sinks above and below them, and a scale above 1."""
    args = problem("gpt_oss_full")
    args["q"] = (args["q"].astype(np.float32) * 20).astype(BF16)
    args["sinks"] = np.linspace(-300, 300, 8).astype(np.float32)
    assert agrees(kernel, args, "trn2")
    args["q"] = (args["q"].astype(np.float32) / 64).astype(BF16)
    args["sm_scale"] = 1.5
    assert agrees(kernel, args, "trn3")


def test_padding_queries_do_not_reach_back(kernel):
    """A causal chunk padded at the end: the same bits in front."""
    args = problem("llama")
    whole = run(kernel, args, "trn2")
    for name in ("q", "k", "v"):
        args[name] = args[name][:, :150].copy()
    assert np.array_equal(whole[:, :128].view(np.uint16), run(kernel, args, "trn2")[:, :128].view(np.uint16))


def test_chunks_add_up(kernel):
    """A sequence in two chunks, the first as prior keys of the second: within the two bounds of the whole."""
    args = problem("gpt_oss")
    out, spread, reach = attention_prefill_parts(**args)
    limit = bound(out, spread, reach, args["sinks"], 64, 328, tiles=4)
    rest = dict(args, k_prior=args["k"][:, :130].copy(), v_prior=args["v"][:, :130].copy())
    rest["prior_len"] = np.array([130], np.int32)
    for name in ("q", "k", "v"):
        rest[name] = args[name][:, 130:].copy()
    assert harness.within(run(kernel, rest, "trn2"), out[:, 130:], limit[:, 130:])


# -- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instructions", "columns", "read", "descriptors", "banks"),
    [
        (
            "gpt_oss_full",
            {"dma": 11, "gpsimd": 25, "scalar": 96, "tensor": 135, "vector": 106},
            {"transpose": 5628, "half": 8544},
            464896, 1328, 2,
        ),
        (
            "full",
            {"dma": 8, "gpsimd": 1, "scalar": 36, "tensor": 141, "vector": 59},
            {"transpose": 5000, "half": 11784},
            497280, 2460, 4,
        ),
    ],
)  # fmt: skip
def test_work_is_pinned(kernel, name, instructions, columns, read, descriptors, banks):
    run(kernel, problem(name), "trn2")
    counters = kernel.attention_prefill.report.counters
    assert dict(counters.instructions) == instructions
    assert dict(counters.matmul_columns) == columns
    assert counters.dma_bytes_read["hbm"] == read
    assert counters.dma_descriptors == descriptors
    assert counters.psum_banks_high_water <= banks


def test_tiles_above_the_diagonal_and_below_the_window_cost_nothing(kernel):
    """QK and PV columns of 4 query tiles: a causal triangle, and a band of two tiles under a window of 128."""
    def columns(**change):
        run(kernel, dict(problem("not_resident"), q=np.ones((1, 512, 1, 64), BF16), k=np.ones((1, 512, 1, 64), BF16),
                         v=np.ones((1, 512, 1, 64), BF16), sinks=None, **change), "trn2")  # fmt: skip
        return kernel.attention_prefill.report.counters.matmul_columns["half"]

    per_block = 128 + 64  # QK streams 128 keys, PV 64 columns of V
    assert columns(causal=True, window=0) == (1 + 2 + 3 + 4) * per_block
    assert columns(causal=True, window=128) == (1 + 2 + 2 + 2) * per_block
    assert columns(causal=False, window=0) == 16 * per_block


# -- mutants ------------------------------------------------------------------------------------------------------

MUTANTS = {
    "causal off by one": ("operand0=float(q0))", "operand0=float(q0 + 1))"),
    "window off by one": ("data=high, op0=nl.subtract, operand0=float(window)", "data=high, op0=nl.subtract, operand0=float(window + 1)"),
    "window of prior keys off by one": ("operand0=float(q0 - window)", "operand0=float(q0 - window - 1)"),
    "prior length ignored": ("nisa.tensor_copy(dst=high, src=prior[:, b : b + 1])", "nisa.memset(dst=high, value=1.0e6)"),
    "prior length inclusive": ("comp_op1=nl.less, bound0", "comp_op1=nl.less_equal, bound0"),
    "section start ignored in the mask": ("range_start=begin", "range_start=0"),
    "diagonal tile not masked": ("causal and stop - 1 > q0", "causal and stop - 1 > q1"),
    "window edge not masked": ("begin <= q1 - 1 - window", "begin < q0 - 128 - window"),
    "window starts a tile late": ("max(0, q0 - window + 1) // P_MAX * P_MAX", "max(0, q0 - window + P_MAX) // P_MAX * P_MAX"),
    "maximum dropped": ("op1=nl.minimum, operand1=before", "op1=nl.maximum, operand1=before"),
    "no rescaling": ("dst=whole, data=whole, op0=nl.multiply, operand0=alpha[:rows]", "dst=whole, data=whole, op0=nl.multiply, operand0=1.0"),
    "sum not rescaled": ("dst=sum_h, data=sum_h, op0=nl.multiply, operand0=alpha[:rows]", "dst=sum_h, data=sum_h, op0=nl.multiply, operand0=1.0"),
    "sink dropped from the sum": ("dst=sum_h, data1=alpha[:rows], data2=row_sum, op=nl.add", "dst=sum_h, data1=row_sum, data2=row_sum, op=nl.maximum"),
    "sink of the wrong sign": ("data=start_nb, op0=nl.multiply, operand0=-1.0", "data=start_nb, op0=nl.multiply, operand0=1.0"),
    "alpha inverted": ("scale=-1.0, bias=nb_new", "scale=-2.0, bias=nb_new"),
    "wrong kv head": ("kv = h // group\n", "kv = h % (hq // group)\n"),
    "wrong query slot": ("(first + i) % group, :]", "(first + i) // group % group, :]"),
    "values of the section's start": ("moving=values[:keys, first_slice + j]", "moving=values[:keys, j]"),
    "queries of the previous tile": ("group_tiles.append((k_turned, v_tile, q_turned,", "group_tiles.append((k_turned, v_tile, queries if i > 0 else q_turned,"),
    "PV of one slice": ("accumulate=(j > 0)", "accumulate=False"),
    "not normalised": ("nisa.reciprocal(dst=inverse[:rows], data=sums", "nisa.tensor_copy(dst=inverse[:rows], src=sums"),
    "scores not scaled": ("scale=sm_scale,", "scale=1.0,"),
    "keys of another sequence": ("name = (b, source, index)", "name = (0, source, index)"),
}  # fmt: skip
SMALL = ("prior_and_window", "sections", "prior", "narrow_window", "gpt_oss", "not_resident")


# A mutant that only a larger case reaches.
LARGE = {"window edge not masked": ("window_over_sections",)}


def small_cases(module, names=SMALL) -> bool:
    """Cases that between them reach every line of the kernel."""
    return all(agrees(module, problem(name), "trn3") for name in names)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name):
    cases = LARGE.get(name, SMALL)
    assert harness.killed("attention_prefill", MUTANTS[name], lambda module: small_cases(module, cases)) is not None


def test_the_original_lives(kernel):
    assert small_cases(kernel)


def test_lint():
    assert lint.lint_file(harness.KERNELS / "attention_prefill.py") == []
