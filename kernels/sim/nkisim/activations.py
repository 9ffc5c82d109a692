"""ScalarE functions, with the input ranges that the NKI documentation gives for each.

Values are computed in float64 and rounded to float32 once. The device uses piecewise polynomials whose error is not
documented, so only limits (exp of -inf is 0, exp of 0 is 1) may be relied on to the bit.
"""

from __future__ import annotations

import math

import numpy as np

from . import config
from .errors import CastError

_erf = np.vectorize(math.erf, otypes=[np.float64])
_SQRT_2 = math.sqrt(2.0)
_TANH_C = math.sqrt(2.0 / math.pi)


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1.0 + _erf(x / _SQRT_2))


def _gelu_dx(x):
    return 0.5 * (1.0 + _erf(x / _SQRT_2)) + x * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _gelu_tanh(x):
    return 0.5 * x * (1.0 + np.tanh(_TANH_C * (x + 0.044715 * x**3)))


def _gelu_sigmoid_dx(x):
    s = _sigmoid(1.702 * x)
    return s + 1.702 * x * s * (1.0 - s)


def _silu(x):
    return np.where(np.isneginf(x), 0.0, x * _sigmoid(x))


def _silu_dx(x):
    s = _sigmoid(x)
    return s + x * s * (1.0 - s)


def _softplus(x):
    return np.logaddexp(0.0, x)


FUNCTIONS = {
    "copy": lambda x: x,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "reciprocal": lambda x: 1.0 / x,
    "square": np.square,
    "abs": np.abs,
    "sign": np.sign,
    "relu": lambda x: np.maximum(x, 0.0),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": _silu,
    "silu_dx": _silu_dx,
    "gelu": _gelu,
    "gelu_dx": _gelu_dx,
    "gelu_apprx_tanh": _gelu_tanh,
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": _gelu_sigmoid_dx,
    "softplus": _softplus,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "erf": _erf,
    "erf_dx": lambda x: 2.0 / math.sqrt(math.pi) * np.exp(-x * x),
    "sin": np.sin,
    "arctan": np.arctan,
}

# Documented valid ranges: magnitude for reciprocal, sin and arctan, value for the others.
_RANGES = {
    "log": (2.0**-64, 2.0**64),
    "sqrt": (2.0**-116, 2.0**118),
    "rsqrt": (2.0**-87, 2.0**97),
    "reciprocal": (2.0**-42, 2.0**42),
    "sin": (0.0, math.pi),
    "arctan": (0.0, math.pi / 2),
}
_BY_MAGNITUDE = ("reciprocal", "sin", "arctan")


def evaluate(name: str, x: np.ndarray, relu_param=0.0) -> np.ndarray:
    """The function on float32 values; CastError outside its documented range (switch `activation_range`)."""
    if name in _RANGES and config.current().activation_range == "error":
        low, high = _RANGES[name]
        measured = np.abs(x) if name in _BY_MAGNITUDE else x
        limit = np.nextafter(np.float32(high), np.float32(np.inf))  # the bound itself rounds to float32
        bad = ~((measured >= np.float32(low)) & (measured <= limit))
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            what = "|x|" if name in _BY_MAGNITUDE else "x"
            raise CastError(
                f"{name} of {x[at]!s} at {at}: the device is defined for {low:.6g} <= {what} <= {high:.6g} "
                "(switch activation_range)"
            )
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        if name == "prelu":
            return np.where(wide >= 0, wide, wide * relu_param).astype(np.float32)
        return FUNCTIONS[name](wide).astype(np.float32)
