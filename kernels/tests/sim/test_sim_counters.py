"""Each counter counts what it says; the trace is the executed flat list."""

import numpy as np
import pytest

import nki.isa as nisa
import nki.language as nl
from nkisim import trace

F32, BF16 = nl.float32, nl.bfloat16


def tile(shape, dtype=F32, fill=1.0, **kw):
    """A tile of one value."""
    t = nl.ndarray(shape, dtype, **kw)
    nisa.memset(t, fill)
    return t


def test_instructions_by_engine_and_name(sim):
    def body():
        a, b = tile((8, 16)), tile((8, 16))
        nisa.tensor_tensor(a, a, b, op=nl.add)
        nisa.activation(b, nl.exp, a)
        nisa.iota(b, [[1, 16]])
        nisa.tensor_copy(a, b, engine=nisa.engine.gpsimd)
        nisa.dma_copy(a, b)
        nisa.register_alloc(3)
        acc = nl.ndarray((4, 16), F32, nl.psum)
        nisa.nc_matmul(acc, tile((8, 4), BF16), tile((8, 16), BF16), accumulate=False)

    sim(body)
    c = sim.report.counters
    assert c.instructions == {"vector": 5, "scalar": 1, "gpsimd": 2, "dma": 1, "sync": 1, "tensor": 1}
    assert c.by_name["memset"] == 4
    assert c.total_instructions == 11 == len(sim.report.instructions)
    assert c.vector_elements == {"vector": 16 + 16 + 16 + 4 + 16, "scalar": 16, "gpsimd": 32}


def test_matmul_columns_and_macs(sim):
    def body():
        acc = nl.ndarray((8, 24), F32, nl.psum)
        for dtype in (F32, BF16, nl.float8_e4m3):
            nisa.nc_matmul(acc, tile((32, 8), dtype), tile((32, 24), dtype), accumulate=False)
        two = nl.float8_e4m3
        nisa.nc_matmul(
            acc,
            tile((32, 2, 8), two),
            tile((32, 2, 24), two),
            accumulate=False,
            perf_mode=nisa.matmul_perf_mode.double_row,
        )
        x4, scale = nl.float8_e4m3fn_x4, tile((4, 24), nl.uint8, 127)
        nisa.nc_matmul_mx(acc, tile((32, 8), x4, 0), tile((32, 24), x4, 0), scale[:, 0:8], scale, accumulate=False)
        nisa.nc_transpose(nl.ndarray((16, 32), BF16, nl.psum), tile((32, 16), BF16))

    sim(body)
    c = sim.report.counters
    assert c.matmul_columns == {"fp32": 24, "half": 24, "fp8": 24, "double_row": 24, "mx": 24, "transpose": 32}
    assert c.matmul_macs == 8 * 24 * 32 * (1 + 1 + 1 + 2 + 4)


@pytest.mark.parametrize(
    ("source", "target", "elements", "descriptors"),
    [
        (lambda h: h, lambda t: t, 64, 4),  # a run cannot cross partitions
        (lambda h: h[:, 0:8], lambda t: t[:, 0:8], 32, 4),
        (lambda h: h[:, 0:16:2], lambda t: t[:, 0:8], 32, 32),
        (lambda h: h[:, 0:8], lambda t: t[:, 0:16:2], 32, 32),
        (lambda h: h.reshape((4, 2, 8)), lambda t: t.reshape((4, 2, 8)), 64, 4),
        (lambda h: h.reshape((4, 2, 8))[:, :, 0:4], lambda t: t[:, 0:8], 32, 8),
    ],
)
def test_dma_bytes_and_descriptors(sim, source, target, elements, descriptors):
    def body(x):
        t = nl.ndarray((4, 16), F32)
        nisa.dma_copy(target(t), source(x))

    sim(body, np.zeros((4, 16), np.float32))
    c = sim.report.counters
    assert c.dma_bytes_read == {"hbm": 4 * elements}
    assert c.dma_bytes_written == {"sbuf": 4 * elements}
    assert c.dma_transfers == 1
    assert c.dma_descriptors == descriptors


def test_a_transpose_counts_pieces_of_its_source(sim):
    def body(x):
        nisa.dma_transpose(nl.ndarray((16, 4), BF16), x)

    sim(body, np.zeros((4, 16), np.float16).view(BF16.np))
    assert sim.report.counters.dma_descriptors == 1
    assert sim.report.counters.dma_bytes_written == {"sbuf": 128}


def test_converting_dma_counts_each_side(sim):
    def body(x):
        nisa.dma_copy(nl.ndarray((4, 16), BF16), x)

    sim(body, np.zeros((4, 16), np.float32))
    assert sim.report.counters.dma_bytes_read == {"hbm": 256}
    assert sim.report.counters.dma_bytes_written == {"sbuf": 128}


def test_high_water_is_what_is_live_at_once(sim):
    def body():
        a = tile((8, 100))
        b = tile((8, 50))
        nisa.tensor_tensor(b, b, a[:, 0:50], op=nl.add)  # a ends here
        c = tile((8, 80))
        nisa.tensor_tensor(b, b, c[:, 0:50], op=nl.add)

    sim(body)
    assert sim.report.counters.sbuf_high_water == 4 * 150


def test_buffers_with_addresses_count_once_where_they_overlap(sim):
    def body():
        a = tile((8, 64), address=(0, 0))
        b = tile((8, 64), address=(0, 128))
        nisa.tensor_copy(b[:, 32:64], a[:, 0:32])

    sim(body)
    assert sim.report.counters.sbuf_high_water == 128 + 256


def test_psum_high_water_in_bytes_and_banks(sim):
    def body():
        a = tile((1, 1), BF16)
        tiles = [nl.ndarray((1, n), F32, nl.psum) for n in (512, 100, 1)]
        for t in tiles:
            nisa.nc_matmul(t[:, 0:1], a, a, accumulate=False)
        for t in tiles:
            nisa.tensor_copy(nl.ndarray((1, 1), F32), t[:, 0:1])

    sim(body)
    assert sim.report.counters.psum_high_water == 2048 + 400 + 4
    assert sim.report.counters.psum_banks_high_water == 3


def test_the_trace_names_operands_immediates_and_lines(sim):
    def body(x):
        t = nl.ndarray((4, 8), F32, name="work")
        nisa.dma_copy(t, x)
        nisa.tensor_scalar(t[:, 2:6], t[:, 2:6], nl.multiply, 3.0, op1=nl.add, operand1=1.5, name="scale")
        out = nl.ndarray((4, 8), F32, nl.shared_hbm)
        nisa.dma_copy(out, t)
        return out

    sim(body, np.zeros((4, 8), np.float32))
    first, second, third = sim.report.instructions
    assert [i.name for i in (first, second, third)] == ["dma_copy", "tensor_scalar", "dma_copy"]
    assert second.engine == "vector"
    assert second.label == "scale"
    assert second.where[0] == __file__
    assert second.reads["data"] == second.writes["dst"]
    assert second.reads["data"] == trace.OperandRef(first.writes["dst"].tensor, "float32", 2, ((8, 4), (1, 4)))
    assert second.attrs == {
        "op0": "multiply", "op1": "add", "reverse0": False, "reverse1": False, "operand0": 3.0, "operand1": 1.5,
    }  # fmt: skip
    table = {t["name"]: t for t in sim.report.tensors()}
    assert table["x"]["kind"] == "input"
    assert table["work"]["shape"] == [4, 8]
    assert table["work"]["uses"] == [0, 2]
    assert [t["kind"] for t in sim.report.tensors()].count("output") == 1


def test_the_trace_keeps_runtime_offsets_as_references(sim):
    def body(x, rows):
        i = nl.ndarray((4, 1), nl.int32)
        nisa.dma_copy(i, rows)
        t = nl.ndarray((4, 8), F32)
        nisa.dma_copy(t, x.ap([[8, 4], [1, 8]], vector_offset=i))

    sim(body, np.zeros((6, 8), np.float32), np.zeros((4, 1), np.int32))
    index, copy = sim.report.instructions
    dynamic = copy.reads["src"].dynamic
    assert dynamic["kind"] == "vector"
    assert dynamic["scale"] == 8
    assert dynamic["index"].tensor == index.writes["dst"].tensor
    assert copy.as_dict()["reads"]["src"]["dynamic"]["index"]["pattern"] == [[1, 4], [1, 1]]


def test_the_trace_is_plain_data(sim):
    import json

    def body(x):
        t = nl.ndarray((4, 8), BF16)
        nisa.dma_copy(t, x)
        nisa.activation(t, nl.exp, t, scale=0.5)
        nisa.affine_select(t, [[-1, 8]], 1, t, 0.0, cmp_op=nl.greater_equal)

    sim(body, np.zeros((4, 8), np.float32))
    text = json.dumps([i.as_dict() for i in sim.report.instructions] + sim.report.tensors())
    assert "greater_equal" in text
    assert json.dumps(sim.report.counters.as_dict())
