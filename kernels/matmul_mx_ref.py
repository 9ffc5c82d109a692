"""numpy reference of `matmul_mx.py`: the same arguments, the same result within `bound`."""

from __future__ import annotations

import ml_dtypes
import numpy as np

import mx_ref

OUTPUTS = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
U32 = 2.0**-24
U16 = 2.0**-8
TINY = 2.0**-126


def _operands(x, w, w_scale, x_scale, bias, m, n, w_element, x_element, x_terms, rule):
    """x [M, K], w [K, N], bias [1, N] as float64 values."""
    b = mx_ref.unpack(w, w_scale, w_element)[: n or w.shape[2]].T
    if x_scale is None:
        a = mx_ref.quantized(x, x_element, rule, x_terms)
        b = b[: a.shape[1]]
    else:
        a = mx_ref.unpack(x, x_scale, x_element)[: m or x.shape[2]]
    return a, b, 0.0 if bias is None else np.asarray(bias, np.float64)[:, : b.shape[1]]


def matmul_mx(
    x,
    w,
    w_scale,
    x_scale=None,
    bias=None,
    m=None,
    n=None,
    w_element="e2m1",
    x_element="e4m3fn",
    out="bf16",
    x_terms=1,
    rule="neuron",
):
    """y = x @ w + bias in float64, rounded once. `rule` is the block scale of the device's `quantize_mx`."""
    a, b, shift = _operands(x, w, w_scale, x_scale, bias, m, n, w_element, x_element, x_terms, rule)
    return (a @ b + shift).astype(np.float32).astype(OUTPUTS[out])


def bound(
    x,
    w,
    w_scale,
    x_scale=None,
    bias=None,
    m=None,
    n=None,
    w_element="e2m1",
    x_element="e4m3fn",
    out="bf16",
    x_terms=1,
    rule="neuron",
):
    """How far any order of float32 summation may be from the reference.

    Code products times powers of two are exact; K products (for each term of x) and the bias added in any order are K roundings of relative size
    2^-24 on partial sums no larger than sum |x w| + |bias|. Each side rounds its output once more.
    """
    a, b, shift = _operands(x, w, w_scale, x_scale, bias, m, n, w_element, x_element, x_terms, rule)
    steps = (x_terms * a.shape[1] + 2) * U32
    error = steps / (1.0 - steps) * (np.abs(a) @ np.abs(b) + np.abs(shift))
    rounding = (U16 if out == "bf16" else U32) * (np.abs(a @ b + shift) + error)
    return error + 2.0 * rounding + TINY
