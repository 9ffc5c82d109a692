"""numpy reference of `rmsnorm_quantize`: the norm in float64, rounded where the format says so and nowhere else."""

from __future__ import annotations

import ml_dtypes
import mx_ref
import numpy as np

TYPES = {"e4m3": ml_dtypes.float8_e4m3, "e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
TOP = {"e4m3": 240.0, "e4m3fn": 448.0, "e5m2": 57344.0}
TINY = 1.0e-30


def rmsnorm(x, gamma, eps):
    """x / sqrt(mean(x^2) + eps) * gamma in float64."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * np.asarray(gamma, np.float64)


def rmsnorm_quantize_fp8(x, gamma, eps=1e-5, element="e4m3"):
    """Codes [M, K] uint8 and scales [M, 1] float32."""
    y = rmsnorm(x, gamma, eps)
    wide = np.asarray(x, np.float64)
    norm = 1.0 / np.sqrt((wide * wide).mean(axis=1, keepdims=True) + eps)
    largest = np.maximum(np.abs(wide * np.asarray(gamma, np.float64)).max(axis=1, keepdims=True), TINY) * norm
    scale = largest / TOP[element]
    codes = np.clip(y / scale, -TOP[element], TOP[element]).astype(np.float32).astype(TYPES[element])
    return codes.view(np.uint8), scale.astype(np.float32)


def rmsnorm_quantize_mx(x, gamma, eps=1e-5, element="e4m3fn", rule="neuron"):
    """Words [128, T, R] uint32 and scale rows [64, S, R] uint8 of layout `mx-quads/1`; `rule` as in mx_ref."""
    y = rmsnorm(x, gamma, eps).astype(np.float32).astype(ml_dtypes.bfloat16)
    codes, scale = mx_ref.quantize(y, element, rule)
    return mx_ref.pack(codes, scale, element, columns=len(y) + len(y) % 2)
