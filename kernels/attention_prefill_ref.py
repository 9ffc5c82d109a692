"""numpy reference of `attention_prefill`: the formula in float64, nothing of the kernel's order."""

from __future__ import annotations

import numpy as np


def attention_prefill(
    q, k, v, k_prior=None, v_prior=None, prior_len=None, sinks=None, sm_scale=1.0, causal=True, window=0
):
    """Output [B, SQ, HQ, D] in float64, not rounded to bf16."""
    return attention_prefill_parts(q, k, v, k_prior, v_prior, prior_len, sinks, sm_scale, causal, window)[0]


def attention_prefill_parts(
    q, k, v, k_prior=None, v_prior=None, prior_len=None, sinks=None, sm_scale=1.0, causal=True, window=0
):
    """(output, weighted mean of |v|, largest sum of |logit terms|): [B, SQ, HQ, D], same, [B, SQ, HQ]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, spread = np.zeros(q.shape), np.zeros(q.shape)
    reach = np.zeros(q.shape[:3])
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        prior = 0 if prior_len is None else int(prior_len[b])
        keys, values = k[b], v[b]
        if prior:
            keys = np.concatenate([np.asarray(k_prior[b, :prior], np.float64), keys])
            values = np.concatenate([np.asarray(v_prior[b, :prior], np.float64), values])
        at_query = prior + np.arange(q.shape[1])[:, None]
        at_key = np.arange(len(keys))[None, :]
        seen = np.ones((q.shape[1], len(keys)), bool)
        if causal:
            seen &= at_key <= at_query
        if window:
            seen &= at_key > at_query - window
        for h in range(q.shape[2]):
            kv = h // group
            logits = np.where(seen, q[b, :, h] @ keys[:, kv].T * sm_scale, -np.inf)
            size = np.where(seen, np.abs(q[b, :, h]) @ np.abs(keys[:, kv]).T * sm_scale, 0.0)
            reach[b, :, h] = size.max(axis=1)
            top = logits.max(axis=1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, float(sinks[h]))
            weights = np.exp(logits - top)
            total = weights.sum(axis=1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(float(sinks[h]) - top)
            out[b, :, h] = weights @ values[:, kv] / total
            spread[b, :, h] = weights @ np.abs(values[:, kv]) / total
    return out, spread, reach
