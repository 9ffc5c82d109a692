"""Attention of one new token for each sequence over a paged KV cache (Trn2, Trn3).

Dimensions
    B   sequences of the batch
    HQ  query heads (num_qo_heads), HKV kv heads (num_kv_heads), G = HQ / HKV query heads for each kv head
    D   head_dim
    N   pages of the cache (num_pages), S tokens of a page (page_size), M pages in a row of the block table (max_pages)
    W   window: keys that a query sees, itself included; 0 means all
    T   tokens in one row of a gather (T divides S); 128 rows make a context tile of 128 T tokens
    C   context tiles of one sequence

Tensors (HBM)
    q             [B, HQ, D]      bf16
    k_cache       [N, S, HKV, D]  bf16, float8_e4m3, float8_e4m3fn (Trn3) or float8_e5m2; value = code x k_scale
    v_cache       [N, S, HKV, D]  as k_cache; value = code x v_scale
    block_table   [B, M]          int32; entries at or past the context are not read, by convention -1
    context_lens  [B]             int32; keys of each sequence, the query's own included; 0 gives zeros (sinks None)
    sinks         [HQ]            f32 or None: one learned logit for each head; joins the softmax, has no value
    k_scale       [1]             f32, FP8 caches only; v_scale likewise
    out           [B, HQ, D]      bf16

out[b, h] = sum_j softmax_j(sm_scale * q[b, h] . K[j, h / G]) V[j, h / G], j in [max(0, len - W), len).

Keys lie on the partitions of the scores, so that all 128 lanes work on the softmax whatever G is, and probabilities come
out in the layout that PV contracts over. Gathered rows that hold no visible key are skipped: DMA time follows the real
lengths of a ragged batch. Every byte of the cache pages in use must be a finite number (a fresh pool is zeroed).
"""

import nki
import nki.isa as nisa
import nki.language as nl

P_MAX = 128
BANK = 512  # f32 elements of a PSUM bank
# Tiles that rotate. A key tile is free once it is transposed, a value tile only two tiles later, after PV: with these
# numbers two loads of each run ahead of the computation. The stores of results queue behind them.
LOADS_AHEAD = 2
KEY_TILES = LOADS_AHEAD + 1
VALUE_TILES = LOADS_AHEAD + 3
ROW_BYTES = 16384  # longest row of a gather: DMA saturates at 4 KiB, more only costs SBUF

# Raw scores (before sm_scale) are kept above FLOOR by the running maximum; a masked key is at MASK. Both are bf16 powers of
# two. c * (MASK - FLOOR) is far below exp's underflow for every c above 2^-40, so masked probabilities are exactly 0.
MASK = -(2.0**60)
FLOOR = -(2.0**50)
SKIP = 2.0**23  # added to a row id to push it out of range; ids below 2^22 stay exact in f32


def largest_divisor(n, limit):
    """Largest divisor of n that is at most limit (at least 1)."""
    best = 1
    for i in range(1, n + 1):
        if n % i == 0 and i <= limit:
            best = i
    return best


def tokens_of_row(page_size, heads, max_tokens, token_bytes):
    """T: tokens of one gathered row, 0 if no divisor of page_size serves.

    Scores of a tile fill at most one PSUM bank (T * HQ <= 512), the page's rows divide 128, and a tile is not larger than
    the longest context unless T = 1.
    """
    best = 0
    for t in range(1, page_size + 1):
        if page_size % t == 0 and P_MAX % (page_size // t) == 0 and t * heads <= BANK:
            if best == 0 or (P_MAX * t <= max_tokens and t * token_bytes <= ROW_BYTES):
                best = t
    return best


def is_fp8(dtype):
    """Whether a cache dtype is one byte wide."""
    return dtype == nl.float8_e4m3 or dtype == nl.float8_e4m3fn or dtype == nl.float8_e5m2


def block_mask(rows_per_head, heads, group, total):
    """[heads * rows_per_head, total] bf16: 1 where the row's head is the column's head, heads counted within a chunk."""
    rows = heads * rows_per_head
    ones = nl.ndarray((rows, total), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    if heads == 1:
        return ones
    half = nl.ndarray((rows, total), dtype=nl.bfloat16, buffer=nl.sbuf)
    mask = nl.ndarray((rows, total), dtype=nl.bfloat16, buffer=nl.sbuf)
    chunks = total // (heads * group)
    nisa.affine_select(
        dst=half, pattern=[[0, chunks], [-rows_per_head, heads], [0, group]], channel_multiplier=1, offset=0,
        on_true_tile=ones, on_false_value=0.0, cmp_op=nl.greater_equal,
    )  # fmt: skip
    nisa.affine_select(
        dst=mask, pattern=[[0, chunks], [rows_per_head, heads], [0, group]], channel_multiplier=-1, offset=rows_per_head - 1,
        on_true_tile=half, on_false_value=0.0, cmp_op=nl.greater_equal,
    )  # fmt: skip
    return mask


def load_column(src):
    """A [1] tensor as a [128, 1] column."""
    column = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=column, src=src.ap([[0, P_MAX], [1, 1]], offset=0))
    return column


def row_ids(block_table, lens, t, sub, tiles, window):
    """[128, B * C] int32: the row of the cache, seen as [N * S / T, T * HKV * D], that partition p of a tile gathers.

    Rows without a visible key get an id out of range, so that they are skipped, but row 0 in the first VALUE_TILES tiles:
    these find their buffers undefined and must fill them. `lens` is [128, B] f32, `sub` = S / T rows of a page.
    """
    batch, max_pages = block_table.shape
    pages = P_MAX // sub
    ids = nl.ndarray((P_MAX, batch * tiles), dtype=nl.int32, buffer=nl.sbuf)
    within = nl.ndarray((P_MAX, pages, sub), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=within, pattern=[[0, pages], [1, sub]])
    start = nl.ndarray((P_MAX, tiles), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=start, pattern=[[P_MAX * t, tiles]], channel_multiplier=t)
    step = max(1, P_MAX // tiles)
    for first in range(0, batch, step):
        count = min(step, batch - first)
        rows = count * tiles
        table = nl.ndarray((rows, pages), dtype=nl.int32, buffer=nl.sbuf)
        if max_pages % pages == 0:
            nisa.dma_copy(dst=table, src=block_table[first : first + count].reshape((rows, pages)))
        else:
            full = max_pages // pages
            nisa.memset(dst=table, value=-1)
            for i in range(count):
                if full > 0:
                    nisa.dma_copy(
                        dst=table[i * tiles : i * tiles + full],
                        src=block_table[first + i, 0 : full * pages].reshape((full, pages)),
                    )
                nisa.dma_copy(
                    dst=table[i * tiles + full, 0 : max_pages - full * pages],
                    src=block_table[first + i, full * pages : max_pages].reshape((1, max_pages - full * pages)),
                )
        wide = nl.ndarray((rows, pages, sub), dtype=nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            dst=wide, data=table.reshape((rows, pages, 1)).broadcast(2, sub), op0=nl.multiply, operand0=float(sub),
            op1=nl.add, operand1=within[:rows],
        )  # fmt: skip
        down = nl.ndarray((P_MAX, rows), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=down, data=wide)
        begin = start.reshape((P_MAX, 1, tiles)).broadcast(1, count)
        length = lens[:, first : first + count].reshape((P_MAX, count, 1)).broadcast(2, tiles)
        outside = nl.ndarray((P_MAX, count, tiles), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=outside, data1=begin, data2=length, op=nl.greater_equal)
        if window > 0:
            old = nl.ndarray((P_MAX, count, tiles), dtype=nl.float32, buffer=nl.sbuf)
            nisa.scalar_tensor_tensor(
                dst=old, data=begin, op0=nl.add, operand0=float(t + window), op1=nl.less_equal, operand1=length
            )
            nisa.tensor_tensor(dst=outside, data1=outside, data2=old, op=nl.add)
        flat = outside.reshape((P_MAX, rows))
        fill = max(0, min(rows, VALUE_TILES - first * tiles))
        if fill > 0:
            inside = nl.ndarray((P_MAX, fill), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=inside, data=flat[:, :fill], op0=nl.less, operand0=0.5)
            nisa.tensor_tensor(dst=ids[:, first * tiles : first * tiles + fill], data1=inside, data2=down[:, :fill], op=nl.multiply)
        if fill < rows:
            nisa.scalar_tensor_tensor(
                dst=ids[:, first * tiles + fill : first * tiles + rows], data=flat[:, fill:], op0=nl.multiply,
                operand0=SKIP, op1=nl.add, operand1=down[:, fill:],
            )  # fmt: skip
    return ids


def query_blocks(q_row, heads, words, elements, ident, mask):
    """The query of one sequence as moving operand of QK: one [heads * words, HQ] bf16 tile for each element of a word.

    Row (h, i) holds q[i * elements + e] in the columns of kv head h of every chunk, 0 in the others: one matmul serves the
    `heads` kv heads that lie above each other in a chunk of K.
    """
    hq = q_row.shape[0]
    lanes = q_row.reshape((hq, 1, words, elements)).broadcast(1, heads)
    out = []
    for e in range(elements):
        spread = nl.ndarray((heads * words, hq), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=spread, stationary=lanes[:, :, :, e], moving=ident[:hq, :hq], accumulate=False)
        block = nl.ndarray((heads * words, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=block, data1=spread, data2=mask, op=nl.multiply)
        out.append(block)
    return out


def transpose_keys(words, rows, chunk_rows, chunks, t):
    """K tile [rows, T, chunks * chunk_rows] of 16-bit words as [chunk_rows, T * chunks, rows]: eight transposes to a bank."""
    slots = t * chunks
    keys = nl.ndarray((chunk_rows, slots, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    for first in range(0, slots, 8):
        count = min(8, slots - first)
        bank = nl.ndarray((chunk_rows, 8, P_MAX), dtype=nl.bfloat16, buffer=nl.psum)
        for i in range(count):
            j, chunk = (first + i) // chunks, (first + i) % chunks
            nisa.nc_transpose(
                dst=bank[:, i, :rows], data=words[:rows, j, chunk * chunk_rows : (chunk + 1) * chunk_rows]
            )
        # VectorE has more to do than ScalarE elsewhere, but copies 16-bit words from PSUM twice as fast: two banks of three
        if (first // 8) % 3 == 2:
            copier = nisa.engine.scalar
        else:
            copier = nisa.engine.vector
        nisa.tensor_copy(dst=keys[:, first : first + count, :rows], src=bank[:, :count, :rows], engine=copier)
    return keys


@nki.jit
def attention_decode(
    q, k_cache, v_cache, block_table, context_lens, sinks=None, k_scale=None, v_scale=None, sm_scale=1.0, window=0
):
    """See the module's docstring; constraints are those of manifest.toml."""
    version = nisa.get_nc_version()
    assert version == nisa.nc_version.gen3 or version == nisa.nc_version.gen4, "target: need trn2 or trn3"
    assert len(q.shape) == 3, f"q shape: got {q.shape}, need [B, HQ, D]"
    assert len(k_cache.shape) == 4, f"k_cache shape: got {k_cache.shape}, need [N, S, HKV, D]"
    assert len(block_table.shape) == 2, f"block_table shape: got {block_table.shape}, need [B, M]"
    batch, hq, d = q.shape
    num_pages, page_size, hkv, d_k = k_cache.shape
    max_pages = block_table.shape[1]
    fp8 = is_fp8(k_cache.dtype)
    assert q.dtype == nl.bfloat16, f"q dtype: got {q.dtype}, need bfloat16"
    assert fp8 or k_cache.dtype == nl.bfloat16, f"k_cache dtype: got {k_cache.dtype}, need bfloat16 or an FP8 type"
    assert k_cache.dtype != nl.float8_e4m3fn or version == nisa.nc_version.gen4, "k_cache dtype: float8_e4m3fn needs trn3"
    assert v_cache.dtype == k_cache.dtype, f"v_cache dtype: got {v_cache.dtype}, need that of k_cache, {k_cache.dtype}"
    assert block_table.dtype == nl.int32, f"block_table dtype: got {block_table.dtype}, need int32"
    assert context_lens.dtype == nl.int32, f"context_lens dtype: got {context_lens.dtype}, need int32"
    assert 1 <= d and d <= 128, f"head_dim: got {d}, need 1..128"
    assert d_k == d, f"k_cache head_dim: got {d_k}, need that of q, {d}"
    assert v_cache.shape == k_cache.shape, f"v_cache shape: got {v_cache.shape}, need that of k_cache, {k_cache.shape}"
    assert not fp8 or d % 2 == 0, f"head_dim: got {d}, an FP8 cache needs it even"
    assert 1 <= hq and hq <= 128, f"num_qo_heads: got {hq}, need 1..128"
    assert hq % hkv == 0, f"num_qo_heads: got {hq}, need a multiple of num_kv_heads {hkv}"
    assert block_table.shape[0] == batch, f"block_table rows: got {block_table.shape[0]}, need batch {batch}"
    assert context_lens.shape == (batch,), f"context_lens shape: got {context_lens.shape}, need ({batch},)"
    assert fp8 == (k_scale != None), "k_scale: an FP8 cache needs it, bfloat16 takes none"  # noqa: E711
    assert fp8 == (v_scale != None), "v_scale: an FP8 cache needs it, bfloat16 takes none"  # noqa: E711
    assert window >= 0, f"window: got {window}, need 0 (none) or more"
    assert sm_scale > 0.0, f"sm_scale: got {sm_scale}, need more than 0"
    width = hkv * d
    item = 1 if fp8 else 2
    t = tokens_of_row(page_size, hq, max_pages * page_size, width * item)
    assert t > 0, f"page_size: got {page_size}; some divisor t needs t * num_qo_heads <= 512 and page_size / t dividing 128"
    sub = page_size // t
    assert num_pages * sub <= 2**22, f"num_pages: got {num_pages}, need at most {2**22 // sub}"
    tiles = -(-max_pages * sub // P_MAX)
    assert tiles <= 128, f"max_pages: got {max_pages}, need at most {128 * P_MAX // sub} at page_size {page_size}"
    if sinks != None:  # noqa: E711
        assert sinks.shape == (hq,) and sinks.dtype == nl.float32, f"sinks: got {sinks.shape}, need ({hq},) float32"
    if fp8:
        assert k_scale.shape == (1,) and k_scale.dtype == nl.float32, "k_scale: need one float32"
        assert v_scale.shape == (1,) and v_scale.dtype == nl.float32, "v_scale: need one float32"

    # Chunks: kv heads above each other on the 128 rows of PE. K goes through PE as 16-bit words, two codes to a word in FP8.
    elements = 2 if fp8 else 1
    words = d // elements
    k_heads = largest_divisor(hkv, P_MAX // words)
    k_rows, k_chunks = k_heads * words, hkv // k_heads
    v_heads = largest_divisor(hkv, P_MAX // d)
    v_rows, v_chunks = v_heads * d, hkv // v_heads
    k_columns, v_columns = hq // k_chunks, hq // v_chunks

    # Constants.
    ident = nl.shared_identity_matrix(P_MAX, dtype=nl.bfloat16)
    to_mask = nl.ndarray((P_MAX, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=to_mask, data=ident, op0=nl.multiply, operand0=MASK)
    ones = nl.ndarray((P_MAX, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    minus = nl.ndarray((1, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=minus, value=-1.0)
    k_mask = block_mask(words, k_heads, hq // hkv, hq)
    v_mask = block_mask(d, v_heads, hq // hkv, hq)
    fold = nl.ndarray((v_rows, d), dtype=nl.bfloat16, buffer=nl.sbuf)  # sums the heads of a chunk: identity, stacked
    nisa.tensor_reduce(
        dst=fold, op=nl.add, data=ident[:v_rows, :v_rows].reshape((v_rows, v_heads, d)).permute((0, 2, 1)), axis=2
    )
    position = nl.ndarray((P_MAX, tiles, t), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=position, pattern=[[P_MAX * t, tiles], [1, t]], channel_multiplier=t)
    lens_int = nl.ndarray((P_MAX, batch), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=lens_int, src=context_lens.ap([[0, P_MAX], [1, batch]], offset=0))
    lens = nl.ndarray((P_MAX, batch), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=lens, src=lens_int)
    ids = row_ids(block_table, lens, t, sub, tiles, window)
    q_all = nl.ndarray((hq, batch, d), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.dma_copy(dst=q_all, src=q.permute((1, 0, 2)))

    # c = sm_scale * k_scale turns raw scores into logits.
    logit = sm_scale
    value = 1.0
    if fp8:
        k_column = load_column(k_scale)
        logit = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=logit, data=k_column, op0=nl.multiply, operand0=sm_scale)
        value = load_column(v_scale)

    # State before the first tile: running maximum (raw) and [PV, row sum], equal on every row that holds a head.
    m_first = nl.ndarray((P_MAX, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
    state_first = None
    if sinks == None:  # noqa: E711
        nisa.memset(dst=m_first, value=FLOOR)
    else:
        sink = nl.ndarray((P_MAX, hq), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=sink, src=sinks.ap([[0, P_MAX], [1, hq]], offset=0))
        inverse = 1.0 / sm_scale
        if fp8:
            inverse = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.reciprocal(dst=inverse, data=logit)
        nisa.tensor_scalar(dst=m_first, data=sink, op0=nl.multiply, operand0=inverse)
        back = nl.ndarray((P_MAX, hq), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=back, data=m_first, op0=nl.multiply, operand0=logit)
        nisa.tensor_tensor(dst=back, data1=sink, data2=back, op=nl.subtract)
        state_first = nl.ndarray((v_rows, 2, hq), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=state_first[:, 0, :], value=0.0)
        nisa.activation(dst=state_first[:, 1, :], op=nl.exp, data=back[:v_rows])

    # Rows that a gather skips keep what an earlier one left there.
    k_tiles = []
    v_tiles = []
    for _ in range(KEY_TILES):
        k_tiles.append(nl.ndarray((P_MAX, t * width), dtype=k_cache.dtype, buffer=nl.sbuf))
    for _ in range(VALUE_TILES):
        v_tiles.append(nl.ndarray((P_MAX, t * width), dtype=k_cache.dtype, buffer=nl.sbuf))
    k_rows_hbm = k_cache.reshape((num_pages * sub, t * width))
    v_rows_hbm = v_cache.reshape((num_pages * sub, t * width))
    out = nl.ndarray((batch, hq, d), dtype=nl.bfloat16, buffer=nl.shared_hbm)

    # Three tiles are in the pipeline: while tile i is transposed and scored, tile i - 1 goes through its softmax and tile
    # i - 2 through PV. Each engine takes its instructions in this order.
    total = batch * tiles
    q_block = []
    hidden = None
    score_tiles = []
    p_tiles = []
    alphas = []
    peak = None
    m_old = m_first
    state = state_first
    for i in range(-LOADS_AHEAD, total + 2):
        ahead = i + LOADS_AHEAD
        if ahead < total:
            filling = ahead < VALUE_TILES
            rows = P_MAX if filling else min(P_MAX, max_pages * sub - ahead % tiles * P_MAX)
            missing = nisa.oob_mode.error if filling else nisa.oob_mode.skip
            row = [[t * width, rows], [1, t * width]]
            index = ids[:rows, ahead : ahead + 1]
            nisa.dma_copy(
                dst=k_tiles[ahead % KEY_TILES][:rows],
                src=k_rows_hbm.ap(row, offset=0, vector_offset=index), oob_mode=missing,
            )  # fmt: skip
            nisa.dma_copy(
                dst=v_tiles[ahead % VALUE_TILES][:rows],
                src=v_rows_hbm.ap(row, offset=0, vector_offset=index), oob_mode=missing,
            )  # fmt: skip
        if 1 <= i and i <= total:
            # The tile's maximum for each head: over partitions by a transpose, back to all partitions by a matmul.
            rows = min(P_MAX, max_pages * sub - (i - 1) % tiles * P_MAX)
            across = nl.ndarray((hq, P_MAX), dtype=nl.bfloat16, buffer=nl.psum)
            nisa.nc_transpose(dst=across[:, :rows], data=peak[:rows])
            top = nl.ndarray((hq, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_reduce(dst=top, op=nl.maximum, data=across[:, :rows], axis=1)
            diagonal = nl.ndarray((hq, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=diagonal, data=ident[:hq, :hq], op0=nl.multiply, operand0=top)
        if 0 <= i and i < total:
            b, c = i // tiles, i % tiles
            rows = min(P_MAX, max_pages * sub - c * P_MAX)
            k_tile = k_tiles[i % KEY_TILES]
            if c == 0:
                q_block = query_blocks(q_all[:, b, :], k_heads, words, elements, ident, k_mask)
                hidden = nl.ndarray((P_MAX, tiles, t), dtype=nl.bfloat16, buffer=nl.sbuf)
                nisa.tensor_scalar(dst=hidden, data=position, op0=nl.greater_equal, operand0=lens[:, b : b + 1])
                if window > 0:
                    early = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
                    nisa.tensor_scalar(dst=early, data=lens[:, b : b + 1], op0=nl.subtract, operand0=float(window))
                    nisa.scalar_tensor_tensor(
                        dst=hidden, data=position, op0=nl.less, operand0=early, op1=nl.add, operand1=hidden
                    )
            keys = transpose_keys(
                k_tile.view(nl.bfloat16).reshape((P_MAX, t, hkv * words)), rows, k_rows, k_chunks, t
            )
            lanes = keys
            if fp8:
                lanes = keys.view(k_cache.dtype)
        if 1 <= i and i <= total:
            spread = nl.ndarray((P_MAX, hq), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(dst=spread, stationary=ones[:hq, :], moving=diagonal, accumulate=False)
            if (i - 1) % tiles == 0:
                m_old = m_first
            m_new = nl.ndarray((P_MAX, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=m_new, data1=m_old, data2=spread, op=nl.maximum)
            alpha = None
            if (i - 1) % tiles > 0 or sinks != None:  # noqa: E711
                drop = nl.ndarray((v_rows, hq), dtype=nl.float32, buffer=nl.sbuf)
                nisa.tensor_tensor(dst=drop, data1=m_old[:v_rows], data2=m_new[:v_rows], op=nl.subtract)
                alpha = nl.ndarray((v_rows, hq), dtype=nl.float32, buffer=nl.sbuf)
                scale = logit[:v_rows] if fp8 else logit
                nisa.activation(dst=alpha, op=nl.exp, data=drop, scale=scale)
            alphas.append(alpha)
            m_old = m_new
        if 0 <= i and i < total:
            # Raw scores [key, (token of the row, query head)]: hidden keys first, then QK on top.
            scores = nl.ndarray((P_MAX, t, hq), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(
                dst=scores[:rows], stationary=to_mask[:rows, :rows],
                moving=hidden[:rows, c, :].reshape((rows, t, 1)).broadcast(2, hq), accumulate=False,
            )  # fmt: skip
            for j in range(t):
                for chunk in range(k_chunks):
                    columns = nl.ds(chunk * k_columns, k_columns)
                    for e in range(elements):
                        stop = elements * (rows - 1) + e + 1
                        nisa.nc_matmul(
                            dst=scores[:rows, j, columns], stationary=lanes[:, j * k_chunks + chunk, e:stop:elements],
                            moving=q_block[e][:, columns], accumulate=True,
                        )  # fmt: skip
            peak = nl.ndarray((P_MAX, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
            nisa.tensor_reduce(dst=peak[:rows], op=nl.maximum, data=scores[:rows].permute((0, 2, 1)), axis=2)
            score_tiles.append(scores)
        if 1 <= i and i <= total:
            rows = min(P_MAX, max_pages * sub - (i - 1) % tiles * P_MAX)
            scores = score_tiles[i - 1]
            nisa.nc_matmul(
                dst=scores[:rows], stationary=minus[:, :rows],
                moving=m_new[0:1, :].reshape((1, 1, hq)).broadcast(1, t), accumulate=True,
            )  # fmt: skip
            p = nl.ndarray((P_MAX, t, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
            scale = logit[:rows] if fp8 else logit
            nisa.activation(dst=p[:rows], op=nl.exp, data=scores[:rows], scale=scale)
            p_tiles.append(p)
        if i >= 2:
            # [PV, row sum] of the tile, transposed: head_dim on partitions, query heads along the free axis.
            b, c = (i - 2) // tiles, (i - 2) % tiles
            rows = min(P_MAX, max_pages * sub - c * P_MAX)
            p, alpha = p_tiles[i - 2], alphas[i - 2]
            values = v_tiles[(i - 2) % VALUE_TILES].reshape((P_MAX, t, width))
            part = nl.ndarray((v_rows, 2, hq), dtype=nl.float32, buffer=nl.psum)
            for chunk in range(v_chunks):
                columns = nl.ds(chunk * v_columns, v_columns)
                for j in range(t):
                    nisa.nc_matmul(
                        dst=part[:, 0, columns], stationary=values[:rows, j, chunk * v_rows : (chunk + 1) * v_rows],
                        moving=p[:rows, j, columns], accumulate=(j > 0),
                    )  # fmt: skip
            for j in range(t):
                nisa.nc_matmul(
                    dst=part[:, 1, :], stationary=ones[:rows, :v_rows], moving=p[:rows, j, :], accumulate=(j > 0)
                )
            if c == 0:
                state = state_first
            fresh = nl.ndarray((v_rows, 2, hq), dtype=nl.float32, buffer=nl.sbuf)
            if state == None:  # noqa: E711
                nisa.tensor_copy(dst=fresh, src=part)
            else:
                kept = nl.ndarray((v_rows, 2, hq), dtype=nl.float32, buffer=nl.sbuf)
                nisa.tensor_tensor(
                    dst=kept, data1=state, data2=alpha.reshape((v_rows, 1, hq)).broadcast(1, 2), op=nl.multiply,
                    engine=nisa.engine.gpsimd,
                )  # fmt: skip
                nisa.tensor_tensor(dst=fresh, data1=kept, data2=part, op=nl.add)
            state = fresh
            if c == tiles - 1:
                finish(out, b, state, value, v_mask, fold, fp8)
    return out


def finish(out, b, state, value, v_mask, fold, fp8):
    """Normalise the state of one sequence, keep each head's own block of rows, transpose and store."""
    v_rows, _, hq = state.shape
    d = fold.shape[1]
    total = nl.ndarray((v_rows, hq), dtype=nl.float32, buffer=nl.sbuf)
    # A sum is at least exp(0) rounded if any key is visible; 0 means none is, and the result is 0 / tiny = 0.
    nisa.tensor_scalar(dst=total, data=state[:, 1, :], op0=nl.maximum, operand0=1e-30)
    weight = nl.ndarray((v_rows, hq), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=weight, data=total)
    nisa.tensor_tensor(dst=weight, data1=weight, data2=v_mask, op=nl.multiply)
    own = nl.ndarray((v_rows, hq), dtype=nl.bfloat16, buffer=nl.sbuf)
    scale = value[:v_rows] if fp8 else value
    nisa.scalar_tensor_tensor(
        dst=own, data=state[:, 0, :], op0=nl.multiply, operand0=scale, op1=nl.multiply, operand1=weight
    )
    turned = nl.ndarray((hq, d), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=turned, stationary=own, moving=fold, accumulate=False)
    result = nl.ndarray((hq, d), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.activation(dst=result, op=nl.copy, data=turned)
    nisa.dma_copy(dst=out[b], src=result)
