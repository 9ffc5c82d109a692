"""numpy reference of `attention_decode`: the formula in float64, nothing of the kernel's order."""

from __future__ import annotations

import numpy as np


def attention_decode(
    q, k_cache, v_cache, block_table, context_lens, sinks=None, k_scale=None, v_scale=None, sm_scale=1.0, window=0
):
    """Output [B, HQ, D] in float64, not rounded to bf16."""
    return attention_decode_parts(
        q, k_cache, v_cache, block_table, context_lens, sinks, k_scale, v_scale, sm_scale, window
    )[0]


def attention_decode_parts(
    q, k_cache, v_cache, block_table, context_lens, sinks=None, k_scale=None, v_scale=None, sm_scale=1.0, window=0
):
    """(output, weighted mean of |v|, largest |logit terms|): what an error bound needs, [B, HQ, D], same, [B, HQ]."""
    q = np.asarray(q, np.float64)
    batch, heads, d = q.shape
    page, kv_heads = k_cache.shape[1], k_cache.shape[2]
    out, spread = np.zeros(q.shape), np.zeros(q.shape)
    reach = np.zeros(q.shape[:2])
    k_factor = 1.0 if k_scale is None else float(k_scale[0])
    v_factor = 1.0 if v_scale is None else float(v_scale[0])
    for b in range(batch):
        n = int(context_lens[b])
        positions = np.arange(max(0, n - window) if window else 0, n)
        if not len(positions):
            continue
        pages = np.asarray(block_table)[b, positions // page]
        k = np.asarray(k_cache[pages, positions % page], np.float64) * k_factor
        v = np.asarray(v_cache[pages, positions % page], np.float64) * v_factor
        for h in range(heads):
            kv = h // (heads // kv_heads)
            logits = k[:, kv] @ q[b, h] * sm_scale
            reach[b, h] = np.max(np.abs(k[:, kv]) @ np.abs(q[b, h])) * sm_scale
            top = logits.max() if sinks is None else max(logits.max(), float(sinks[h]))
            weights = np.exp(logits - top)
            total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[h]) - top))
            out[b, h] = weights @ v[:, kv] / total
            spread[b, h] = weights @ np.abs(v[:, kv]) / total
    return out, spread, reach
