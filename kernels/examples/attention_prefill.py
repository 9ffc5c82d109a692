"""Examples of attention_prefill: causal with sinks and a window, prior keys of ragged lengths, full attention."""

import sys

import ml_dtypes
import numpy as np
from trace import KERNELS, Example

sys.path.append(str(KERNELS / "tests"))

from attention_bounds import bound  # noqa: E402
from attention_prefill_ref import attention_prefill_parts  # noqa: E402

BF16 = ml_dtypes.bfloat16
# name: target, B, SQ, SK, HQ, HKV, D, SP, prior_len, sinks, causal, window
CASES = {
    "causal": ("trn2", 1, 140, 140, 4, 2, 64, 0, None, True, True, 0),
    "window": ("trn3", 1, 150, 150, 2, 1, 32, 0, None, True, True, 40),
    "prior": ("trn2", 2, 40, 40, 2, 1, 64, 130, (130, 21), False, True, 0),
    "full": ("trn3", 1, 9, 150, 3, 1, 48, 0, None, False, False, 0),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def _example(name: str, case: tuple, seed: int) -> Example:
    target, batch, sq, sk, hq, hkv, d, sp, used, with_sinks, causal, window = case
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
        args["k_prior"] = normal(batch, sp, hkv, d).astype(BF16)
        args["v_prior"] = normal(batch, sp, hkv, d).astype(BF16)
        args["prior_len"] = np.array(used, np.int32)
    out, spread, reach = attention_prefill_parts(**args)
    # Each executor is within the kernel's own bound of the exact result, so two of them are within twice that.
    apart = 2.0 * bound(out, spread, reach, args["sinks"], d, sk + sp, tiles=2 + (sk + sp) // 128)
    return Example(name, target, "attention_prefill.py", "attention_prefill", args, (apart,))


def shaped(kernel: str, target: str, dims: dict) -> dict[str, object]:
    """Arguments of a shape, zeros: what is computed on does not change the program. Every prior slot is in use."""
    batch, queries, hq, hkv, d, prior = (dims[name] for name in ("b", "sq", "hq", "hkv", "d", "sp"))
    zeros = lambda s, heads: np.zeros((batch, s, heads, d), BF16)  # noqa: E731
    keys = dims["sk"] or queries
    args = {
        "q": zeros(queries, hq),
        "k": zeros(keys, hkv),
        "v": zeros(keys, hkv),
        "sinks": np.zeros(hq, np.float32) if dims["sinks"] == "yes" else None,
        "sm_scale": float(np.float32(max(d, 1) ** -0.5)),
        "causal": dims["causal"] == "yes",
        "window": dims["w"],
    }
    if prior:
        args |= {"k_prior": zeros(prior, hkv), "v_prior": zeros(prior, hkv), "prior_len": np.full(batch, prior, np.int32)}
    return args
