"""RMS normalisation, then quantization of the result: FP8 with one scale a row (Trn2, Trn3), or MXFP8 (Trn3).

Dimensions
    M   rows (tokens)
    K   row length (hidden size), at most 8192
    T   512-deep tiles of K, ceil(K / 512); S = ceil(T / 4) scale tiles
    R   M rounded up to even

    y[i, j] = x[i, j] / sqrt(mean_j(x[i, j]^2) + eps) * gamma[j]

rmsnorm_quantize_fp8(x, gamma, eps, element) -> (codes, scale)
    x        [M, K]  bf16 or f32
    gamma    [1, K]  bf16 or f32
    eps      inside the root, at least 2^-80
    element  "e4m3" (IEEE, max 240), "e4m3fn" (max 448, Trn3) or "e5m2" (max 57344)
    codes    [M, K]  uint8; y is about codes * scale. What matmul_fp8 takes as x
    scale    [M, 1]  f32: max |y| of the row / max of the element
rmsnorm_quantize_mx(x, gamma, eps, element) -> (data, scale): what matmul_mx takes as x
    element  "e4m3fn" or "e5m2"
    data     [128, T, R]  uint32, layout `mx-quads/1` (docs/layouts.md), columns in the place of rows
    scale    [64, S, R]   uint8
"""

import nki
import nki.isa as nisa
import nki.language as nl

from matmul_tiles import PARTITIONS, QUADRANT_ROWS, ceil_div, clear, psum_banks, quantize_rows, spread_row

MAX_K = 8192  # two rows of tiles in flight fill SBUF
TINY = 1.0e-30  # a row's largest |x * gamma| is taken to be at least this, so that a row of zeros has a scale
LOADS_AHEAD = 1
GROUP = 512  # rows whose MX codes are stored together: 2 KiB a partition and k tile
NO_SCALE = 127  # scale byte 1.0 of k tiles that do not exist


def check(x, gamma, eps):
    """Refuse what neither entry serves; returns (M, K)."""
    gen = nisa.get_nc_version()
    assert gen != nisa.nc_version.gen2, "target: got trn1, need trn2 or trn3"
    assert len(x.shape) == 2, f"x: got {x.shape}, need [M, K]"
    m, k = x.shape
    assert x.dtype == nl.bfloat16 or x.dtype == nl.float32, f"x: got {x.dtype}, need bfloat16 or float32"
    assert k <= MAX_K, f"K: got {k}, need at most {MAX_K}"
    assert gamma.shape == (1, k), f"gamma: got {gamma.shape}, need (1, {k})"
    assert gamma.dtype == nl.bfloat16 or gamma.dtype == nl.float32, f"gamma: got {gamma.dtype}, need bfloat16 or float32"
    assert eps >= 2.0**-80 and eps < 2.0**80, f"eps: got {eps}, need 2^-80 <= eps < 2^80 (what ScalarE takes the root of)"
    return m, k


def load_ahead(waiting, x, tile):
    """Loads rows of x, 128 to a tile, until tile `tile` + LOADS_AHEAD is under way; stores queue behind loads.

    `waiting` holds the tiles loaded so far.
    """
    while len(waiting) <= tile + LOADS_AHEAD and len(waiting) * PARTITIONS < x.shape[0]:
        row = len(waiting) * PARTITIONS
        m = min(PARTITIONS, x.shape[0] - row)
        rows = nl.ndarray((PARTITIONS, x.shape[1]), x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows[:m], src=x[row : row + m])
        waiting.append(rows)


def row_factor(rows, m, eps):
    """1 / rms of the first m rows of a tile as [128, 1]: K is the real row length, never a padded one."""
    k = rows.shape[1]
    squares = nl.ndarray((PARTITIONS, k), nl.bfloat16, buffer=nl.sbuf)  # not read: only the sum counts
    total = nl.ndarray((PARTITIONS, 1), nl.float32, buffer=nl.sbuf)
    nisa.activation(
        dst=squares[:m], op=nl.square, data=rows[:m], reduce_op=nl.add, reduce_res=total[:m],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    factor = nl.ndarray((PARTITIONS, 1), nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=factor[:m], op=nl.rsqrt, data=total[:m], scale=1.0 / k, bias=eps)
    return factor


def fp8_type(element):
    """The dtype of an element and its largest value."""
    assert element in ("e4m3", "e4m3fn", "e5m2"), f"element: got {element}, need e4m3, e4m3fn or e5m2"
    if element == "e4m3fn":
        assert nisa.get_nc_version() == nisa.nc_version.gen4, "element: e4m3fn needs trn3"
        return nl.float8_e4m3fn, 448.0
    if element == "e4m3":
        return nl.float8_e4m3, 240.0
    return nl.float8_e5m2, 57344.0


@nki.jit
def rmsnorm_quantize_fp8(x, gamma, eps=1e-5, element="e4m3"):
    """Codes and one scale a row; see the module's docstring."""
    m_all, k = check(x, gamma, eps)
    kind, top = fp8_type(element)
    codes_out = nl.ndarray((m_all, k), nl.uint8, buffer=nl.shared_hbm)
    scale_out = nl.ndarray((m_all, 1), nl.float32, buffer=nl.shared_hbm)
    banks = psum_banks()
    weight, turn = spread_row(gamma, 0, k, min(PARTITIONS, m_all), banks, 0)
    waiting = []
    for group in range(0, m_all, PARTITIONS * PARTITIONS):
        # Scales of up to 128 row tiles, one column each: turned by PE they are stored in runs of 512 bytes, not of 4.
        here = min(PARTITIONS * PARTITIONS, m_all - group)
        tiles = ceil_div(here, PARTITIONS)
        columns = nl.ndarray((PARTITIONS, tiles), nl.float32, buffer=nl.sbuf)
        loaded = []
        for tile in range(tiles + 1):
            # The next tile is loaded, summed and multiplied before this one is quantized: no engine waits for another.
            if tile < tiles:
                row = group + tile * PARTITIONS
                m = min(PARTITIONS, m_all - row)
                load_ahead(waiting, x, row // PARTITIONS)
                rows = waiting[row // PARTITIONS]
                factor = row_factor(rows, m, eps)
                # GpSimd multiplies while ScalarE still sums: 1 / rms commutes with gamma.
                product = nl.ndarray((PARTITIONS, k), nl.float32, buffer=nl.sbuf)
                nisa.tensor_tensor(
                    dst=product[:m], data1=rows[:m], data2=weight[:m], op=nl.multiply, engine=nisa.engine.gpsimd
                )
                inverse = row_scale(columns[:m, tile : tile + 1], product[:m], factor[:m], top)
                loaded.append((product, inverse))
            if tile > 0:
                row = group + (tile - 1) * PARTITIONS
                m = min(PARTITIONS, m_all - row)
                product, inverse = loaded[tile - 1]
                nisa.activation(dst=product[:m], op=nl.copy, data=product[:m], scale=inverse)
                codes = nl.ndarray((PARTITIONS, k), kind, buffer=nl.sbuf)
                nisa.tensor_scalar(
                    dst=codes[:m], data=product[:m], op0=nl.minimum, operand0=top, op1=nl.maximum, operand1=-top
                )
                nisa.dma_copy(dst=codes_out.view(kind)[row : row + m], src=codes[:m])
        store_columns(scale_out, group, here, columns, banks, turn)
        turn += 1
    return codes_out, scale_out


def row_scale(scale, product, factor, top):
    """Writes scale [m, 1] = max |product| * factor / top; returns top / max |product|, what makes codes of product."""
    m, k = product.shape
    largest = nl.ndarray((m, 1), nl.float32, buffer=nl.sbuf)
    sizes = nl.ndarray((m, k), nl.bfloat16, buffer=nl.sbuf)  # not read: only the maximum counts
    nisa.tensor_scalar_reduce(
        dst=sizes, data=product, op0=nl.abs, operand0=None, reduce_op=nl.maximum, reduce_res=largest
    )
    nisa.tensor_scalar(dst=largest, data=largest, op0=nl.maximum, operand0=TINY)
    inverse = nl.ndarray((m, 1), nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=largest)
    nisa.tensor_scalar(dst=inverse, data=inverse, op0=nl.multiply, operand0=top)
    nisa.scalar_tensor_tensor(
        dst=scale, data=largest, op0=nl.multiply, operand0=1.0 / top, op1=nl.multiply, operand1=factor
    )
    return inverse


def store_columns(dst, first, count, columns, banks, turn):
    """Rows first..first+count of dst [M, 1] from columns [128, tiles]: row 128 t + p is (p, t)."""
    tiles = columns.shape[1]
    bank = banks[turn % len(banks)]
    nisa.nc_transpose(dst=bank[:tiles, :PARTITIONS], data=columns)
    lines = nl.ndarray((tiles, PARTITIONS), nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=lines, src=bank[:tiles, :PARTITIONS], engine=nisa.engine.vector)
    full = count // PARTITIONS
    rest = count - full * PARTITIONS
    if full > 0:
        nisa.dma_copy(
            dst=dst[first : first + full * PARTITIONS].reshape((full, PARTITIONS)), src=lines[:full]
        )
    if rest > 0:
        nisa.dma_copy(dst=dst[first + full * PARTITIONS : first + count].reshape((1, rest)), src=lines[full, :rest])


@nki.jit
def rmsnorm_quantize_mx(x, gamma, eps=1e-5, element="e4m3fn"):
    """MXFP8 in the layout of an activation operand; see the module's docstring."""
    m_all, k = check(x, gamma, eps)
    assert nisa.get_nc_version() == nisa.nc_version.gen4, "target: MX needs trn3"
    assert element in ("e4m3fn", "e5m2"), f"element: got {element}, need e4m3fn or e5m2 (what the device quantizes to)"
    assert k % 32 == 0, f"K: got {k}, need a multiple of 32 (one scale group)"
    kind = nl.float8_e4m3fn_x4 if element == "e4m3fn" else nl.float8_e5m2_x4
    tiles = ceil_div(k, 512)
    scale_tiles = ceil_div(tiles, 4)
    columns = m_all + m_all % 2
    data_out = nl.ndarray((PARTITIONS, tiles, columns), nl.uint32, buffer=nl.shared_hbm)
    scale_out = nl.ndarray((4 * QUADRANT_ROWS, scale_tiles, columns), nl.uint8, buffer=nl.shared_hbm)
    banks = psum_banks()
    weight, turn = spread_row(gamma, 0, k, min(PARTITIONS, m_all), banks, 0)
    waiting = []
    factors = []
    for start in range(0, columns, PARTITIONS):
        # The next 128 rows are loaded and summed before these are quantized: no engine waits for another.
        while len(factors) * PARTITIONS < min(start + 2 * PARTITIONS, m_all):
            tile = len(factors)
            load_ahead(waiting, x, tile)
            factors.append(row_factor(waiting[tile], min(PARTITIONS, m_all - tile * PARTITIONS), eps))
        group = start // GROUP * GROUP
        here = min(GROUP, columns - group)
        if start == group:
            data = nl.ndarray((PARTITIONS, tiles, here), kind, buffer=nl.sbuf)
            scale = nl.ndarray((PARTITIONS, scale_tiles, here), nl.uint8, buffer=nl.sbuf)
            if tiles % 4 > 0:
                nisa.memset(dst=scale[:, scale_tiles - 1], value=NO_SCALE, engine=nisa.engine.gpsimd)
        even = min(PARTITIONS, columns - start)
        m = min(PARTITIONS, m_all - start)
        rows = nl.ndarray((even, 512 * tiles), nl.bfloat16, buffer=nl.sbuf)
        if even > m:
            clear(rows)
        elif k < 512 * tiles:
            clear(rows[:, k : 512 * tiles])
        tile = start // PARTITIONS
        nisa.scalar_tensor_tensor(
            dst=rows[:m, :k], data=waiting[tile][:m], op0=nl.multiply, operand0=factors[tile][:m], op1=nl.multiply,
            operand1=weight[:m],
        )  # fmt: skip
        at = nl.ds(start - group, even)
        turn = quantize_rows(rows, 0, [(data[:, :, at], scale[:, :, at])], banks, turn)
        if start + even < group + here:
            continue
        nisa.dma_copy(dst=data_out.view(kind)[:, :, group : group + here], src=data)
        for quadrant in range(4):
            nisa.dma_copy(
                dst=scale_out[QUADRANT_ROWS * quadrant : QUADRANT_ROWS * (quadrant + 1), :, group : group + here],
                src=scale[32 * quadrant : 32 * quadrant + QUADRANT_ROWS],
            )
    return data_out, scale_out
