"""FP8 matmul with float32 scales: y = activation((x @ w) * scales + bias), Trainium2 and Trainium3.

Dimensions
    M   rows of x and y (tokens), any
    K   contraction, any up to 65536; padded with zeros to 128 H
    N   columns of y (output channels), any
    H   128-deep half chunks of k, ceil(K / 128); two make one double-row chunk
    C   columns of w after padding, C >= N
    B   128-wide column blocks, ceil(N / 128)

Arguments
    x        [M, K] uint8: FP8 codes, row-major
    w        [128, H, C] uint8: FP8 codes in layout `rows-128/1` (docs/layouts.md)
    x_scale  float32 [1, 1], [M, 1], or with blocks [M, H]
    w_scale  float32 [1, 1], [1, C], or with blocks [B, H]
    bias     None or [1, C], float32 or bfloat16
    n        N; None for C
    x_element, w_element  "e4m3" (IEEE, max 240; both targets), "e4m3fn" (OCP, max 448; Trainium3) or "e5m2"
    blocks   True: x_scale and w_scale belong to 1 x 128 and 128 x 128 blocks
    activation  "none", "relu", "silu" or "gelu" (tanh form)
    out      "f32" or "bf16"
Returns y [M, N]. value = code x scale for both operands.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from matmul_tiles import BANK, BANKS, PARTITIONS, ceil_div, clear, column_block, drain, psum_banks, spread_row

# Bytes of a partition given to weights (twice: the next column block loads while this one works) and to activations.
WEIGHT_BYTES = 64 * 1024
ROW_BYTES = 40 * 1024
PIECE = 2048  # k loaded by one DMA: 2 KiB of codes a row
STREAM_AHEAD = 4  # chunks in flight when a weight is used once


def fp8_type(element, role):
    """The dtype of an operand's codes; refuses what the target does not have."""
    gen = nisa.get_nc_version()
    assert gen != nisa.nc_version.gen2, "target: got trn1, need trn2 or trn3 (double-row FP8)"
    assert element in ("e4m3", "e4m3fn", "e5m2"), f"{role}_element: got {element}, need e4m3, e4m3fn or e5m2"
    if element == "e4m3fn":
        assert gen == nisa.nc_version.gen4, f"{role}_element: e4m3fn needs trn3; halve the codes to e4m3 for trn2"
        return nl.float8_e4m3fn
    return nl.float8_e4m3 if element == "e4m3" else nl.float8_e5m2


def check(x, w, x_scale, w_scale, bias, n, blocks):
    """Refuse shapes that do not belong together; returns (M, K, N, H)."""
    assert len(x.shape) == 2 and x.dtype == nl.uint8, f"x: got {x.shape} {x.dtype}, need [M, K] uint8"
    assert len(w.shape) == 3 and w.dtype == nl.uint8, f"w: got {w.shape} {w.dtype}, need [128, H, C] uint8"
    m, k = x.shape
    halves = ceil_div(k, PARTITIONS)
    assert k <= 65536, f"K: got {k}, need at most 65536"
    assert w.shape[0] == PARTITIONS and w.shape[1] == halves, f"w: got {w.shape}, need [128, {halves}, C] for K {k}"
    columns = w.shape[2]
    n = columns if n == None else n  # noqa: E711  (NKI has no `is`)
    assert 1 <= n <= columns, f"n: got {n}, need 1..{columns}, the columns of w"
    wide = ceil_div(n, PARTITIONS)
    x_shapes = ((m, halves),) if blocks else ((1, 1), (m, 1))
    w_shapes = ((wide, halves),) if blocks else ((1, 1), (1, columns))
    assert x_scale.dtype == nl.float32, f"x_scale: got {x_scale.dtype}, need float32"
    assert w_scale.dtype == nl.float32, f"w_scale: got {w_scale.dtype}, need float32"
    assert tuple(x_scale.shape) in x_shapes, f"x_scale: got {x_scale.shape}, need one of {x_shapes}"
    assert tuple(w_scale.shape) in w_shapes, f"w_scale: got {w_scale.shape}, need one of {w_shapes}"
    if bias != None:  # noqa: E711
        assert tuple(bias.shape) == (1, columns), f"bias: got {bias.shape}, need (1, {columns})"
        assert bias.dtype in (nl.float32, nl.bfloat16), f"bias: got {bias.dtype}, need float32 or bfloat16"
    return m, k, n, halves


def load_rows(x, fp8, row, m, k, halves, banks, turn):
    """Rows row..row+m of x with k on partitions: [128, H, m] codes; returns (tile, turn).

    The DMA widens codes to bf16 on the way (exact), because TensorE transposes 16-bit elements; the copy out of PSUM
    narrows them again (exact).
    """
    tile = nl.ndarray((PARTITIONS, halves, m), fp8, buffer=nl.sbuf)
    codes = x.view(fp8)
    for start in range(0, PARTITIONS * halves, PIECE):
        width = min(PIECE, PARTITIONS * halves - start)
        have = min(PIECE, k - start)
        rows = nl.ndarray((m, width), nl.bfloat16, buffer=nl.sbuf)
        if have < width:
            clear(rows[:, have:width])
        nisa.dma_copy(dst=rows[:, 0:have], src=codes[row : row + m, start : start + have])
        per_bank = 2 * BANK // PARTITIONS
        for first in range(0, width // PARTITIONS, per_bank):
            count = min(per_bank, width // PARTITIONS - first)
            bank = banks[turn % BANKS].view(nl.bfloat16)
            for i in range(count):
                column = PARTITIONS * (first + i)
                nisa.nc_transpose(
                    dst=bank[:, m * i : m * (i + 1)],
                    data=rows[:, column : column + PARTITIONS],
                    engine=nisa.engine.tensor,
                )
            half = start // PARTITIONS + first
            nisa.tensor_copy(dst=tile[:, half : half + count, :], src=bank[:, 0 : m * count], engine=drain(turn))
            turn += 1
    return tile, turn


def load_weights(w, fp8, chunk, halves, start, n):
    """Columns start..start+n of one double-row chunk [128, 2, n]; of the last half chunk alone if H is odd."""
    count = min(2, halves - 2 * chunk)
    tile = nl.ndarray((PARTITIONS, count, n), fp8, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=w.view(fp8)[:, 2 * chunk : 2 * chunk + count, start : start + n])
    return tile


def multiply_chunk(dst, rows, chunk, weights, first, width):
    """dst (+)= one chunk: double-row if it is 256 deep, plain if 128."""
    if weights.shape[1] == 2:
        nisa.nc_matmul(
            dst=dst,
            stationary=rows[:, 2 * chunk : 2 * chunk + 2, :],
            moving=weights[:, :, first : first + width],
            accumulate=(chunk > 0),
            perf_mode=nisa.matmul_perf_mode.double_row,
        )
    else:
        nisa.nc_matmul(
            dst=dst,
            stationary=rows[:, 2 * chunk, :],
            moving=weights[:, 0, first : first + width],
            accumulate=(chunk > 0),
        )


def load_row_scale(x_scale, w_scale, row, m):
    """[m, 1] float32: the row's scale, times the weight's if that is one number."""
    scale = nl.ndarray((m, 1), nl.float32, buffer=nl.sbuf)
    if x_scale.shape[0] == 1:
        nisa.dma_copy(dst=scale, src=x_scale.ap([[0, m], [1, 1]], offset=0))
    else:
        nisa.dma_copy(dst=scale, src=x_scale[row : row + m, 0:1])
    if w_scale.shape[1] == 1:
        factor = nl.ndarray((m, 1), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=factor, src=w_scale.ap([[0, m], [1, 1]], offset=0))
        nisa.tensor_tensor(dst=scale, data1=scale, data2=factor, op=nl.multiply)
    return scale


def scaled(dst, acc, row_scale, column_scale, bias, op, turn):
    """dst = op(acc * row_scale * column_scale + bias), PSUM to SBUF, in as few passes as the operands allow.

    VectorE multiplies both scales in one pass, GpSimd adds the bias, ScalarE applies the activation: three engines on
    three tiles at once. Without column operands one pass does all, on the two engines that reach PSUM in turn.
    """
    m, n = acc.shape
    tile = acc
    if column_scale != None:  # noqa: E711
        last = bias == None and op == nl.copy  # noqa: E711
        tile = dst if last else nl.ndarray((m, n), nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            dst=tile, data=acc, op0=nl.multiply, operand0=row_scale, op1=nl.multiply, operand1=column_scale
        )
        if bias != None:  # noqa: E711
            total = dst if op == nl.copy else nl.ndarray((m, n), nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=total, data1=tile, data2=bias, op=nl.add, engine=nisa.engine.gpsimd)
            tile = total
    elif bias != None:  # noqa: E711
        tile = dst if op == nl.copy else nl.ndarray((m, n), nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(dst=tile, data=acc, op0=nl.multiply, operand0=row_scale, op1=nl.add, operand1=bias)
    elif op == nl.copy and turn % 2 == 1:
        nisa.tensor_scalar(dst=dst, data=acc, op0=nl.multiply, operand0=row_scale)
    else:
        nisa.activation(dst=dst, op=op, data=acc, scale=row_scale)
        return
    if op != nl.copy:
        nisa.activation(dst=dst, op=op, data=tile)


def block_factors(x_scale, spread, row, m, wide, halves):
    """[m, wide * H] float32: x_scale[row + i, h] * w_scale[b, h] at column b * H + h.

    `spread` has the w_scale of these column blocks in every partition.
    """
    scale = nl.ndarray((m, halves), nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=scale, src=x_scale[row : row + m, :])
    factors = nl.ndarray((m, wide * halves), nl.float32, buffer=nl.sbuf)
    for b in range(wide):
        here = factors[:, b * halves : (b + 1) * halves]
        nisa.tensor_tensor(dst=here, data1=spread[0:m, b * halves : (b + 1) * halves], data2=scale, op=nl.multiply)
    return factors


def add_block(total, part, factors, column, first, parity):
    """total = part * factor + total for one 128 x 128 block (without the sum if it is the first).

    Blocks alternate between VectorE, one fused pass, and ScalarE with GpSimd, a pass each.
    """
    m, n = part.shape
    factor = factors[:, column : column + 1]
    if first:
        nisa.activation(dst=total, op=nl.copy, data=part, scale=factor)
    elif parity == 0:
        nisa.scalar_tensor_tensor(dst=total, data=part, op0=nl.multiply, operand0=factor, op1=nl.add, operand1=total)
    else:
        term = nl.ndarray((m, n), nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=term, op=nl.copy, data=part, scale=factor)
        nisa.tensor_tensor(dst=total, data1=total, data2=term, op=nl.add, engine=nisa.engine.gpsimd)


def block_sums(total, rows, weights, chunk, factors, halves, banks, turn):
    """total [m, n] += one chunk of weights: each 128-deep half is a sum of its own, scaled as it leaves PSUM."""
    m, n = total.shape
    for j in range(weights.shape[1]):
        h = 2 * chunk + j
        for first in range(0, n, BANK):
            width = min(BANK, n - first)
            acc = banks[turn % BANKS][0:m, 0:width]
            nisa.nc_matmul(
                dst=acc, stationary=rows[:, h, :], moving=weights[:, j, first : first + width], accumulate=False
            )
            turn += 1
            for column in range(0, width, PARTITIONS):
                last = min(column + PARTITIONS, width)
                b = (first + column) // PARTITIONS
                add_block(
                    total[:, first + column : first + last], acc[:, column:last], factors, b * halves + h, h == 0, b % 2
                )
    return turn


@nki.jit
def matmul_fp8(
    x,
    w,
    x_scale,
    w_scale,
    bias=None,
    n=None,
    x_element="e4m3",
    w_element="e4m3",
    blocks=False,
    activation="none",
    out="bf16",
):
    """y = activation((x @ w) * scales + bias); see the module's docstring."""
    x_fp8 = fp8_type(x_element, "x")
    w_fp8 = fp8_type(w_element, "w")
    mixed = x_element != w_element and x_element != "e5m2" and w_element != "e5m2"
    assert not mixed, f"elements: got {x_element} and {w_element}; e4m3 and e4m3fn do not meet in one matmul"
    assert activation in ("none", "relu", "silu", "gelu"), (
        f"activation: got {activation}, need none, relu, silu or gelu"
    )
    assert out in ("f32", "bf16"), f"out: got {out}, need f32 or bf16"
    m_all, k, n_all, halves = check(x, w, x_scale, w_scale, bias, n, blocks)
    op = nl.copy
    if activation == "relu":
        op = nl.relu
    elif activation == "silu":
        op = nl.silu
    elif activation == "gelu":
        op = nl.gelu_apprx_tanh
    kind = nl.float32 if out == "f32" else nl.bfloat16
    y = nl.ndarray((m_all, n_all), kind, buffer=nl.shared_hbm)
    banks = psum_banks()
    turn = 0
    chunks = ceil_div(halves, 2)
    resident = max(1, ROW_BYTES // (halves * PARTITIONS))
    group = min(ceil_div(m_all, PARTITIONS), resident) * PARTITIONS
    for group_row in range(0, m_all, group):
        tiles = ceil_div(min(group, m_all - group_row), PARTITIONS)
        step = column_block(tiles, halves, WEIGHT_BYTES)
        ahead = STREAM_AHEAD if tiles == 1 else chunks
        spread_rows = min(PARTITIONS, m_all - group_row)
        total_loads = ceil_div(n_all, step) * chunks
        weights = []
        rows = []
        scales = []
        for number in range(ceil_div(n_all, step)):
            start = step * number
            width = min(step, n_all - start)
            column_scale = None
            column_bias = None
            spread = None
            if blocks:
                wide = ceil_div(width, PARTITIONS)
                flat = w_scale.reshape((1, w_scale.shape[0] * halves))
                spread, turn = spread_row(flat, start // PARTITIONS * halves, wide * halves, spread_rows, banks, turn)
            elif w_scale.shape[1] > 1:
                column_scale, turn = spread_row(w_scale, start, width, spread_rows, banks, turn)
            if bias != None:  # noqa: E711
                column_bias, turn = spread_row(bias, start, width, spread_rows, banks, turn)
            for t in range(tiles):
                # The next row tile is prepared before this one is multiplied, so TensorE does not wait for it.
                while number == 0 and len(rows) < min(t + 2, tiles):
                    row = group_row + PARTITIONS * len(rows)
                    tile, turn = load_rows(x, x_fp8, row, min(PARTITIONS, m_all - row), k, halves, banks, turn)
                    rows.append(tile)
                    if not blocks:
                        scales.append(load_row_scale(x_scale, w_scale, row, tile.shape[2]))
                row = group_row + PARTITIONS * t
                m = rows[t].shape[2]
                result = nl.ndarray((m, width), kind, buffer=nl.sbuf)
                if blocks:
                    factors = block_factors(x_scale, spread, row, m, wide, halves)
                    total = nl.ndarray((m, width), nl.float32, buffer=nl.sbuf)
                first_bank = turn
                for c in range(chunks):
                    # Loads run ahead of use: by a whole column block if weights stay for many row tiles.
                    while t == 0 and len(weights) < min(number * chunks + c + 1 + ahead, total_loads):
                        later = step * (len(weights) // chunks)
                        weights.append(
                            load_weights(w, w_fp8, len(weights) % chunks, halves, later, min(step, n_all - later))
                        )
                    tile = weights[number * chunks + c]
                    if blocks:
                        turn = block_sums(total, rows[t], tile, c, factors, halves, banks, turn)
                    else:
                        # One stationary load serves the whole column block.
                        for i in range(ceil_div(width, BANK)):
                            part = min(BANK, width - BANK * i)
                            acc = banks[(first_bank + i) % BANKS][0:m, 0:part]
                            multiply_chunk(acc, rows[t], c, tile, BANK * i, part)
                for i in range(ceil_div(width, BANK)):
                    at = BANK * i
                    part = min(BANK, width - at)
                    here = result[:, at : at + part]
                    if blocks:
                        finish_blocks(here, total[:, at : at + part], column_bias, at, op)
                    else:
                        acc = banks[(first_bank + i) % BANKS][0:m, 0:part]
                        by_column = None if column_scale == None else column_scale[0:m, at : at + part]  # noqa: E711
                        by_bias = None if column_bias == None else column_bias[0:m, at : at + part]  # noqa: E711
                        scaled(here, acc, scales[t], by_column, by_bias, op, turn)
                        turn += 1
                nisa.dma_copy(dst=y[row : row + m, start : start + width], src=result)
    return y


def finish_blocks(dst, total, bias, at, op):
    """dst = op(total + bias): ScalarE rounds and activates, GpSimd adds the bias; VectorE is the busy one here."""
    m, n = total.shape
    tile = total
    if bias != None:  # noqa: E711
        tile = dst if op == nl.copy else nl.ndarray((m, n), nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=tile, data1=total, data2=bias[0:m, at : at + n], op=nl.add, engine=nisa.engine.gpsimd)
        if op == nl.copy:
            return
    nisa.activation(dst=dst, op=op, data=tile)
