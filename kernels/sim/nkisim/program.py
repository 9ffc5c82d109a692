"""The running kernel on one core: allocation, issuing instructions, engine registers, counters."""

from __future__ import annotations

import threading

import numpy as np

from . import chip as chips
from . import config, legal, liveness
from .chip import Chip
from .counters import Counters
from .dtypes import DType, resolve
from .errors import BufferKindError, CapacityError, LanguageError, NkiValidationError, user_location
from .memory import PSUM, SBUF, SHARED_HBM, MemoryRegion, Physical, Storage, check_extents
from .tensor import NkiTensor, whole
from .trace import Instruction, OperandRef, plain

_active = threading.local()


class Shared:
    """What the cores of one launch have in common: shared HBM tensors and mailboxes."""

    def __init__(self):
        self.tensors: list[Storage] = []
        self.mail: dict = {}
        self.turnstile = None
        self._last_id = 0

    def next_id(self) -> int:
        """A tensor id that no other tensor of the launch has."""
        self._last_id += 1
        return self._last_id


class Program:
    """One core's execution of a kernel."""

    def __init__(self, chip: Chip, core: int = 0, cores: int = 1, grid: bool = False, shared: Shared | None = None):
        self.chip, self.core, self.cores, self.grid = chip, core, cores, grid
        self.shared = shared or Shared()
        self.storages: list[Storage] = []
        self.instructions: list[Instruction] = []
        self.counters = Counters()
        self.accumulators: dict[str, np.ndarray | None] = {"vector": None, "scalar": None}
        self.random: dict[str, np.random.Generator] = {}
        self.data_dependent = False  # a loop's length came from a register: the instruction list holds for this data only
        self.indirect_group = 16  # partitions that share the offsets of an indirect() operand of this instruction
        self._physical: dict[MemoryRegion, Physical] = {}
        self._shared_seen = 0

    # -- allocation ---------------------------------------------------------------------------------------------

    def allocate(self, shape, dtype, buffer, name: str | None = "", address=None) -> NkiTensor:
        """A new tensor with undefined contents (the body of `nl.ndarray`)."""
        if not isinstance(buffer, MemoryRegion):
            raise LanguageError(f"buffer {buffer!r} is not one of nl.sbuf, nl.psum, nl.hbm, nl.shared_hbm")
        kind = resolve(dtype)
        extents = check_extents(shape, buffer, kind, self.chip.sbuf_bytes)
        if buffer is SHARED_HBM:
            return whole(self._shared_storage(extents, kind, name))
        storage = self._new_storage(extents, kind, buffer, name)
        if address is None:
            storage.own_bytes()
        else:
            storage.place(self._memory(buffer), _address(address))
        return whole(storage)

    def _new_storage(self, extents, dtype: DType, buffer: MemoryRegion, name) -> Storage:
        number = self.shared.next_id()
        storage = Storage(number, name or f"{buffer.value}_{number}", extents, dtype, buffer)
        self.storages.append(storage)
        return storage

    def _shared_storage(self, extents, dtype: DType, name) -> Storage:
        """The n-th shared HBM tensor is the same memory on every core."""
        position = self._shared_seen
        self._shared_seen += 1
        if position < len(self.shared.tensors):
            storage = self.shared.tensors[position]
            if storage.shape != extents or storage.dtype != dtype:
                raise LanguageError("the cores of a launch allocate different shared_hbm tensors")
            self.storages.append(storage)
            return storage
        storage = self._new_storage(extents, dtype, SHARED_HBM, name)
        storage.own_bytes()
        self.shared.tensors.append(storage)
        return storage

    def adopt(
        self, array: np.ndarray, dtype: DType, name: str, kind: str, buffer=MemoryRegion.private_hbm
    ) -> NkiTensor:
        """A tensor that takes the bytes of an array: an input or a constant."""
        storage = self._new_storage(
            check_extents(array.shape, buffer, dtype, self.chip.sbuf_bytes), dtype, buffer, name
        )
        storage.fill_from(array)
        storage.kind = kind
        return whole(storage)

    def _memory(self, buffer: MemoryRegion) -> Physical:
        if not buffer.on_chip:
            raise BufferKindError(f"address= is for sbuf and psum, got {buffer.value}")
        if buffer not in self._physical:
            self._physical[buffer] = Physical(chips.PSUM_BYTES if buffer is PSUM else self.chip.sbuf_bytes)
        return self._physical[buffer]

    # -- instructions -------------------------------------------------------------------------------------------

    def issue(self, name, engine, writes, reads, attrs, run, *, label=None, any_partition=()):
        """Record an instruction, check its access patterns and execute it.

        `writes` and `reads` map roles to tensors (None entries are dropped); `run()` does the work. Roles listed in
        `any_partition` may start at any partition.
        """
        writes = {k: t for k, t in writes.items() if isinstance(t, NkiTensor)}
        reads = {k: t for k, t in reads.items() if isinstance(t, NkiTensor)}
        self.indirect_group = 32 if engine.name == "tensor" else 16
        for role, t in [*writes.items(), *reads.items()]:
            legal.pattern(t, role, start=engine.name != "dma" and role not in any_partition)
            legal.indirect(self, t, role, engine.name)
        for role, t in writes.items():
            legal.distinct(t, role)
            if t.storage.kind == "constant":
                raise LanguageError(f"{role} {t.name!r} is a compile-time constant")
        instruction = Instruction(
            index=len(self.instructions),
            name=name,
            engine=engine.name,
            writes={k: OperandRef.of(t) for k, t in writes.items()},
            reads={k: OperandRef.of(t) for k, t in reads.items()},
            attrs={k: plain(v) for k, v in attrs.items()},
            where=user_location(),
            label=label,
        )
        run()
        self.instructions.append(instruction)
        for t in [*writes.values(), *reads.values()]:
            self._touch(t, instruction.index)
        self.counters.instructions[engine.name] += 1
        self.counters.by_name[name] += 1
        if engine.name in ("vector", "scalar", "gpsimd"):
            free = [t.free_size for t in [*writes.values(), *reads.values()] if t.on_chip]
            self.counters.vector_elements[engine.name] += max(free, default=0)
        return instruction

    def _touch(self, t: NkiTensor, index: int) -> None:
        storage = t.storage
        storage.first_use = index if storage.first_use is None else storage.first_use
        storage.last_use = index
        if t.dynamic is not None and isinstance(t.dynamic.source, NkiTensor):
            self._touch(t.dynamic.source, index)

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Fill in the high-water counters and check capacity."""
        c = self.counters
        c.sbuf_high_water, _, at = liveness.high_water(self.storages, SBUF, self.chip.sbuf_bytes)
        self._check_capacity("sbuf", c.sbuf_high_water, self.chip.sbuf_bytes, at)
        c.psum_high_water, c.psum_banks_high_water, at = liveness.high_water(self.storages, PSUM, chips.PSUM_BYTES)
        self._check_capacity("psum", c.psum_high_water, chips.PSUM_BYTES, at)

    def _check_capacity(self, what: str, used: int, limit: int, at: Storage | None) -> None:
        if used > limit and config.current().capacity == "error":
            raise CapacityError(
                f"{used} bytes a partition of {what} are live at once, {self.chip.name} has {limit}; the peak is "
                f"reached by {at.name!r}, allocated at {at.where[0]}:{at.where[1]} (switch capacity)"
            )


def _address(address) -> tuple[int, int]:
    if (
        not isinstance(address, (tuple, list))
        or len(address) != 2
        or not all(isinstance(v, (int, np.integer)) for v in address)
    ):
        raise LanguageError(f"address is {address!r}, need (partition, byte)")
    return int(address[0]), int(address[1])


def current() -> Program:
    """The program running on this thread; raises outside a kernel."""
    program = getattr(_active, "program", None)
    if program is None:
        raise NkiValidationError("NKI calls work only inside a kernel launched by nki.jit or nki.simulate")
    return program


def active() -> bool:
    """True inside a kernel."""
    return getattr(_active, "program", None) is not None


class running:
    """Context manager: make a program current on this thread."""

    def __init__(self, program: Program):
        self.program = program

    def __enter__(self):
        self.before = getattr(_active, "program", None)
        _active.program = self.program
        return self.program

    def __exit__(self, *exc):
        _active.program = self.before
