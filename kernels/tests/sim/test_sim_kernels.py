"""Whole kernels, end to end, in the styles that NKI kernels are written in."""

import ml_dtypes
import numpy as np
import pytest

import nki
import nki.isa as nisa
import nki.language as nl

F32, BF16 = nl.float32, nl.bfloat16
RNG = np.random.default_rng(11)


# -- matmul -----------------------------------------------------------------------------------------------------------


def matmul(lhsT, rhs):
    """Tiled over M, N and K with automatic accumulation, as in the tutorials."""
    k_all, m_all = lhsT.shape
    n_all = rhs.shape[1]
    tm, tk, tn = nl.tile_size.gemm_stationary_fmax, nl.tile_size.pmax, nl.tile_size.gemm_moving_fmax
    result = nl.ndarray((m_all, n_all), dtype=lhsT.dtype, buffer=nl.shared_hbm)
    for m in range(-(-m_all // tm)):
        rows = min(tm, m_all - m * tm)
        for n in range(-(-n_all // tn)):
            columns = min(tn, n_all - n * tn)
            acc = nl.ndarray((rows, columns), F32, buffer=nl.psum)
            for k in range(-(-k_all // tk)):
                depth = min(tk, k_all - k * tk)
                a = nl.ndarray((depth, rows), lhsT.dtype, buffer=nl.sbuf)
                b = nl.ndarray((depth, columns), rhs.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=a, src=lhsT[nl.ds(k * tk, depth), nl.ds(m * tm, rows)])
                nisa.dma_copy(dst=b, src=rhs[nl.ds(k * tk, depth), nl.ds(n * tn, columns)])
                nisa.nc_matmul(dst=acc, stationary=a, moving=b)
            out = nl.ndarray((rows, columns), result.dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=out, src=acc)
            nisa.dma_copy(dst=result[nl.ds(m * tm, rows), nl.ds(n * tn, columns)], src=out)
    return result


@pytest.mark.parametrize("shape", [(128, 128, 512), (256, 200, 600), (1, 1, 1), (130, 129, 513)])
@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_matmul(sim, shape, target):
    k, m, n = shape
    a, b = RNG.integers(-3, 4, (k, m)).astype(np.float32), RNG.integers(-3, 4, (k, n)).astype(np.float32)
    assert np.array_equal(sim(matmul, a, b, target=target), a.T @ b)


def matmul_double_row(lhsT, rhs, scale):
    """FP8, 256-deep chunks, dequantised at eviction."""
    k_all, m = lhsT.shape
    n = rhs.shape[1]
    acc = nl.ndarray((m, n), F32, buffer=nl.psum)
    for k in range(k_all // 256):
        a, b = nl.ndarray((128, 2, m), lhsT.dtype), nl.ndarray((128, 2, n), rhs.dtype)
        nisa.dma_copy(a, lhsT.ap([[m, 128], [128 * m, 2], [1, m]], offset=k * 256 * m))
        nisa.dma_copy(b, rhs.ap([[n, 128], [128 * n, 2], [1, n]], offset=k * 256 * n))
        nisa.nc_matmul(acc, a, b, accumulate=(k > 0), perf_mode=nisa.matmul_perf_mode.double_row)
    s = nl.ndarray((m, 1), F32)
    nisa.dma_copy(s, scale)
    out, hbm = nl.ndarray((m, n), F32), nl.ndarray((m, n), F32, nl.shared_hbm)
    nisa.tensor_scalar(out, acc, nl.multiply, s)
    nisa.dma_copy(hbm, out)
    return hbm


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_fp8_double_row_matmul(sim, target):
    a, b = (RNG.integers(-4, 5, (512, c)).astype(ml_dtypes.float8_e4m3) for c in (64, 96))
    scale = 2.0 ** RNG.integers(-3, 4, (64, 1)).astype(np.float32)
    want = scale * (a.astype(np.float32).T @ b.astype(np.float32))
    assert np.array_equal(sim(matmul_double_row, a, b, scale.astype(np.float32), target=target), want)
    assert sim.report.counters.matmul_columns == {"double_row": 192}


# -- transposes and pooling --------------------------------------------------------------------------------------------


def transpose_free_axes(x, shape2d):
    """[P, F1*F2] to [P, F2*F1] with one strided copy."""
    f1, f2 = shape2d
    t, out = nl.ndarray(x.shape, x.dtype), nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(t, x)
    nisa.tensor_copy(
        dst=out.reshape((x.shape[0], f2, f1)), src=t.ap([[f1 * f2, x.shape[0]], [1, f2], [f2, f1]], offset=0)
    )
    hbm = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    nisa.dma_copy(hbm, out)
    return hbm


def test_transpose_of_free_axes(sim):
    x = RNG.integers(-128, 128, (5, 12)).astype(np.int8)
    assert np.array_equal(sim(transpose_free_axes, x, (3, 4)), x.reshape(5, 3, 4).transpose(0, 2, 1).reshape(5, 12))


def average_pool(x, size, whole_tile):
    """A 5-D view [C, H/s, W/s, s, s] reduced over the last two axes, by nisa or by nl.sum."""
    c, h, w = x.shape
    t = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(t, x)
    windows = t.ap([[h * w, c], [size * w, h // size], [size, w // size], [w, size], [1, size]])
    if whole_tile:
        total = nl.sum(windows, axis=[3, 4], dtype=F32)
    else:
        total = nl.ndarray((c, h // size, w // size), F32)
        nisa.tensor_reduce(dst=total, op=nl.add, data=windows, axis=(3, 4))
    out = nl.ndarray((c, h // size, w // size), x.dtype)
    nisa.tensor_scalar(dst=out, data=total, op0=nl.multiply, operand0=1.0 / size**2)
    hbm = nl.ndarray(out.shape, x.dtype, nl.shared_hbm)
    nisa.dma_copy(hbm, out)
    return hbm


@pytest.mark.parametrize("whole_tile", [False, True])
def test_average_pool(sim, whole_tile):
    x = RNG.integers(0, 64, (6, 8, 12)).astype(np.float16)
    want = x.reshape(6, 2, 4, 3, 4).mean((2, 4)).astype(np.float16)
    assert np.array_equal(sim(average_pool, x, 4, whole_tile), want)


# -- softmax, norm -------------------------------------------------------------------------------------------------------


def softmax(x):
    """Row softmax: max, exp with row sums, reciprocal."""
    p, f = x.shape
    t, e, out = nl.ndarray((p, f), F32), nl.ndarray((p, f), F32), nl.ndarray((p, f), x.dtype)
    nisa.dma_copy(t, x)
    top, total = nl.ndarray((p, 1), F32), nl.ndarray((p, 1), F32)
    nisa.tensor_reduce(dst=top, op=nl.maximum, data=t, axis=1, negate=True)
    nisa.activation(
        dst=e, op=nl.exp, data=t, bias=top, reduce_op=nl.add, reduce_res=total, reduce_cmd=nisa.reduce_cmd.reset_reduce
    )
    nisa.reciprocal(dst=total, data=total)
    nisa.tensor_scalar(dst=out, data=e, op0=nl.multiply, operand0=total)
    hbm = nl.ndarray((p, f), x.dtype, nl.shared_hbm)
    nisa.dma_copy(hbm, out)
    return hbm


def np_softmax(s):
    """Row softmax in float64."""
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_softmax(sim):
    x = (4 * RNG.standard_normal((100, 300))).astype(np.float32)
    assert np.allclose(sim(softmax, x), np_softmax(x.astype(np.float64)), rtol=1e-5)


class NormArgs(nl.NKIObject):
    """Configuration in the library's style: annotated and plain attributes are fields."""

    eps: float = 1e-6
    limit = 240.0


def rmsnorm_quantize(x, gamma, args):
    """RMS norm, then FP8 rows with one fp32 scale each, appended as four bytes."""
    p, h = x.shape
    t, sq, norm = nl.ndarray((p, h), F32), nl.ndarray((p, h), F32), nl.ndarray((p, h), F32)
    g, ones = nl.ndarray((1, h), F32), nl.ndarray((1, p), F32)
    nisa.dma_copy(t, x)
    nisa.dma_copy(g, gamma)
    nisa.memset(ones, 1.0)
    rms, eps, amax, scale = (nl.ndarray((p, 1), F32) for _ in range(4))
    nisa.memset(eps, args.eps)
    nisa.activation_reduce(sq, nl.square, t, reduce_op=nl.add, reduce_res=rms)
    nisa.activation(rms, nl.rsqrt, rms, bias=eps, scale=1 / h)
    wide = nl.ndarray((p, h), F32, nl.psum)
    nisa.nc_matmul(wide, ones, g, accumulate=False)
    nisa.scalar_tensor_tensor(norm, t, nl.multiply, rms, nl.multiply, wide)
    nisa.tensor_scalar_reduce(sq, norm, nl.abs, None, nl.maximum, amax)
    nisa.tensor_scalar(scale, amax, nl.multiply, 1.0 / args.limit, op1=nl.maximum, operand1=1e-6)
    nisa.reciprocal(amax, scale)
    codes = nl.ndarray((p, h), nl.float8_e4m3)
    nisa.tensor_scalar(norm, norm, nl.multiply, amax)
    nisa.tensor_scalar(codes, norm, nl.minimum, args.limit, op1=nl.maximum, operand1=-args.limit)
    out = nl.ndarray((p, h + 4), nl.float8_e4m3, nl.shared_hbm)
    nisa.dma_copy(out[:, 0:h], codes)
    nisa.dma_copy(out[:, h : h + 4], scale.ap([[4, p], [1, 4]], dtype=nl.float8_e4m3))
    return out


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_rmsnorm_quantize(sim, target):
    x, gamma = RNG.standard_normal((96, 256)).astype(np.float32), RNG.uniform(0.5, 2, (1, 256)).astype(np.float32)
    out = sim(rmsnorm_quantize, x, gamma, NormArgs(eps=1e-5), target=target)
    scale = out[:, 256:].copy().view(np.uint8).view(np.float32)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * gamma
    codes = out[:, :256].astype(np.float64)
    assert np.abs(codes).max() == 240
    # A value is off by half a unit in the last place of e4m3: 2^-4 of itself, or half of its smallest step.
    assert (np.abs(codes * scale - want) <= np.maximum(2.0**-4 * np.abs(want), 2.0**-10 * scale) * 1.001).all()


# -- attention --------------------------------------------------------------------------------------------------------------


def flash_attention(q, k, v, scale, causal):
    """Online softmax over 128-key tiles; q, k are [d, S], v is [S, d]."""
    d, s_all = q.shape
    out = nl.ndarray((s_all, d), F32, nl.shared_hbm)
    for i in range(s_all // 128):
        tq, acc = nl.ndarray((d, 128), BF16), nl.ndarray((128, d), F32)
        top, total = nl.ndarray((128, 1), F32), nl.ndarray((128, 1), F32)
        nisa.dma_copy(tq, q[:, nl.ds(i * 128, 128)])
        nisa.memset(acc, 0.0)
        nisa.memset(top, -1e30)
        nisa.memset(total, 0.0)
        for j in range((i + 1) if causal else s_all // 128):
            tk, tv = nl.ndarray((d, 128), BF16), nl.ndarray((128, d), BF16)
            nisa.dma_copy(tk, k[:, nl.ds(j * 128, 128)])
            nisa.dma_copy(tv, v[nl.ds(j * 128, 128)])
            scores, s = nl.ndarray((128, 128), F32, nl.psum), nl.ndarray((128, 128), F32)
            nisa.nc_matmul(scores, tq, tk, accumulate=False)
            nisa.tensor_scalar(s, scores, nl.multiply, scale)
            if causal and i == j:
                nisa.affine_select(s, [[-1, 128]], 1, s, -1e30, cmp_op=nl.greater_equal, offset=0)
            new, neg, fix, row = (nl.ndarray((128, 1), F32) for _ in range(4))
            nisa.tensor_reduce(new, nl.maximum, s, axis=1)
            nisa.tensor_tensor(new, new, top, op=nl.maximum)
            nisa.tensor_scalar(neg, new, nl.multiply, -1.0)
            nisa.activation(fix, nl.exp, top, bias=neg)
            p = nl.ndarray((128, 128), BF16)
            cmd = nisa.reduce_cmd.reset_reduce
            nisa.activation(p, nl.exp, s, bias=neg, reduce_op=nl.add, reduce_res=row, reduce_cmd=cmd)
            nisa.tensor_copy(top, new)
            nisa.scalar_tensor_tensor(total, total, nl.multiply, fix, nl.add, row)
            pt = nl.ndarray((128, 128), BF16)
            nisa.dma_transpose(pt, p)
            pv = nl.ndarray((128, d), F32, nl.psum)
            nisa.nc_matmul(pv, pt, tv, accumulate=False)
            nisa.scalar_tensor_tensor(acc, acc, nl.multiply, fix, nl.add, pv)
        nisa.reciprocal(total, total)
        nisa.tensor_scalar(acc, acc, nl.multiply, total)
        nisa.dma_copy(out[nl.ds(i * 128, 128)], acc)
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention(sim, causal):
    d, s = 64, 384
    q, k = (RNG.standard_normal((d, s)).astype(ml_dtypes.bfloat16) for _ in range(2))
    v = RNG.standard_normal((s, d)).astype(ml_dtypes.bfloat16)
    got = sim(flash_attention, q, k, v, d**-0.5, causal)
    logits = q.astype(np.float64).T @ k.astype(np.float64) * d**-0.5
    if causal:
        logits = np.where(np.tril(np.ones((s, s), bool)), logits, -np.inf)
    weights = np_softmax(logits)
    want = weights @ v.astype(np.float64)
    # P is rounded to bf16 once (2^-9 relative); the sums of P use the unrounded values.
    assert (np.abs(got - want) <= 2.0**-8 * (weights @ np.abs(v.astype(np.float64))) + 1e-5).all()


def paged_scores(q, cache, slots):
    """Decode scores over a paged FP8 cache: gather rows, widen, transpose, multiply."""
    d, heads = q.shape
    n = slots.shape[0]
    index, rows = nl.ndarray((n, 1), nl.int32), nl.ndarray((n, d), cache.dtype)
    nisa.dma_copy(index, slots)
    nisa.dma_copy(rows, cache.ap([[d, n], [1, d]], vector_offset=index))
    wide, kt, tk = nl.ndarray((n, d), BF16), nl.ndarray((d, n), BF16, nl.psum), nl.ndarray((d, n), BF16)
    nisa.tensor_copy(wide, rows)
    nisa.nc_transpose(kt, wide)
    nisa.tensor_copy(tk, kt)
    tq, acc, out = nl.ndarray((d, heads), BF16), nl.ndarray((heads, n), F32, nl.psum), nl.ndarray((heads, n), F32)
    nisa.dma_copy(tq, q)
    nisa.nc_matmul(acc, tq, tk, accumulate=False)
    nisa.tensor_copy(out, acc)
    hbm = nl.ndarray((heads, n), F32, nl.shared_hbm)
    nisa.dma_copy(hbm, out)
    return hbm


def test_paged_fp8_scores(sim):
    q = RNG.integers(-3, 4, (64, 8)).astype(ml_dtypes.bfloat16)
    cache = RNG.integers(-8, 9, (512, 64)).astype(ml_dtypes.float8_e4m3)
    slots = RNG.permutation(512)[:128].astype(np.int32).reshape(-1, 1)
    want = q.astype(np.float32).T @ cache[slots[:, 0]].astype(np.float32).T
    assert np.array_equal(sim(paged_scores, q, cache, slots, target="trn2"), want)


# -- MX ------------------------------------------------------------------------------------------------------------------------


def mx_online(x, w):
    """bf16 [M, K] x bf16 [N, K]: DMA as fp32 pairs, PE transposes with stride 2, quantize_mx, nc_matmul_mx.

    Contiguous quads: partition p holds k = 4p .. 4p+3 of each 512 of K.
    """
    (m, k_all), n = x.shape, w.shape[0]
    acc = nl.ndarray((m, n), F32, nl.psum)
    for k in range(k_all // 512):
        operands = []
        for h, rows in ((x, m), (w, n)):
            pairs = nl.ndarray((rows, 256), F32)
            nisa.dma_copy(pairs, h.ap([[k_all // 2, rows], [1, 256]], offset=k * 256, dtype=F32))
            turned = nl.ndarray((128, rows, 2), F32, nl.psum)
            for j in range(2):
                nisa.nc_transpose(turned[:, :, j], pairs[:, j:256:2])
            quads = nl.ndarray((128, rows, 2), F32)
            nisa.tensor_copy(quads, turned)
            data, scale = nl.ndarray((128, rows), nl.float8_e4m3fn_x4), nl.ndarray((128, rows), nl.uint8)
            nisa.quantize_mx(dst=data, src=quads.reshape((128, rows * 2)).view(BF16), dst_scale=scale)
            operands.append((data, scale))
        (a, sa), (b, sb) = operands
        nisa.nc_matmul_mx(acc, a, b, sa, sb, accumulate=(k > 0))
    out, hbm = nl.ndarray((m, n), F32), nl.ndarray((m, n), F32, nl.shared_hbm)
    nisa.tensor_copy(out, acc)
    nisa.dma_copy(hbm, out)
    return hbm


@pytest.mark.parametrize("rule", ["neuron", "ocp"])
def test_mx_matmul_with_online_quantization(sim, rule):
    """Powers of two quantise exactly, so the order of k and the scales are checked to the bit."""
    x, w = (2.0 ** RNG.integers(-2, 3, (r, 1024)).astype(np.float32) for r in (32, 48))
    x, w = (np.sign(RNG.standard_normal(t.shape)) * t for t in (x, w))
    got = sim(mx_online, x.astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16), mx_scale=rule)
    assert np.array_equal(got, x @ w.T)


def test_mx_matmul_of_normal_data_is_close(sim):
    x, w = (RNG.standard_normal((r, 512)).astype(ml_dtypes.bfloat16) for r in (32, 48))
    got = sim(mx_online, x, w)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


# -- buffers at addresses, two cores ---------------------------------------------------------------------------------------------


def double_buffered(x):
    """Two SBUF buffers at fixed addresses, used in turn."""
    rows, f = x.shape
    out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    tiles = [nl.ndarray((128, f), x.dtype, address=(0, (i % 2) * f * 4)) for i in range(rows // 128)]
    for i in range(rows // 128):
        nisa.dma_copy(tiles[i], x[nl.ds(i * 128, 128)])
        nisa.tensor_scalar(tiles[i], tiles[i], nl.multiply, 2.0)
        nisa.dma_copy(out[nl.ds(i * 128, 128)], tiles[i])
    return out


def test_double_buffering_at_addresses(sim):
    x = RNG.standard_normal((512, 64)).astype(np.float32)
    assert np.array_equal(sim(double_buffered, x), 2 * x)
    assert sim.report.counters.sbuf_high_water == 256  # each buffer is dead before the next is written


def two_cores(x):
    """Each core doubles half, they swap results through SBUF, and core 0 reads what both wrote to shared HBM."""
    core, cores = nl.program_id(0), nl.num_programs(0)
    half = x.shape[0] // cores
    scratch, out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm), nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    mine, theirs = nl.ndarray((half, x.shape[1]), x.dtype), nl.ndarray((half, x.shape[1]), x.dtype)
    nisa.dma_copy(mine, x[nl.ds(core * half, half)])
    nisa.tensor_scalar(mine, mine, nl.multiply, 2.0)
    nisa.dma_copy(scratch[nl.ds(core * half, half)], mine)
    nisa.sendrecv(src=mine, dst=theirs, send_to_rank=1 - core, recv_from_rank=1 - core, pipe_id=0)
    nisa.core_barrier(scratch, (0, 1))
    total = nl.ndarray((half, x.shape[1]), x.dtype)
    nisa.dma_copy(total, scratch[nl.ds((1 - core) * half, half)])
    nisa.tensor_tensor(total, total, theirs, op=nl.add)
    nisa.dma_copy(out[nl.ds((1 - core) * half, half)], total)
    return out


def test_two_cores(sim):
    x = RNG.standard_normal((64, 16)).astype(np.float32)
    assert np.array_equal(sim(two_cores, x, cores=2, target="trn2"), 4 * x)
    assert len(sim.report.cores) == 2
    with pytest.raises(nisa.NkiValidationError, match="no launches on two cores"):
        sim(two_cores, x, cores=2, target="trn1")


def test_a_core_that_waits_for_nobody_is_an_error(sim):
    def body(x):
        scratch = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        if nl.program_id(0) == 0:
            nisa.core_barrier(scratch, (0, 1))

    with pytest.raises(nisa.NkiValidationError, match="waits for another that has finished"):
        sim(body, np.ones((2, 2), np.float32), cores=2)


def test_an_error_on_one_core_reaches_the_caller(sim):
    def body(x):
        if nl.program_id(0) == 1:
            nisa.tensor_copy(x, x)
        nisa.core_barrier(nl.ndarray(x.shape, x.dtype, nl.shared_hbm), (0, 1))

    with pytest.raises(nisa.NkiValidationError, match="dst is in private_hbm"):
        sim(body, np.ones((2, 2), np.float32), cores=2)


def test_kernels_call_kernels():
    inner = nki.jit(softmax)

    @nki.jit
    def outer(x):
        return inner(x)

    x = RNG.standard_normal((4, 8)).astype(np.float32)
    assert np.array_equal(outer(x), inner(x))
