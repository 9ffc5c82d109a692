"""Pseudo random numbers.

The device's generators (LFSR before NeuronCore-v4, XORWOW on it) are not documented to the bit: the sequence here is
numpy's, equal for equal seeds, and no kernel may rely on its values.
"""

from __future__ import annotations

import numpy as np

from .. import legal, operand, program
from ..errors import DtypeError, ShapeError, UnspecifiedError
from ..memory import SBUF
from ..tensor import NkiTensor
from .common import Engine, instruction, pick


def _generator(prog, which: str) -> np.random.Generator:
    return prog.random.setdefault(which, np.random.default_rng(0))


@instruction
def rng(dst, engine=Engine.unknown, name=None):
    """Random bits into an integer tile."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    if not dst.dtype.is_integer or dst.dtype == "bool":
        raise DtypeError(f"dst is {dst.dtype}, need an integer type")
    chosen = pick(engine, Engine.vector, Engine.vector, Engine.gpsimd)

    def run():
        words = _generator(prog, chosen.name).integers(0, 2**32, size=dst.shape, dtype=np.uint32)
        operand.store_bits(dst, words.astype(f"u{dst.itemsize}").view(dst.dtype.np))

    return prog.issue("rng", chosen, {"dst": dst}, {}, {}, run, label=name)


@instruction
def set_rng_seed(src_seeds, name=None):
    """Seed VectorE's generator with one 32-bit value."""
    prog = program.current()
    legal.on_chip(src_seeds, "src_seeds")
    if src_seeds.size != 1 or src_seeds.itemsize != 4:
        raise ShapeError(f"src_seeds is {src_seeds.shape} {src_seeds.dtype}, need one 32-bit value")

    def run():
        seed = int(operand.raw(src_seeds, "src_seeds").view(np.uint32).reshape(-1)[0])
        prog.random["vector"] = np.random.default_rng(seed)

    return prog.issue("set_rng_seed", Engine.vector, {}, {"src_seeds": src_seeds}, {}, run, label=name)


@instruction
def rand2(dst, min, max, name=None):
    """Uniform values in [min, max] (NeuronCore-v4)."""
    prog = program.current()
    legal.needs(prog, 4, "rand2")
    legal.on_chip(dst, "dst")
    legal.arithmetic(dst, "dst")
    bounds = {"min": min, "max": max}
    for role, value in bounds.items():
        if isinstance(value, NkiTensor):
            legal.column(value, role, dst.shape[0])
        else:
            legal.number(value, role)

    def run():
        low, high = (operand.f32(v, r) if isinstance(v, NkiTensor) else np.float32(v) for r, v in bounds.items())
        if not np.all(low < high):
            raise ShapeError("min must be below max")
        uniform = _generator(prog, "vector").random((dst.shape[0], dst.free_size), dtype=np.float32)
        operand.store_f32(dst, low + uniform * (high - low))

    attrs = {r: v for r, v in bounds.items() if not isinstance(v, NkiTensor)}
    return prog.issue("rand2", Engine.vector, {"dst": dst}, bounds, attrs, run, label=name)


@instruction
def dropout(dst, data, prob, name=None):
    """Zero each element with probability `prob` (number or vector)."""
    prog = program.current()
    legal.on_chip(dst, "dst")
    legal.on_chip(data, "data")
    legal.same_elements(dst, "dst", data, "data")
    if dst.dtype != data.dtype:
        raise DtypeError(f"data is {data.dtype}, dst is {dst.dtype}; they must agree")
    if isinstance(prob, NkiTensor):
        legal.column(prob, "prob", data.shape[0])
    else:
        legal.number(prob, "prob")

    def run():
        chance = operand.f32(prob, "prob") if isinstance(prob, NkiTensor) else np.float32(prob)
        drop = _generator(prog, "vector").random((data.shape[0], data.free_size), dtype=np.float32) < chance
        values = operand.raw(data, "data").reshape(drop.shape)
        operand.store_bits(dst, np.where(drop, np.zeros((), data.dtype.np), values).reshape(dst.shape))

    attrs = {} if isinstance(prob, NkiTensor) else {"prob": prob}
    return prog.issue("dropout", Engine.vector, {"dst": dst}, {"data": data, "prob": prob}, attrs, run, label=name)


def _state_size(prog, engine, t, role: str):
    legal.needs(prog, 3, role)
    chosen = pick(engine, Engine.gpsimd, Engine.gpsimd, Engine.vector)
    if chosen is Engine.vector:
        legal.needs(prog, 4, f"{role} on vector")
    need = 24 if chosen is Engine.vector else 6
    legal.dtype_in(legal.in_buffers(t, role, SBUF), role, "uint32")
    if t.free_size != need:
        raise ShapeError(f"{role} has {t.free_size} elements a partition, {chosen.name} has {need}")
    return chosen


@instruction
def rand_set_state(src_seeds, engine=Engine.unknown, name=None):
    """Seed an engine's generator from a state tile."""
    prog = program.current()
    chosen = _state_size(prog, engine, src_seeds, "src_seeds")

    def run():
        words = operand.raw(src_seeds, "src_seeds").reshape(-1)
        prog.random[chosen.name] = np.random.default_rng([int(w) for w in words])

    return prog.issue("rand_set_state", chosen, {}, {"src_seeds": src_seeds}, {}, run, label=name)


@instruction
def rand_get_state(dst, engine=Engine.unknown, name=None):
    """Read an engine's generator state: refused, the generators here are not XORWOW."""
    _state_size(program.current(), engine, dst, "dst")
    raise UnspecifiedError("rand_get_state: the engine's XORWOW generator is not modelled, so it has no state to read")
