"""numpy references of the MX pieces that the kernels' references share: quantization, packing, unpacking."""

from __future__ import annotations

import ml_dtypes
import numpy as np

ELEMENTS = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
# Exponent of the largest power of two an element holds, and its largest value.
EMAX = {"e4m3fn": 8, "e5m2": 15, "e2m1": 2}
TOP = {"e4m3fn": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


def scale_byte(top, element: str, rule: str):
    """Scale byte of a group whose largest magnitude is `top`.

    The exponent is that of `top` minus EMAX - 1 (`neuron`, NKI 0.5 and later: nothing saturates) or minus EMAX (`ocp`: what
    exceeds the range is clamped), not below byte 0.
    """
    exponent = np.where(top > 0, np.frexp(top)[1] - 1, -10_000)
    return np.clip(exponent + 127 - EMAX[element] + (1 if rule == "neuron" else 0), 0, 254).astype(np.uint8)


def encode(x, scale, element: str):
    """Codes of x [M, K] under scale bytes [M, K/32], to nearest even, clamped to the largest value."""
    groups = np.asarray(x, np.float64).reshape(x.shape[0], -1, 32)
    scaled = np.ldexp(groups, 127 - scale.astype(np.int64)[..., None])
    values = np.clip(scaled, -TOP[element], TOP[element]).astype(np.float32)
    return values.astype(ELEMENTS[element]).view(np.uint8).reshape(x.shape)


def quantize(x, element: str, rule: str = "neuron"):
    """Codes [M, K] uint8 and scale bytes [M, K/32] of x in groups of 32 along K."""
    x = np.asarray(x, np.float64)
    scale = scale_byte(np.abs(x).reshape(x.shape[0], -1, 32).max(axis=2), element, rule)
    return encode(x, scale, element), scale


def terms(x, count: int):
    """bf16 values [M, K] as `count` terms: themselves, or the sign, exponent and upper three mantissa bits and the rest."""
    x = np.asarray(x).astype(ml_dtypes.bfloat16)
    if count == 1:
        return [x.astype(np.float64)]
    high = (x.view(np.uint16) & np.uint16(0xFFF0)).view(ml_dtypes.bfloat16).astype(np.float64)
    return [high, x.astype(np.float64) - high]


def quantized(x, element: str, rule: str | None, count: int = 1):
    """What the device makes of bf16 x [M, K] in `count` terms, in float64; with rule None, x as it is."""
    if rule is None:
        return np.asarray(x, np.float64)
    return sum(dequantize(*quantize(part, element, rule), element) for part in terms(x, count))


def terms_error(x, rule: str | None, least=None):
    """How far two e4m3fn terms of bf16 values may be from x [M, K], of which only magnitudes up to |x| are known.

    `least`, if given, are magnitudes that x has at least. With e the exponent of a group's maximum: nothing is lost of an
    element of at least 2^(e - 13); below that half a step of each term, 2^(e - 17) and 2^(e - 21). `ocp` halves both and
    saturates a term of 1.875 times its group's power of two (480 to 448), which takes a fifteenth of it: of the high term only
    where |x| >= 1.875 2^e, of the low one (below an eighth of the element) anywhere.
    """
    x = np.abs(np.asarray(x, np.float64))
    least = x if least is None else np.abs(np.asarray(least, np.float64))
    groups = lambda v: v.reshape(x.shape[0], -1, 32).max(axis=2).repeat(32, axis=1)  # noqa: E731
    power = lambda v: np.where(v > 0, np.exp2(np.floor(np.log2(np.where(v > 0, v, 1.0)))), 0.0)  # noqa: E731
    top, lowest_top = power(groups(x)), power(groups(least))
    shift = 1 if rule == "ocp" else 0
    small = (x > 0) & (least < top * 2.0 ** (-13 - shift))
    error = np.where(small, top * (2.0 ** (-17 - shift) + 2.0 ** (-21 - shift)), 0.0)
    if rule == "ocp":
        error = error + x / 120.0 + np.where(x >= 1.875 * lowest_top, x / 15.0, 0.0)
    return error


def with_scale(x, scale, element: str):
    """x rounded to the grid of its groups' scales."""
    return dequantize(encode(x, scale, element), scale, element)


def dequantize(codes, scale, element: str):
    """Values [M, K] in float64."""
    values = codes.view(ELEMENTS[element]).astype(np.float64).reshape(codes.shape[0], -1, 32)
    return np.ldexp(values, scale.astype(np.int64)[..., None] - 127).reshape(codes.shape)


def pack(codes, scale, element: str, columns: int | None = None):
    """Codes [N, K] and scales [N, K/32] -> layout `mx-quads/1`: words [128, T, C] and scale rows [64, S, C]."""
    n, k = codes.shape
    tiles = -(-k // 512)
    columns = columns or -(-n // 32) * 32
    full = np.zeros((columns, tiles * 512), np.uint8)
    full[:n, :k] = codes
    quads = full.reshape(columns, tiles, 128, 4).transpose(2, 1, 0, 3).astype(np.uint32)
    bits, word = (4, np.uint16) if element == "e2m1" else (8, np.uint32)
    words = sum(quads[..., q] << (bits * q) for q in range(4)).astype(word)
    groups = np.full((columns, -(-tiles // 4) * 4, 4, 4), 127, np.uint8)
    groups.reshape(columns, -1)[:n, : k // 32] = scale
    rows = groups.reshape(columns, -1, 4, 4, 4).transpose(
        3, 2, 4, 1, 0
    )  # quadrant, tile of four, group, scale tile, column
    return np.ascontiguousarray(words), np.ascontiguousarray(rows.reshape(64, -1, columns))


def unpack_scales(scale_rows, k: int):
    """Scale rows [64, S, C] -> scale bytes [C, K/32]."""
    columns = scale_rows.shape[2]
    groups = scale_rows.reshape(4, 4, 4, -1, columns).transpose(
        4, 3, 1, 0, 2
    )  # column, scale tile, tile, quadrant, group
    return np.ascontiguousarray(groups.reshape(columns, -1)[:, : k // 32])


def unpack(words, scale_rows, element: str):
    """Layout `mx-quads/1` -> values [C, 512 T] in float64."""
    _, tiles, columns = words.shape
    bits = 4 if element == "e2m1" else 8
    lanes = (words[..., None].astype(np.uint32) >> (bits * np.arange(4, dtype=np.uint32))) & np.uint32(2**bits - 1)
    codes = np.ascontiguousarray(lanes.astype(np.uint8).transpose(2, 1, 0, 3).reshape(columns, tiles * 512))
    return dequantize(codes, unpack_scales(scale_rows, 512 * tiles), element)
