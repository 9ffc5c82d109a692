"""What a kernel did: the flat list of executed instructions.

Loops and branches on compile-time values have run by then; what is left is what the device would be given.
"""

from __future__ import annotations

import dataclasses
import enum

from .dtypes import DType
from .memory import Storage
from .registers import VirtualRegister
from .tensor import NkiTensor


@dataclasses.dataclass(frozen=True)
class OperandRef:
    """An access as it was issued.

    `offset` and `pattern` ([[stride, count], ...], outermost first) count elements of `dtype` over the flat storage of
    `tensor` (its id). `dynamic` is None or a dict: kind (scalar, vector), scale in elements, and either `register` or
    `index` (an OperandRef).
    """

    tensor: int
    dtype: str
    offset: int
    pattern: tuple[tuple[int, int], ...]
    dynamic: dict | None = None

    @staticmethod
    def of(t: NkiTensor) -> OperandRef:
        """Describe a view."""
        dynamic, offset = None, t.offset
        source = None if t.dynamic is None else t.dynamic.source
        if isinstance(source, VirtualRegister) and source.frozen:
            offset += source.value() * t.dynamic.scale  # a loop's register: this instruction is one turn of it
        elif source is not None:
            dynamic = {"kind": t.dynamic.kind, "scale": t.dynamic.scale, "extent": t.dynamic.extent}
            if isinstance(source, VirtualRegister):
                dynamic["register"] = source.id
            else:
                dynamic["index"] = OperandRef.of(source)
        pattern = tuple(zip(t.strides, t.shape, strict=True))
        return OperandRef(t.storage.id, str(t.dtype), offset, pattern, dynamic)

    def as_dict(self) -> dict:
        """Plain data for export."""
        out = {
            "tensor": self.tensor,
            "dtype": self.dtype,
            "offset": self.offset,
            "pattern": [list(p) for p in self.pattern],
        }
        if self.dynamic:
            out["dynamic"] = {k: v.as_dict() if isinstance(v, OperandRef) else v for k, v in self.dynamic.items()}
        return out


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One executed instruction: operands it writes and reads by role, immediate arguments, and its source line."""

    index: int
    name: str
    engine: str
    writes: dict[str, OperandRef]
    reads: dict[str, OperandRef]
    attrs: dict[str, object]
    where: tuple[str, int]
    label: str | None = None

    def as_dict(self) -> dict:
        """Plain data for export (the source location is left out: it is not part of the program)."""
        out = {
            "name": self.name,
            "engine": self.engine,
            "writes": {k: v.as_dict() for k, v in self.writes.items()},
            "reads": {k: v.as_dict() for k, v in self.reads.items()},
            "attrs": dict(self.attrs),
        }
        if self.label:
            out["label"] = self.label
        return out


def plain(value):
    """An immediate argument as plain data: operator tokens, enums, dtypes and registers by name or id."""
    if isinstance(value, DType):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, VirtualRegister):
        return value.value() if value.frozen else {"register": value.id}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    return getattr(value, "op_name", repr(value))


def tensor_table(storages: list[Storage]) -> list[dict]:
    """Every tensor: id, name, shape, dtype, buffer, address, kind, first and last instruction that uses it."""
    return [
        {
            "id": s.id,
            "name": s.name,
            "shape": list(s.shape),
            "dtype": str(s.dtype),
            "buffer": s.buffer.value,
            "address": list(s.address) if s.address else None,
            "kind": s.kind,
            "uses": [s.first_use, s.last_use],
        }
        for s in storages
    ]
