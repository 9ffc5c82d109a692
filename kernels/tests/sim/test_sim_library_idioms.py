"""What published kernels do beyond the instructions of ours: tensor indirection, short last tiles, loop-carried state,
old spellings, and names that are refused with a reason."""

import ml_dtypes
import numpy as np
import pytest

import nki
import nki.collectives as collectives
import nki.isa as nisa
import nki.language as nl
from nkisim import blas, errors

F32 = nl.float32
RNG = np.random.default_rng(7)


def load(x):
    """An array in SBUF."""
    t = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(t, x)
    return t


def save(t):
    """A tile as an output."""
    out = nl.ndarray(t.shape, t.dtype, nl.shared_hbm)
    nisa.dma_copy(out, t)
    return out


# -- tensor indirection -----------------------------------------------------------------------------------------------


def snake(index, group, count):
    """Offsets of each group of partitions in reading order: [i % group, i // group]."""
    return [[index[g + i % group, i // group] for i in range(count)] for g in range(0, index.shape[0], group)]


def test_indirect_gathers_columns(sim):
    x = RNG.standard_normal((32, 20)).astype(np.float32)
    index = RNG.integers(0, 20, (32, 3)).astype(np.uint16)

    def body(x, index):
        d = nl.ndarray((32, 40), F32)
        nisa.tensor_copy(d, load(x).indirect(load(index), num_elem=40), engine=nisa.engine.vector)
        return save(d)

    got = sim(body, x, index)
    for group, offsets in enumerate(snake(index, 16, 40)):
        rows = slice(16 * group, 16 * group + 16)
        assert np.array_equal(got[rows], x[rows][:, offsets])


def test_indirect_in_placed_memory_and_arithmetic(sim):
    x = RNG.standard_normal((16, 8)).astype(np.float32)
    index = RNG.integers(0, 4, (16, 1)).astype(np.uint16)

    def body(x, index):
        t = nl.ndarray((16, 8), F32, nl.sbuf, address=(32, 4096))
        nisa.dma_copy(t, x)
        d = nl.ndarray((16, 16), F32)
        nisa.tensor_scalar(d, t[:, 2:6].indirect(load(index)), nl.multiply, 2.0)  # num_elem is index.size: 16
        return save(d)

    assert np.array_equal(sim(body, x, index), 2 * x[:, 2:6][:, index[:, 0]])


def test_indirect_on_the_tensor_engine_reads_groups_of_32(sim):
    x = RNG.standard_normal((64, 50)).astype(np.float32)
    index = RNG.integers(0, 50, (64, 1)).astype(np.uint16)

    def body(x, index):
        p, d = nl.ndarray((32, 64), F32, nl.psum), nl.ndarray((32, 64), F32)
        nisa.nc_transpose(p, load(x).indirect(load(index), 32), engine=nisa.engine.tensor)
        nisa.tensor_copy(d, p)
        return save(d)

    got = sim(body, x, index)
    for group, offsets in enumerate(snake(index, 32, 32)):
        rows = slice(32 * group, 32 * group + 32)
        assert np.array_equal(got[:, rows], x[rows][:, offsets].T)


def test_indirect_scatters(sim):
    x = RNG.standard_normal((16, 16)).astype(np.float32)
    index = RNG.permutation(24)[:16].astype(np.uint16).reshape(16, 1)

    def body(x, index):
        d = nl.zeros((16, 24), F32)
        nisa.tensor_copy(d.indirect(load(index), 16), load(x))
        return save(d)

    want = np.zeros((16, 24), np.float32)
    want[:, index[:, 0]] = x
    assert np.array_equal(sim(body, x, index), want)


@pytest.mark.parametrize(
    ("use", "kind", "match"),
    [
        (lambda t, i: nisa.dma_copy(t, t.indirect(i, 8)), errors.EngineError, "dma cannot use one"),
        (lambda t, i: nisa.tensor_copy(t[:, 0:8], t.indirect(i, 17)), errors.ShapeError, "17"),
        (lambda t, i: nisa.tensor_copy(t[:, 0:8], t[:, 0:4].indirect(i, 8)), errors.BoundsError, r"outside 0\.\.4"),
        (lambda t, i: nisa.tensor_copy(t.indirect(i, 8), t), errors.BoundsError, "offsets of indirect"),
        (lambda t, i: t.indirect(i, 8)[:, 0:2], errors.BoundsError, "viewed again"),
        (lambda t, i: t.indirect(i, 8).indirect(i, 8), errors.BoundsError, "already has a runtime index"),
        (lambda t, i: t.indirect(t, 8), errors.DtypeError, "need uint16"),
        (lambda t, i: t.indirect(3, 8), errors.BoundsError, "tensor in SBUF"),
        (lambda t, i: t[:, 0:8:2].indirect(i, 8), errors.UnspecifiedError, "contiguous rows"),
        (lambda t, i: nl.ndarray((32, 8), F32).indirect(i, 8), errors.PartitionError, "index has 16"),
        (lambda t, i: t.indirect(i, 0), errors.ShapeError, "at least 1"),
    ],
)
def test_indirect_rules(sim, use, kind, match):
    def body():
        t, i = nl.zeros((16, 8), F32), nl.full((16, 1), 5, nl.uint16)
        use(t, i)

    with pytest.raises(kind, match=match):
        sim(body)


def test_indirect_needs_trn3_and_whole_groups(sim):
    def body(partitions, count):
        t, d = nl.zeros((partitions, 8), F32), nl.ndarray((partitions, count), F32)
        nisa.tensor_copy(d, t.indirect(nl.zeros((partitions, 1), nl.uint16), count))

    with pytest.raises(errors.TargetError, match="indirect"):
        sim(body, 16, 8, target="trn2")
    for partitions, count in ((8, 8), (16, 17)):
        with pytest.raises(errors.BoundsError, match="groups of 16"):
            sim(body, partitions, count)


def test_local_gather_of_runs(sim):
    x = RNG.standard_normal((32, 12, 4)).astype(np.float32)
    index = RNG.integers(0, 12, (32, 2)).astype(np.uint16)

    def body(x, index):
        d = nl.ndarray((32, 20, 4), F32)
        nisa.local_gather(d, load(x), load(index), num_elem_per_idx=4, num_valid_indices=20)
        return save(d)

    got = sim(body, x, index * np.uint16(4))  # offsets count elements
    for core, offsets in enumerate(snake(index, 16, 20)):
        rows = slice(16 * core, 16 * core + 16)
        assert np.array_equal(got[rows], x[rows][:, offsets])


def test_gather_flattened(sim):
    x = RNG.standard_normal((8, 3, 5)).astype(np.float32)
    index = RNG.integers(0, 15, (8, 4)).astype(np.uint32)

    def body(x, index):
        exact = nl.gather_flattened(load(x), load(index))
        return save(exact), save(nl.gather_flattened(load(x), load(index), dtype=nl.bfloat16))

    want = np.take_along_axis(x.reshape(8, 15), index.astype(int), 1)
    exact, rounded = sim(body, x, index)
    assert np.array_equal(exact, want)
    assert np.array_equal(rounded, want.astype(ml_dtypes.bfloat16))
    with pytest.raises(errors.UnspecifiedError, match="axis 1"):
        sim(lambda x, index: nl.gather_flattened(load(x), load(index), axis=1), x, index)


# -- short last tiles -------------------------------------------------------------------------------------------------


def test_bounds_of_range_select_may_be_longer(sim):
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    high = np.arange(128, dtype=np.float32).reshape(128, 1)

    def body(x, high):
        t, d = load(x), nl.ndarray((5, 8), F32)
        nisa.range_select(d, t, nl.greater_equal, nl.less, nl.zeros((128, 1), F32), load(high))
        return save(d)

    got = sim(body, x, high)
    keep = np.arange(8)[None, :] < np.arange(5)[:, None]
    assert np.array_equal(got, np.where(keep, x, np.float32(-3.4028235e38)))
    with pytest.raises(errors.ShapeError, match="bound0"):
        sim(body, x, high, range_bounds="error")


def test_fresh_memory_can_be_read_as_the_official_simulator_does(sim):
    def body(x):
        t, d = nl.ndarray((4, 4), F32), nl.ndarray((4, 4), F32)
        nisa.dma_copy(t[0:2], x)
        nisa.tensor_scalar(d, t, nl.add, 1.0)
        n, m = nl.ndarray((4, 4), nl.int32), nl.ndarray((4, 4), nl.int32)
        nisa.tensor_scalar(m, n, nl.add, 1)
        return save(d), save(m), nl.ndarray((2, 2), nl.bfloat16, nl.shared_hbm)

    x = np.ones((2, 4), np.float32)
    with pytest.raises(errors.UninitializedError, match="switch uninitialized"):
        sim(body, x)
    d, m, nothing = sim(body, x, uninitialized="fill")
    assert (d[:2] == 2).all() and np.isnan(d[2:]).all()
    assert (m == 5).all()
    assert nothing.shape == (2, 2)


@pytest.mark.parametrize("step", [1, 2])
def test_one_unwritten_element_is_seen_in_any_layout(sim, step):
    def body(x, missing):
        t = nl.ndarray((4, 8 * step), nl.bfloat16)
        for i in range(8):
            if i != missing:
                nisa.dma_copy(t[:, i * step : i * step + 1], x)
        d = nl.ndarray((4, 8), nl.bfloat16)
        nisa.tensor_scalar(d, t[:, 0 : 8 * step : step], nl.add, 1.0)
        return save(d)

    x = np.ones((4, 1), ml_dtypes.bfloat16)
    assert (sim(body, x, None) == 2).all()
    for missing in (0, 3, 7):
        with pytest.raises(errors.UninitializedError, match=rf"\(0, {missing}\)"):
            sim(body, x, missing)


# -- state and spellings ----------------------------------------------------------------------------------------------


def test_assignment_copies_on_chip(sim):
    def body(x):
        state = nl.zeros((4, 8), nl.bfloat16)
        state[...] = load(x)
        state[:, 0:2] = nl.full((4, 2), 9.0, F32)
        return save(state)

    x = RNG.standard_normal((4, 8)).astype(np.float32)
    want = x.astype(ml_dtypes.bfloat16)
    want[:, :2] = 9
    assert np.array_equal(sim(body, x), want)


@pytest.mark.parametrize("value", [lambda x: 0.0, lambda x: x])
def test_nothing_else_is_assigned(sim, value):
    def body(x):
        nl.zeros((4, 8), F32)[...] = value(x)

    with pytest.raises(errors.LanguageError, match="on-chip tile can be assigned"):
        sim(body, np.zeros((4, 8), np.float32))


def test_copy_brings_psum_to_sbuf(sim):
    def body(x):
        product = nl.matmul(load(x), load(x), transpose_x=True)
        tile = nl.copy(product)
        assert product.buffer is nl.psum and tile.buffer is nl.sbuf
        return save(tile)

    x = RNG.standard_normal((8, 4)).astype(np.float32)
    assert np.allclose(sim(body, x), x.T @ x, rtol=1e-6)


def test_sendrecv_with_the_argument_of_nki_0_3(sim):
    def body(x):
        me = nl.program_id(0)
        t, d = nl.full((4, 8), float(me + 1), F32), nl.ndarray((4, 8), F32)
        nisa.sendrecv(src=t, dst=d, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0, use_gpsimd_dma=True)
        out = nl.ndarray((2, 4, 8), F32, nl.shared_hbm)
        nisa.dma_copy(out[me], d)
        return out

    assert sim(body, X, cores=2)[:, 0, 0].tolist() == [2, 1]
    assert "gpsimd" in {i.engine for i in sim.report.instructions if i.name == "sendrecv"}


X = np.zeros((4, 8), np.float32)


def test_versions(sim):
    def body(gen, sub):
        assert nisa.get_nc_version() == gen and nisa.get_nc_sub_version() == sub
        assert isinstance(nisa.memset(nl.ndarray((1, 1), F32), 0.0), nisa.NkiInstruction)

    sim(body, 3, 0, target="trn2")
    sim(body, 4, 1, target="trn3")


# -- refused, with the reason -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda: nisa.topk(None, None, None, 16), "topk: one edition"),
        (lambda: nisa.rand_get_state(nl.ndarray((16, 6), nl.uint32)), "rand_get_state: .*XORWOW"),
        (lambda: collectives.all_reduce([], [], collectives.ReplicaGroup([[0]]), nl.add), "all_reduce needs several"),
        (lambda: collectives.rank_id(), "rank_id needs several"),
    ],
)
def test_refusals_name_the_call_and_say_why(sim, use, match):
    with pytest.raises(errors.UnspecifiedError, match=match):
        sim(use)


def test_names_that_are_gone_or_unknown():
    for name in ("benchmark", "baremetal", "simulate_kernel", "compiler"):
        with pytest.raises(AttributeError, match="removed before NKI 0.3"):
            getattr(nki, name)
    with pytest.raises(AttributeError, match="not modelled"):
        collectives.no_such_collective  # noqa: B018


def test_blas_threads_come_back():
    controls = blas._controls()
    if controls is None:
        pytest.skip("this numpy does not bring OpenBLAS")
    get, put = controls
    before = get()
    put(2)
    with blas.one_thread():
        assert get() == 1
    assert get() == 2
    put(before)
