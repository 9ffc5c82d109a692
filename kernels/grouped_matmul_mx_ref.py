"""numpy reference of `grouped_matmul_mx.py`: the same arguments, the same result within `bound`."""

from __future__ import annotations

import ml_dtypes
import numpy as np

import mx_ref

OUTPUTS = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
U32, U16, TINY = 2.0**-24, 2.0**-8, 2.0**-126
ALPHA = 1.702
# Largest slope of g * sigmoid(1.702 g), as of silu(1.702 g) / 1.702.
SLOPE = 1.0999


def quads(i: int) -> np.ndarray:
    """Column of channel i in ColumnOrder::Quads."""
    i = np.asarray(i)
    return 512 * (i // 512) + 128 * (i % 4) + (i % 512) // 4


def pack_gate_up(codes, scale, bias, element: str):
    """Rows that interleave gate and up, codes [2 I, H], scale [2 I, H/32], bias [2 I] -> (words, scale rows, bias rows)."""
    inter, hidden = codes.shape[0] // 2, codes.shape[1]
    padded = -(-inter // 512) * 512
    full, full_scale = np.zeros((2 * padded, hidden), np.uint8), np.full((2 * padded, hidden // 32), 127, np.uint8)
    full_bias = np.zeros(2 * padded, np.float32)
    columns = quads(np.arange(inter))
    for part in range(2):
        full[part * padded + columns] = codes[part::2]
        full_scale[part * padded + columns] = scale[part::2]
        full_bias[part * padded + columns] = bias[part::2]
    words, rows = mx_ref.pack(full, full_scale, element, 2 * padded)
    return words, rows, full_bias.reshape(-1, 128)


def blocks_of(offsets, slots: int, empty: int):
    """Experts' row offsets [E + 1] of sorted rows -> (take = put [B, slots], block_expert [1, B]), empty slots = `empty`."""
    rows, experts = [], []
    for e in range(len(offsets) - 1):
        for first in range(offsets[e], offsets[e + 1], slots):
            row = np.full(slots, empty, np.int32)
            count = min(slots, offsets[e + 1] - first)
            row[:count] = np.arange(first, first + count)
            rows.append(row)
            experts.append(e)
    return np.array(rows, np.int32), np.array([experts], np.int32)


def _run(args: dict, rule: str):
    """Result and error bound [Y, H] in float64."""
    x, take, put, element = args["x"], args["take"], args["put"], args.get("w_element", "e2m1")
    inter, limit, rows_out = args["intermediate"], args.get("limit", 7.0), args["rows_out"]
    count = args.get("x_terms", 1)
    hidden, half = x.shape[1], -(-inter // 512) * 512
    y, error = np.full((rows_out, hidden), np.nan), np.zeros((rows_out, hidden))
    for block, expert in enumerate(args["block_expert"][0]):
        used = take[block] < x.shape[0]
        a = mx_ref.quantized(x[take[block][used]], "e4m3fn", rule, count)
        gate_up = mx_ref.unpack(args["w_gate_up"][expert], args["s_gate_up"][expert], element)[:, :hidden]
        bias = np.asarray(args["b_gate_up"][expert], np.float64).reshape(-1)
        columns = quads(np.arange(inter))
        parts, errors = [], []
        for part in range(2):
            w, b = gate_up[part * half + columns].T, bias[part * half + columns]
            parts.append(a @ w + b)
            steps = (count * hidden + 4) * U32
            errors.append(steps / (1 - steps) * (np.abs(a) @ np.abs(w) + np.abs(b) + 1.0))
        gate, up = np.minimum(parts[0], limit), np.clip(parts[1], -limit, limit) + 1.0
        glu = gate * 0.5 * (1.0 + np.tanh(0.5 * ALPHA * gate))
        inner = glu * up
        # How far the device's float32 value before its rounding to bf16 may be: both halves, and four roundings since.
        before = errors[0] * SLOPE * np.abs(up) + errors[1] * np.abs(glu) + errors[0] * errors[1] * SLOPE
        before = before + 4 * U32 * (np.abs(inner) + before)
        value, slack = (_requantized if count == 1 else _in_two_terms)(inner, before, rule)
        w = mx_ref.unpack(args["w_down"][expert], args["s_down"][expert], element)[:hidden, :inter].T
        b = np.asarray(args["b_down"][expert], np.float64)[:hidden]
        total = value @ w + b
        steps = (count * inter + 2) * U32
        size = (np.abs(value) + slack) @ np.abs(w) + np.abs(b)
        rows = put[block][used]
        y[rows] = total
        error[rows] = slack @ np.abs(w) + steps / (1 - steps) * size
    return y, error


def _requantized(inner, before, rule: str):
    """The value after rounding to bf16 and quantizing, and how far the device's may be if its input is within `before`.

    Both roundings are monotone for a fixed scale, so what becomes of the ends of the interval bounds what becomes of
    anything in it. Where the group's largest magnitude may cross a power of two the scale may differ too: each is tried.
    """
    low, exact, high = (_bf16(v) for v in (inner - before, inner, inner + before))
    smallest = np.where(np.sign(low) == np.sign(high), np.minimum(np.abs(low), np.abs(high)), 0.0)
    largest = np.maximum(np.abs(low), np.abs(high))
    scales = [_scales(v, rule) for v in (exact, smallest, largest)]
    value = mx_ref.with_scale(exact, scales[0], "e4m3fn")
    slack = np.zeros_like(value)
    for scale in scales:
        for end in (low, high):
            slack = np.maximum(slack, np.abs(mx_ref.with_scale(end, scale, "e4m3fn") - value))
    return value, slack


def _in_two_terms(inner, before, rule: str):
    """As `_requantized` with two terms: rounding to bf16 is monotone, and what the terms lose of that is bounded."""
    low, exact, high = (_bf16(v) for v in (inner - before, inner, inner + before))
    value = mx_ref.quantized(exact, "e4m3fn", rule, 2)
    least = np.where(np.sign(low) == np.sign(high), np.minimum(np.abs(low), np.abs(high)), 0.0)
    lost = mx_ref.terms_error(np.maximum(np.abs(low), np.abs(high)), rule, least)
    return value, np.maximum(np.abs(low - value), np.abs(high - value)) + lost


def _bf16(v):
    return v.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def _scales(v, rule: str):
    return mx_ref.scale_byte(np.abs(v).reshape(v.shape[0], -1, 32).max(axis=2), "e4m3fn", rule)


def with_bf16_activations(**args):
    """What the kernel would give if it did not quantize activations, float32 output, and how far two terms may be from it.

    Under the documented block scale, and if x holds nothing 2^13 below the maximum of its group.
    """
    y, error = _run(args | {"x_terms": 2}, None)
    return y, error + 2.0 * U32 * (np.abs(y) + error) + TINY


def grouped_matmul_mx(*, rule="neuron", **args):
    """The kernel's result: sums in float64, rounded to bf16 before requantizing as on the device, once at the end."""
    y, _ = _run(args, rule)
    return y.astype(np.float32).astype(OUTPUTS[args.get("out", "bf16")])


def bound(*, rule="neuron", **args):
    """How far another order of float32 summation may be from the reference.

    Gate and up: (H + 4) roundings on sum |x w| + |bias| + 1 (K terms, bias, the 1, clamp); H counts for each term of x. Swiglu
    multiplies the gate's error by its largest slope times |up + 1| and the up half's by |glu|, then rounds; requantizing turns
    that into a step of the FP8 grid, or with two terms of bf16, where it crosses a boundary (`_requantized`, `_in_two_terms`);
    the down projection carries it by |w| and adds (I + 2) roundings, I for each term.
    """
    y, error = _run(args, rule)
    rounding = (U16 if args.get("out", "bf16") == "bf16" else U32) * (np.abs(y) + error)
    return error + 2.0 * rounding + TINY
