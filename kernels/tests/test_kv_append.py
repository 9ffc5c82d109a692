"""kv_append: reference, in place, refusals, counts, mutants."""

import ml_dtypes
import numpy as np
import pytest

import harness  # first: it makes kernels/ importable

import kv_append_ref as ref
from examples.kv_append import arguments

KERNEL = harness.load("kv_append")
BF16, I32 = np.dtype(ml_dtypes.bfloat16), np.int32
DTYPES = [np.dtype(d) for d in (np.uint8, ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16, np.float32)]
# (T, N, S, HKV, D): one token, one page, ragged rows, as many tokens as partitions, more, every slot of the cache.
SHAPES = (
    (1, 1, 1, 1, 1),
    (1, 8, 16, 2, 32),
    (7, 3, 5, 3, 7),
    (128, 9, 16, 8, 64),
    (131, 20, 8, 1, 16),
    (300, 19, 16, 4, 24),
    (48, 3, 16, 2, 128),
)


def same_bytes(got, want) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def agrees(module, args, target="trn3") -> bool:
    """What is returned, what the caller's caches hold afterwards, and that nothing else changed."""
    want = ref.kv_append(**args)
    given = {name: value.copy() for name, value in args.items()}
    got = harness.launch(module.kv_append, target=target, **given)
    kept = all(same_bytes(given[name], args[name]) for name in ("k", "v", "slots"))
    caches = (given["k_cache"], given["v_cache"])
    return kept and all(same_bytes(g, w) and same_bytes(c, w) for g, w, c in zip(got, want, caches, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shape, target, dtype):
    assert agrees(KERNEL, arguments(1, *shape, dtype), target)


def test_a_bucket_serves_fewer_tokens():
    """Padding rows at -1 write nothing: the same cache as a call of the real tokens."""
    args = arguments(2, 64, 8, 16, 2, 32, BF16)
    args["slots"] = np.where(np.arange(64) < 48, np.random.default_rng(2).permutation(128)[:64], -1).astype(I32)
    want = ref.kv_append(args["k"][:48], args["v"][:48], args["slots"][:48], args["k_cache"], args["v_cache"])
    got = harness.launch(KERNEL.kv_append, target="trn3", **args)
    assert all(same_bytes(g, w) for g, w in zip(got, want, strict=True))


def test_no_token_at_all():
    args = arguments(3, 4, 2, 4, 1, 8, BF16) | {"slots": np.array([-1, 8, 2**31 - 1, -(2**31)], I32)}
    got = harness.launch(KERNEL.kv_append, target="trn3", **{n: a.copy() for n, a in args.items()})
    assert same_bytes(got[0], args["k_cache"]) and same_bytes(got[1], args["v_cache"])


def test_two_tokens_in_one_slot_are_an_error():
    args = arguments(4, 2, 2, 4, 1, 8, BF16) | {"slots": np.array([3, 3], I32)}
    with pytest.raises(Exception, match="one row"):
        harness.launch(KERNEL.kv_append, target="trn3", **args)


def test_decode_reads_what_was_appended():
    """Tokens appended one call at a time, then attention over them: as with a cache that held them from the start."""
    decode = harness.load("attention_decode").attention_decode
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((20, 2, 32)).astype(BF16) for _ in range(2))
    table = np.array([[5, 2, -1, -1]], I32)
    caches = [np.zeros((6, 16, 2, 32), BF16) for _ in range(2)]
    for first, last in ((0, 17), (17, 18), (18, 20)):
        at = np.arange(first, last)
        slots = (table[0, at // 16] * 16 + at % 16).astype(I32)
        caches = harness.launch(KERNEL.kv_append, k[first:last], v[first:last], slots, *caches, target="trn3")
    whole = []
    for rows in (k, v):
        cache = np.zeros((6, 16, 2, 32), BF16)
        cache[5], cache[2, :4] = rows[:16], rows[16:]
        whole.append(cache)
    assert all(same_bytes(g, w) for g, w in zip(caches, whole, strict=True))
    q, lens = rng.standard_normal((1, 8, 32)).astype(BF16), np.array([20], I32)
    run = lambda pair: harness.launch(decode, q, *pair, table, lens, target="trn3", sm_scale=0.125)  # noqa: E731
    assert same_bytes(run(caches)[0], run(whole)[0])



# Pinned: a change that makes the kernel do more work fails here. A row is read twice and written twice, nothing else moves.
@pytest.mark.parametrize(
    ("tokens", "dmas"),
    [(1, 5), (128, 5), (131, 10)],
)
def test_counts(tokens, dmas):
    args = arguments(7, tokens, 20, 8, 8, 64, BF16)
    harness.launch(KERNEL.kv_append, target="trn3", **args)
    counted = harness.counters(KERNEL.kv_append)
    row = 8 * 64 * 2
    assert counted["instructions"] == {"dma": dmas}
    assert counted["dma_bytes_read"] == {"hbm": tokens * (2 * row + 4), "sbuf": tokens * 2 * row}
    assert counted["dma_descriptors"] == 5 * tokens


MUTANTS = {
    "keys into both caches": ("scatter(v_cache, v_rows, index)", "scatter(v_cache, k_rows, index)"),
    "values into the key cache": ("scatter(v_cache, v_rows, index)", "scatter(k_cache, v_rows, index)"),
    "values not written": ("        scatter(v_cache, v_rows, index)\n", ""),
    "keys loaded twice": ("v_rows = load_rows(v,", "v_rows = load_rows(k,"),
    "first rows again": ("src=rows[first : first + count]", "src=rows[0:count]"),
    "first slots again": ("src=slots[first : first + count]", "src=slots[0:count]"),
    "rows after 128 left out": ("range(0, tokens, P_MAX)", "range(0, min(tokens, P_MAX), P_MAX)"),
    "one row late": ("offset=0, vector_offset", "offset=width, vector_offset"),
    "rows in slot order": (
        "dst=target.ap([[width, count], [1, width]], offset=0, vector_offset=index)",
        "dst=target[0:count]",
    ),
    "an error instead of a skip": ("oob_mode=nisa.oob_mode.skip", "oob_mode=nisa.oob_mode.error"),
    "pages and slots swapped": ("cache.reshape((pages * page_size, width))", "cache.reshape((pages, page_size * width))"),
    "returned the wrong way round": ("return k_cache, v_cache", "return v_cache, k_cache"),
}


def passes(module) -> bool:
    return agrees(module, arguments(8, 131, 20, 8, 2, 16, BF16))


def test_original_raises_no_alarm():
    assert passes(harness.load("kv_append"))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant):
    assert harness.killed("kv_append", MUTANTS[mutant], passes) is not None
