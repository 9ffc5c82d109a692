"""MX matmul: y = x @ w + bias with MXFP4 or MXFP8 weights, Trainium3.

Dimensions
    M   rows of x and y (tokens), any
    K   contraction, a multiple of 32 up to 65536; padded with zeros to 512 T
    N   columns of y (output channels), any
    T   512-deep k tiles, ceil(K / 512)
    S   scale tiles, ceil(T / 4)
    C   columns of w after padding, C >= N
    R   columns of a packed x, a multiple of 2, R >= M

Arguments
    x        [M, K] bfloat16, quantized on the device (MXFP8 in `x_element`); or packed like w: [128, T, R] uint32 / uint16
    w        [128, T, C] x4 words in layout `mx-quads/1` (docs/layouts.md): uint32 for MXFP8, uint16 for MXFP4
    w_scale  [64, S, C] uint8
    x_scale  None for bfloat16 x, else [64, S, R] uint8
    bias     None or [1, C], float32 or bfloat16
    m, n     M of a packed x and N; None for R and C
    w_element, x_element  "e4m3fn", "e5m2" or "e2m1"
    x_terms  MXFP8 terms of a bfloat16 x: 1 rounds it, 2 (e4m3fn) keeps all its bits (`split` in matmul_tiles.py)
    out      "f32" or "bf16"
Returns y [M, N], summed in float32.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from matmul_tiles import (
    BANK,
    BANKS,
    PARTITIONS,
    ceil_div,
    clear,
    column_block,
    evict,
    live_rows,
    load_scales,
    mx_terms,
    psum_banks,
    quantize_rows,
    spread_row,
)

# Bytes of a partition given to weights (twice: the next column block loads while this one works) and to activations.
WEIGHT_BYTES = 64 * 1024
ROW_BYTES = 72 * 1024
PIECE = 8  # k tiles of bfloat16 x loaded by one DMA: 8 KiB a row
STREAM_AHEAD = 4  # k tiles in flight when a weight is used once


def x4_type(element, words, role):
    """The dtype of the x4 words of an operand."""
    assert element in ("e4m3fn", "e5m2", "e2m1"), f"{role}_element: got {element}, need e4m3fn, e5m2 or e2m1"
    if element == "e2m1":
        assert words == nl.uint16, f"{role}_element: got e2m1 and {words} words, need uint16"
        return nl.float4_e2m1fn_x4
    assert words == nl.uint32, f"{role}_element: got {element} and {words} words, need uint32"
    return nl.float8_e4m3fn_x4 if element == "e4m3fn" else nl.float8_e5m2_x4


def check_packed(role, data, scale):
    """Refuse an operand that is not in `mx-quads/1`; returns its k tiles and columns."""
    assert len(data.shape) == 3 and data.shape[0] == PARTITIONS, f"{role}: got {data.shape}, need [128, T, columns]"
    tiles, columns = data.shape[1], data.shape[2]
    need = (64, ceil_div(tiles, 4), columns)
    assert scale != None, f"{role}_scale: got none, need {need} uint8"  # noqa: E711
    assert scale.dtype == nl.uint8, f"{role}_scale: got {scale.dtype}, need uint8"
    assert tuple(scale.shape) == need, f"{role}_scale: got {scale.shape}, need {need}"
    assert tiles <= 128, f"K: got {512 * tiles} after padding, need at most 65536"
    return tiles, columns


def check(x, w, w_scale, x_scale, bias, m, n):
    """Refuse shapes that do not belong together; returns (M, N, T)."""
    assert nisa.get_nc_version() == nisa.nc_version.gen4, "target: need trn3 (MX instructions)"
    tiles, columns = check_packed("w", w, w_scale)
    n = columns if n == None else n  # noqa: E711
    assert 1 <= n <= columns, f"n: got {n}, need 1..{columns}, the columns of w"
    if bias != None:  # noqa: E711
        assert tuple(bias.shape) == (1, columns), f"bias: got {bias.shape}, need (1, {columns})"
        assert bias.dtype in (nl.float32, nl.bfloat16), f"bias: got {bias.dtype}, need float32 or bfloat16"
    if x.dtype == nl.bfloat16:
        assert len(x.shape) == 2, f"x: got {x.shape}, need [M, K]"
        assert x_scale == None, "x_scale: got one, need none with bfloat16 x"  # noqa: E711
        assert m == None or m == x.shape[0], f"m: got {m}, need {x.shape[0]}, the rows of x"  # noqa: E711
        k = x.shape[1]
        assert k % 32 == 0, f"K: got {k}, need a multiple of 32 (one scale group)"
        assert ceil_div(k, 512) == tiles, f"w: got {tiles} k tiles of 512, K {k} needs {ceil_div(k, 512)}"
        return x.shape[0], n, tiles
    x_tiles, rows = check_packed("x", x, x_scale)
    assert x_tiles == tiles, f"x: got {x_tiles} k tiles, need {tiles} as in w"
    assert rows % 2 == 0, f"x: got {rows} columns, need an even number"
    m = rows if m == None else m  # noqa: E711
    assert 1 <= m <= rows, f"m: got {m}, need 1..{rows}, the columns of x"
    return m, n, tiles


def quantized_rows(x, kind, x_terms, row, m, tiles, banks, turn):
    """Rows row..row+m of bf16 x as MXFP8; returns (terms, turn). An odd m gets one more row of zeros."""
    even = m + m % 2
    k = x.shape[1]
    terms = mx_terms(x_terms, tiles, even, kind)
    for first in range(0, tiles, PIECE):
        width = 512 * min(PIECE, tiles - first)
        have = min(width, k - 512 * first)
        rows = nl.ndarray((even, width), nl.bfloat16, buffer=nl.sbuf)
        if even > m:
            clear(rows)
        elif have < width:
            clear(rows[:, have:width])
        nisa.dma_copy(dst=rows[0:m, 0:have], src=x[row : row + m, 512 * first : 512 * first + have])
        turn = quantize_rows(rows, first, terms, banks, turn)
    return terms, turn


def packed_rows(x, kind, x_scale, row, m):
    """Columns row..row+m of a packed x, one more if m is odd: one term."""
    even = m + m % 2
    data = nl.ndarray((PARTITIONS, x.shape[1], even), kind, buffer=nl.sbuf)
    nisa.dma_copy(dst=data, src=x.view(kind)[:, :, row : row + even])
    return [(data, load_scales(x_scale, 0, x_scale.shape[1], live_rows(x.shape[1], 0), row, even))]


def load_weights(w, kind, t, start, n):
    """Columns start..start+n of k tile t, [128, n] x4."""
    tile = nl.ndarray((PARTITIONS, n), kind, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=w.view(kind)[:, t, start : start + n])
    return tile


@nki.jit
def matmul_mx(
    x,
    w,
    w_scale,
    x_scale=None,
    bias=None,
    m=None,
    n=None,
    w_element="e2m1",
    x_element="e4m3fn",
    out="bf16",
    x_terms=1,
):
    """y = x @ w + bias; see the module's docstring."""
    m_all, n_all, tiles = check(x, w, w_scale, x_scale, bias, m, n)
    assert out in ("f32", "bf16"), f"out: got {out}, need f32 or bf16"
    on_device = x.dtype == nl.bfloat16
    w_kind = x4_type(w_element, w.dtype, "w")
    assert not (on_device and x_element == "e2m1"), (
        "x_element: got e2m1 with bfloat16 x, need e4m3fn or e5m2 (what the device quantizes to)"
    )
    assert x_terms == 1 or (x_terms == 2 and on_device and x_element == "e4m3fn"), (
        f"x_terms: got {x_terms}, need 1, or 2 with bfloat16 x and e4m3fn"
    )
    x_kind = x4_type(x_element, nl.uint32 if on_device else x.dtype, "x")
    kind = nl.float32 if out == "f32" else nl.bfloat16
    y = nl.ndarray((m_all, n_all), kind, buffer=nl.shared_hbm)
    banks = psum_banks()
    turn = 0
    word = 2 if w_element == "e2m1" else 4
    resident = max(1, ROW_BYTES // (tiles * PARTITIONS * 5 * x_terms))
    group = min(ceil_div(m_all, PARTITIONS), resident) * PARTITIONS
    for group_row in range(0, m_all, group):
        row_tiles = ceil_div(min(group, m_all - group_row), PARTITIONS)
        step = column_block(row_tiles, tiles * word, WEIGHT_BYTES)
        ahead = STREAM_AHEAD if row_tiles == 1 else tiles
        spread_rows = min(PARTITIONS, m_all - group_row)
        blocks = ceil_div(n_all, step)
        weights = []
        scales = []
        rows = []
        for number in range(blocks):
            start = step * number
            width = min(step, n_all - start)
            column_bias = None
            if bias != None:  # noqa: E711
                column_bias, turn = spread_row(bias, start, width, spread_rows, banks, turn)
            for r in range(row_tiles):
                # The next row tile is prepared before this one is multiplied, so TensorE does not wait for it.
                while number == 0 and len(rows) < min(r + 2, row_tiles):
                    row = group_row + PARTITIONS * len(rows)
                    count = min(PARTITIONS, m_all - row)
                    if on_device:
                        terms, turn = quantized_rows(x, x_kind, x_terms, row, count, tiles, banks, turn)
                    else:
                        terms = packed_rows(x, x_kind, x_scale, row, count)
                    rows.append(terms)
                row = group_row + PARTITIONS * r
                count = min(PARTITIONS, m_all - row)
                even = count + count % 2
                first_bank = turn
                for t in range(tiles):
                    # Loads run ahead of use: by a whole column block if weights stay for many row tiles.
                    while r == 0 and len(weights) < min(number * tiles + t + 1 + ahead, blocks * tiles):
                        later = step * (len(weights) // tiles)
                        next_tile = len(weights) % tiles
                        columns = min(step, n_all - later)
                        if next_tile % 4 == 0:
                            s = next_tile // 4
                            scales.append(load_scales(w_scale, s, s + 1, live_rows(tiles, s), later, columns))
                        weights.append(load_weights(w, w_kind, next_tile, later, columns))
                    tile = weights[number * tiles + t]
                    tile_scale = scales[number * ceil_div(tiles, 4) + t // 4]
                    # One stationary load serves the whole column block; both terms of x meet the same weights.
                    for j in range(x_terms):
                        data, scale = rows[r][j]
                        for i in range(ceil_div(width, BANK)):
                            part = min(BANK, width - BANK * i)
                            nisa.nc_matmul_mx(
                                dst=banks[(first_bank + i) % BANKS][0:even, 0:part],
                                stationary=data[:, t, :],
                                moving=tile[:, BANK * i : BANK * i + part],
                                stationary_scale=scale[4 * (t % 4) :, t // 4, :],
                                moving_scale=tile_scale[4 * (t % 4) :, 0, BANK * i : BANK * i + part],
                                accumulate=(t + j > 0),
                            )
                result = nl.ndarray((count, width), kind, buffer=nl.sbuf)
                for i in range(ceil_div(width, BANK)):
                    at = BANK * i
                    part = min(BANK, width - at)
                    by_bias = None if column_bias == None else column_bias[0:count, at : at + part]  # noqa: E711
                    evict(result[:, at : at + part], banks[(first_bank + i) % BANKS][0:count, 0:part], by_bias, turn)
                    turn += 1
                nisa.dma_copy(dst=y[row : row + count, start : start + width], src=result)
    return y
