"""MX instructions of NeuronCore-v4: quantize_mx and nc_matmul_mx.

A scaling group is 8 consecutive partitions x the 4 lanes of one packed element. Group g = p // 8 of column n keeps its
scale byte at partition 32 * (g // 4) + g % 4 of the scale tile, column n.
"""

from __future__ import annotations

import numpy as np

from .. import cast, legal, operand, program
from ..errors import DtypeError, MxError, ShapeError
from ..memory import PSUM, SBUF
from ..tensor import NkiTensor
from .common import Engine, instruction, switches
from .matmul import accumulation, check_moving, check_result, contract, tiling, write_product

# Exponent of the largest power of two that each element type holds.
_EMAX = {"float8_e4m3fn_x4": 8, "float8_e5m2_x4": 15}
_SCALE_DTYPES = ("uint8", "float8_e8m0fnu")


def scale_row(group: int) -> int:
    """Partition, within the scale tile, of the scale of 8-partition group `group`."""
    return 32 * (group // 4) + group % 4


def _scale_tile(scale, role: str, data: NkiTensor, columns: int) -> np.ndarray:
    """Check a scale operand; returns the rows of the tile that are live for `data`."""
    legal.in_buffers(scale, role, SBUF)
    legal.dtype_in(scale, role, *_SCALE_DTYPES)
    groups = data.shape[0] // 8
    rows = np.array([scale_row(g) for g in range(groups)])
    if scale.free_size != columns:
        raise ShapeError(f"{role} has {scale.free_size} columns, the data has {columns}")
    if scale.shape[0] <= rows[-1]:
        raise MxError(
            f"{role} has {scale.shape[0]} partitions; group {groups - 1} keeps its scale at partition {rows[-1]}"
        )
    if scale.start_partition % 32 not in (0, 4, 8, 12):
        raise MxError(f"{role} starts at partition {scale.start_partition}; need row 0, 4, 8 or 12 of a quadrant")
    if scale.start_partition // 32 != data.start_partition // 32:
        raise MxError(
            f"{role} starts in quadrant {scale.start_partition // 32}, its data in "
            f"quadrant {data.start_partition // 32}; a scale lives in the quadrant of its group"
        )
    return rows


def _data_tile(t, role: str) -> None:
    legal.in_buffers(t, role, SBUF)
    if not t.dtype.is_packed:
        raise DtypeError(f"{role} is {t.dtype}; need an x4 type")
    _partitions(t, role)


def _partitions(t: NkiTensor, role: str) -> None:
    if t.shape[0] % 32:
        raise MxError(f"{role} has {t.shape[0]} partitions, need a multiple of 32")
    if t.shape[0] == 96 and switches().mx_96_partitions == "error":
        raise MxError(f"{role} has 96 partitions, need 32, 64 or 128 (switch mx_96_partitions)")


@instruction
def quantize_mx(dst, src, dst_scale, name=None):
    """Quantize bf16/fp16 [P, 4F] to MXFP8 [P, F] x4 with one scale for each group of 32 (switch `mx_scale`)."""
    prog = program.current()
    legal.needs(prog, 4, "quantize_mx")
    legal.in_buffers(src, "src", SBUF)
    legal.in_buffers(dst, "dst", SBUF)
    legal.dtype_in(src, "src", "bfloat16", "float16")
    legal.dtype_in(dst, "dst", *_EMAX)
    _partitions(src, "src")
    legal.same_partitions(src, "src", dst, "dst")
    if src.free_size != 4 * dst.free_size:
        raise ShapeError(f"src has {src.free_size} elements a partition, dst has {dst.free_size}; need 4 to 1")
    rows = _scale_tile(dst_scale, "dst_scale", dst, dst.free_size)
    rule = switches().mx_scale

    def run():
        codes, scale = quantize(operand.f32(src, "src"), dst.dtype, rule)
        operand.store_bits(dst, cast.pack_x4(codes, dst.dtype).reshape(dst.shape))
        tile = operand.resolve(dst_scale, "dst_scale")
        where = np.zeros((dst_scale.shape[0], dst_scale.free_size), bool)
        where[rows] = True
        values = np.zeros(where.shape, np.uint8)
        values[rows] = scale
        tile.write(values.reshape(dst_scale.shape), True, where.reshape(dst_scale.shape))

    writes = {"dst": dst, "dst_scale": dst_scale}
    return prog.issue(
        "quantize_mx",
        Engine.vector,
        writes,
        {"src": src},
        {"mx_scale": rule},
        run,
        label=name,
        any_partition=("dst_scale",),
    )


def quantize(values: np.ndarray, dtype, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [P, F, 4] (uint8) and dense scale bytes [P/8, F] of float32 values [P, 4F].

    The exponent is that of the largest magnitude minus Emax-1 (`neuron`) or Emax (`ocp`), clamped to byte 0; a group
    of zeros has byte 0. Elements beyond the largest finite value are clamped to it: only `ocp` produces them.
    """
    partitions, width = values.shape
    lanes = values.reshape(partitions, width // 4, 4)
    if not np.isfinite(lanes).all() and switches().mx_special == "error":
        raise MxError("src holds NaN or infinity; the documents give no result (switch mx_special)")
    groups = np.abs(lanes).reshape(partitions // 8, 8, width // 4, 4)
    amax = groups.max(axis=(1, 3))
    field = (amax.view(np.uint32) >> np.uint32(23)).astype(np.int64)  # biased exponent; 0 for zero and subnormals
    emax = _EMAX[str(dtype)] - (1 if rule == "neuron" else 0)
    scale = np.clip(field - emax, 0, 255)
    exponent = np.repeat(scale - 127, 8, axis=0)[..., None]
    with np.errstate(all="ignore"):
        scaled = np.ldexp(lanes.astype(np.float64), -exponent)
        top = float(np.float32(cast.ml_dtypes.finfo(dtype.lane).max))
        clamped = np.where(np.isnan(scaled), scaled, np.clip(scaled, -top, top))
        codes = clamped.astype(np.float32).astype(dtype.lane)
    return codes.view(np.uint8), scale.astype(np.uint8)


@instruction
def nc_matmul_mx(
    dst,
    stationary,
    moving,
    stationary_scale,
    moving_scale,
    tile_position=None,
    tile_size=None,
    accumulate=None,
    name=None,
):
    """dst[M, N] (+)= sum over partitions and lanes of scaled stationary x scaled moving."""
    prog = program.current()
    legal.needs(prog, 4, "nc_matmul_mx")
    legal.in_buffers(dst, "dst", PSUM)
    legal.dtype_in(dst, "dst", "float32", "bfloat16")
    _data_tile(stationary, "stationary")
    _data_tile(moving, "moving")
    legal.same_partitions(stationary, "stationary", moving, "moving")
    accumulate = accumulation(accumulate)
    m, n = stationary.free_size, moving.free_size
    tiling(tile_position or (), tile_size or (), stationary.shape[0])
    if m > 128 or m % 2:
        raise ShapeError(f"stationary has {m} columns, need an even number up to 128")
    check_moving(prog, dst, n)
    check_result(dst, m, n)
    live_s = _scale_tile(stationary_scale, "stationary_scale", stationary, m)
    live_m = _scale_tile(moving_scale, "moving_scale", moving, n)

    def run():
        a = dequantize(stationary, stationary_scale, live_s, "stationary")
        b = dequantize(moving, moving_scale, live_m, "moving")
        write_product(prog, dst, contract(a, b), accumulate)
        prog.counters.matmul_columns["mx"] += n
        prog.counters.matmul_macs += 4 * stationary.shape[0] * m * n

    attrs = {"accumulate": accumulate, "tile_position": tuple(tile_position or ()), "tile_size": tuple(tile_size or ())}
    reads = {
        "stationary": stationary,
        "moving": moving,
        "stationary_scale": stationary_scale,
        "moving_scale": moving_scale,
    }
    scales = ("stationary_scale", "moving_scale")
    return prog.issue("nc_matmul_mx", Engine.tensor, {"dst": dst}, reads, attrs, run, label=name, any_partition=scales)


def dequantize(data: NkiTensor, scale: NkiTensor, rows: np.ndarray, role: str) -> np.ndarray:
    """Values [P * 4, columns] (float64) of a packed tile; contraction index is partition-major, lane-minor."""
    words = operand.raw(data, role).reshape(data.shape[0], -1)
    lanes = cast.unpack_x4(words, data.dtype)
    flat = NkiTensor(scale.storage, scale.dtype, scale.shape, scale.strides, scale.offset)
    codes = _live_scales(flat, rows, f"{role}_scale")
    if switches().mx_special == "error":
        if not np.isfinite(lanes).all():
            raise MxError(f"{role} holds NaN or infinity; the documents give no result (switch mx_special)")
        if (codes == 255).any():
            raise MxError(f"{role}_scale holds byte 255 (NaN); the documents give no result (switch mx_special)")
    factor = np.ldexp(np.ones(codes.shape), codes.astype(np.int64) - 127)
    factor = np.where(codes == 255, np.nan, factor)
    values = lanes.astype(np.float64) * np.repeat(factor, 8, axis=0)[..., None]
    return values.transpose(0, 2, 1).reshape(4 * data.shape[0], -1)


def _live_scales(scale: NkiTensor, rows: np.ndarray, role: str) -> np.ndarray:
    """Scale bytes of the live rows only: the others are never read."""
    out = []
    for row in rows:
        out.append(operand.raw(scale[int(row)], role).view(np.uint8).reshape(-1))
    return np.stack(out)
