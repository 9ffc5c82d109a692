"""TensorE matrix multiplication: nc_matmul and its PSUM rules."""

from __future__ import annotations

import numpy as np

from .. import cast, legal, operand, program
from ..chip import PSUM_BANK_BYTES
from ..errors import DtypeError, LanguageError, PsumError, ShapeError, UninitializedError
from ..memory import PSUM, PSUM_EVICTED, PSUM_MATMUL, PSUM_OTHER, PSUM_UNTOUCHED, SBUF
from ..tensor import NkiTensor
from .common import Engine, PerfMode, instruction, member, switches
from .move import fp8_transpose

_FP32 = ("float32", "tfloat32")


@instruction
def nc_matmul(
    dst,
    stationary,
    moving,
    is_stationary_onezero=False,
    is_moving_onezero=False,
    is_transpose=False,
    accumulate=None,
    tile_position=(),
    tile_size=(),
    perf_mode=PerfMode.none,
    name=None,
):
    """dst[M, N] (+)= stationary[K, M].T @ moving[K, N]; with double_row the contraction is K x 2."""
    prog = program.current()
    _check_operands(prog, dst, stationary, moving)
    member(perf_mode, PerfMode, "perf_mode")
    double = perf_mode is PerfMode.double_row
    columns = tiling(tile_position, tile_size, stationary.shape[0])
    m, n = _extents(prog, dst, stationary, moving, double, columns)
    if double:
        _check_double_row(prog, stationary, moving, is_transpose)
    _check_dtypes(prog, dst, stationary, moving, is_transpose)
    accumulate = accumulation(accumulate)
    if is_transpose and accumulate:
        raise PsumError("a transpose does not accumulate")

    def run():
        if is_transpose:
            _transpose(dst, stationary, moving)
            prog.counters.matmul_columns["transpose"] += n
            return
        for t, role, flag in ((stationary, "stationary", is_stationary_onezero), (moving, "moving", is_moving_onezero)):
            if flag and not np.isin(operand.f32(t, role), (0.0, 1.0)).all():
                raise LanguageError(f"is_{role}_onezero promises ones and zeros, {role} holds other values")
        k = stationary.shape[0] * (2 if double else 1)
        a = operand.f32(stationary, "stationary").reshape(k, -1) if double else operand.f32(stationary, "stationary")
        b = operand.f32(moving, "moving").reshape(k, -1) if double else operand.f32(moving, "moving")
        write_product(prog, dst, contract(a, b), accumulate)
        prog.counters.matmul_columns[_kind(stationary, moving, double)] += n
        prog.counters.matmul_macs += k * m * n

    attrs = {
        "accumulate": accumulate,
        "is_transpose": bool(is_transpose),
        "perf_mode": perf_mode,
        "tile_position": tuple(tile_position or ()),
        "tile_size": tuple(tile_size or ()),
        "is_stationary_onezero": bool(is_stationary_onezero),
        "is_moving_onezero": bool(is_moving_onezero),
    }
    return prog.issue(
        "nc_matmul", Engine.tensor, {"dst": dst}, {"stationary": stationary, "moving": moving}, attrs, run, label=name
    )


def _check_operands(prog, dst, stationary, moving) -> None:
    legal.in_buffers(dst, "dst", PSUM)
    legal.in_buffers(stationary, "stationary", SBUF)
    legal.in_buffers(moving, "moving", SBUF)
    legal.same_partitions(stationary, "stationary", moving, "moving")
    for t, role in ((dst, "dst"), (stationary, "stationary"), (moving, "moving")):
        legal.dtype_on_target(prog, t, role)


def tiling(position, size, rows_used: int) -> int:
    """Check row tiling (tiles of 32, 64 or 128 rows, at a multiple of their size); returns the columns of a tile."""
    if not position and not size:
        position, size = (0, 0), (128, 128)
    if not position or not size:
        raise LanguageError("tile_position and tile_size go together")
    (start_row, start_column), (rows, columns) = tuple(position), tuple(size)
    if rows not in (32, 64, 128) or columns != 128:
        raise ShapeError(f"tile_size is {(rows, columns)}, need (32, 64 or 128, 128)")
    if start_column != 0 or start_row % rows or not 0 <= start_row < 128:
        raise ShapeError(f"tile_position is {(start_row, start_column)}, need (a multiple of {rows} below 128, 0)")
    if rows_used > rows:
        raise ShapeError(f"operands have {rows_used} partitions, the row tile has {rows}")
    return columns


def _extents(prog, dst, stationary, moving, double, columns) -> tuple[int, int]:
    if double:
        for t, role in ((stationary, "stationary"), (moving, "moving")):
            if t.ndim < 3 or t.shape[1] != 2:
                raise ShapeError(f"{role} has shape {t.shape}; double_row needs [K, 2, ...]")
        m, n = stationary.free_size // 2, moving.free_size // 2
    else:
        m, n = stationary.free_size, moving.free_size
    if m > columns:
        raise ShapeError(f"stationary has {m} columns, the limit is {columns}")
    check_moving(prog, dst, n)
    check_result(dst, m, n)
    return m, n


def check_moving(prog, dst: NkiTensor, n: int) -> None:
    """Moving columns: one PSUM bank on v2 and v3, the whole PSUM on v4; dst within one bank before v4."""
    limit = 512 if prog.chip.gen < 4 else 8 * PSUM_BANK_BYTES // dst.itemsize
    if n > limit:
        raise ShapeError(f"moving has {n} columns, the limit on {prog.chip.name} with a {dst.dtype} dst is {limit}")
    first, last = legal.bank_of(dst)
    if prog.chip.gen < 4 and first != last:
        raise PsumError(f"dst crosses PSUM banks {first}..{last}; on {prog.chip.name} a matmul writes one bank")


def check_result(dst: NkiTensor, m: int, n: int) -> None:
    """dst is M partitions of N elements."""
    if dst.shape[0] != m or dst.free_size != n:
        raise ShapeError(f"dst has shape {dst.shape}, the product is {m} x {n}")


def _check_double_row(prog, stationary, moving, is_transpose) -> None:
    legal.needs(prog, 3, "double_row")
    for t, role in ((stationary, "stationary"), (moving, "moving")):
        if not t.dtype.is_fp8:
            raise DtypeError(f"{role} is {t.dtype}; double_row needs FP8 operands")
    if is_transpose:
        raise LanguageError("double_row does not combine with is_transpose")


def _check_dtypes(prog, dst, stationary, moving, is_transpose) -> None:
    for t, role in ((stationary, "stationary"), (moving, "moving")):
        if not t.dtype.is_float and not is_transpose:
            raise DtypeError(f"{role} is {t.dtype}; TensorE multiplies floats")
    if (stationary.dtype in _FP32) != (moving.dtype in _FP32):
        raise DtypeError(f"stationary is {stationary.dtype}, moving is {moving.dtype}; fp32 goes with fp32 only")
    if {str(stationary.dtype), str(moving.dtype)} == {"float8_e4m3", "float8_e4m3fn"}:
        raise DtypeError("float8_e4m3 and float8_e4m3fn do not mix in one matmul")
    if is_transpose:
        if dst.dtype != stationary.dtype:
            raise DtypeError(f"dst is {dst.dtype}; a transpose keeps {stationary.dtype}")
        fp8_transpose(stationary)
        return
    if dst.dtype != "float32" and not (prog.chip.gen >= 4 and dst.dtype == "bfloat16"):
        raise DtypeError(f"dst is {dst.dtype}; need float32" + (" or bfloat16" if prog.chip.gen >= 4 else ""))


def _kind(stationary, moving, double) -> str:
    if double:
        return "double_row"
    if stationary.dtype in _FP32:
        return "fp32"
    return "fp8" if stationary.dtype.is_fp8 and moving.dtype.is_fp8 else "half"


def _transpose(dst, stationary, moving) -> None:
    """stationary.T, bit for bit; moving must be the identity."""
    identity = operand.f32(moving, "moving")
    if identity.shape[0] != identity.shape[1] or not np.array_equal(identity, np.eye(identity.shape[0])):
        raise LanguageError("is_transpose needs an identity matrix as moving")
    values, written, _ = operand.bits(stationary, "stationary")
    flat = values.reshape(stationary.shape[0], -1).T.reshape(dst.shape)
    mask = written.reshape(stationary.shape[0], stationary.free_size, -1).transpose(1, 0, 2)
    operand.store_bits(dst, flat, written=mask.reshape(dst.shape + (-1,)))


def accumulation(value) -> bool | None:
    """`accumulate=` as True, False or None."""
    if value is None or value in (True, False):
        return None if value is None else bool(value)
    raise LanguageError(f"accumulate is {value!r}, need True, False or None")


def contract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a.T @ b rounded to float32 once. Products are exact; the device adds in about float32, in an unknown order."""
    with np.errstate(all="ignore"):
        return (a.astype(np.float64).T @ b.astype(np.float64)).astype(np.float32)


def write_product(prog, dst: NkiTensor, product: np.ndarray, accumulate) -> None:
    """Write a product into PSUM: overwrite, add, or decide by what each location holds.

    A bfloat16 dst is widened, added to in float32 and rounded by every instruction.
    """
    access = operand.resolve(dst, "dst")
    product = product.reshape(dst.shape)
    add = _adding(prog, access, accumulate)
    if add.any():
        if not access.written()[add].all():
            raise UninitializedError("dst: accumulates onto elements that were never written")
        old = cast.to_f32(np.where(add, access.read(), np.zeros((), dst.dtype.np)), dst.dtype)
        with np.errstate(all="ignore"):
            product = np.where(add, old + product, product)
    operand.store_bits(dst, cast.from_f32(product, dst.dtype), by_matmul=True)


def _adding(prog, access, accumulate) -> np.ndarray:
    """Which elements accumulate."""
    states = access.psum_states()
    kind, evicted = states & ~np.uint8(PSUM_EVICTED), (states & PSUM_EVICTED) != 0
    if accumulate is False:
        return np.zeros(access.shape, bool)
    if accumulate:
        if (kind == PSUM_UNTOUCHED).any():
            raise PsumError("accumulate=True onto PSUM that no instruction has written through this tensor")
        if (kind == PSUM_OTHER).any() and prog.chip.gen < 4:
            raise PsumError(
                f"accumulate=True onto PSUM written by something else than a matmul is undefined on {prog.chip.name}"
            )
        return np.ones(access.shape, bool)
    other = kind == PSUM_OTHER
    if other.any() and (not access.written()[other].all() or cast.to_f32(access.read(), access.dtype)[other].any()):
        raise PsumError("accumulate=None onto PSUM that something else than a matmul has filled; pass accumulate")
    reused = evicted & (kind == PSUM_MATMUL)
    if reused.any():
        rule = switches().psum_after_eviction
        if rule == "error":
            raise PsumError(
                "accumulate=None onto PSUM that was read since its last matmul: it may add or overwrite; pass "
                "accumulate (switch psum_after_eviction)"
            )
        if rule == "overwrite":
            return (kind == PSUM_MATMUL) & ~reused
    return kind == PSUM_MATMUL
