"""Registers, runtime loops and the two-core instructions."""

from __future__ import annotations

import numpy as np

from .. import legal, operand, program
from ..errors import DtypeError, LanguageError, ShapeError
from ..memory import HBM, SBUF, SHARED_HBM
from ..registers import VirtualRegister
from ..tensor import NkiTensor
from .common import DmaEngine, Engine, instruction, member, nc_version


def get_nc_version():
    """The NeuronCore generation compiled for."""
    return nc_version(program.current().chip.gen)


def get_nc_sub_version() -> int:
    """Revision within a generation; library kernels ask for 1 on gen4 before they call `exponential`."""
    return 1 if get_nc_version() >= nc_version.gen4 else 0


@instruction
def register_alloc(x=None):
    """A register, set to an int if one is given."""
    register = VirtualRegister()
    if x is not None:
        register.set(legal.integer(x, "x"))
    program.current().issue("register_alloc", Engine.sync, {}, {}, {"dst": register, "value": x}, lambda: None)
    return register


def _register(value, role: str) -> VirtualRegister:
    if not isinstance(value, VirtualRegister):
        raise LanguageError(f"{role} is {value!r}, need a register")
    return value


@instruction
def register_move(dst, src):
    """dst = an int or another register."""
    _register(dst, "dst")
    source = src if isinstance(src, VirtualRegister) else legal.integer(src, "src")

    def run():
        dst.set(source.value() if isinstance(source, VirtualRegister) else source)

    return program.current().issue("register_move", Engine.sync, {}, {}, {"dst": dst, "src": source}, run)


def _single(t, role: str) -> NkiTensor:
    legal.in_buffers(t, role, HBM, SHARED_HBM, SBUF)
    if t.size != 1:
        raise ShapeError(f"{role} has {t.size} elements, need 1")
    if not t.dtype.is_integer:
        raise DtypeError(f"{role} is {t.dtype}, need an integer type")
    return t


@instruction
def register_load(dst, src):
    """dst = the one element of a tensor."""
    _register(dst, "dst")
    _single(src, "src")

    def run():
        dst.set(int(operand.ints(src, "src").reshape(-1)[0]))

    return program.current().issue("register_load", Engine.sync, {}, {"src": src}, {"dst": dst}, run)


@instruction
def register_store(dst, src):
    """The one element of a tensor = a register."""
    _single(dst, "dst")
    _register(src, "src")

    def run():
        value = src.value()
        info = np.iinfo(dst.dtype.np)
        if not info.min <= value <= info.max:
            raise DtypeError(f"register value {value} does not fit {dst.dtype}")
        operand.store_bits(dst, np.full(dst.shape, value, dst.dtype.np))

    return program.current().issue("register_store", Engine.sync, {"dst": dst}, {}, {"src": src}, run)


def bound(value, role: str) -> int:
    """A loop bound: an int or a register."""
    if not isinstance(value, VirtualRegister):
        return legal.integer(value, role)
    program.current().data_dependent = True
    return value.value()


def fori_loop(lo, hi, body, step=1):
    """Run `body(register)` for lo, lo + step, ... below hi. The register may only be a scalar_offset."""
    if isinstance(step, VirtualRegister) or legal.integer(step, "step") < 1:
        raise LanguageError(f"fori_loop step is {step!r}, need a compile-time int of at least 1")
    for i in range(bound(lo, "lo"), bound(hi, "hi"), step):
        if body(VirtualRegister(i, frozen=True)) is not None:
            raise LanguageError("the body of fori_loop returns nothing; pass state through SBUF or HBM")


def while_loop(reg, body):
    """Run `body(register)` while the register is not zero; the body returns the next condition register."""
    condition = _register(reg, "reg")
    program.current().data_dependent = True
    while condition:
        condition = body(condition)
        if not isinstance(condition, VirtualRegister):
            raise LanguageError("the body of while_loop must return the next condition register")


def dynamic_range(start, stop=None, step=1):
    """Registers start, start + step, ... below stop (deprecated; use fori_loop)."""
    if isinstance(step, VirtualRegister) or legal.integer(step, "step") < 1:
        raise LanguageError(f"dynamic_range step is {step!r}, need a compile-time int of at least 1")
    lo, hi = (0, start) if stop is None else (start, stop)
    for i in range(bound(lo, "start"), bound(hi, "stop"), step):
        yield VirtualRegister(i, frozen=True)


def _two_cores(prog, what: str) -> None:
    legal.needs(prog, 3, what)
    if prog.cores != 2:
        raise LanguageError(f"{what} needs a launch on two cores: kernel[2](...)")


@instruction
def core_barrier(data, cores, engine=Engine.gpsimd, name=None):
    """Both cores of an LNC=2 launch reach this point before either goes on."""
    prog = program.current()
    _two_cores(prog, "core_barrier")
    if tuple(cores) != (0, 1):
        raise LanguageError(f"cores is {cores!r}, need (0, 1)")
    legal.in_buffers(data, "data", SHARED_HBM)
    member(engine, Engine, "engine")
    return prog.issue("core_barrier", engine, {}, {"data": data}, {}, prog.shared.turnstile.wait, label=name)


@instruction
def sendrecv(
    src, dst, send_to_rank, recv_from_rank, pipe_id, dma_engine=DmaEngine.dma, name=None, use_gpsimd_dma=None
):
    """Send `src` to the other core's `dst` while receiving its `src`. `use_gpsimd_dma` is NKI 0.3's `dma_engine`."""
    prog = program.current()
    if use_gpsimd_dma is not None:
        dma_engine = DmaEngine.gpsimd_dma if use_gpsimd_dma else DmaEngine.dma
    _two_cores(prog, "sendrecv")
    legal.in_buffers(src, "src", SBUF)
    legal.in_buffers(dst, "dst", SBUF)
    if src.dtype != dst.dtype or src.shape != dst.shape:
        raise ShapeError(f"src is {src.shape} {src.dtype}, dst is {dst.shape} {dst.dtype}; they must agree")
    for rank, role in ((send_to_rank, "send_to_rank"), (recv_from_rank, "recv_from_rank")):
        if legal.integer(rank, role) not in (0, 1):
            raise LanguageError(f"{role} is {rank}, need 0 or 1")
    member(dma_engine, DmaEngine, "dma_engine")
    if dma_engine is DmaEngine.gpsimd_dma and src.free_size > 256:
        raise ShapeError(f"gpsimd_dma moves up to 256 elements a partition, got {src.free_size}")

    def run():
        values, written, _ = operand.bits(src, "src")
        prog.shared.mail[(prog.core, send_to_rank, pipe_id)] = (values, written.copy())
        prog.shared.turnstile.wait()
        key = (recv_from_rank, prog.core, pipe_id)
        if key not in prog.shared.mail:
            raise LanguageError(f"core {recv_from_rank} sent nothing to core {prog.core} on pipe {pipe_id}")
        values, written = prog.shared.mail[key]
        prog.shared.turnstile.wait()
        operand.store_bits(dst, values, written=written)

    attrs = {"send_to_rank": send_to_rank, "recv_from_rank": recv_from_rank, "pipe_id": pipe_id}
    chosen = Engine.dma if dma_engine is DmaEngine.dma else Engine.gpsimd
    return prog.issue("sendrecv", chosen, {"dst": dst}, {"src": src}, attrs, run, label=name)
