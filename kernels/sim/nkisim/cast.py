"""Conversions: every compute instruction widens to float32 and rounds once, to nearest even, into its destination."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from . import config
from .dtypes import DType
from .errors import CastError, DtypeError

_INT_RANGE = {
    "int8": (-128, 127), "int16": (-32768, 32767), "int32": (-(2**31), 2**31 - 1),
    "uint8": (0, 255), "uint16": (0, 65535), "uint32": (0, 2**32 - 1), "bool": (0, 1),
}  # fmt: skip


def int_range(dtype: DType) -> tuple[int, int]:
    """Smallest and largest value of an integer dtype."""
    return _INT_RANGE[str(dtype)]


def fresh(dtype: DType) -> np.generic:
    """What the official simulator's memory holds before anything is written: NaN in floats, 4 in integers."""
    if dtype.is_float:
        return np.array(np.nan, np.float32).astype(dtype.np)[()]
    return np.array(4, dtype.np)[()] if dtype.is_integer else np.zeros((), dtype.np)[()]


def to_f32(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """Values of storage elements as float32 (32-bit integers round to nearest even)."""
    if not (dtype.is_float or dtype.is_integer):
        raise DtypeError(f"{dtype} has no values that arithmetic reads")
    return raw.astype(np.float32)


def from_f32(values: np.ndarray, dtype: DType, defined: np.ndarray | None = None) -> np.ndarray:
    """Round float32 values to the storage of `dtype`.

    `defined` marks which values mean anything; the others may hold any bits and are not checked.
    Raises CastError where the result is not defined: FP8 overflow (switch `fp8_overflow`), infinity into e4m3fn,
    NaN into an integer (switch `nan_to_int`).
    """
    values = np.asarray(values, dtype=np.float32)
    if defined is not None:
        values = np.where(defined, values, np.float32(0))
    if dtype.is_integer:
        return _to_integer(values, dtype)
    if dtype == "float32":
        return values
    if dtype == "tfloat32":
        return _to_tf32(values)
    if dtype.is_fp8:
        return _to_fp8(values, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype.np)


def _to_integer(values: np.ndarray, dtype: DType) -> np.ndarray:
    nan = np.isnan(values)
    if nan.any():
        if config.current().nan_to_int == "error":
            raise CastError(f"NaN at {_first(nan)} has no defined value in {dtype} (switch nan_to_int)")
        values = np.where(nan, np.float32(0), values)
    low, high = int_range(dtype)
    return np.clip(np.rint(values.astype(np.float64)), low, high).astype(dtype.np)


def _to_tf32(values: np.ndarray) -> np.ndarray:
    """Keep 10 mantissa bits, nearest even; infinities and NaN unchanged."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def _to_fp8(values: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        out = values.astype(dtype.np)
    overflow = np.isfinite(values) & ~np.isfinite(out.astype(np.float32))
    if dtype == "float8_e4m3fn":
        overflow |= np.isinf(values)
    if not overflow.any():
        return out
    rule = config.current().fp8_overflow
    if rule == "error":
        at = _first(overflow)
        raise CastError(
            f"{values[at]!s} at {at} exceeds the largest {dtype} value {dtype.max:g}; clamp with minimum/maximum "
            "before the cast (switch fp8_overflow)"
        )
    if rule == "saturate":
        return np.where(overflow, np.copysign(np.float32(dtype.max), values), out.astype(np.float32)).astype(dtype.np)
    return out


def unpack_x4(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """Values of packed elements as float32, with a new last axis of 4; lane 0 sits in the lowest bits."""
    if dtype.itemsize == 4:
        lanes = np.ascontiguousarray(raw).view(np.uint8).reshape(raw.shape + (4,))
        return lanes.view(dtype.lane).astype(np.float32)
    shifts = np.arange(4, dtype=np.uint16) * np.uint16(4)
    codes = ((raw[..., None] >> shifts) & np.uint16(0xF)).astype(np.uint8)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def pack_x4(codes: np.ndarray, dtype: DType) -> np.ndarray:
    """Pack one-byte codes [..., 4] of an FP8 x4 dtype into its words."""
    return np.ascontiguousarray(codes).view(np.uint32).reshape(codes.shape[:-1])


def _first(mask: np.ndarray) -> tuple[int, ...]:
    """Index of the first true element."""
    return tuple(int(i) for i in np.argwhere(mask)[0])
