"""Small kernels over instructions that the device kernels do not use, so that executors can be compared on them too.

As isa_tour.py: data leaves no rounding open, and executors must agree to the bit. Dimensions: P partitions, F free elements.
"""

import nki
import nki.isa as nisa
import nki.language as nl


def load(tensor):
    """A copy of an HBM tensor in SBUF."""
    tile = nl.ndarray(tensor.shape, dtype=tensor.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=tensor)
    return tile


def store(tile):
    """A copy of a whole SBUF tile in HBM, to return."""
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


@nki.jit
def tour_running(a, b, column):
    """a, b [P, F] fp32, column [P, 1] fp32: scans, running reductions, statistics.

    Out: scans [P, 5, F] fp32; mean and variance of a, of a and b [P, 4] fp32; statistics of b [P, 6] bf16; a across partitions
    [1, F] fp32; bits of an integer tile [P, 3] int32.
    """
    p, f = a.shape
    x = load(a)
    y = load(b)
    c = load(column)
    scans = nl.ndarray((p, 5, f), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor_scan(dst=scans[:, 0, :], data0=x, data1=y, initial=3.0, op0=nl.minimum, op1=nl.add)
    nisa.tensor_tensor_scan(
        dst=scans[:, 1, :], data0=x, data1=y, initial=c, op0=nl.subtract, op1=nl.maximum, reverse0=True
    )
    nisa.tensor_scalar_cumulative(dst=scans[:, 2, :], src=x, op0=nl.multiply, op1=nl.add, imm0=c)
    nisa.tensor_scalar_cumulative(
        dst=scans[:, 3, :], src=y, op0=nl.add, op1=nl.maximum, imm0=1.0, imm1=c, reduce_cmd=nisa.reduce_cmd.load_reduce
    )
    nisa.tensor_scalar_cumulative(
        dst=scans[:, 4, :], src=x, op0=nl.subtract, op1=nl.maximum, imm0=2.0, reduce_cmd=nisa.reduce_cmd.reduce
    )
    stats = nl.ndarray((p, 2, 6), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_stats(dst=stats[:, 0, :], data=x)
    nisa.bn_stats(dst=stats[:, 1, :], data=y)
    moments = nl.ndarray((p, 4), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_aggr(dst=moments[:, 0:2], data=stats[:, 0, :])
    nisa.bn_aggr(dst=moments[:, 2:4], data=stats)
    narrow = nl.ndarray((p, 6), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.bn_stats(dst=narrow, data=y)
    across = nl.ndarray((1, f), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_partition_reduce(dst=across, op=nl.add, data=x)
    whole = nl.ndarray((p, f), dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=whole, src=y)
    bits = nl.ndarray((p, 3), dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=bits[:, 0:1], op=nl.bitwise_or, data=whole, axis=1)
    nisa.tensor_reduce(dst=bits[:, 1:2], op=nl.bitwise_and, data=whole, axis=1)
    nisa.tensor_reduce(dst=bits[:, 2:3], op=nl.bitwise_xor, data=whole, axis=1)
    return store(scans), store(moments), store(narrow), store(across), store(bits)


@nki.jit
def tour_activate2(a, column):
    """a [P, F] fp32, column [P, 1] fp32: out [P, 4, F] fp32 and reductions [P, 3] fp32."""
    p, f = a.shape
    x = load(a)
    c = load(column)
    tiles = nl.ndarray((p, 4, f), dtype=nl.float32, buffer=nl.sbuf)
    tops = nl.ndarray((p, 3), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activate2(
        dst=tiles[:, 0, :], op=nl.relu, data=x, imm0=c, imm1=0.5, op0=nl.multiply, op1=nl.add,
        reduce_op=nl.maximum, reduce_res=tops[:, 0:1], reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    nisa.activate2(
        dst=tiles[:, 1, :], op=nl.square, data=x, imm0=3.0, imm1=0.0, op0=nl.subtract, op1=nl.bypass, reverse0=True,
        reduce_op=nl.add, reduce_res=tops[:, 1:2], reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    nisa.activate2(
        dst=tiles[:, 2, :], op=nl.copy, data=x, imm0=2.0, imm1=c, op0=nl.multiply, op1=nl.subtract,
        reduce_op=nl.minimum, reduce_res=tops[:, 2:3], reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    nisa.activate2(dst=tiles[:, 3, :], op=nl.abs, data=x, imm0=0.0, imm1=0.0, op0=nl.bypass, op1=nl.bypass)
    return store(tiles), store(tops)


@nki.jit
def tour_search(a, index, near, segments):
    """a [P, F] fp32 of distinct values, index [P, G] uint32, near [P, 4] uint16, segments [1, F] fp32.

    Out: the 16 largest [P, 16] fp32 and where they are [P, 8] uint32, a without the 8 largest [P, F] fp32, gathers [P, G] and
    [P, 64] fp32, partitions shuffled [P, F] fp32, bounds of segments [1, 2, F] int32, indices of non-zeros [P, F + 1] int32.
    """
    p, f = a.shape
    x = load(a)
    top = nl.ndarray((p, 16), dtype=nl.float32, buffer=nl.sbuf)
    where = nl.ndarray((p, 8), dtype=nl.uint32, buffer=nl.sbuf)
    again = nl.ndarray((p, 8), dtype=nl.uint32, buffer=nl.sbuf)
    rest = nl.ndarray((p, f), dtype=nl.float32, buffer=nl.sbuf)
    nisa.max8(dst=top[:, 0:8], src=x)
    nisa.nc_find_index8(dst=where, data=x, vals=top[:, 0:8])
    nisa.nc_match_replace8(dst=rest, data=x, vals=top[:, 0:8], imm=-1000.0, dst_idx=again)
    nisa.max8(dst=top[:, 8:16], src=rest)
    gathered = nl.ndarray(index.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_n_gather(dst=gathered, data=x, indices=load(index))
    local = nl.ndarray((p, 16 * near.shape[1]), dtype=nl.float32, buffer=nl.sbuf)
    nisa.local_gather(dst=local, src_buffer=x, index=load(near))
    turned = nl.ndarray((p, f), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=turned, value=0.25)
    mask = []
    for i in range(32):
        mask.append(31 - i if i % 3 > 0 else 255)
    nisa.nc_stream_shuffle(dst=turned, src=x, shuffle_mask=mask)
    bounds = nl.ndarray((1, 2, f), dtype=nl.float32, buffer=nl.sbuf)
    nisa.sequence_bounds(dst=bounds, segment_ids=load(segments))
    count = nl.ndarray((p, f + 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=count, value=7)
    kept = nl.ndarray((p, f), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=kept, data=x, op0=nl.maximum, operand0=0.0)
    nisa.nonzero_with_count(dst=count, src=kept, index_offset=100, padding_val=-3)
    return store(top), store(where), store(again), store(rest), store(gathered), store(local), store(turned), store(bounds), store(count)


@nki.jit
def tour_dma_compute(a, b, table, rows):
    """a, b [P, F] fp32, table [R, F] bf16, rows [P, 1] int32: sums by DMA. Out: a + b + a [P, F] bf16; table[rows] += a; a + table[rows]."""
    p, f = a.shape
    r = table.shape[0]
    x = load(a)
    index = load(rows)
    total = nl.ndarray((p, f), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_compute(dst=total, srcs=[x, b, a], reduce_op=nl.add, scales=[1.0, 1.0, 1.0])
    scattered = nl.ndarray((r, f), dtype=table.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=scattered, src=table)
    target = scattered.ap([[f, p], [1, f]], offset=0, vector_offset=index)
    nisa.dma_compute(dst=target, srcs=[target, x], reduce_op=nl.add)
    source = table.ap([[f, p], [1, f]], offset=0, vector_offset=index)
    nisa.dma_compute(dst=x, srcs=[x, source], reduce_op=nl.add)
    return total, scattered, store(x)
