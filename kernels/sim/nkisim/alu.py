"""Operator tokens: `nl.add` and its like, passed to instructions as `op=`.

A token is also callable (`nl.add(x, y)`), which is the experimental whole-tile API of `nki.language`.
"""

from __future__ import annotations

import numpy as np

from . import activations, legal
from .errors import DtypeError, LanguageError, UnspecifiedError


def _abs_max(x, y):
    return np.where(np.abs(x) > np.abs(y), x, y)


def _abs_min(x, y):
    return np.where(np.abs(x) < np.abs(y), x, y)


def _truth(test):
    return lambda x, y: test(x, y).astype(np.float32)


_BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "abs_max": _abs_max,
    "abs_min": _abs_min,
    "power": np.power,
    "equal": _truth(np.equal),
    "not_equal": _truth(np.not_equal),
    "less": _truth(np.less),
    "less_equal": _truth(np.less_equal),
    "greater": _truth(np.greater),
    "greater_equal": _truth(np.greater_equal),
    "logical_and": _truth(np.logical_and),
    "logical_or": _truth(np.logical_or),
    "logical_xor": _truth(np.logical_xor),
}
_UNARY = {
    "abs": np.abs,
    "square": np.square,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "rsqrt": lambda x: (1.0 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "reciprocal": lambda x: (1.0 / x.astype(np.float64)).astype(np.float32),
}
_BITWISE = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": np.right_shift,
}
_COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
_ALIASES = {"max": "maximum", "min": "minimum"}
_GEN4 = ("abs_max", "abs_min", "square", "relu")

# Start of an empty reduction, and the ufunc that reduces.
IDENTITY = {"add": 0.0, "multiply": 1.0, "maximum": -np.inf, "minimum": np.inf, "abs_max": 0.0, "abs_min": np.inf}


class Op:
    """An operator token. `op_name` is its NKI name; `wrapper` is the whole-tile function, filled in by the language."""

    def __init__(self, op_name: str):
        self.op_name = op_name
        self.key = _ALIASES.get(op_name, op_name)
        self.wrapper = None

    def __call__(self, *args, **kwargs):
        if self.wrapper is None:
            raise UnspecifiedError(
                f"nl.{self.op_name} as a function on tiles is not modelled; use the nisa instruction"
            )
        return self.wrapper(*args, **kwargs)

    @property
    def unary(self) -> bool:
        """Takes one input."""
        return self.key in _UNARY or self.key == "invert"

    @property
    def bitwise(self) -> bool:
        """Works on integer bit patterns."""
        return self.key in _BITWISE or self.key == "invert"

    @property
    def comparison(self) -> bool:
        """One of the six comparisons."""
        return self.key in _COMPARISONS

    def __repr__(self):
        return f"nl.{self.op_name}"

    __name__ = property(lambda self: self.op_name)


def check(op, role: str, program) -> Op:
    """The token is an ALU operator that the target has."""
    if not isinstance(op, Op):
        raise LanguageError(f"{role} is {op!r}, need an operator such as nl.add")
    if op.key not in _BINARY and op.key not in _UNARY and not op.bitwise:
        raise UnspecifiedError(f"{role}: {op!r} is not an operator of the vector ALU")
    if op.key in _GEN4:
        legal.needs(program, 4, f"{role}: {op!r}")
    return op


def apply(op: Op, x: np.ndarray, y) -> np.ndarray:
    """An arithmetic operator on float32 values (`y` is ignored by unary operators)."""
    with np.errstate(all="ignore"):
        if op.key in _UNARY:
            return _UNARY[op.key](x).astype(np.float32, copy=False)
        return _BINARY[op.key](x, y).astype(np.float32, copy=False)


def apply_integer(op: Op, x: np.ndarray, y) -> np.ndarray:
    """An arithmetic operator on 32-bit integers, exact modulo 2^32 (GpSimd)."""
    with np.errstate(all="ignore"):
        return _BINARY[op.key](x, y).astype(x.dtype)


def apply_bits(op: Op, x: np.ndarray, y) -> np.ndarray:
    """A bitwise operator; `right_shift` is arithmetic on signed types and logical on unsigned ones."""
    if op.key == "invert":
        return np.invert(x)
    if "shift" in op.key and (np.any(np.asarray(y) < 0) or np.any(np.asarray(y) >= 8 * x.dtype.itemsize)):
        raise UnspecifiedError(f"{op!r} by less than 0 or by the width of the type or more")
    return _BITWISE[op.key](x, y).astype(x.dtype)


def bit_operand(value: int, dtype, role: str) -> np.ndarray:
    """A scalar operand of a bitwise operator as one element of `dtype`."""
    value = legal.integer(value, role)
    width = 8 * dtype.itemsize
    if not -(1 << (width - 1)) <= value < (1 << width):
        raise DtypeError(f"{role} is {value}, which does not fit {dtype}")
    return np.array(value & ((1 << width) - 1), dtype=f"u{dtype.itemsize}").view(dtype.np)


def reduce_values(op: Op, values: np.ndarray, axis=-1) -> np.ndarray:
    """Reduce float32 values along an axis. The order of additions is not part of the contract."""
    with np.errstate(all="ignore"):
        if op.key in ("add", "multiply", "maximum", "minimum"):
            return _BINARY[op.key].reduce(values, axis=axis, dtype=np.float32)
        if op.key in ("logical_and", "logical_or", "logical_xor"):
            ufunc = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}[op.key]
            return ufunc.reduce(values != 0, axis=axis).astype(np.float32)
        if op.key in ("abs_max", "abs_min"):
            result = np.take(values, 0, axis=axis)
            for i in range(1, values.shape[axis]):
                result = apply(op, result, np.take(values, i, axis=axis))
            return result
    raise UnspecifiedError(f"{op!r} is not a documented reduction with a defined order")


def reduce_bits(op: Op, values: np.ndarray, axis=-1) -> np.ndarray:
    """Reduce integers bitwise along an axis."""
    if op.key not in ("bitwise_and", "bitwise_or", "bitwise_xor"):
        raise UnspecifiedError(f"{op!r} is not a documented reduction")
    return _BITWISE[op.key].reduce(values, axis=axis)


def combine(op: Op, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fold a reduction result into an accumulator."""
    return apply(op, a, b)


def activation(op, role: str) -> str:
    """The name of the ScalarE function a token stands for."""
    if not isinstance(op, Op):
        raise LanguageError(f"{role} is {op!r}, need an activation such as nl.exp")
    if op.key not in activations.FUNCTIONS and op.key != "prelu":
        raise UnspecifiedError(f"{role}: {op!r} is not a ScalarE activation function")
    return op.key


NAMES = sorted(
    {
        *_BINARY,
        *_UNARY,
        *_BITWISE,
        *activations.FUNCTIONS,
        *_ALIASES,
        "invert",
        "prelu",
        "bypass",
        "average",
        "logical_not",
    }
    | {"divide", "mod", "fmod", "negative", "sum", "prod", "mean", "cos", "tan", "floor", "ceil", "trunc"}
)
TOKENS = {name: Op(name) for name in NAMES}
