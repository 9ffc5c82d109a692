"""Virtual registers: 32-bit scalars for dynamic offsets and loop bounds."""

from __future__ import annotations

from .errors import LanguageError, UninitializedError


class VirtualRegister:
    """A 32-bit register. `state` is its value (None: not set); a loop's register is `frozen`."""

    _next = 0

    def __init__(self, state: int | None = None, frozen: bool = False):
        self.state = state
        self.frozen = frozen
        VirtualRegister._next += 1
        self.id = VirtualRegister._next

    def value(self) -> int:
        """The value; raises if nothing has set it."""
        if self.state is None:
            raise UninitializedError("the register was never set")
        return self.state

    def set(self, value: int) -> None:
        """Store a 32-bit value (signed or unsigned)."""
        if self.frozen:
            raise LanguageError("a loop's register cannot be written")
        if not -(2**31) <= value < 2**32:
            raise LanguageError(f"{value} does not fit a 32-bit register")
        self.state = int(value)

    def __bool__(self):
        return self.value() != 0

    def _no_operator(self, *_):
        raise LanguageError(
            "a register is a runtime value: it may be a scalar_offset, a loop bound or a condition only"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __mod__ = __neg__ = _no_operator
    __lt__ = __le__ = __gt__ = __ge__ = __int__ = __index__ = _no_operator
