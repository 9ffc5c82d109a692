"""Launching, arguments, NKIObject, loops, registers, dtypes, whole-tile functions, run.py."""

import dataclasses
import enum
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import nki
import nki.isa as nisa
import nki.language as nl
import run as runner
from nki.isa.constants import oob_mode
from nki.typing import tensor
from nkisim import dtypes, errors, view

F32 = nl.float32


def add_one(x: tensor[4, 8]):
    """x + 1 through SBUF."""
    t, out = nl.ndarray(x.shape, x.dtype), nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    nisa.dma_copy(t, x)
    nisa.tensor_scalar(t, t, nl.add, 1.0)
    nisa.dma_copy(out, t)
    return out


X = np.arange(32, dtype=np.float32).reshape(4, 8)


# -- launching ------------------------------------------------------------------------------------------------------


def test_every_way_to_launch():
    for kernel in (nki.jit(add_one), nki.jit()(add_one), nki.jit(platform_target="trn2")(add_one), nki.jit(add_one)[1]):
        assert np.array_equal(kernel(X), X + 1)
        assert np.array_equal(nki.simulate(kernel)(x=X), X + 1)
    assert np.array_equal(nki.simulate(add_one)(X), X + 1)


@pytest.mark.parametrize(
    ("name", "gen"), [("trn1", "gen2"), ("inf2", "gen2"), ("gen3", "gen3"), ("trn3", "gen4"), (None, "gen4")]
)
def test_the_target_comes_from_the_environment(monkeypatch, name, gen):
    if name:
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", name)

    @nki.jit
    def kernel():
        assert nisa.get_nc_version() == getattr(nisa.nc_version, gen)

    kernel()


def test_a_wrong_target_or_grid():
    with pytest.raises(errors.TargetError, match="'trn9' is not one of"):
        nki.jit(add_one, platform_target="trn9")(X)
    with pytest.raises(errors.LanguageError, match="need 1 or 2 cores"):
        nki.jit(add_one)[3]


class Mode(enum.Enum):
    FAST = 1


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "name", (1, (2, "x")), Mode.FAST, nl.bfloat16, np.float32, np.dtype("int8"), np.int32(3)],
)
def test_arguments_a_kernel_takes(sim, value):
    sim(lambda v: None, value)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {1}, 2**33, -(2**32), object(), 1j])
def test_arguments_a_kernel_does_not_take(sim, value):
    with pytest.raises(errors.LanguageError, match="argument 'v'"):
        sim(lambda v: None, value)


def test_variadic_kernels_are_refused(sim):
    with pytest.raises(errors.LanguageError, match="takes no"):
        sim(lambda *v: None, 1)


def test_64_bit_arrays_are_refused(sim):
    with pytest.raises(errors.DtypeError, match="not an NKI dtype"):
        sim(add_one, X.astype(np.float64))


def test_outputs_may_be_several_or_none(sim):
    def body(x):
        a, b = add_one(x), add_one(x)
        return a, None, b

    first, none, last = sim(body, X)
    assert none is None
    assert np.array_equal(first, last)
    with pytest.raises(errors.LanguageError, match="return value 0 is int"):
        sim(lambda x: 3, X)


@pytest.mark.parametrize(
    "kind",
    ["bfloat16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float16", "int8", "uint16", "bool"],
)
def test_dtypes_cross_the_boundary_unchanged(sim, kind):
    x = np.arange(8, dtype=np.uint8).reshape(2, 4).astype(np.dtype(kind) if kind != "float8_e8m0fnu" else np.uint8)
    x = x.view(ml_dtypes.float8_e8m0fnu) if kind == "float8_e8m0fnu" else x

    def body(x):
        assert str(x.dtype) == kind
        t, out = nl.ndarray(x.shape, x.dtype), nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        nisa.dma_copy(t, x)
        nisa.dma_copy(out, t)
        return out

    got = sim(body, x)
    assert got.dtype == x.dtype
    assert np.array_equal(got.view(np.uint8), x.view(np.uint8))


def test_dtypes_compare_as_names_and_as_numpy_types():
    assert nl.bfloat16 == "bfloat16" == str(nl.bfloat16)
    assert nl.float32 == np.float32
    assert nl.bfloat16 == np.dtype(ml_dtypes.bfloat16)
    assert nl.float8_e4m3 != nl.float8_e4m3fn
    assert nl.float32 != None  # noqa: E711
    assert {nl.float8_e4m3: 240.0}["float8_e4m3"] == 240.0
    assert dtypes.resolve("uint8") is nl.uint8
    assert nl.float8_e4m3.max == 240
    assert nl.float8_e4m3fn.max == 448


def test_tile_sizes(monkeypatch):
    t = nl.tile_size
    assert (t.pmax, t.gemm_stationary_fmax, t.gemm_moving_fmax, t.psum_bank_fmax, t.psum_fmax) == (
        128,
        128,
        512,
        512,
        512,
    )
    assert (t.psum_bank_fmax_bytes, t.psum_num_banks, t.bn_stats_fmax) == (2048, 8, 512)
    assert t.sbuf_size_bytes == 128 * t.sbuf_fmax_bytes == 128 * 4 * t.sbuf_fmax == 32 << 20
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")
    assert t.total_available_sbuf_size == 192 * 1024
    monkeypatch.setenv("NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE", "true")
    assert t.psum_num_banks == 8
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    assert t.psum_num_banks == 7


def test_generations_are_ordered(sim):
    def body():
        assert nisa.get_nc_version() >= nisa.nc_version.gen3
        assert nisa.get_nc_version() < nisa.nc_version.gen4

    sim(body, target="trn2")


def test_unrolled_ranges(sim):
    def body():
        for make in (nl.range, nl.static_range, nl.affine_range, nl.sequential_range):
            assert list(make(3)) == [0, 1, 2]
            assert list(make(1, 7, 2)) == [1, 3, 5]

    sim(body)


# -- NKIObject --------------------------------------------------------------------------------------------------------


def test_plain_and_annotated_attributes_are_fields():
    class Config(nl.NKIObject):
        rows: int
        columns = 4
        name: str = "x"

        def area(self):
            return self.rows * self.columns

    c = Config(3, name="y")
    assert (c.rows, c.columns, c.name, c.area()) == (3, 4, "y", 12)
    assert Config(rows=2, columns=5).area() == 10
    with pytest.raises(errors.LanguageError, match="missing argument 'rows'"):
        Config()
    with pytest.raises(errors.LanguageError, match="no field 'depth'"):
        Config(1, depth=2)
    with pytest.raises(errors.LanguageError, match="got 4 arguments"):
        Config(1, 2, "z", 4)


def test_dataclass_decorated_objects_and_factories():
    @dataclasses.dataclass
    class Buffers(nl.NKIObject):
        a = None
        b: list = dataclasses.field(default_factory=list)
        c: int = 3

        def __post_init__(self):
            self.c += 1

    first, second = Buffers(a=1), Buffers()
    first.b.append(7)
    assert (first.a, first.c, second.b) == (1, 4, [])


def test_inheritance_and_own_initializers():
    class Base(nl.NKIObject):
        a: int = 1

    class Child(Base):
        b: int = 2

    class Own(nl.NKIObject):
        scale: int = 0

        def __init__(self, value):
            self.value = value

    class OwnChild(Own):
        extra: int = 0

    assert (Child(5).a, Child(b=7).b) == (5, 7)
    assert Own(3).value == 3
    assert OwnChild(4).value == 4


# -- runtime loops ------------------------------------------------------------------------------------------------------


def rows_by_loop(x, count, style):
    """Copy `count` rows with a runtime loop."""
    out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
    zero = nl.zeros((x.shape[0], x.shape[1]), x.dtype)
    nisa.dma_copy(out, zero)
    n = nl.ndarray((1, 1), nl.int32)
    nisa.dma_copy(n, count)
    limit = nisa.register_alloc()
    nisa.register_load(limit, n)

    def body(i):
        t = nl.ndarray((1, x.shape[1]), x.dtype)
        nisa.dma_copy(t, x.ap([[x.shape[1], 1], [1, x.shape[1]]], scalar_offset=i))
        nisa.dma_copy(out.ap([[x.shape[1], 1], [1, x.shape[1]]], scalar_offset=i), t)

    if style == "fori":
        nl.fori_loop(0, limit, body)
    elif style == "dynamic":
        for i in nl.dynamic_range(limit):
            body(i)
    else:
        index, one = nl.zeros((1, 1), nl.int32), nl.full((1, 1), 1, nl.int32)
        position = nisa.register_alloc(0)

        def step(left):
            body(position)
            nisa.tensor_tensor(index, index, one, op=nl.add)
            nisa.tensor_tensor(n, n, one, op=nl.subtract)
            nisa.register_load(position, index)
            nisa.register_load(left, n)
            return left

        nl.while_loop(limit, step)
    return out


@pytest.mark.parametrize("style", ["fori", "dynamic", "while"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_runtime_loops(sim, style, count):
    got = sim(rows_by_loop, X, np.array([[count]], np.int32), style)
    assert np.array_equal(got[:count], X[:count])
    assert not got[count:].any()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda: nl.fori_loop(0, 2, lambda i: i + 1), "runtime value"),
        (lambda: nl.fori_loop(0, 2, lambda i: 5), "returns nothing"),
        (lambda: nl.fori_loop(0, 2, lambda i: None, step=nisa.register_alloc(1)), "compile-time int"),
        (lambda: nl.fori_loop(0, 2, lambda i: nisa.register_move(i, 3)), "cannot be written"),
        (lambda: nl.while_loop(nisa.register_alloc(1), lambda r: None), "must return"),
        (lambda: nl.while_loop(3, lambda r: None), "need a register"),
        (lambda: nl.static_range(nisa.register_alloc(1)), "use nl.fori_loop"),
        (lambda: nl.ds(nisa.register_alloc(1), 4), "runtime value"),
        (lambda: nisa.register_alloc(2**40), "32-bit register"),
    ],
)
def test_runtime_loop_rules(sim, body, match):
    with pytest.raises(errors.LanguageError, match=match):
        sim(lambda: body() and None)


def test_register_moves_and_stores(sim):
    def body():
        a, b, t = nisa.register_alloc(5), nisa.register_alloc(), nl.ndarray((1, 1), nl.int32)
        nisa.register_move(b, a)
        nisa.register_store(t, b)
        out = nl.ndarray((1, 1), nl.int32, nl.shared_hbm)
        nisa.dma_copy(out, t)
        return out

    assert sim(body).item() == 5


# -- whole-tile functions ---------------------------------------------------------------------------------------------------


def test_whole_tile_functions(sim):
    def body(x):
        t = nl.load(x)
        s = nl.add(nl.multiply(t, 2.0), t)
        s = nl.subtract(100.0, s)
        out = nl.ndarray(x.shape, x.dtype, nl.shared_hbm)
        nl.store(out, nl.maximum(nl.copy(s), nl.negative(nl.exp(nl.zeros_like(t)))))
        return out

    assert np.array_equal(sim(body, X), np.maximum(100 - 3 * X, -1))


def test_whole_tile_reductions_and_norms(sim):
    x = np.random.default_rng(3).standard_normal((4, 8)).astype(np.float32)

    def body(x):
        t, w = nl.load(x), nl.ones((4, 8), F32)
        parts = [nl.sum(t, axis=1), nl.max(t, axis=1, keepdims=True), nl.mean(t, axis=[1])]
        tiles = [
            nl.softmax(t),
            nl.rms_norm(t, w, axis=1, n=8),
            nl.where(nl.greater(t, 0.0), t, w),
            nl.broadcast_to(parts[0], (4, 8)),
        ]
        out = []
        for p in parts + tiles:
            h = nl.ndarray(p.shape, p.dtype, nl.shared_hbm)
            nl.store(h, p)
            out.append(h)
        return tuple(out)

    total, top, mean, soft, norm, chosen, wide = sim(body, x)
    assert np.allclose(total[:, 0], x.sum(1), rtol=1e-5, atol=1e-6)
    assert np.array_equal(top[:, 0], x.max(1))
    assert np.allclose(mean[:, 0], x.mean(1), rtol=1e-5, atol=1e-6)
    e = np.exp(x - x.max(1, keepdims=True))
    assert np.allclose(soft, e / e.sum(1, keepdims=True), rtol=1e-5)
    assert np.allclose(norm, x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6), rtol=1e-5)
    assert np.array_equal(chosen, np.where(x > 0, x, 1))
    assert np.array_equal(wide, np.repeat(total, 8, axis=1))


def test_whole_tile_matmul_and_transpose(sim):
    def body(x):
        t = nl.load(x)
        product, turned = nl.matmul(t, t, transpose_x=True), nl.add(nl.transpose(t), 0.0)
        out, other = nl.ndarray((8, 8), F32, nl.shared_hbm), nl.ndarray((8, 4), F32, nl.shared_hbm)
        nl.store(out, nl.add(product, 0.0))
        nl.store(other, nl.maximum(turned, nl.load_transpose2d(x)))
        return out, other

    product, turned = sim(body, X)
    assert np.array_equal(product, X.T @ X)
    assert np.array_equal(turned, X.T)


def test_rsqrt_of_psum_is_for_activation_only(sim):
    def body(call):
        acc, x = nl.ndarray((2, 2), F32, nl.psum), nl.full((2, 2), 4.0, F32)
        nisa.tensor_copy(acc, x)
        out = nl.ndarray((2, 2), F32)
        nisa.activation(out, nl.rsqrt, acc)
        nisa.tensor_tensor(out, out, nl.rsqrt(acc if call else x), op=nl.subtract)
        hbm = nl.ndarray((2, 2), F32, nl.shared_hbm)
        nisa.dma_copy(hbm, out)
        return hbm

    assert not sim(body, False).any()
    with pytest.raises(errors.BufferKindError, match="gpsimd cannot reach psum"):
        sim(body, True)


def test_what_fails_on_hardware_is_refused(sim):
    for call in (lambda t: nl.divide(t, t), lambda t: nl.mod(t, 2.0), lambda t: nl.matmul(t, t)):
        with pytest.raises(errors.UnspecifiedError):
            sim(lambda x: call(nl.load(x)) and None, X)  # noqa: B023


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 130)])
def test_filled_hbm(sim, shape):
    assert (sim(lambda: nl.full(shape, 2.5, F32, nl.shared_hbm)) == 2.5).all()
    assert (sim(lambda: nl.ones(shape, nl.int8, nl.shared_hbm)) == 1).all()


def test_constants(sim, tmp_path):
    np.save(tmp_path / "c.npy", X)

    def body(path):
        out = nl.ndarray((4, 8), F32, nl.shared_hbm)
        nisa.dma_copy(out, nl.shared_constant(path))
        return out, nl.shared_constant(X)

    for got in sim(body, str(tmp_path / "c.npy")):
        assert np.array_equal(got, X)


def test_constants_are_read_only_and_reported(sim):
    def body(write):
        t = nl.shared_identity_matrix(3, F32)
        out = nl.ndarray((3, 3), F32)
        nisa.tensor_copy(t if write else out, t)

    sim(body, False)
    ((_, values),) = sim.report.constants().items()
    assert np.array_equal(values, np.eye(3))
    with pytest.raises(errors.LanguageError, match="compile-time constant"):
        sim(body, True)


def test_identity(sim):
    def body():
        t = nl.shared_identity_matrix(5, dst=nl.ndarray((5, 5), nl.bfloat16))
        out = nl.ndarray((5, 5), nl.bfloat16, nl.shared_hbm)
        nisa.dma_copy(out, t)
        small = nl.ndarray((5, 5), nl.uint8, nl.shared_hbm)
        nisa.dma_copy(small, nl.shared_identity_matrix(5))
        return out, small

    for got in sim(body):
        assert np.array_equal(got.astype(np.float32), np.eye(5))


def test_device_print(sim, capsys):
    sim(lambda x: nl.device_print("value", x), X)
    assert "value" in capsys.readouterr().out


def test_buffer_predicates():
    assert nl.is_sbuf(nl.sbuf)
    assert nl.is_psum(nl.psum)
    assert nl.is_hbm(nl.shared_hbm)
    assert nl.hbm is nl.private_hbm
    assert nl.is_on_chip(nl.psum)
    assert oob_mode is nisa.oob_mode


# -- views, against numpy -----------------------------------------------------------------------------------------------------


VIEWS = [
    (lambda t: t[1], lambda a: a[1:2]),
    (lambda t: t[-1, 2], lambda a: a[3:4, 2]),
    (lambda t: t[1:3, ..., 0:4:2], lambda a: a[1:3, :, 0:4:2]),
    (lambda t: t[:, -1], lambda a: a[:, -1]),
    (lambda t: t[:, nl.ds(1, 2)], lambda a: a[:, 1:3]),
    (lambda t: t.slice(2, 1, 4, 2), lambda a: a[:, :, 1:4:2]),
    (lambda t: t.select(1, 2), lambda a: a[:, 2]),
    (lambda t: t.permute((0, 2, 1)), lambda a: a.transpose(0, 2, 1)),
    (lambda t: t.reshape((4, 12)), lambda a: a.reshape(4, 12)),
    (lambda t: t.reshape((4, 2, -1)), lambda a: a.reshape(4, 2, 6)),
    (lambda t: t.reshape_dim(2, (2, -1)), lambda a: a.reshape(4, 3, 2, 2)),
    (lambda t: t.flatten_dims(1, 2), lambda a: a.reshape(4, 12)),
    (lambda t: t.expand_dim(1), lambda a: a[:, None]),
    (lambda t: t[:, 1:2].squeeze_dim(1), lambda a: a[:, 1]),
    (lambda t: t[:, 1:2].broadcast(1, 5), lambda a: np.repeat(a[:, 1:2], 5, 1)),
    (lambda t: t.rearrange(("p", "a", ("b", "c")), ("p", "c", ("a", "b")), {"c": 2}), lambda a: a.reshape(4, 3, 2, 2).transpose(0, 3, 1, 2).reshape(4, 2, 6)),
    (lambda t: t.ap([[12, 2], [1, 4], [4, 3]], offset=12), lambda a: a[1:3].transpose(0, 2, 1)),
    (lambda t: t.ap([[12, 4], [0, 3], [1, 2]]), lambda a: np.repeat(a[:, 0, None, 0:2], 3, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", VIEWS, ids=range(len(VIEWS)))
def test_views_select_what_numpy_selects(sim, case):
    make, want = case
    a = np.arange(48, dtype=np.float32).reshape(4, 3, 4)

    def body(x):
        t = nl.ndarray(x.shape, x.dtype)
        nisa.dma_copy(t, x)
        v = make(t)
        out, hbm = nl.ndarray(v.shape, F32), nl.ndarray(v.shape, F32, nl.shared_hbm)
        nisa.dma_copy(out, v)
        nisa.dma_copy(hbm, out)
        return hbm

    got, expected = sim(body, a), want(a)
    assert np.array_equal(got.reshape(expected.shape), expected)
    assert got.ndim >= 2


def test_hbm_views_may_move_any_axis(sim):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def body(x):
        assert x[1].shape == (3, 4)
        assert x[:, 1, 0:2].shape == (2, 2)
        out = nl.ndarray((4, 3, 2), F32, nl.shared_hbm)
        nisa.dma_copy(out, x.permute((2, 1, 0)))
        return out

    assert np.array_equal(sim(body, a), a.transpose(2, 1, 0))


def test_reinterpreting_bits(sim):
    a = np.arange(16, dtype=np.uint32).reshape(2, 8) * np.uint32(0x01020304)

    def body(x):
        t = nl.ndarray((2, 8), nl.uint32)
        nisa.dma_copy(t, x)
        assert t.view(nl.float8_e4m3fn_x4).shape == (2, 8)
        assert t.view(nl.uint8).view(nl.uint16).shape == (2, 16)
        assert t[:, 2:4].view(nl.uint8).offset == 8
        out, words = nl.ndarray((2, 32), nl.uint8, nl.shared_hbm), nl.ndarray((2, 4), nl.uint16, nl.shared_hbm)
        nisa.dma_copy(out, t.view(nl.uint8))
        nisa.dma_copy(words, t[:, 1:3].view(nl.uint16))
        return out, words

    octets, words = sim(body, a)
    assert np.array_equal(octets, a.view(np.uint8))
    assert np.array_equal(words, a[:, 1:3].copy().view(np.uint16))


def test_view_queries(sim):
    def body():
        t = nl.ndarray((4, 3, 4), F32)
        assert (t.ndim, t.size, t.offset, t.strides) == (3, 48, 0, (12, 4, 1))
        assert t.get_pattern() == [[12, 4], [4, 3], [1, 4]]
        assert t.is_contiguous()
        assert not t.permute((0, 2, 1)).is_contiguous()
        assert t[2:4, 1:2].is_contiguous()
        assert not t.is_indirect()
        assert t[1, 2].offset == 20

    sim(body)


def test_reshape_finds_strides_or_says_no():
    assert view.reshape_strides((3, 4), (8, 2), (3, 2, 2)) == (8, 4, 2)
    assert view.reshape_strides((2, 3, 4), (12, 4, 1), (6, 2, 2)) == (4, 2, 1)
    assert view.reshape_strides((1, 4), (99, 1), (4,)) == (1,)
    with pytest.raises(errors.ShapeError):
        view.reshape_strides((3, 4), (1, 3), (12,))


@pytest.mark.parametrize("seed", range(40))
def test_reshape_agrees_with_numpy(seed):
    """Random strided layouts: the strides found address the elements numpy's reshape would copy."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4], size=int(rng.integers(1, 5))))
    base = np.arange(4096).reshape(8, 8, 8, 8)
    order = tuple(int(i) for i in rng.permutation(4)[: len(shape)])
    rest = [i for i in range(4) if i not in order]
    a = base.transpose(*order, *rest)[tuple(slice(0, n) for n in shape) + (0,) * len(rest)]
    strides = tuple(s // base.itemsize for s in a.strides)
    size = int(np.prod(shape))
    factors = [d for d in range(1, size + 1) if size % d == 0]
    first = int(rng.choice(factors))
    new = (first, size // first)
    try:
        found = view.reshape_strides(shape, strides, new)
    except errors.ShapeError:
        assert not np.shares_memory(a.reshape(new), base)
        return
    offsets = np.add.outer(np.arange(new[0]) * found[0], np.arange(new[1]) * found[1])
    assert np.array_equal(base.reshape(-1)[offsets + int(a.reshape(-1)[0])], a.reshape(new))


# -- run.py ---------------------------------------------------------------------------------------------------------------------


def test_run_resolves_a_backend(monkeypatch):
    name, module = runner.backend()
    assert (name, module) == ("sim", nki)
    assert np.array_equal(runner.run(nki.jit(add_one), X, target_name="trn2"), X + 1)
    with pytest.raises(runner.BackendError, match="sim nki is already imported"):
        runner.backend("official")
    monkeypatch.setenv("NKI_BACKEND", "gpu")
    with pytest.raises(runner.BackendError, match="need official or sim"):
        runner.backend()


def test_run_as_a_command(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text("import nki, sys\nprint(hasattr(nki, 'SIMULATOR'), sys.argv[1])\n")
    command = [sys.executable, runner.__file__, str(script), "argument"]
    sim = subprocess.run(command, capture_output=True, text=True, env={"NKI_BACKEND": "sim", "PATH": ""}, check=True)
    assert sim.stdout.split() == ["True", "argument"]
    official = subprocess.run(
        command, capture_output=True, text=True, env={"NKI_BACKEND": "official", "PATH": ""}, check=False
    )
    try:
        import importlib.metadata

        importlib.metadata.version("nki")
    except importlib.metadata.PackageNotFoundError:
        assert official.returncode != 0
        assert "official nki package is not installed" in official.stderr


def test_an_official_package_is_preferred(tmp_path):
    package = tmp_path / "nki"
    package.mkdir()
    (package / "__init__.py").write_text("def simulate(kernel): return kernel\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(runner._HERE)!r}]; import run; print(run.backend()[0])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert out.stdout.strip() == "official"
    (package / "__init__.py").write_text("raise ImportError('placeholder')\n")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PATH": ""})
    assert out.stdout.strip() == "sim", out.stderr
