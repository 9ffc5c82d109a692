"""Errors that name the line of the kernel at fault.

Every refusal is a `NkiValidationError`. The message starts with `file:line` of the innermost frame outside this
simulator, then the instruction, then what was got and what is needed.
"""

from __future__ import annotations

import os
import sys
import threading

_SIM_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_current = threading.local()


def set_instruction(name: str | None) -> str | None:
    """Record the instruction being issued on this thread; returns the one before it."""
    before = getattr(_current, "name", None)
    _current.name = name
    return before


def user_location() -> tuple[str, int]:
    """File and line of the innermost frame that is not part of the simulator."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_SIM_ROOT) and not filename.startswith("<"):
            return filename, frame.f_lineno
        frame = frame.f_back
    return "<unknown>", 0


class NkiValidationError(Exception):
    """A rule of the hardware or of the documented API is broken.

    Attributes: `filename` and `lineno` of the kernel, `instruction` (or None), `reason` (the message without them).
    """

    def __init__(self, reason: str):
        self.filename, self.lineno = user_location()
        self.instruction = getattr(_current, "name", None)
        self.reason = reason
        what = f"nisa.{self.instruction}: " if self.instruction else ""
        super().__init__(f"{self.filename}:{self.lineno}: {what}{reason}")


class LanguageError(NkiValidationError):
    """The kernel uses Python in a way that NKI does not compile."""


class ShapeError(NkiValidationError):
    """Extents do not agree or exceed a tile limit."""


class BoundsError(NkiValidationError):
    """An access leaves its tensor."""


class PartitionError(NkiValidationError):
    """A start partition, partition count or partition stride is not one the hardware has."""


class DtypeError(NkiValidationError):
    """A dtype is not accepted here, or not together with another."""


class BufferKindError(NkiValidationError):
    """An operand lives in a memory that the engine cannot reach."""


class EngineError(NkiValidationError):
    """The engine asked for does not execute this instruction."""


class TargetError(NkiValidationError):
    """The instruction does not exist on the chosen target."""


class CapacityError(NkiValidationError):
    """SBUF or PSUM is too small for what is live."""


class PsumError(NkiValidationError):
    """A PSUM bank or accumulation rule is broken."""


class MxError(NkiValidationError):
    """MX data or scale operands are not laid out as the hardware reads them."""


class UninitializedError(NkiValidationError):
    """Arithmetic, control or output reads an element that nothing has written."""


class CastError(NkiValidationError):
    """A value has no defined representation in the destination dtype."""


class RaceError(NkiValidationError):
    """The result depends on an order that the hardware does not promise."""


class ReductionStateError(NkiValidationError):
    """An engine reduction register is read in a state nobody set."""


class UnspecifiedError(NkiValidationError):
    """The documents leave the result open and no switch settles it."""
