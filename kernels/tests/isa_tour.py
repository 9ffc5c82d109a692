"""Small kernels that between them issue every instruction of the device kernels, on data that leaves no rounding open.

They exist to compare executors: the simulator and the Rust emulator must agree on them to the bit. Dimensions: P
partitions, K contraction, M stationary columns, N moving columns, F free elements.
"""

import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def tour_double_row(x, w, scale):
    """x [K=256, M] and w [256, N] fp8 (k = 128 j + p), scale [M, 1] fp32: out [M, N] bf16 = (x.T w) scale, row by row."""
    m, n = x.shape[1], w.shape[1]
    stationary = nl.ndarray((128, 2, m), dtype=x.dtype, buffer=nl.sbuf)
    moving = nl.ndarray((128, 2, n), dtype=w.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=stationary, src=x.ap([[m, 128], [128 * m, 2], [1, m]], offset=0))
    nisa.dma_copy(dst=moving, src=w.ap([[n, 128], [128 * n, 2], [1, n]], offset=0))
    factor = nl.ndarray((m, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=factor, src=scale)
    acc = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=acc, stationary=stationary, moving=moving, accumulate=False, perf_mode=nisa.matmul_perf_mode.double_row)
    nisa.nc_matmul(dst=acc, stationary=stationary[:, 0, :], moving=moving[:, 1, :], accumulate=True)
    out = nl.ndarray((m, n), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=out, data=acc, op0=nl.multiply, operand0=factor)
    result = nl.ndarray((m, n), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=result, src=out)
    return result


@nki.jit
def tour_mx(x, w, w_scale):
    """x [128, 4 M] bf16 (layout A), w [128, N] uint16 fp4 x4, w_scale [16, N] uint8: out [M, N] fp32 and bf16."""
    m, n = x.shape[1] // 4, w.shape[1]
    src = nl.ndarray((128, 4 * m), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.dma_copy(dst=src, src=x)
    moving = nl.ndarray((128, n), dtype=nl.float4_e2m1fn_x4, buffer=nl.sbuf)
    nisa.dma_copy(dst=moving, src=w.ap([[n, 128], [1, n]], offset=0, dtype=nl.float4_e2m1fn_x4))
    scales = nl.ndarray((128, n), dtype=nl.uint8, buffer=nl.sbuf)
    nisa.memset(dst=scales, value=0)
    for quadrant in range(4):
        nisa.dma_copy(dst=scales[32 * quadrant : 32 * quadrant + 4, :], src=w_scale[4 * quadrant : 4 * quadrant + 4, :])
    codes = nl.ndarray((128, m), dtype=nl.float8_e4m3fn_x4, buffer=nl.sbuf)
    x_scale = nl.ndarray((128, m), dtype=nl.uint8, buffer=nl.sbuf)
    nisa.quantize_mx(dst=codes, src=src, dst_scale=x_scale)
    acc = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.psum)
    half = nl.ndarray((m, n), dtype=nl.bfloat16, buffer=nl.psum)
    for step in range(2):
        for dst in (acc, half):
            nisa.nc_matmul_mx(
                dst=dst, stationary=codes, moving=moving, stationary_scale=x_scale, moving_scale=scales, accumulate=(step > 0)
            )
    single = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.sbuf)
    rounded = nl.ndarray((m, n), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_copy(dst=single, src=acc)
    nisa.tensor_copy(dst=rounded, src=half, engine=nisa.engine.scalar)
    first = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.shared_hbm)
    second = nl.ndarray((m, n), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=first, src=single)
    nisa.dma_copy(dst=second, src=rounded)
    return first, second


@nki.jit
def tour_vector(a, b, column):
    """a, b [P <= 32, F] fp32, column [P, 1] fp32: VectorE and GpSimdE arithmetic; out [8, P, F] fp32 and [P, 8] fp32."""
    p, f = a.shape
    x = nl.ndarray((p, f), dtype=nl.float32, buffer=nl.sbuf)
    y = nl.ndarray((p, f), dtype=nl.float32, buffer=nl.sbuf)
    c = nl.ndarray((p, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=x, src=a)
    nisa.dma_copy(dst=y, src=b)
    nisa.dma_copy(dst=c, src=column)
    tiles = nl.ndarray((p, 8, f), dtype=nl.float32, buffer=nl.sbuf)
    sums = nl.ndarray((p, 8), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=tiles[:, 0, :], data1=x, data2=y, op=nl.subtract)
    nisa.tensor_tensor(dst=tiles[:, 1, :], data1=x, data2=y, op=nl.maximum, engine=nisa.engine.gpsimd)
    nisa.tensor_scalar(dst=tiles[:, 2, :], data=x, op0=nl.multiply, operand0=c, op1=nl.subtract, operand1=3.0, reverse1=True)
    nisa.scalar_tensor_tensor(dst=tiles[:, 3, :], data=x, op0=nl.add, operand0=c, op1=nl.multiply, operand1=y)
    nisa.tensor_scalar_reduce(
        dst=tiles[:, 4, :], data=x, op0=nl.abs, operand0=None, reduce_op=nl.maximum, reduce_res=sums[:, 0:1]
    )
    nisa.tensor_scalar_reduce(
        dst=tiles[:, 5, :], data=y, op0=nl.multiply, operand0=2.0, reduce_op=nl.add, reduce_res=sums[:, 1:2],
        reduce_res_negate=True,
    )  # fmt: skip
    nisa.tensor_reduce(dst=sums[:, 2:3], op=nl.add, data=x, axis=1)
    nisa.tensor_reduce(dst=sums[:, 3:4], op=nl.maximum, data=tiles[:, 0:2, :], axis=(1, 2), negate=True)
    nisa.tensor_scalar(dst=tiles[:, 6, :], data=x, op0=nl.greater_equal, operand0=c)
    nisa.reciprocal(dst=sums[:, 4:5], data=c)
    nisa.tensor_copy(dst=sums[:, 5:6], src=c, engine=nisa.engine.gpsimd)
    nisa.activation(
        dst=tiles[:, 7, :], op=nl.square, data=x, scale=c, bias=c, reduce_op=nl.add, reduce_res=sums[:, 6:7],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    nisa.activation(dst=sums[:, 7:8], op=nl.relu, data=c, scale=-1.0)
    out = nl.ndarray((8, p, f), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out.ap([[f, p], [p * f, 8], [1, f]], offset=0), src=tiles)
    last = nl.ndarray((p, 8), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=last, src=sums)
    return out, last


@nki.jit
def tour_select(a, low, high):
    """a [P, F] fp32, low and high [P, 1] fp32: iota, masks and predicated copies; out [4, P, F] fp32, ids [P, F] int32."""
    p, f = a.shape
    x = nl.ndarray((p, f), dtype=nl.float32, buffer=nl.sbuf)
    lo = nl.ndarray((p, 1), dtype=nl.float32, buffer=nl.sbuf)
    hi = nl.ndarray((p, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=x, src=a)
    nisa.dma_copy(dst=lo, src=low)
    nisa.dma_copy(dst=hi, src=high)
    ids = nl.ndarray((p, f), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=ids, pattern=[[1, f]], offset=7, channel_multiplier=f)
    tiles = nl.ndarray((p, 4, f), dtype=nl.float32, buffer=nl.sbuf)
    top = nl.ndarray((p, 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.affine_select(
        dst=tiles[:, 0, :], pattern=[[-1, f]], channel_multiplier=1, on_true_tile=x, on_false_value=-1.0,
        cmp_op=nl.greater_equal, offset=2,
    )  # fmt: skip
    nisa.range_select(
        dst=tiles[:, 1, :], on_true_tile=x, comp_op0=nl.greater_equal, comp_op1=nl.less, bound0=lo, bound1=hi,
        reduce_res=top[:, 0:1], range_start=1,
    )  # fmt: skip
    odd = nl.ndarray((p, f), dtype=nl.int32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=odd, data=ids, op0=nl.bitwise_and, operand0=1)
    flags = nl.ndarray((p, f), dtype=nl.uint8, buffer=nl.sbuf)
    nisa.tensor_copy(dst=flags, src=odd)
    nisa.select_reduce(
        dst=tiles[:, 2, :], predicate=flags, on_true=x, on_false=-50.0, reduce_res=top[:, 1:2],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )  # fmt: skip
    nisa.memset(dst=tiles[:, 3, :], value=0.5)
    nisa.tensor_copy_predicated(dst=tiles[:, 3, :], src=x, predicate=flags, reverse_pred=True)
    out = nl.ndarray((4, p, f), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out.ap([[f, p], [p * f, 4], [1, f]], offset=0), src=tiles)
    numbers = nl.ndarray((p, f), dtype=nl.int32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=numbers, src=ids)
    tops = nl.ndarray((p, 2), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=tops, src=top)
    return out, numbers, tops


@nki.jit
def tour_move(table, rows, start):
    """table [R, F] bf16, rows [P, 1] int32, start [1, 1] int32: gathers, transposes, casts, scatter.

    Out: gathered rows [P, F] bf16; their transpose [F, P] bf16; row `start` [1, F] fp32; the scatter [R, F] bf16.
    """
    r, f = table.shape
    p = rows.shape[0]
    index = nl.ndarray((p, 1), dtype=nl.int32, buffer=nl.sbuf)
    first = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=index, src=rows)
    nisa.dma_copy(dst=first, src=start)
    tile = nl.ndarray((p, f), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=table.ap([[f, p], [1, f]], offset=0, vector_offset=index))
    gathered = nl.ndarray((p, f), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=gathered, src=tile)
    turned = nl.ndarray((f, p), dtype=nl.bfloat16, buffer=nl.psum)
    nisa.nc_transpose(dst=turned, data=tile)
    copied = nl.ndarray((f, p), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_copy(dst=copied, src=turned)
    by_dma = nl.ndarray((f, p), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.dma_transpose(dst=by_dma, src=gathered)
    both = nl.ndarray((f, p), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=both, data1=copied, data2=by_dma, op=nl.add)
    transposed = nl.ndarray((f, p), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=transposed, src=both)
    one = nl.ndarray((1, f), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=one, src=table.ap([[f, 1], [1, f]], offset=0, scalar_offset=first, indirect_dim=0))
    scattered = nl.ndarray((r, f), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=scattered, src=table)
    narrow = nl.ndarray((p, f), dtype=nl.float8_e4m3, buffer=nl.sbuf)
    nisa.tensor_copy(dst=narrow, src=tile)
    wide = nl.ndarray((p, f), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=wide, data=narrow, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=1.0)
    nisa.dma_copy(dst=scattered.ap([[f, p], [1, f]], offset=0, vector_offset=index), src=wide)
    return gathered, transposed, one, scattered
