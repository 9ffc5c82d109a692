"""Error bounds of the attention kernels, derived from what they round; nothing here is tuned.

Notation: w_j the exact softmax weights of one query and head (they sum to at most 1; a sink takes the rest), v_j values.

* Logits. Products of bf16 (or FP8) numbers are exact in f32. A sum of `terms` of them in f32, in any order, is within
  terms * 2^-24 of the sum of magnitudes (`reach`, in logits). Subtracting the running maximum, whose magnitude is at most
  reach + |sink|, and scaling add at most 4 roundings of numbers of that size. So |error| <= (terms + 4) * 2^-24 * size
  with size = 2 * (reach + |sink|).
* Weights. exp is evaluated to 2^-20 relative (the device's bound is not documented; the simulator's is a few ulp) and once
  more for each tile's rescaling; P is rounded to bf16: 2^-8 (half an ulp of 8 significant bits, relative to the value).
  Together each weight is off by a factor 1 + delta, |delta| <= d. Numerator and denominator use weights with such factors,
  so the quotient is off by at most 2 d / (1 - d) * sum_j w_j |v_j|.
* Sums over n keys and the rescaled tiles in f32: (n + 4 * tiles + 8) * 2^-24 of the same magnitude, twice.
* The result is rounded to bf16: 2^-8 of its magnitude.
"""

from __future__ import annotations

import numpy as np

BF16 = 2.0**-8
F32 = 2.0**-24
EXP = 2.0**-20


def bound(out, spread, reach, sinks, terms, keys, tiles):
    """Absolute bound for each element. `out`, `spread` = sum w |v| are [..., HQ, D], `reach` is [..., HQ]; tiles >= 1."""
    size = 2 * (reach + (0.0 if sinks is None else np.abs(np.asarray(sinks, np.float64))))
    logit = (terms + 4) * F32 * size
    d = np.expm1(logit) + BF16 + (tiles + 1) * (EXP + 4 * F32)
    d = d[..., None]
    assert np.all(d < 0.5), "the logits are too large for this bound to say anything"
    error = 2 * d / (1 - d) * spread + 2 * (keys + 4 * tiles + 8) * F32 * spread
    return error + BF16 * (np.abs(out) + error) + 1e-30
