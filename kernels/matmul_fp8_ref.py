"""numpy reference of `matmul_fp8.py`: the same arguments, the same result within `bound`."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

ELEMENTS = {"e4m3": ml_dtypes.float8_e4m3, "e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
OUTPUTS = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
# Largest slope of each activation: what it can make of an error in its argument.
SLOPE = {"none": 1.0, "relu": 1.0, "silu": 1.0999, "gelu": 1.1290}
U32 = 2.0**-24
U16 = 2.0**-8
TINY = 2.0**-126


def apply(activation: str, v: np.ndarray) -> np.ndarray:
    """The activation in float64."""
    if activation == "relu":
        return np.maximum(v, 0.0)
    if activation == "silu":
        return v * 0.5 * (1.0 + np.tanh(0.5 * v))
    if activation == "gelu":
        return 0.5 * v * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3)))
    return v


def unpack(w: np.ndarray, k: int, element: str) -> np.ndarray:
    """Layout `rows-128/1` [128, H, C] -> float64 [K, C]: k = 128 h + p."""
    partitions, halves, columns = w.shape
    rows = w.view(ELEMENTS[element]).astype(np.float64).transpose(1, 0, 2).reshape(halves * partitions, columns)
    return rows[:k]


def pack(codes: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Codes [K, N] uint8 -> layout `rows-128/1` with zeros as padding."""
    k, n = codes.shape
    halves = -(-k // 128)
    out = np.zeros((halves * 128, columns or -(-n // 32) * 32), np.uint8)
    out[:k, :n] = codes
    return np.ascontiguousarray(out.reshape(halves, 128, -1).transpose(1, 0, 2))


def _exact(x, w, x_scale, w_scale, bias, n, x_element, w_element, blocks):
    """(sum, sum of magnitudes, bias, number of scaled partial sums) in float64."""
    k = x.shape[1]
    a = x.view(ELEMENTS[x_element]).astype(np.float64)
    b = unpack(w, k, w_element)[:, : n or w.shape[2]]
    sx, sw = np.asarray(x_scale, np.float64), np.asarray(w_scale, np.float64)
    if blocks:
        a = a * np.repeat(sx, 128, axis=1)[:, :k]
        b = b * np.repeat(np.repeat(sw, 128, axis=1).T, 128, axis=1)[:k, : b.shape[1]]
    else:
        a = a * sx
        b = b * sw[:, : b.shape[1]]
    shift = 0.0 if bias is None else np.asarray(bias, np.float64)[:, : b.shape[1]]
    return a @ b, np.abs(a) @ np.abs(b), shift


def matmul_fp8(
    x,
    w,
    x_scale,
    w_scale,
    bias=None,
    n=None,
    x_element="e4m3",
    w_element="e4m3",
    blocks=False,
    activation="none",
    out="bf16",
):
    """y = activation((x @ w) * scales + bias), summed in float64, rounded once."""
    total, _, shift = _exact(x, w, x_scale, w_scale, bias, n, x_element, w_element, blocks)
    return apply(activation, total + shift).astype(np.float32).astype(OUTPUTS[out])


def bound(
    x,
    w,
    x_scale,
    w_scale,
    bias=None,
    n=None,
    x_element="e4m3",
    w_element="e4m3",
    blocks=False,
    activation="none",
    out="bf16",
):
    """How far any order of float32 summation may be from the reference.

    Products of FP8 codes are exact in float32. K terms added in any order, the two scale products, a multiplication and
    an addition for each block, the bias and the activation's own rounding are at most K + H + 6 roundings of relative
    size 2^-24 on a path, each on a partial result no larger than sum |x w| + |bias|. The activation multiplies that by
    its slope and rounds its value once (the simulator's rule; the device's polynomials have no documented bound). The
    output is rounded once by each side, which for a value on a tie differs by one ulp.
    """
    k, halves = x.shape[1], w.shape[1]
    total, size, shift = _exact(x, w, x_scale, w_scale, bias, n, x_element, w_element, blocks)
    steps = (k + halves + 6) * U32
    error = steps / (1.0 - steps) * (size + np.abs(shift)) * SLOPE[activation]
    value = np.abs(apply(activation, total + shift))
    rounding = (U16 if out == "bf16" else U32) * (value + error)
    return error + 2.0 * rounding + TINY
