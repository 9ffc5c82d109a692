"""attention_decode: against its float64 reference within a derived bound, invariances, refusals, costs, mutants."""

from __future__ import annotations

import sys

import harness
import ml_dtypes
import numpy as np
import pytest
from attention_bounds import bound

sys.path.insert(0, str(harness.KERNELS / "sim"))
import lint  # noqa: E402

from attention_decode_ref import attention_decode_parts  # noqa: E402

BF16 = ml_dtypes.bfloat16
IEEE, FN, E5M2 = ml_dtypes.float8_e4m3, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2

# name: B, HQ, HKV, D, page_size, max_pages, context_lens, cache dtype, sinks, window
CASES = {
    "gpt_oss": (2, 64, 8, 64, 16, 40, (640, 33), BF16, True, 128),
    "gpt_oss_full": (2, 64, 8, 64, 16, 40, (513, 1), BF16, True, 0),
    "llama_tp": (3, 8, 2, 128, 32, 12, (384, 100, 257), BF16, False, 0),
    "mqa": (1, 71, 1, 64, 16, 20, (311,), BF16, False, 0),
    "mha_odd_dim": (2, 5, 5, 80, 8, 30, (240, 7), BF16, False, 50),
    "one_token_pages": (2, 4, 2, 32, 1, 150, (150, 129), BF16, True, 0),
    "dim_1": (1, 3, 1, 1, 4, 5, (18,), BF16, False, 0),
    "empty_and_short": (3, 6, 3, 64, 16, 20, (0, 320, 2), BF16, False, 16),
    "many_tiles": (2, 128, 8, 64, 4, 300, (1200, 130), BF16, True, 0),
    "pages_that_do_not_divide": (2, 16, 2, 128, 48, 7, (336, 49), BF16, False, 100),
    "fp8_ieee": (2, 64, 8, 64, 16, 40, (640, 35), IEEE, True, 128),
    "fp8_ieee_wide": (1, 32, 8, 128, 16, 40, (600,), IEEE, False, 0),
    "fp8_e5m2": (2, 8, 4, 96, 16, 20, (320, 1), E5M2, True, 0),
    "fp8_fn": (2, 12, 4, 64, 16, 20, (320, 150), FN, True, 64),
}
TARGETS = [(name, target) for name in CASES for target in ("trn2", "trn3") if target == "trn3" or CASES[name][7] != FN]


def problem(name: str, seed: int = 7, loud: float = 30.0):
    """Arguments of a case. Slots that no query may see hold numbers `loud` times larger, so that a leak is visible."""
    batch, hq, hkv, d, page, pages, lens, dtype, with_sinks, window = CASES[name]
    rng = np.random.default_rng(seed)
    total = batch * pages + 2
    table = rng.permutation(total)[: batch * pages].reshape(batch, pages).astype(np.int32)
    visible = np.zeros((total, page), bool)
    for b, n in enumerate(lens):
        seen = np.arange(max(0, n - window) if window else 0, n)
        visible[table[b, seen // page], seen % page] = True
        table[b, -(-n // page) :] = -1
    k, v = (rng.standard_normal((total, page, hkv, d)) for _ in range(2))
    hidden = ~visible
    k[hidden] *= loud
    v[hidden] *= loud
    args = {
        "q": rng.standard_normal((batch, hq, d)).astype(BF16),
        "k_cache": k.astype(np.float32).astype(dtype),
        "v_cache": v.astype(np.float32).astype(dtype),
        "block_table": table,
        "context_lens": np.array(lens, np.int32),
        "sinks": (2 * rng.standard_normal(hq)).astype(np.float32) if with_sinks else None,
        "sm_scale": float(np.float32(d**-0.5)),
        "window": window,
    }
    if dtype != BF16:
        args["k_scale"] = np.array([0.7], np.float32)
        args["v_scale"] = np.array([1.9], np.float32)
    return args


def run(module, args, target):
    return harness.launch(module.attention_decode, target=target, **args)[0]


def agrees(module, args, target) -> bool:
    """Whether the kernel is within the derived bound of the reference."""
    got = run(module, args, target)
    out, spread, reach = attention_decode_parts(**args)
    keys = args["block_table"].shape[1] * args["k_cache"].shape[1]
    limit = bound(out, spread, reach, args["sinks"], args["q"].shape[2], keys, tiles=1 + keys // 128)
    return got.dtype == BF16 and harness.within(got, out, limit)


@pytest.fixture(scope="module")
def kernel():
    return harness.load("attention_decode")


@pytest.mark.parametrize(("name", "target"), TARGETS)
def test_within_the_derived_bound(kernel, name, target):
    assert agrees(kernel, problem(name), target)


def test_empty_context_is_zero(kernel):
    got = run(kernel, problem("empty_and_short"), "trn2")
    assert not got[0].astype(np.float32).any() and got[1].astype(np.float32).any()


def test_large_logits(kernel):
    """Logits of some hundreds, a sink above and below them: the running maximum has to work."""
    args = problem("gpt_oss_full")
    args["q"] = (args["q"].astype(np.float32) * 20).astype(BF16)
    args["sinks"] = np.linspace(-300, 300, 64).astype(np.float32)
    assert agrees(kernel, args, "trn2")


def test_tiny_fp8_scale(kernel):
    """Codes near the largest with a small scale: raw scores are far above logits."""
    args = problem("fp8_ieee_wide", loud=1.0)
    codes = args["k_cache"].astype(np.float32)
    args["k_cache"] = np.clip(codes * 60, -240, 240).astype(IEEE)
    args["k_scale"] = np.array([0.01], np.float32)
    assert agrees(kernel, args, "trn2")


def test_page_numbers_do_not_matter(kernel):
    """The same tokens in other pages: the same bits."""
    args = problem("llama_tp")
    before = run(kernel, args, "trn2")
    moved = np.random.default_rng(1).permutation(args["k_cache"].shape[0])
    back = np.argsort(moved)
    args["k_cache"], args["v_cache"] = args["k_cache"][back], args["v_cache"][back]
    args["block_table"] = np.where(args["block_table"] < 0, -1, moved[args["block_table"]]).astype(np.int32)
    assert np.array_equal(before.view(np.uint16), run(kernel, args, "trn2").view(np.uint16))


def test_batch_does_not_matter(kernel):
    """A sequence alone and inside a batch: the same bits."""
    args = problem("llama_tp")
    together = run(kernel, args, "trn2")
    for b in range(3):
        alone = dict(args, q=args["q"][b : b + 1], block_table=args["block_table"][b : b + 1])
        alone["context_lens"] = args["context_lens"][b : b + 1]
        assert np.array_equal(together[b].view(np.uint16), run(kernel, alone, "trn2")[0].view(np.uint16))


# -- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instructions", "columns", "read", "descriptors", "banks"),
    [
        (
            "gpt_oss",
            {"dma": 17, "gpsimd": 11, "scalar": 11, "tensor": 229, "vector": 66},
            {"transpose": 5444, "half": 5632},
            4244800, 1540, 2,
        ),
        (
            "fp8_ieee_wide",
            {"dma": 11, "gpsimd": 6, "scalar": 4, "tensor": 180, "vector": 36},
            {"transpose": 2722, "half": 1792},
            2107040, 962, 2,
        ),
    ],
)  # fmt: skip
def test_work_is_pinned(kernel, name, instructions, columns, read, descriptors, banks):
    run(kernel, problem(name), "trn2")
    counters = kernel.attention_decode.report.counters
    assert dict(counters.instructions) == instructions
    assert dict(counters.matmul_columns) == columns
    assert counters.dma_bytes_read["hbm"] == read
    assert counters.dma_descriptors == descriptors
    assert counters.psum_banks_high_water <= banks


def test_rows_of_a_gather_are_long(kernel):
    """At least 2 KiB contiguous a partition for pages of 16 tokens of gpt-oss and Llama shapes."""
    for heads, token_bytes in ((64, 1024), (64, 512), (32, 2048), (32, 1024)):
        assert kernel.tokens_of_row(16, heads, 8192, token_bytes) * token_bytes >= 2048


# -- mutants ------------------------------------------------------------------------------------------------------

MUTANTS = {
    "no mask": ("operand0=MASK)", "operand0=0.0)"),
    "mask off by one key": ("op0=nl.greater_equal, operand0=lens[:, b", "op0=nl.greater, operand0=lens[:, b"),
    "window off by one key": ("op0=nl.less, operand0=early", "op0=nl.less_equal, operand0=early"),
    "window ignored": ("op0=nl.less, operand0=early", "op0=nl.less, operand0=-1.0"),
    "gather skips a row too many": ("data1=begin, data2=length, op=nl.greater_equal", "data1=begin, data2=length, op=nl.not_equal"),
    "window gather skips too early": ("operand0=float(t + window)", "operand0=float(window)"),
    "row of the page dropped": ("op1=nl.add, operand1=within[:rows]", "op1=nl.subtract, operand1=within[:rows]"),
    "tile start dropped": ("pattern=[[P_MAX * t, tiles], [1, t]]", "pattern=[[0, tiles], [1, t]]"),
    "maximum not kept": ("data1=m_old, data2=spread, op=nl.maximum", "data1=m_old, data2=spread, op=nl.minimum"),
    "maximum of the previous sequence": ("if (i - 1) % tiles == 0:", "if i == 1:"),
    "state of the previous sequence": ("if c == 0:\n                state", "if i == 2:\n                state"),
    "no rescaling": ("nisa.activation(dst=alpha, op=nl.exp,", "nisa.activation(dst=alpha, op=nl.sign,"),
    "sink not in the sum": ("nisa.activation(dst=state_first[:, 1, :], op=nl.exp, data=back[:v_rows])",
                            "nisa.memset(dst=state_first[:, 1, :], value=0.0)"),
    "scores not scaled": ("op=nl.exp, data=scores[:rows], scale=scale", "op=nl.exp, data=scores[:rows], scale=1.0"),
    "row sum of one token only": ("dst=part[:, 1, :], stationary=ones[:rows, :v_rows], moving=p[:rows, j, :], accumulate=(j > 0)",
                                  "dst=part[:, 1, :], stationary=ones[:rows, :v_rows], moving=p[:rows, j, :], accumulate=False"),
    "PV of one token only": ("moving=p[:rows, j, columns], accumulate=(j > 0)", "moving=p[:rows, j, columns], accumulate=False"),
    "heads of a chunk mixed": ("data1=spread, data2=mask, op=nl.multiply", "data1=spread, data2=mask, op=nl.maximum"),
    "values of other heads leak": ("data1=weight, data2=v_mask", "data1=weight, data2=weight"),
    "value tile reused too soon": ("VALUE_TILES = LOADS_AHEAD + 3", "VALUE_TILES = LOADS_AHEAD + 1"),
    "not normalised": ("nisa.reciprocal(dst=weight, data=total)", "nisa.tensor_copy(dst=weight, src=total)"),
    "wrong kv chunk": ("j, chunk = (first + i) // chunks, (first + i) % chunks", "j, chunk = (first + i) // chunks, 0"),
    "v_scale dropped": ("scale = value[:v_rows] if fp8 else value", "scale = 1.0"),
    "k_scale dropped": ("nisa.tensor_scalar(dst=logit, data=k_column, op0=nl.multiply,", "nisa.tensor_scalar(dst=logit, data=k_column, op0=nl.maximum,"),
    "halves of a word swapped": ("moving=q_block[e][:, columns]", "moving=q_block[elements - 1 - e][:, columns]"),
}  # fmt: skip
SMALL = ("llama_tp", "one_token_pages", "empty_and_short", "fp8_fn", "many_tiles")


# A mutant that Python can run only where a sink makes a state before the first tile.
WITH_SINKS = {"state of the previous sequence": ("one_token_pages",)}


def small_cases(module, names=SMALL) -> bool:
    """Cases that between them reach every line of the kernel."""
    return all(agrees(module, problem(name), "trn3") for name in names)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name):
    cases = WITH_SINKS.get(name, SMALL)
    assert harness.killed("attention_decode", MUTANTS[name], lambda module: small_cases(module, cases)) is not None


def test_the_original_lives(kernel):
    assert small_cases(kernel)


def test_lint():
    assert lint.lint_file(harness.KERNELS / "attention_decode.py") == []
