"""NKI dtypes: strings that carry their storage type.

NKI dtypes print and compare as their names; kernels write `str(t.dtype) == str(nl.bfloat16)` as well as
`t.dtype == nl.bfloat16`. A `DType` is therefore a `str` with attributes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .errors import DtypeError


class DType(str):
    """A dtype name with its numpy storage type.

    Attributes: `np` storage dtype, `itemsize` bytes, `kind` one of float, int, uint, bool, x4, e8m0, `lanes` values in
    one element (4 for packed types), `lane` the numpy dtype of one value of a packed element, `max` the largest finite
    value (floats only).
    """

    __slots__ = ("np", "itemsize", "kind", "lanes", "lane", "max")

    def __new__(cls, name, np_dtype, kind, lanes=1, lane=None):
        self = str.__new__(cls, name)
        self.np = np.dtype(np_dtype)
        self.itemsize = self.np.itemsize
        self.kind = kind
        self.lanes = lanes
        self.lane = None if lane is None else np.dtype(lane)
        self.max = float(ml_dtypes.finfo(self.np).max) if kind == "float" else None
        return self

    def __eq__(self, other):
        if isinstance(other, str):
            return str.__eq__(self, other)
        if other is None:
            return False
        try:
            return str.__eq__(self, resolve(other))
        except DtypeError:
            return False

    def __ne__(self, other):
        return not self == other

    __hash__ = str.__hash__

    def __repr__(self):
        return f"nl.{str(self)}"

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return resolve, (str(self),)

    @property
    def is_float(self) -> bool:
        """True for floating-point types that arithmetic may use."""
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        """True for signed, unsigned and boolean integers."""
        return self.kind in ("int", "uint", "bool")

    @property
    def is_fp8(self) -> bool:
        """True for the three FP8 element types."""
        return self.kind == "float" and self.itemsize == 1

    @property
    def is_packed(self) -> bool:
        """True for the x4 types, which only MX instructions interpret."""
        return self.kind == "x4"


bool_ = DType("bool", np.uint8, "bool")
int8 = DType("int8", np.int8, "int")
int16 = DType("int16", np.int16, "int")
int32 = DType("int32", np.int32, "int")
uint8 = DType("uint8", np.uint8, "uint")
uint16 = DType("uint16", np.uint16, "uint")
uint32 = DType("uint32", np.uint32, "uint")
float16 = DType("float16", np.float16, "float")
float32 = DType("float32", np.float32, "float")
bfloat16 = DType("bfloat16", ml_dtypes.bfloat16, "float")
tfloat32 = DType("tfloat32", np.float32, "float")
float8_e4m3 = DType("float8_e4m3", ml_dtypes.float8_e4m3, "float")
float8_e4m3fn = DType("float8_e4m3fn", ml_dtypes.float8_e4m3fn, "float")
float8_e5m2 = DType("float8_e5m2", ml_dtypes.float8_e5m2, "float")
float8_e8m0fnu = DType("float8_e8m0fnu", np.uint8, "e8m0")
float8_e4m3fn_x4 = DType("float8_e4m3fn_x4", np.uint32, "x4", 4, ml_dtypes.float8_e4m3fn)
float8_e5m2_x4 = DType("float8_e5m2_x4", np.uint32, "x4", 4, ml_dtypes.float8_e5m2)
float4_e2m1fn_x4 = DType("float4_e2m1fn_x4", np.uint16, "x4", 4, ml_dtypes.float4_e2m1fn)

ALL = {
    str(d): d
    for d in (
        bool_, int8, int16, int32, uint8, uint16, uint32, float16, float32, bfloat16, tfloat32, float8_e4m3,
        float8_e4m3fn, float8_e5m2, float8_e8m0fnu, float8_e4m3fn_x4, float8_e5m2_x4, float4_e2m1fn_x4,
    )
}  # fmt: skip


def resolve(dtype) -> DType:
    """The `DType` meant by a DType, a name, a numpy dtype or scalar type, or a torch dtype.

    Raises DtypeError for a type that NKI does not have (64-bit types among them).
    """
    if isinstance(dtype, DType):
        return dtype
    name = None
    if isinstance(dtype, str):
        name = dtype
    elif str(dtype).startswith("torch."):
        name = str(dtype)[len("torch.") :]
    else:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            pass
    if name is not None and name in ALL:
        return ALL[name]
    raise DtypeError(f"{dtype!r} is not an NKI dtype")


def outer(dtype: DType) -> np.dtype:
    """The numpy dtype in which a tensor of `dtype` crosses the kernel boundary (x4 types travel as unsigned words)."""
    return (
        np.dtype(ml_dtypes.float8_e8m0fnu)
        if dtype.kind == "e8m0"
        else np.dtype(bool)
        if dtype.kind == "bool"
        else dtype.np
    )
