"""Examples of attention_decode: every cache dtype, ragged lengths with an empty page-table tail, sinks, a window."""

import sys

import ml_dtypes
import numpy as np
from trace import KERNELS, Example

sys.path.append(str(KERNELS / "tests"))

from attention_bounds import bound  # noqa: E402
from attention_decode_ref import attention_decode_parts  # noqa: E402

BF16 = ml_dtypes.bfloat16
CACHES = {"bf16": BF16} | {f"e{name}": getattr(ml_dtypes, f"float8_e{name}") for name in ("4m3", "4m3fn", "5m2")}
# name: target, cache dtype, HQ, HKV, D, page_size, max_pages, context_lens, sinks, window
CASES = {
    "bf16": ("trn2", BF16, 8, 2, 64, 16, 9, (140, 33), True, 0),
    "bf16_window": ("trn3", BF16, 6, 3, 32, 8, 20, (157, 1), False, 40),
    "fp8_ieee": ("trn2", ml_dtypes.float8_e4m3, 8, 4, 64, 16, 9, (144, 17), True, 0),
    "fp8_fn": ("trn3", ml_dtypes.float8_e4m3fn, 8, 4, 64, 16, 9, (130, 20), False, 64),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def _example(name: str, case: tuple, seed: int) -> Example:
    target, dtype, hq, hkv, d, page, pages, lens, with_sinks, window = case
    rng = np.random.default_rng(seed)
    batch, total = len(lens), len(lens) * pages + 1
    table = rng.permutation(total)[: batch * pages].reshape(batch, pages).astype(np.int32)
    for b, n in enumerate(lens):
        table[b, -(-n // page) :] = -1
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    args = {
        "q": normal(batch, hq, d).astype(BF16),
        "k_cache": normal(total, page, hkv, d).astype(dtype),
        "v_cache": normal(total, page, hkv, d).astype(dtype),
        "block_table": table,
        "context_lens": np.array(lens, np.int32),
        "sinks": 2 * normal(hq) if with_sinks else None,
        "sm_scale": float(np.float32(d**-0.5)),
        "window": window,
    }
    if dtype != BF16:
        args |= {"k_scale": np.array([0.7], np.float32), "v_scale": np.array([1.9], np.float32)}
    out, spread, reach = attention_decode_parts(**args)
    # Each executor is within the kernel's own bound of the exact result, so two of them are within twice that.
    apart = 2.0 * bound(out, spread, reach, args["sinks"], d, pages * page, tiles=1 + pages * page // 128)
    return Example(name, target, "attention_decode.py", "attention_decode", args, (apart,))


def shaped(kernel: str, target: str, dims: dict) -> dict[str, object]:
    """Arguments of a shape, zeros: what is computed on does not change the program. Every page of a sequence is full."""
    batch, hq, hkv, d, pages, page = (dims[name] for name in ("b", "hq", "hkv", "d", "m", "s"))
    dtype = CACHES[dims["cache"]]
    one = None if dtype == BF16 else np.ones(1, np.float32)
    pool = dims["n"] or batch * pages
    return {
        "q": np.zeros((batch, hq, d), BF16),
        "k_cache": np.zeros((pool, page, hkv, d), dtype),
        "v_cache": np.zeros((pool, page, hkv, d), dtype),
        "block_table": (np.arange(batch * pages, dtype=np.int32) % max(pool, 1)).reshape(batch, pages),
        "context_lens": np.full(batch, pages * page, np.int32),
        "sinks": np.zeros(hq, np.float32) if dims["sinks"] == "yes" else None,
        "sm_scale": float(np.float32(max(d, 1) ** -0.5)),
        "window": dims["w"],
        "k_scale": one,
        "v_scale": one,
    }
