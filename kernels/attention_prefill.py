"""Flash attention of a chunk of queries: causal or full, GQA, sliding window, sinks, prior keys (Trn2, Trn3).

Dimensions
    B   sequences, SQ queries and SK keys of the chunk (SQ = SK if causal), SP slots of the prior keys
    HQ  query heads (num_qo_heads), HKV kv heads (num_kv_heads), G = HQ / HKV query heads for each kv head
    D   head_dim
    W   window: keys that a query sees, itself included; 0 means all

Tensors (HBM)
    q          [B, SQ, HQ, D]   bf16
    k, v       [B, SK, HKV, D]  bf16
    k_prior    [B, SP, HKV, D]  bf16 or None: keys before the chunk; v_prior likewise
    prior_len  [B]              int32 or None: how many of the SP slots hold keys (0..SP); the others hold finite numbers
    sinks      [HQ]             f32 or None: one learned logit for each head; joins the softmax, has no value
    out        [B, SQ, HQ, D]   bf16

out[b, i, h] = sum_j softmax_j(sm_scale * q[b, i, h] . K[j, h / G]) V[j, h / G]. Prior key x has position x, key and query
j of the chunk have position prior_len + j; causal keeps j <= i, a window keeps positions above position(i) - W.
Queries of a shorter sequence are padded at the end: with causal nothing of the padding reaches an earlier query.

A tile of 128 queries goes through the keys in sections. Work items are (tile, section, head); four are in the pipeline.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P_MAX = 128
BANK = 512  # f32 elements of a PSUM bank
SLICES = 8  # at most 8 * 128 keys in a section: its scores fill two banks, its transposed probabilities one
SECTION_BYTES = 16384  # at most this much of V, and as much of K, in a partition
VECTOR_SHARE = 6  # of 8 slices of transposed probabilities that VectorE copies
RESIDENT_BYTES = 65536  # keys and values of a sequence stay in SBUF for all query tiles if they fit here
# Running state is nb = -sm_scale * max. NONE stands for "no key yet": exp(nb - NONE) and exp(FP32_MIN * sm_scale + NONE) are 0.
NONE = 1.0e30


def heads_in_chunk(hkv, d):
    """kv heads that lie above each other on the rows of PE; each must start at a row tile of its own size."""
    if d == 32 and hkv % 4 == 0:
        return 4
    if (d == 64 or d == 32) and hkv % 2 == 0:
        return 2
    return 1


def slices_of_section(width):
    """128-key slices of a section for kv rows of `width` elements."""
    return max(1, min(SLICES, SECTION_BYTES // (2 * width)))


def load_rows(src, first, count, slices):
    """Rows first..first + count of [S, HKV, D] as [128, slices, HKV * D]; row first + 128 j + p is (p, j)."""
    width = src.shape[1] * src.shape[2]
    tile = nl.ndarray((P_MAX, slices, width), dtype=nl.bfloat16, buffer=nl.sbuf)
    full = count // P_MAX
    rest = count - full * P_MAX
    if full > 0:
        nisa.dma_copy(
            dst=tile[:, :full], src=src[first : first + full * P_MAX].reshape((full, P_MAX, width)).permute((1, 0, 2))
        )
    if rest > 0:
        nisa.dma_copy(dst=tile[:rest, full], src=src[first + full * P_MAX : first + count].reshape((rest, width)))
    return tile


def transpose_bank(dst, tiles, rows):
    """Transpose up to eight [rows, n] bf16 views into dst [n, len(tiles), 128] through one PSUM bank."""
    count = len(tiles)
    out_rows = dst.shape[0]
    bank = nl.ndarray((out_rows, SLICES, P_MAX), dtype=nl.bfloat16, buffer=nl.psum)
    for i in range(count):
        nisa.nc_transpose(dst=bank[:, i, :rows], data=tiles[i])
    nisa.tensor_copy(dst=dst[:, :, :rows], src=bank[:, :count, :rows], engine=nisa.engine.vector)


def transpose_queries(q_tile, rows, hq, hkv, d, stack):
    """q tile [128, HQ * D] as [stack * D, HQ / stack, 128]: slot (chunk, g) holds query head g of each kv head of the chunk."""
    group = hq // hkv
    slots = hq // stack
    heads = q_tile.reshape((P_MAX, hkv // stack, stack, group, d))
    turned = nl.ndarray((stack * d, slots, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    for first in range(0, slots, SLICES):
        count = min(SLICES, slots - first)
        views = []
        for i in range(count):
            views.append(heads[:rows, (first + i) // group, :, (first + i) % group, :])
        transpose_bank(turned[:, first : first + count], views, rows)
    return turned


def transpose_keys(k_tile, count, hkv, d, stack, slices):
    """K section [128, slices, HKV * D] as [stack * D, chunk, slices * 128]."""
    chunks = hkv // stack
    turned = nl.ndarray((stack * d, chunks, slices, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    full = count // P_MAX
    rest = count - full * P_MAX
    for chunk in range(chunks):
        columns = nl.ds(chunk * stack * d, stack * d)
        views = []
        for j in range(full):
            views.append(k_tile[:, j, columns])
        if full > 0:
            transpose_bank(turned[:, chunk, :full], views, P_MAX)
        if rest > 0:
            transpose_bank(turned[:, chunk, full : full + 1], [k_tile[:rest, full, columns]], rest)
    return turned.reshape((stack * d, chunks, slices * P_MAX))


def plan(batch, sq, sk, sp, section, causal, window):
    """Every (b, tile, first, last, source, section, begin, stop, masked): what each query tile reads, in order.

    `source` is 0 for prior keys and 1 for the chunk's own; begin..stop are keys of one section, begin a multiple of 128.
    Sections that no query of the tile can see are left out; `masked` says that some query may not see all of them.
    """
    groups = []
    for b in range(batch):
        for q0 in range(0, sq, P_MAX):
            q1 = min(q0 + P_MAX, sq)
            low, high = 0, sk
            if causal:
                high = q1
            if window > 0:
                low = max(0, q0 - window + 1) // P_MAX * P_MAX
            parts = []
            for s in range(0, sp, section):
                parts.append((0, s // section, s, min(s + section, sp), True))
            for s in range(low // section * section, high, section):
                begin, stop = max(s, low), min(s + section, high)
                masked = (causal and stop - 1 > q0) or (window > 0 and begin <= q1 - 1 - window)
                parts.append((1, s // section, begin, stop, masked))
            for i in range(len(parts)):
                source, index, begin, stop, masked = parts[i]
                groups.append((b, q0, i == 0, i == len(parts) - 1, source, index, begin, stop, masked))
    return groups


@nki.jit
def attention_prefill(
    q, k, v, k_prior=None, v_prior=None, prior_len=None, sinks=None, sm_scale=1.0, causal=True, window=0
):
    """See the module's docstring; constraints are those of manifest.toml."""
    version = nisa.get_nc_version()
    assert version == nisa.nc_version.gen3 or version == nisa.nc_version.gen4, "target: need trn2 or trn3"
    assert len(q.shape) == 4, f"q shape: got {q.shape}, need [B, SQ, HQ, D]"
    assert len(k.shape) == 4, f"k shape: got {k.shape}, need [B, SK, HKV, D]"
    batch, sq, hq, d = q.shape
    sk, hkv = k.shape[1], k.shape[2]
    assert q.dtype == nl.bfloat16, f"q dtype: got {q.dtype}, need bfloat16"
    assert k.dtype == nl.bfloat16, f"k dtype: got {k.dtype}, need bfloat16"
    assert v.dtype == nl.bfloat16, f"v dtype: got {v.dtype}, need bfloat16"
    assert 1 <= d and d <= 128, f"head_dim: got {d}, need 1..128"
    assert k.shape == (batch, sk, hkv, d), f"k shape: got {k.shape}, need ({batch}, SK, HKV, {d})"
    assert v.shape == k.shape, f"v shape: got {v.shape}, need that of k, {k.shape}"
    assert hq % hkv == 0, f"num_qo_heads: got {hq}, need a multiple of num_kv_heads {hkv}"
    assert hq * d <= 8192, f"query row: got {hq} heads of {d}, need num_qo_heads * head_dim <= 8192"
    assert hkv * d <= 4096, f"key row: got {hkv} heads of {d}, need num_kv_heads * head_dim <= 4096"
    assert not causal or sq == sk, f"causal: got {sq} queries and {sk} keys, need as many"
    assert window >= 0, f"window: got {window}, need 0 (none) or more"
    assert window == 0 or causal, "window: needs causal"
    assert sm_scale > 0.0, f"sm_scale: got {sm_scale}, need more than 0"
    sp = 0
    if k_prior != None:  # noqa: E711
        assert v_prior != None and prior_len != None, "prior: k_prior, v_prior and prior_len go together"  # noqa: E711
        assert len(k_prior.shape) == 4, f"prior: got k_prior {k_prior.shape}, need [B, SP, HKV, D]"
        sp = k_prior.shape[1]
        assert k_prior.dtype == nl.bfloat16 and v_prior.dtype == nl.bfloat16, "prior: need bfloat16 keys and values"
        assert k_prior.shape == (batch, sp, hkv, d), f"prior: got k_prior {k_prior.shape}, need ({batch}, SP, {hkv}, {d})"
        assert v_prior.shape == k_prior.shape, f"prior: got v_prior {v_prior.shape}, need that of k_prior"
        assert prior_len.dtype == nl.int32, f"prior: got prior_len {prior_len.dtype}, need int32"
        assert prior_len.shape == (batch,), f"prior: got prior_len {prior_len.shape}, need ({batch},)"
    else:
        assert v_prior == None and prior_len == None, "prior: k_prior, v_prior and prior_len go together"  # noqa: E711
    assert sk + sp <= 2**22, f"keys: got {sk + sp}, need at most {2**22}"
    if sinks != None:  # noqa: E711
        assert sinks.shape == (hq,) and sinks.dtype == nl.float32, f"sinks: got {sinks.shape}, need ({hq},) float32"

    group = hq // hkv
    stack = heads_in_chunk(hkv, d)
    slices = slices_of_section(hkv * d)
    section = slices * P_MAX
    sections = -(-sk // section) + -(-sp // section)
    resident = sections * 4 * slices * hkv * d <= RESIDENT_BYTES

    # Constants: p + 1 on partition p, -sink on every partition.
    rank = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=rank, pattern=[[1, 1]], offset=1, channel_multiplier=1)
    nothing = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=nothing, value=-1.0)
    start_nb = None
    if sinks != None:  # noqa: E711
        start_nb = nl.ndarray((P_MAX, hq), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=start_nb, src=sinks.ap([[0, P_MAX], [1, hq]], offset=0))
        nisa.tensor_scalar(dst=start_nb, data=start_nb, op0=nl.multiply, operand0=-1.0)
    prior = None
    if sp > 0:
        prior_int = nl.ndarray((P_MAX, batch), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=prior_int, src=prior_len.ap([[0, P_MAX], [1, batch]], offset=0))
        prior = nl.ndarray((P_MAX, batch), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=prior, src=prior_int)
    out = nl.ndarray((batch, sq, hq, d), dtype=nl.bfloat16, buffer=nl.shared_hbm)

    # K^T and V of sections seen so far: (b, source, section) -> position in the lists.
    groups = plan(batch, sq, sk, sp, section, causal, window)
    kept_names = []
    kept_tiles = []
    items = len(groups) * hq
    group_tiles = []  # of each group: K^T, V, queries, bounds, running state
    scored = []  # of each item: scores (PSUM, or masked in SBUF), then probabilities
    weights = []
    turned = []
    # Each engine takes its instructions in this order: scores of item i, exp of i - 1, transpose of i - 2, PV of i - 3. What a
    # step reads was made one iteration before, or by an engine that is ahead in this one.
    for i in range(items + 3):
        if i < items and i % hq == 0:
            b, q0, first, last, source, index, begin, stop, masked = groups[i // hq]
            rows = min(P_MAX, sq - q0)
            name = (b, source, index)
            if resident and name in kept_names:
                k_turned, v_tile = kept_tiles[kept_names.index(name)]
            else:
                size = sk if source == 1 else sp
                count = min(section, size - index * section)
                k_from = k[b] if source == 1 else k_prior[b]
                v_from = v[b] if source == 1 else v_prior[b]
                k_tile = load_rows(k_from, index * section, count, slices)
                v_tile = load_rows(v_from, index * section, count, slices)
                k_turned = transpose_keys(k_tile, count, hkv, d, stack, slices)
                if resident:
                    kept_names.append(name)
                    kept_tiles.append((k_turned, v_tile))
            if first:
                q_tile = nl.ndarray((P_MAX, hq * d), dtype=nl.bfloat16, buffer=nl.sbuf)
                nisa.dma_copy(dst=q_tile[:rows], src=q[b, q0 : q0 + rows].reshape((rows, hq * d)))
                q_turned = transpose_queries(q_tile, rows, hq, hkv, d, stack)
                total = nl.ndarray((P_MAX, hq), dtype=nl.float32, buffer=nl.sbuf)
                state = nl.ndarray((P_MAX, hq, d), dtype=nl.float32, buffer=nl.sbuf)
                result = nl.ndarray((P_MAX, hq, d), dtype=nl.bfloat16, buffer=nl.sbuf)
                old_nb = start_nb
            new_nb = nl.ndarray((P_MAX, hq), dtype=nl.float32, buffer=nl.sbuf)
            low, high = nothing, nothing
            if masked:
                low, high = bounds(rank, nothing, prior, b, q0, source, causal, window)
            group_tiles.append((k_turned, v_tile, q_turned, old_nb, new_nb, total, state, result, low, high))
            old_nb = new_nb
        if i < items:
            # Scores of item i and their running maximum.
            b, q0, first, last, source, index, begin, stop, masked = groups[i // hq]
            k_turned, v_tile, queries, nb_old, nb_new, sums, states, results, low, high = group_tiles[i // hq]
            rows, h, count = min(P_MAX, sq - q0), i % hq, stop - begin
            chunk, above, g = h // group // stack, h // group % stack, h % group
            from_row = begin - index * section
            lanes = nl.ds(above * d, d)
            scores = nl.ndarray((P_MAX, SLICES * P_MAX), dtype=nl.float32, buffer=nl.psum)
            for n0 in range(0, count, BANK):
                n1 = min(n0 + BANK, count)
                if stack > 1:
                    nisa.nc_matmul(
                        dst=scores[:rows, n0:n1], stationary=queries[lanes, chunk * group + g, :rows],
                        moving=k_turned[lanes, chunk, from_row + n0 : from_row + n1], accumulate=False,
                        tile_position=(above * d, 0), tile_size=(d, P_MAX),
                    )  # fmt: skip
                else:
                    nisa.nc_matmul(
                        dst=scores[:rows, n0:n1], stationary=queries[:, chunk * group + g, :rows],
                        moving=k_turned[:, chunk, from_row + n0 : from_row + n1], accumulate=False,
                    )  # fmt: skip
            top = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
            if masked:
                seen = nl.ndarray((P_MAX, SLICES * P_MAX), dtype=nl.float32, buffer=nl.sbuf)
                nisa.range_select(
                    dst=seen[:rows, :count], on_true_tile=scores[:rows, :count], comp_op0=nl.greater_equal,
                    comp_op1=nl.less, bound0=low[:rows], bound1=high[:rows], range_start=begin,
                    reduce_cmd=nisa.reduce_cmd.reset_reduce, reduce_op=nl.maximum, reduce_res=top[:rows],
                )  # fmt: skip
                scored.append(seen)
            else:
                nisa.tensor_reduce(dst=top[:rows], op=nl.maximum, data=scores[:rows, :count], axis=1)
                scored.append(scores)
            before = NONE
            if nb_old != None:  # noqa: E711
                before = nb_old[:rows, h : h + 1]
            nisa.tensor_scalar(
                dst=nb_new[:rows, h : h + 1], data=top[:rows], op0=nl.multiply, operand0=-sm_scale,
                op1=nl.minimum, operand1=before,
            )  # fmt: skip
        if 1 <= i and i <= items:
            # Probabilities of item i - 1 and their sum.
            b, q0, first, last, source, index, begin, stop, masked = groups[(i - 1) // hq]
            k_turned, v_tile, queries, nb_old, nb_new, sums, states, results, low, high = group_tiles[(i - 1) // hq]
            rows, h, count = min(P_MAX, sq - q0), (i - 1) % hq, stop - begin
            p = nl.ndarray((P_MAX, SLICES * P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
            part = sums[:rows, h : h + 1]
            alpha = None
            if nb_old != None:  # noqa: E711
                part = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)[:rows]
                alpha = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
                nisa.activation(
                    dst=alpha[:rows], op=nl.exp, data=nb_old[:rows, h : h + 1], scale=-1.0, bias=nb_new[:rows, h : h + 1]
                )
            nisa.activation(
                dst=p[:rows, :count], op=nl.exp, data=scored[i - 1][:rows, :count], scale=sm_scale,
                bias=nb_new[:rows, h : h + 1], reduce_op=nl.add, reduce_res=part,
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )  # fmt: skip
            weights.append((p, alpha, part))
        if 2 <= i and i <= items + 1:
            b, q0, first, last, source, index, begin, stop, masked = groups[(i - 2) // hq]
            turned.append(transpose_probabilities(weights[i - 2][0], min(P_MAX, sq - q0), stop - begin))
        if i >= 3:
            # PV of item i - 3 and its sum, on top of the rescaled state.
            b, q0, first, last, source, index, begin, stop, masked = groups[(i - 3) // hq]
            k_turned, v_tile, queries, nb_old, nb_new, sums, states, results, low, high = group_tiles[(i - 3) // hq]
            rows, h = min(P_MAX, sq - q0), (i - 3) % hq
            alpha, row_sum = weights[i - 3][1], weights[i - 3][2]
            sum_h = sums[:rows, h : h + 1]
            if alpha != None:  # noqa: E711
                if first:  # a sink: its weight exp(sink - max) is alpha
                    nisa.tensor_tensor(dst=sum_h, data1=alpha[:rows], data2=row_sum, op=nl.add, engine=nisa.engine.gpsimd)
                else:
                    nisa.scalar_tensor_tensor(
                        dst=sum_h, data=sum_h, op0=nl.multiply, operand0=alpha[:rows], op1=nl.add, operand1=row_sum
                    )
            kv = h // group
            part = times_values(
                turned[i - 3], v_tile[:, :, kv * d : (kv + 1) * d], rows, stop - begin, (begin - index * section) // P_MAX
            )
            whole = part[:rows]
            if not first:
                whole = states[:rows, h]
                nisa.scalar_tensor_tensor(
                    dst=whole, data=whole, op0=nl.multiply, operand0=alpha[:rows], op1=nl.add, operand1=part[:rows]
                )
            elif not last:
                whole = states[:rows, h]
                nisa.tensor_copy(dst=whole, src=part[:rows], engine=nisa.engine.scalar)
            if last:
                inverse = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
                nisa.reciprocal(dst=inverse[:rows], data=sums[:rows, h : h + 1])
                nisa.activation(dst=results[:rows, h], op=nl.copy, data=whole, scale=inverse[:rows])
                if h == hq - 1:
                    nisa.dma_copy(
                        dst=out[b, q0 : q0 + rows].reshape((rows, hq * d)), src=results[:rows].reshape((rows, hq * d))
                    )
    return out


def bounds(rank, nothing, prior, b, q0, source, causal, window):
    """Columns [128, 1]: query q0 + p sees keys low <= key < high of the section's source."""
    low, high = nothing, nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
    if source == 1:
        nisa.tensor_scalar(dst=high, data=rank, op0=nl.add, operand0=float(q0))
        if window > 0:
            low = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=low, data=high, op0=nl.subtract, operand0=float(window))
        return low, high
    nisa.tensor_copy(dst=high, src=prior[:, b : b + 1])
    if window > 0:
        low = nl.ndarray((P_MAX, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(
            dst=low, data=rank, op0=nl.add, operand0=float(q0 - window), op1=nl.add, operand1=prior[:, b : b + 1]
        )
    return low, high


def transpose_probabilities(p, rows, count):
    """P [rows, count] bf16 as [128, slice, rows], 128 keys at a time through one bank.

    The copy out is the work that balances VectorE, which also takes the maximum, and ScalarE, which also takes exp.
    """
    full = count // P_MAX
    rest = count - full * P_MAX
    bank = nl.ndarray((P_MAX, SLICES, P_MAX), dtype=nl.bfloat16, buffer=nl.psum)
    turned = nl.ndarray((P_MAX, SLICES, P_MAX), dtype=nl.bfloat16, buffer=nl.sbuf)
    for j in range(full):
        nisa.nc_transpose(dst=bank[:, j, :rows], data=p[:rows, j * P_MAX : (j + 1) * P_MAX])
    if rest > 0:
        nisa.nc_transpose(dst=bank[:rest, full, :rows], data=p[:rows, full * P_MAX : count])
    share = full * VECTOR_SHARE // SLICES
    if share > 0:
        nisa.tensor_copy(dst=turned[:, :share, :rows], src=bank[:, :share, :rows], engine=nisa.engine.vector)
    if share < full:
        nisa.tensor_copy(dst=turned[:, share:full, :rows], src=bank[:, share:full, :rows], engine=nisa.engine.scalar)
    if rest > 0:
        nisa.tensor_copy(dst=turned[:rest, full, :rows], src=bank[:rest, full, :rows], engine=nisa.engine.vector)
    return turned


def times_values(turned, values, rows, count, first_slice):
    """[128, D] in PSUM: transposed probabilities times the section's V rows from slice `first_slice` on."""
    part = nl.ndarray((P_MAX, values.shape[2]), dtype=nl.float32, buffer=nl.psum)
    for j in range(-(-count // P_MAX)):
        keys = min(P_MAX, count - j * P_MAX)
        nisa.nc_matmul(
            dst=part[:rows], stationary=turned[:keys, j, :rows], moving=values[:keys, first_slice + j], accumulate=(j > 0)
        )
    return part
