"""What the matmul kernels share: PSUM banks, rows spread over partitions, activations quantized to MX.

Dimensions
    m   tokens of one tile, at most 128
    t   512-deep k tiles of the `mx-quads/1` layout (docs/layouts.md)
    p   partitions, 128
"""

import nki.isa as nisa
import nki.language as nl

PARTITIONS = 128
BANKS = 8  # PSUM banks of a partition
BANK = 512  # float32 of one bank
QUADRANT_ROWS = 16  # scale rows of a quadrant: four k tiles of four groups
HIGH_BITS = 0xFFF0  # sign, exponent and the upper three mantissa bits of a bfloat16: what float8_e4m3fn holds


def ceil_div(a, b):
    """a / b rounded up."""
    return (a + b - 1) // b


def psum_banks():
    """All eight banks as [128, 512] float32 tiles. A kernel takes them in turn: TensorE fills one while another drains."""
    banks = []
    for _ in range(BANKS):
        banks.append(nl.ndarray((PARTITIONS, BANK), nl.float32, buffer=nl.psum))
    return banks


def clear(tile):
    """Zeros, by GpSimd: the other engines have a queue of work that the next DMA would wait for."""
    nisa.memset(dst=tile, value=0.0, engine=nisa.engine.gpsimd)


def column_block(row_tiles, column_bytes, budget):
    """Columns of w worked on together: four PSUM banks, or fewer if weights that stay for many row tiles would not fit.

    `column_bytes` are the bytes of one column in one partition, over all of k; `budget` is what weights may take.
    """
    if row_tiles == 1:
        return 4 * BANK
    for columns in (4 * BANK, 2 * BANK, BANK, BANK // 2):
        if columns * column_bytes <= budget:
            return columns
    return BANK // 4


def drain(turn):
    """The engine that empties PSUM this time: ScalarE and VectorE alternate, one alone would be slower than TensorE."""
    return nisa.engine.scalar if turn % 2 == 0 else nisa.engine.vector


def spread_row(row, start, n, rows, banks, turn):
    """Elements start..start+n of the HBM tensor `row` [1, C] in each of `rows` partitions, as float32; returns (tile, turn).

    DMA moves the row once instead of `rows` times.
    """
    line = nl.ndarray((1, n), row.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=line, src=row[0:1, start : start + n])
    return spread_line(line, rows, banks, turn)


def spread_line(line, rows, banks, turn):
    """The SBUF row `line` [1, n] in each of `rows` partitions, as float32; returns (tile, turn).

    By TensorE: ones.T @ line has one product in each sum, so it is exact.
    """
    n = line.shape[1]
    ones = nl.ndarray((1, rows), line.dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.gpsimd)
    tile = nl.ndarray((rows, n), nl.float32, buffer=nl.sbuf)
    for first in range(0, n, BANK):
        width = min(BANK, n - first)
        bank = banks[turn % BANKS]
        nisa.nc_matmul(
            dst=bank[0:rows, 0:width],
            stationary=ones,
            moving=line[0:1, first : first + width],
            is_stationary_onezero=True,
            accumulate=False,
        )
        nisa.tensor_copy(dst=tile[:, first : first + width], src=bank[0:rows, 0:width], engine=drain(turn))
        turn += 1
    return tile, turn


def evict(dst, acc, bias, turn):
    """dst = acc + bias, PSUM to SBUF; without bias the two engines that reach PSUM take turns."""
    if bias != None:  # noqa: E711  (NKI has no `is`)
        nisa.tensor_tensor(dst=dst, data1=acc, data2=bias, op=nl.add)
    else:
        nisa.tensor_copy(dst=dst, src=acc, engine=drain(turn))


def live_rows(tiles, s):
    """Scale rows of a quadrant that scale tile s uses: four for each of its k tiles."""
    return 4 * min(4, tiles - 4 * s)


def load_scales(scales, first, last, rows, start, n):
    """Scale bytes of `n` columns from `start` of scale tiles first..last: `mx-quads/1` [64, S, C] -> SBUF [128, last - first, n].

    The first `rows` rows of each quadrant are loaded; the others are never read.
    """
    out = nl.ndarray((PARTITIONS, last - first, n), nl.uint8, buffer=nl.sbuf)
    for quadrant in range(4):
        row = QUADRANT_ROWS * quadrant
        nisa.dma_copy(
            dst=out[32 * quadrant : 32 * quadrant + rows, :, :],
            src=scales[row : row + rows, first:last, start : start + n],
        )
    return out


def mx_terms(count, tiles, columns, kind):
    """SBUF of an MXFP8 operand in `count` terms: (data [128, T, columns] x4, scale [128, ceil(T / 4), columns] u8) of each."""
    terms = []
    for _ in range(count):
        data = nl.ndarray((PARTITIONS, tiles, columns), kind, buffer=nl.sbuf)
        scale = nl.ndarray((PARTITIONS, ceil_div(tiles, 4), columns), nl.uint8, buffer=nl.sbuf)
        terms.append((data, scale))
    return terms


def term_columns(terms, first, last):
    """Columns first..last of the terms."""
    part = []
    for data, scale in terms:
        part.append((data[:, :, first:last], scale[:, :, first:last]))
    return part


def split(values, count):
    """bf16 values [128, n] as `count` bf16 terms: themselves, or two of at most four significant bits each.

    high is the value without its last four mantissa bits and low the rest; neither rounds, so high + low is the value.
    float8_e4m3fn holds four bits. With e the exponent of the largest magnitude of a scale group, low's group has exponent
    e - 4 or less, and quantize_mx (exponent e - 7) keeps both terms of every element of at least 2^(e - 13) exactly; of a
    smaller one it loses at most 2^(e - 17) + 2^(e - 21). Under the `ocp` rule of the block scale (exponent e - 8) the limits
    are half of these, but a term of 1.875 times its group's power of two saturates (480 to 448) and loses a fifteenth.
    """
    if count == 1:
        return [values]
    high = nl.ndarray(values.shape, nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=high.view(nl.uint16), data=values.view(nl.uint16), op0=nl.bitwise_and, operand0=HIGH_BITS,
        engine=nisa.engine.vector,
    )  # fmt: skip
    low = nl.ndarray(values.shape, nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=low, data1=values, data2=high, op=nl.subtract, engine=nisa.engine.vector)
    return [high, low]


def quantize_tile(dst, scale, t, values):
    """k tile t of one term, dst [128, T, m] x4 and scale [128, ceil(T / 4), m], from values [128, 4 m]."""
    nisa.quantize_mx(dst=dst[:, t, :], src=values, dst_scale=scale[4 * (t % 4) :, t // 4, :])


def quantize_rows(rows, start_tile, terms, banks, turn):
    """MXFP8 of bf16 rows [m, 512 c] in SBUF, contraction on partitions; returns the next turn.

    `terms` holds one or two pairs (`mx_terms`); see `split` for what two give. The rows are k tiles start_tile..start_tile+c
    of data [128, T, m] x4 and scale [128, ceil(T / 4), m] u8 of each: element 512 t + 4 p + q of row i goes to lane q of
    data[p, t, i]. A bf16 pair moves through TensorE as one float32: stride 2 over
    pairs puts pair 0 and pair 1 of each quad on the same partition, so one k tile takes two transposes and no element is
    touched twice.
    """
    m = rows.shape[0]
    tiles = rows.shape[1] // 512
    pairs = rows.view(nl.float32)
    for first in range(0, tiles, 2):
        count = min(2, tiles - first)
        bank = banks[turn % BANKS]
        for i in range(count):
            start = 256 * (first + i)
            for half in range(2):
                nisa.nc_transpose(
                    dst=bank[:, 2 * m * i + half : 2 * m * (i + 1) : 2],
                    data=pairs[:, start + half : start + 256 : 2],
                    engine=nisa.engine.tensor,
                )
        quads = nl.ndarray((PARTITIONS, 2 * m * count), nl.float32, buffer=nl.sbuf)
        # ScalarE: VectorE has the quantization itself to do.
        nisa.tensor_copy(dst=quads, src=bank[:, 0 : 2 * m * count], engine=nisa.engine.scalar)
        parts = split(quads.view(nl.bfloat16), len(terms))
        for i in range(count):
            for j in range(len(terms)):
                data, scale = terms[j]
                quantize_tile(data, scale, start_tile + first + i, parts[j][:, 4 * m * i : 4 * m * (i + 1)])
        turn += 1
    return turn
