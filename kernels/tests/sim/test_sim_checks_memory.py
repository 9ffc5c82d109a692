"""Checks on allocation, views, bounds, partitions, definedness and addresses: each raises, at the kernel's line."""

import inspect

import ml_dtypes
import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl
from nkisim import errors


def sb(shape, dtype=nl.float32, fill=1, **kw):
    """An SBUF tile of one value (or undefined with fill=None)."""
    t = nl.ndarray(shape, dtype, **kw)
    if fill is not None:
        nisa.memset(t, float(fill) if t.dtype.is_float else fill)
    return t


def raises(sim, kind, match, body, *args, **options):
    """The body fails with `kind` and the error names this file and a line inside the body."""
    with pytest.raises(kind, match=match) as caught:
        sim(body, *args, **options)
    lines, first = inspect.getsourcelines(body)
    assert caught.value.filename == __file__
    assert first <= caught.value.lineno < first + len(lines)
    return caught.value


# -- allocation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "kind", "match"),
    [
        ((129, 4), {}, errors.PartitionError, "the limit is 128"),
        ((128,), {}, errors.ShapeError, "at least 2 axes"),
        ((4, 0), {}, errors.ShapeError, "need at least 1"),
        ((4, 2.0), {}, errors.ShapeError, "compile-time int"),
        ((4, 65537), {}, errors.CapacityError, "sbuf has 262144"),
        ((4, 4097), {"buffer": nl.psum}, errors.CapacityError, "psum has 16384"),
        ((4, 4), {"buffer": "sbuf"}, errors.LanguageError, "not one of nl.sbuf"),
        ((4, 4), {"dtype": "float64"}, errors.DtypeError, "not an NKI dtype"),
        ((64, 4), {"address": (96, 0)}, errors.PartitionError, "leaves the 128"),
        ((64, 4), {"address": (0, 262140)}, errors.CapacityError, "leaves the 262144"),
        ((64, 4), {"address": (0, 0), "buffer": nl.hbm}, errors.BufferKindError, "sbuf and psum"),
        ((64, 4), {"address": (0, 6), "buffer": nl.psum}, errors.PsumError, "multiple of 4"),
        ((64, 4), {"address": 0}, errors.LanguageError, r"need \(partition, byte\)"),
    ],
)
def test_allocation_is_validated(sim, shape, options, kind, match):
    def body():
        nl.ndarray(shape, **({"dtype": nl.float32} | options))

    raises(sim, kind, match, body)


@pytest.mark.parametrize(("target", "limit"), [("trn1", 192), ("trn2", 224), ("trn3", 256)])
def test_sbuf_is_as_large_as_the_target_says(sim, target, limit):
    def fits():
        assert nl.tile_size.sbuf_fmax_bytes == limit * 1024
        sb((2, limit * 256))

    def too_much():
        a, b = sb((2, limit * 128)), sb((2, limit * 128 + 1))
        nisa.tensor_copy(a[:, 0:1], b[:, 0:1])

    sim(fits, target=target)
    with pytest.raises(errors.CapacityError, match="bytes a partition of sbuf are live at once"):
        sim(too_much, target=target)
    sim(too_much, target=target, capacity="ignore")


def test_tiles_that_are_not_live_together_share_sbuf(sim):
    def body():
        for _ in range(8):
            a = sb((2, 40000))
            b = nl.ndarray((2, 40000), nl.bfloat16)
            nisa.tensor_copy(b, a)

    sim(body)
    assert sim.report.counters.sbuf_high_water == 240000


# -- views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "kind", "match"),
    [
        (lambda t: t[:, 3:9], errors.BoundsError, "not within 0..8"),
        (lambda t: t[:, 5:5], errors.BoundsError, "is empty"),
        (lambda t: t[:, 8], errors.BoundsError, "outside 0..8"),
        (lambda t: t[:, -9], errors.BoundsError, "outside 0..8"),
        (lambda t: t[0, 0, 0], errors.BoundsError, "3 indices"),
        (lambda t: t[0:4:2], errors.PartitionError, "a step of 2"),
        (lambda t: t[:, 0:8:0], errors.BoundsError, "step is 0"),
        (lambda t: t[:, 1.0], errors.LanguageError, "is not an int"),
        (lambda t: t[nl.ds(60, 8)], errors.BoundsError, "not within 0..64"),
        (lambda t: t.permute((1, 0)), errors.PartitionError, "cannot be moved"),
        (lambda t: t.reshape((32, 16)), errors.PartitionError, "changes the partition axis"),
        (lambda t: t.reshape((64, 9)), errors.ShapeError, "need 512"),
        (lambda t: t.reshape_dim(0, (8, 8)), errors.PartitionError, "cannot be split"),
        (lambda t: t.flatten_dims(0, 1), errors.PartitionError, "cannot be merged"),
        (lambda t: t.expand_dim(0), errors.PartitionError, "cannot be preceded"),
        (lambda t: t.broadcast(1, 4), errors.ShapeError, "only an axis of 1"),
        (
            lambda t: t[:, 0:4].reshape_dim(1, (2, 2)).permute((0, 2, 1)).reshape((64, 4)),
            errors.ShapeError,
            "cannot be seen",
        ),
        (lambda t: t[:, 0:8:2].view(nl.uint8), errors.ShapeError, "not contiguous"),
        (lambda t: t[:, 0:3].view(nl.bfloat16).view(nl.uint8)[:, 1:12].view(nl.float32), errors.ShapeError, "divide"),
        (lambda t: t.ap([[4, 64], [1, 8]]), errors.PartitionError, "partition stride of this tensor is 8"),
        (lambda t: t.ap([[16, 32], [1, 8]]), errors.PartitionError, "first stride is 16"),
        (lambda t: t.ap([[8, 65], [1, 8]]), errors.BoundsError, "reaches partition 64"),
        (lambda t: t.ap([[8, 64], [1, 9]]), errors.BoundsError, "reaches element 8"),
        (lambda t: t.ap([[8, 64], [1, 8]], offset=1), errors.BoundsError, "reaches element 8"),
        (lambda t: t.ap([[8, 64], [1, 0]]), errors.BoundsError, "count >= 1"),
        (lambda t: t.ap([8, 64]), errors.ShapeError, r"not \[stride, count\]"),
        (lambda t: t + t, errors.LanguageError, "no operators"),
        (lambda t: 1 if t else 0, errors.LanguageError, "no truth value"),
        (lambda t: list(t), errors.LanguageError, "not iterable"),
    ],
)
def test_view_rules(sim, use, kind, match):
    with pytest.raises(kind, match=match):
        sim(lambda: use(nl.ndarray((64, 8), nl.float32)))


def test_ap_on_a_view_is_a_switch(sim):
    x = np.arange(32, dtype=np.float32).reshape(4, 8)

    def body(x):
        out = nl.ndarray((4, 2), nl.float32, nl.shared_hbm)
        nisa.dma_copy(out, x[:, 2:8].ap([[8, 4], [1, 2]], offset=1))
        return out

    assert sim(body, x)[0].tolist() == [3, 4]
    assert sim(body, x, ap_on_view="whole")[0].tolist() == [1, 2]
    raises(sim, errors.UnspecifiedError, "documents disagree", body, x, ap_on_view="error")


# -- operand placement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "count", "legal"), [
    (0, 128, True), (0, 65, True), (32, 65, False), (0, 33, True), (64, 64, True), (32, 33, False), (96, 32, True),
    (32, 32, True), (16, 16, False), (33, 1, False), (64, 33, True), (96, 1, True),
])  # fmt: skip
def test_start_partition(sim, first, count, legal):
    def body():
        t = sb((128, 4))
        nisa.tensor_scalar(t[first : first + count], t[first : first + count], nl.add, 1.0)

    if legal:
        sim(body)
    else:
        raises(sim, errors.PartitionError, "partitions from", body)


def test_dma_may_start_at_any_partition(sim):
    def body(x):
        t = nl.ndarray((128, 4), nl.float32)
        nisa.dma_copy(t[5:9], x)

    sim(body, np.zeros((4, 4), np.float32))


def test_more_than_four_free_levels(sim):
    def body():
        t = sb((2, 256))
        nisa.tensor_copy(nl.ndarray((2, 16), nl.float32), t.ap([[256, 2], [128, 2], [32, 2], [8, 2], [2, 2], [1, 1]]))
        nisa.tensor_copy(nl.ndarray((2, 32), nl.float32), t.ap([[256, 2], [128, 2], [32, 2], [9, 2], [3, 2], [1, 2]]))

    raises(sim, errors.ShapeError, "needs 5 free levels", body)


def test_a_destination_names_each_element_once(sim):
    def body():
        t = sb((2, 4))
        nisa.tensor_copy(nl.ndarray((2, 4), nl.float32).ap([[4, 2], [0, 4]]), t)

    raises(sim, errors.BoundsError, "writes some element twice", body)


def test_interleaved_destinations_are_distinct(sim):
    def body():
        t = sb((2, 6))
        nisa.tensor_copy(nl.ndarray((2, 8), nl.float32).ap([[8, 2], [3, 2], [2, 3]]), t)

    sim(body)


# -- definedness ----------------------------------------------------------------------------------------------------


def test_arithmetic_on_unwritten_elements(sim):
    def body():
        a, b = nl.ndarray((2, 4), nl.float32), nl.ndarray((2, 4), nl.float32)
        nisa.memset(a[:, 0:3], 1.0)
        nisa.tensor_scalar(b, a, nl.add, 1.0)

    error = raises(sim, errors.UninitializedError, r"data reads element \(0, 3\)", body)
    assert error.instruction == "tensor_scalar"


@pytest.mark.parametrize("hop", ["tensor_copy", "cast", "dma", "transpose", "shuffle", "pair", "select"])
def test_undefinedness_travels_through_copies(sim, hop):
    def body(poison):
        a = nl.ndarray((32, 32), nl.bfloat16 if hop == "pair" else nl.float32)
        nisa.memset(a, 1.0)
        if poison:
            fresh = nl.ndarray(a.shape, a.dtype)
            nisa.tensor_copy(a[0:1, 4:5], fresh[0:1, 4:5])
        if hop == "tensor_copy":
            b = nl.ndarray((32, 32), nl.float32)
            nisa.tensor_copy(b, a)
        elif hop == "cast":
            b = nl.ndarray((32, 32), nl.bfloat16)
            nisa.tensor_copy(b, a)
        elif hop == "dma":
            h, b = nl.ndarray((32, 32), nl.float32, nl.hbm), nl.ndarray((32, 32), nl.float32)
            nisa.dma_copy(h, a)
            nisa.dma_copy(b, h)
        elif hop == "transpose":
            b = nl.ndarray((32, 32), nl.float32)
            nisa.nc_transpose(b, a)
        elif hop == "shuffle":
            b = nl.ndarray((32, 32), nl.float32)
            nisa.nc_stream_shuffle(src=a, dst=b, shuffle_mask=list(reversed(range(32))))
        elif hop == "select":
            b = nl.ndarray((32, 32), nl.float32)
            nisa.affine_select(b, [[1, 32]], 0, a, 0.0, cmp_op=nl.greater_equal, offset=0)
        else:
            b = nl.ndarray((32, 32), nl.bfloat16)
            nisa.tensor_copy(b.view(nl.float32), a.view(nl.float32))
        out, hbm = nl.ndarray(b.shape, b.dtype), nl.ndarray(b.shape, b.dtype, nl.shared_hbm)
        nisa.tensor_scalar(out, b, nl.multiply, 2.0)
        nisa.dma_copy(hbm, out)
        return hbm

    assert (sim(body, False) == 2).all()
    raises(sim, errors.UninitializedError, "never written", body, True)


def test_half_an_undefined_pair_is_still_readable(sim):
    """Copies work on bytes: an undefined bf16 does not spoil its neighbour moved in one fp32."""

    def body():
        a, b = nl.ndarray((2, 4), nl.bfloat16), nl.ndarray((2, 4), nl.bfloat16)
        nisa.memset(a[:, 0:4:2], 3.0)
        nisa.tensor_copy(b.view(nl.float32), a.view(nl.float32))
        nisa.tensor_scalar(b[:, 0:4:2], b[:, 0:4:2], nl.add, 1.0)

    sim(body)


def test_affine_select_may_mask_unwritten_elements_away(sim):
    def body():
        a, b = nl.ndarray((2, 4), nl.float32), nl.ndarray((2, 4), nl.float32)
        nisa.memset(a[:, 0:2], 1.0)
        nisa.affine_select(b, [[1, 4]], 0, a, 0.0, cmp_op=nl.less, offset=-2)
        nisa.tensor_scalar(b, b, nl.add, 1.0)

    sim(body)


def test_an_output_must_be_written_whole(sim):
    def body(x):
        out = nl.ndarray((4, 4), nl.float32, nl.shared_hbm)
        nisa.dma_copy(out[0:3], x)
        return out

    with pytest.raises(errors.UninitializedError, match=r"4 elements were never written, the first is \(3, 0\)"):
        sim(body, np.ones((3, 4), np.float32))


def test_outputs_live_in_shared_hbm(sim):
    def body(x):
        out = nl.ndarray((3, 4), nl.float32, nl.hbm)
        nisa.dma_copy(out, x)
        return out

    with pytest.raises(errors.BufferKindError, match="outputs live in shared_hbm"):
        sim(body, np.ones((3, 4), np.float32))


def test_inputs_written_by_a_kernel_change_in_place(sim):
    x = np.ones((2, 4), np.float32)

    def body(x):
        t = sb((2, 4), fill=5)
        nisa.dma_copy(x, t)

    assert sim(body, x) is None
    assert (x == 5).all()


def test_buffers_at_one_address_clobber_each_other(sim):
    def body(use_old):
        a, b = sb((2, 4), address=(0, 0), fill=1), nl.ndarray((2, 4), nl.float32, address=(0, 8))
        nisa.memset(b, 2.0)
        nisa.tensor_scalar(b, b, nl.add, 1.0)
        nisa.tensor_scalar(a[:, 0:2], a[:, 0:2], nl.add, 1.0)
        if use_old:
            nisa.tensor_scalar(a, a, nl.add, 1.0)

    sim(body, False)
    raises(sim, errors.UninitializedError, "overwritten through another tensor", body, True)


# -- runtime addresses ------------------------------------------------------------------------------------------------


def gather(mode, index):
    def body(table):
        i = nl.ndarray((4, 1), nl.int32)
        hbm = nl.shared_constant(np.array(index, np.int32).reshape(4, 1))
        nisa.dma_copy(i, hbm)
        out = sb((4, 8), fill=-1)
        nisa.dma_copy(out, table.ap([[8, 4], [1, 8]], vector_offset=i), oob_mode=mode)
        result = nl.ndarray((4, 8), nl.float32, nl.shared_hbm)
        nisa.dma_copy(result, out)
        return result

    return body


TABLE = np.arange(48, dtype=np.float32).reshape(6, 8)


def test_vector_offset_gathers_rows(sim):
    out = sim(gather(nisa.oob_mode.error, [5, 0, 3, 3]), TABLE)
    assert np.array_equal(out, TABLE[[5, 0, 3, 3]])


def test_an_index_out_of_range_is_an_error_or_a_skipped_row(sim):
    with pytest.raises(errors.BoundsError, match=r"index 6 of partition 1 is outside 0\.\.6"):
        sim(gather(nisa.oob_mode.error, [5, 6, 3, 3]), TABLE)
    with pytest.raises(errors.BoundsError, match="index -1"):
        sim(gather(nisa.oob_mode.error, [5, 2, 3, -1]), TABLE)
    out = sim(gather(nisa.oob_mode.skip, [5, 6, 3, -1]), TABLE)
    assert np.array_equal(out[[0, 2]], TABLE[[5, 3]])
    assert (out[[1, 3]] == -1).all()


def scatter(rows, values):
    def body(out):
        i = nl.ndarray((len(rows), 1), nl.int32)
        nisa.dma_copy(i, nl.shared_constant(np.array(rows, np.int32).reshape(-1, 1)))
        t = nl.ndarray((len(rows), 8), nl.float32)
        nisa.dma_copy(t, nl.shared_constant(np.array(values, np.float32)[:, None].repeat(8, 1)))
        nisa.dma_copy(out.ap([[8, len(rows)], [1, 8]], vector_offset=i), t)

    return body


def test_scatter_writes_rows_and_refuses_conflicts(sim):
    out = np.zeros((6, 8), np.float32)
    sim(scatter([4, 1, 4], [7, 8, 7]), out)
    assert (out[4] == 7).all()
    assert (out[1] == 8).all()
    with pytest.raises(errors.RaceError, match="scatter different data to one row"):
        sim(scatter([4, 1, 4], [7, 8, 9]), out)


@pytest.mark.parametrize("how", ["register", "tensor"])
def test_scalar_offset_steps_along_the_named_axis(sim, how):
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)

    def body(x, step):
        if how == "register":
            s = nisa.register_alloc(step)
        else:
            s = sb((1, 1), nl.int32, fill=step)
        out = nl.ndarray((2, 5), nl.float32, nl.shared_hbm)
        nisa.dma_copy(out, x.ap([[5, 2], [1, 5]], offset=20, scalar_offset=s, indirect_dim=1))
        return out

    assert np.array_equal(sim(body, x, 2), x[1, 2:4])
    with pytest.raises(errors.BoundsError, match="scalar_offset 7"):
        sim(body, x, 7)


def test_scalar_offset_on_chip_stays_in_its_partition(sim):
    def body(step):
        t, out = nl.ndarray((2, 8), nl.float32), nl.ndarray((2, 2), nl.float32, nl.shared_hbm)
        nisa.iota(t, [[1, 8]], channel_multiplier=100)
        small = nl.ndarray((2, 2), nl.float32)
        nisa.tensor_copy(small, t.ap([[8, 2], [1, 2]], scalar_offset=nisa.register_alloc(step), indirect_dim=1))
        nisa.dma_copy(out, small)
        return out

    assert sim(body, 6).tolist() == [[6, 7], [106, 107]]
    for step in (7, 8, 16):
        with pytest.raises(errors.BoundsError, match=f"scalar_offset {step}"):
            sim(body, step)


def test_dynamic_select_and_vector_select(sim):
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)

    def body(x):
        s = sb((1, 1), nl.int32, fill=2)
        i = sb((2, 1), nl.int32, fill=1)
        a, b = nl.ndarray((4, 5), nl.float32, nl.shared_hbm), nl.ndarray((2, 4, 5), nl.float32, nl.shared_hbm)
        nisa.dma_copy(a, x.select(0, s))
        nisa.dma_copy(b, x.vector_select(0, i))
        return a, b

    a, b = sim(body, x)
    assert np.array_equal(a, x[2])
    assert np.array_equal(b, x[[1, 1]])


@pytest.mark.parametrize(
    ("use", "kind", "match"),
    [
        (lambda h, t, i: t.ap([[8, 4], [1, 8]], vector_offset=i), errors.BoundsError, "needs a tensor in HBM"),
        (lambda h, t, i: h.ap([[8, 4], [1, 8]], vector_offset=i, indirect_dim=1), errors.BoundsError, "indirect_dim=0"),
        (lambda h, t, i: h.ap([[8, 4], [1, 8]], vector_offset=h), errors.BoundsError, "tensor in SBUF"),
        (lambda h, t, i: h.ap([[8, 4], [1, 8]], vector_offset=t[:, 0:1]), errors.DtypeError, "integer"),
        (lambda h, t, i: h.ap([[8, 4], [1, 8]], scalar_offset=i), errors.BoundsError, r"need \(1, 1\)"),
        (lambda h, t, i: t.ap([[8, 4], [1, 8]], scalar_offset=i[0]), errors.PartitionError, "partition axis"),
        (lambda h, t, i: h.ap([[8, 4], [1, 8]], scalar_offset=i[0], vector_offset=i), errors.BoundsError, "exclude"),
        (lambda h, t, i: h[i[0]], errors.LanguageError, "runtime value is not an index"),
        (lambda h, t, i: h.ap([[8, 4], [1, 8]], vector_offset=i)[0:2], errors.BoundsError, "sliced or selected again"),
        (lambda h, t, i: t.indirect(i), errors.DtypeError, "need uint16"),
    ],
)
def test_runtime_address_rules(sim, use, kind, match):
    def body(h):
        use(h, sb((4, 8)), sb((4, 1), nl.int32, fill=0))

    with pytest.raises(kind, match=match):
        sim(body, np.zeros((6, 8), np.float32))


# -- casts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "largest", "first_bad"),
    [(nl.float8_e4m3, 240.0, 248.0), (nl.float8_e4m3fn, 448.0, 465.0), (nl.float8_e5m2, 57344.0, 61440.0)],
)
def test_fp8_overflow_is_an_error_unless_switched(sim, dtype, largest, first_bad):
    def body(value):
        a, b = sb((1, 2), fill=value), nl.ndarray((1, 2), dtype)
        nisa.tensor_copy(b, a)
        out, hbm = nl.ndarray((1, 2), nl.float32), nl.ndarray((1, 2), nl.float32, nl.shared_hbm)
        nisa.tensor_copy(out, b)
        nisa.dma_copy(hbm, out)
        return hbm

    assert (sim(body, largest) == largest).all()
    assert (sim(body, -largest) == -largest).all()
    raises(sim, errors.CastError, "exceeds the largest", body, first_bad)
    assert (sim(body, first_bad, fp8_overflow="saturate") == largest).all()
    assert (sim(body, -first_bad, fp8_overflow="saturate") == -largest).all()
    assert not np.isfinite(sim(body, first_bad, fp8_overflow="nonsaturating")).any()


def test_infinity_fits_e4m3_but_not_e4m3fn(sim):
    x = np.full((1, 2), np.inf, np.float32)

    def body(x, dtype):
        a, b = nl.ndarray((1, 2), nl.float32), nl.ndarray((1, 2), dtype)
        nisa.dma_copy(a, x)
        nisa.tensor_copy(b, a)

    sim(body, x, nl.float8_e4m3)
    raises(sim, errors.CastError, "float8_e4m3fn", body, x, nl.float8_e4m3fn)


def test_nan_to_integer(sim):
    x = np.full((1, 2), np.nan, np.float32)

    def body(x):
        a, b = nl.ndarray((1, 2), nl.float32), nl.ndarray((1, 2), nl.int32)
        nisa.dma_copy(a, x)
        nisa.tensor_copy(b, a)

    raises(sim, errors.CastError, "NaN", body, x)
    sim(body, x, nan_to_int="zero")


@pytest.mark.parametrize(
    ("dtype", "value", "kind"),
    [
        (nl.int32, 2.0, errors.DtypeError),
        (nl.uint8, 256, errors.CastError),
        (nl.int8, -129, errors.CastError),
        (nl.float8_e4m3, 300.0, errors.CastError),
        (nl.float8_e4m3fn_x4, 1, errors.CastError),
        (nl.float32, "1", errors.LanguageError),
        (nl.float32, 1e39, errors.CastError),
        (nl.bfloat16, -1e39, errors.CastError),
    ],
)
def test_memset_value_must_fit(sim, dtype, value, kind):
    def body():
        nisa.memset(nl.ndarray((2, 4), dtype), value)

    raises(sim, kind, "value", body)


def test_copies_between_equal_dtypes_keep_nan_payloads(sim):
    words = np.array([[0x7FA0_1234, 0xFFC0_0001, 0x7F80_0001, 0]], np.uint32)

    def body(x):
        a, b = nl.ndarray((1, 4), nl.float32), nl.ndarray((1, 4), nl.float32)
        nisa.dma_copy(a, x)
        nisa.tensor_copy(b, a)
        out = nl.ndarray((1, 4), nl.float32, nl.shared_hbm)
        nisa.dma_copy(out, b)
        return out

    assert np.array_equal(sim(body, words.view(np.float32)).view(np.uint32), words)


def test_bfloat16_rounds_to_nearest_even(sim):
    x = np.array([[1.00390625, 1.01171875, 3.4e38, -3.4028235e38]], np.float32)

    def body(x):
        a = nl.ndarray((1, 4), nl.bfloat16)
        nisa.dma_copy(a, x)
        out = nl.ndarray((1, 4), nl.bfloat16, nl.shared_hbm)
        nisa.dma_copy(out, a)
        return out

    assert np.array_equal(sim(body, x), x.astype(ml_dtypes.bfloat16))
