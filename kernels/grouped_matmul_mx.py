"""Experts of a mixture-of-experts layer in MX: clamped swiglu MLP with biases, as gpt-oss has it, Trainium3.

Dimensions
    X   rows of x (tokens), any
    Y   rows of y (token-expert pairs), any
    H   hidden size, a multiple of 32 up to 8192
    I   intermediate size, a multiple of 32 up to 8192
    E   experts
    B   blocks of rows, each for one expert
    R   rows of a block, 1..512, R * max(H, I) at most 2^21
    TH  512-deep tiles of H, ceil(H / 512); SH = ceil(TH / 4)
    TI  512-deep tiles of I, ceil(I / 512); SI = ceil(TI / 4)
    CH  columns of w_down after padding, CH >= H

Arguments
    x              [X, H] bfloat16
    take           [B, R] int32: the row of x in each slot; a slot whose index is X or more is empty
    put            [B, R] int32: the row of y that the slot's result goes to; Y or more for an empty slot
    block_expert   [1, B] int32: the expert of each block
    w_gate_up      [E, 128, TH, 1024 TI] x4 words, `mx-quads/1` with GateUp::Split and ColumnOrder::Quads: gate, then up
    s_gate_up      [E, 64, SH, 1024 TI] uint8
    b_gate_up      [E, 8 TI, 128] float32: the bias in the same column order
    w_down         [E, 128, TI, CH] x4 words, `mx-quads/1`
    s_down         [E, 64, SI, CH] uint8
    b_down         [E, CH] bfloat16
    rows_out       Y
    w_element      "e4m3fn", "e5m2" or "e2m1"; both weights
    limit          clamp of gate (from above) and up (both sides), more than 0
    x_terms        MXFP8 terms of x and of the product: 1 rounds them to four significant bits, 2 keeps all eight of bf16
    out            "f32" or "bf16"
Returns y [Y, H]: y[put] = (g * sigmoid(1.702 g) * (u + 1)) @ w_down + b_down, with gate, up = x[take] @ w_gate_up + b_gate_up,
g = min(gate, limit), u = clamp(up, -limit, limit). x and the product are quantized to MXFP8 e4m3fn on the way in, as one
term or as two that add up to the bf16 value (`split` in matmul_tiles.py). Every row of y must be the target of one slot. The caller makes the blocks from the router's expert offsets: expert e's rows in slices of R.
"""

import nki
import nki.isa as nisa
import nki.language as nl

from matmul_tiles import (
    BANK,
    BANKS,
    PARTITIONS,
    QUADRANT_ROWS,
    ceil_div,
    clear,
    column_block,
    evict,
    live_rows,
    mx_terms,
    psum_banks,
    quantize_rows,
    quantize_tile,
    split,
    spread_line,
    term_columns,
)

K_TILE = 512
LANES = 4
# Bytes of a partition given to one set of weights; the next set loads while it works.
WEIGHT_BYTES = 48 * 1024


def check_weights(name, data, scale, experts, tiles, columns, word):
    """Refuse weights or scales whose shape does not follow from H and I."""
    need = (experts, PARTITIONS, tiles, columns)
    assert tuple(data.shape) == need, f"w_{name}: got {data.shape}, need {need}"
    assert data.dtype == word, f"w_{name}: got {data.dtype} words, need {word}"
    need = (experts, 64, ceil_div(tiles, 4), columns)
    assert tuple(scale.shape) == need, f"s_{name}: got {scale.shape}, need {need}"
    assert scale.dtype == nl.uint8, f"s_{name}: got {scale.dtype}, need uint8"


def check(x, take, put, block_expert, w_gate_up, s_gate_up, b_gate_up, w_down, s_down, b_down, rows_out, inter, word):
    """Refuse shapes that do not belong together; returns (H, R, TI)."""
    assert nisa.get_nc_version() == nisa.nc_version.gen4, "target: need trn3 (MX instructions)"
    assert len(x.shape) == 2 and x.dtype == nl.bfloat16, f"x: got {x.shape} {x.dtype}, need [X, H] bfloat16"
    hidden = x.shape[1]
    assert hidden % 32 == 0 and hidden <= 8192, f"H: got {hidden}, need a multiple of 32 up to 8192"
    assert inter >= 32 and inter % 32 == 0 and inter <= 8192, f"I: got {inter}, need a multiple of 32 in 32..8192"
    assert len(take.shape) == 2 and take.dtype == nl.int32, f"take: got {take.shape} {take.dtype}, need [B, R] int32"
    blocks, slots = take.shape
    assert slots <= BANK, f"R: got {slots}, need at most {BANK}"
    deepest = max(hidden, inter)
    assert slots * deepest <= 2**21, f"R: got {slots}, need at most {2**21 // deepest} for H {hidden} and I {inter}"
    assert tuple(put.shape) == (blocks, slots) and put.dtype == nl.int32, (
        f"put: got {put.shape} {put.dtype}, need {take.shape} int32"
    )
    assert tuple(block_expert.shape) == (1, blocks), f"block_expert: got {block_expert.shape}, need (1, {blocks})"
    assert block_expert.dtype == nl.int32, f"block_expert: got {block_expert.dtype}, need int32"
    h_tiles = ceil_div(hidden, K_TILE)
    i_tiles = ceil_div(inter, K_TILE)
    experts = w_gate_up.shape[0]
    check_weights("gate_up", w_gate_up, s_gate_up, experts, h_tiles, 2 * K_TILE * i_tiles, word)
    columns = w_down.shape[3] if len(w_down.shape) == 4 else 0
    assert columns >= hidden, f"w_down: got {w_down.shape}, need at least {hidden} columns"
    check_weights("down", w_down, s_down, experts, i_tiles, columns, word)
    need = (experts, 8 * i_tiles, PARTITIONS)
    assert tuple(b_gate_up.shape) == need and b_gate_up.dtype == nl.float32, (
        f"b_gate_up: got {b_gate_up.shape} {b_gate_up.dtype}, need {need} float32"
    )
    need = (experts, columns)
    assert tuple(b_down.shape) == need and b_down.dtype == nl.bfloat16, (
        f"b_down: got {b_down.shape} {b_down.dtype}, need {need} bfloat16"
    )
    assert rows_out >= 1, f"rows_out: got {rows_out}, need at least 1"
    return hidden, slots, i_tiles


def of_expert(tensor, expert, start, pattern):
    """A view of one expert's part of a stacked tensor: `pattern` from element `start`, the expert known at run time."""
    return tensor.ap(pattern, offset=start, scalar_offset=expert, indirect_dim=0)


def load_weights(w, kind, expert, t, start, n):
    """Columns start..start+n of k tile t of the expert, [128, n] x4."""
    tiles, columns = w.shape[2], w.shape[3]
    tile = nl.ndarray((PARTITIONS, n), kind, buffer=nl.sbuf)
    nisa.dma_copy(
        dst=tile, src=of_expert(w.view(kind), expert, t * columns + start, [[tiles * columns, PARTITIONS], [1, n]])
    )
    return tile


def load_scales(scales, expert, s, rows, start, n):
    """Scale bytes of up to four k tiles: [128, n], the first `rows` rows of each quadrant."""
    depth, columns = scales.shape[2], scales.shape[3]
    tile = nl.ndarray((PARTITIONS, n), nl.uint8, buffer=nl.sbuf)
    for quadrant in range(4):
        first = QUADRANT_ROWS * quadrant * depth * columns + s * columns + start
        nisa.dma_copy(
            dst=tile[32 * quadrant : 32 * quadrant + rows, :],
            src=of_expert(scales, expert, first, [[depth * columns, rows], [1, n]]),
        )
    return tile


def load_slots(index):
    """Row numbers of all slots: for each 128 slots of a block a [m, B] tile, whose column b is block b's."""
    blocks, slots = index.shape
    tiles = []
    for first in range(0, slots, PARTITIONS):
        m = min(PARTITIONS, slots - first)
        tile = nl.ndarray((m, blocks), nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=index.ap([[1, m], [slots, blocks]], offset=first))
        tiles.append(tile)
    return tiles


def gather(x, take, block, slots):
    """The block's rows of x, [m, 512 TH] bfloat16 for each 128 slots; `slots` is even. An empty slot stays zero."""
    hidden = x.shape[1]
    width = K_TILE * ceil_div(hidden, K_TILE)
    tiles = []
    for first in range(0, slots, PARTITIONS):
        index = take[first // PARTITIONS][:, block : block + 1]
        real = index.shape[0]
        rows = nl.ndarray((min(PARTITIONS, slots - first), width), nl.bfloat16, buffer=nl.sbuf)
        clear(rows)
        nisa.dma_copy(
            dst=rows[0:real, 0:hidden],
            src=x.ap([[hidden, real], [1, hidden]], offset=0, vector_offset=index),
            oob_mode=nisa.oob_mode.skip,
        )
        tiles.append(rows)
    return tiles


def quantize_block(tiles, slots, x_terms, banks, turn):
    """Gathered rows as MXFP8 with k on partitions: (terms of [128, TH, slots], turn)."""
    terms = mx_terms(x_terms, tiles[0].shape[1] // K_TILE, slots, nl.float8_e4m3fn_x4)
    for i in range(len(tiles)):
        first = PARTITIONS * i
        last = first + tiles[i].shape[0]
        turn = quantize_rows(tiles[i], 0, term_columns(terms, first, last), banks, turn)
    return terms, turn


def load_gate_up_bias(bias, expert, i_tiles, banks, turn):
    """The expert's gate and up bias with channels on partitions, up plus 1: [128, 8 TI] float32; returns (tile, turn).

    Row 4 t + q of the HBM tensor is what the PSUM tile of (t, q) needs in its partitions: one transpose brings them there.
    """
    tile = nl.ndarray((PARTITIONS, 8 * i_tiles), nl.float32, buffer=nl.sbuf)
    for first in range(0, 8 * i_tiles, PARTITIONS):
        count = min(PARTITIONS, 8 * i_tiles - first)
        rows = nl.ndarray((count, PARTITIONS), nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows, src=of_expert(bias, expert, PARTITIONS * first, [[PARTITIONS, count], [1, PARTITIONS]]))
        bank = banks[turn % BANKS]
        nisa.nc_transpose(dst=bank[:, 0:count], data=rows, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=tile[:, first : first + count], src=bank[:, 0:count], engine=nisa.engine.scalar)
        turn += 1
    half = 4 * i_tiles
    nisa.tensor_scalar(dst=tile[:, half : 2 * half], data=tile[:, half : 2 * half], op0=nl.add, operand0=1.0)
    return tile, turn


def load_columns(w, s, kind, expert, start, n):
    """Columns start..start+n of the expert over all of k: (weights of each k tile, scales of each four)."""
    weights = []
    scales = []
    for t in range(w.shape[2]):
        if t % 4 == 0:
            scales.append(load_scales(s, expert, t // 4, live_rows(w.shape[2], t // 4), start, n))
        weights.append(load_weights(w, kind, expert, t, start, n))
    return weights, scales


def product(dst, loaded, column, terms):
    """dst [128, slots] = 128 columns of w, transposed, times the block's rows: weights stationary, rows moving.

    The terms of a row meet the same weights one after the other and add up in the same bank.
    """
    weights, weight_scales = loaded
    tiles = len(weights)
    for t in range(tiles):
        for j in range(len(terms)):
            data, scale = terms[j]
            nisa.nc_matmul_mx(
                dst=dst,
                stationary=weights[t][:, column : column + PARTITIONS],
                moving=data[:, t, :],
                stationary_scale=weight_scales[t // 4][4 * (t % 4) :, column : column + PARTITIONS],
                moving_scale=scale[4 * (t % 4) :, t // 4, :],
                accumulate=(t + j > 0),
            )


def swiglu(dst, gate, up, gate_bias, up_bias, limit):
    """dst = g sigmoid(1.702 g) (u + 1) from PSUM; up_bias has the 1 in it, so its clamp moves up by 1.

    Three VectorE passes and one of ScalarE, whose gelu_apprx_sigmoid is x sigmoid(1.702 x).
    """
    shape = gate.shape
    g = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=g, data=gate, op0=nl.add, operand0=gate_bias, op1=nl.minimum, operand1=limit)
    activated = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=activated, op=nl.gelu_apprx_sigmoid, data=g)
    u = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=u, data=up, op0=nl.add, operand0=up_bias, op1=nl.minimum, operand1=limit + 1.0)
    nisa.scalar_tensor_tensor(
        dst=dst, data=u, op0=nl.maximum, operand0=1.0 - limit, op1=nl.multiply, operand1=activated
    )


def expert_inner(w, s, bias, kind, expert, word_bytes, terms, limit, inner, banks, turn):
    """Gate and up of the block, swiglu, requantized into `inner`, terms of [128, TI, slots]; returns the next turn.

    Column order Quads puts channel 512 t + 4 p + q of both halves in partition p of product (t, q): the four results, written
    side by side, are the source of quantize_mx for the down projection. Nothing is transposed.
    """
    _, i_tiles, slots = inner[0][0].shape
    # Tiles of I whose weights load together: one would make runs of 1 KiB a partition with MXFP4.
    together = max(1, min(LANES, WEIGHT_BYTES // (2 * K_TILE * w.shape[2] * word_bytes)))
    for t in range(i_tiles):
        if t % together == 0:
            width = K_TILE * min(together, i_tiles - t)
            gate_weights = load_columns(w, s, kind, expert, K_TILE * t, width)
            up_weights = load_columns(w, s, kind, expert, K_TILE * (i_tiles + t), width)
        quads = nl.ndarray((PARTITIONS, slots, LANES), nl.bfloat16, buffer=nl.sbuf)
        for q in range(LANES):
            gate = banks[turn % BANKS][:, 0:slots]
            up = banks[(turn + 1) % BANKS][:, 0:slots]
            turn += 2
            column = K_TILE * (t % together) + PARTITIONS * q
            product(gate, gate_weights, column, terms)
            product(up, up_weights, column, terms)
            at = LANES * t + q
            up_at = LANES * i_tiles + at
            swiglu(quads[:, :, q], gate, up, bias[:, at : at + 1], bias[:, up_at : up_at + 1], limit)
        parts = split(quads.reshape((PARTITIONS, slots * LANES)), len(inner))
        for j in range(len(inner)):
            inner_data, inner_scale = inner[j]
            quantize_tile(inner_data, inner_scale, t, parts[j])
    return turn


def expert_down(w, s, bias, kind, expert, word_bytes, inner, put, block, y, banks, turn):
    """y[put] = inner @ w_down + bias; returns the next turn. Weights move, so rows of y come out contiguous."""
    columns = w.shape[3]
    hidden = y.shape[1]
    _, i_tiles, slots = inner[0][0].shape
    step = column_block(ceil_div(slots, PARTITIONS), i_tiles * word_bytes, WEIGHT_BYTES)
    for start in range(0, hidden, step):
        width = min(step, hidden - start)
        line = nl.ndarray((1, width), nl.bfloat16, buffer=nl.sbuf)
        nisa.dma_copy(dst=line, src=of_expert(bias, expert, start, [[columns, 1], [1, width]]))
        column_bias, turn = spread_line(line, min(PARTITIONS, slots), banks, turn)
        weights = []
        weight_scales = []
        for first in range(0, slots, PARTITIONS):
            m = min(PARTITIONS, slots - first)
            index = put[first // PARTITIONS][:, block : block + 1]
            real = index.shape[0]
            first_bank = turn
            for t in range(i_tiles):
                if first == 0:
                    if t % 4 == 0:
                        weight_scales.append(load_scales(s, expert, t // 4, live_rows(i_tiles, t // 4), start, width))
                    weights.append(load_weights(w, kind, expert, t, start, width))
                for j in range(len(inner)):
                    inner_data, inner_scale = inner[j]
                    for i in range(ceil_div(width, BANK)):
                        part = min(BANK, width - BANK * i)
                        nisa.nc_matmul_mx(
                            dst=banks[(first_bank + i) % BANKS][0:m, 0:part],
                            stationary=inner_data[:, t, first : first + m],
                            moving=weights[t][:, BANK * i : BANK * i + part],
                            stationary_scale=inner_scale[4 * (t % 4) :, t // 4, first : first + m],
                            moving_scale=weight_scales[t // 4][4 * (t % 4) :, BANK * i : BANK * i + part],
                            accumulate=(t + j > 0),
                        )
            result = nl.ndarray((real, width), y.dtype, buffer=nl.sbuf)
            for i in range(ceil_div(width, BANK)):
                at = BANK * i
                part = min(BANK, width - at)
                acc = banks[(first_bank + i) % BANKS][0:real, 0:part]
                evict(result[:, at : at + part], acc, column_bias[0:real, at : at + part], turn)
                turn += 1
            nisa.dma_copy(
                dst=y.ap([[hidden, real], [1, width]], offset=start, vector_offset=index),
                src=result,
                oob_mode=nisa.oob_mode.skip,
            )
    return turn


@nki.jit
def grouped_matmul_mx(
    x,
    take,
    put,
    block_expert,
    w_gate_up,
    s_gate_up,
    b_gate_up,
    w_down,
    s_down,
    b_down,
    rows_out,
    intermediate,
    w_element="e2m1",
    limit=7.0,
    out="bf16",
    x_terms=1,
):
    """The experts' MLPs on blocks of gathered rows; see the module's docstring."""
    assert w_element in ("e4m3fn", "e5m2", "e2m1"), f"w_element: got {w_element}, need e4m3fn, e5m2 or e2m1"
    assert out in ("f32", "bf16"), f"out: got {out}, need f32 or bf16"
    assert limit > 0.0, f"limit: got {limit}, need more than 0"
    assert x_terms in (1, 2), f"x_terms: got {x_terms}, need 1 or 2"
    kind = nl.float8_e4m3fn_x4
    word = nl.uint32
    if w_element == "e2m1":
        kind = nl.float4_e2m1fn_x4
        word = nl.uint16
    elif w_element == "e5m2":
        kind = nl.float8_e5m2_x4
    hidden, slots, i_tiles = check(
        x,
        take,
        put,
        block_expert,
        w_gate_up,
        s_gate_up,
        b_gate_up,
        w_down,
        s_down,
        b_down,
        rows_out,
        intermediate,
        word,
    )
    slots += slots % 2  # a stationary MX operand has an even number of columns; the last slot of an odd block is zero
    y = nl.ndarray((rows_out, hidden), nl.float32 if out == "f32" else nl.bfloat16, buffer=nl.shared_hbm)
    banks = psum_banks()
    turn = 0
    word_bytes = 2 if word == nl.uint16 else 4
    blocks = take.shape[0]
    experts = nl.ndarray((1, blocks), nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=experts, src=block_expert)
    take_rows = load_slots(take)
    put_rows = load_slots(put)
    rows = gather(x, take_rows, 0, slots)
    terms, turn = quantize_block(rows, slots, x_terms, banks, turn)
    for block in range(blocks):
        expert = experts[0:1, block : block + 1]
        bias, turn = load_gate_up_bias(b_gate_up, expert, i_tiles, banks, turn)
        if block + 1 < blocks:
            rows = gather(x, take_rows, block + 1, slots)
        inner = mx_terms(x_terms, i_tiles, slots, nl.float8_e4m3fn_x4)
        turn = expert_inner(w_gate_up, s_gate_up, bias, kind, expert, word_bytes, terms, limit, inner, banks, turn)
        # The next block's rows are ready by now; TensorE turns them before the down projection, which then hides the rest.
        if block + 1 < blocks:
            terms, turn = quantize_block(rows, slots, x_terms, banks, turn)
        turn = expert_down(w_down, s_down, b_down, kind, expert, word_bytes, inner, put_rows, block, y, banks, turn)
    return y
