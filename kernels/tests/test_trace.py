"""Programs: the checked-in files are what the kernels make now, and what they say can be relied on."""

from __future__ import annotations

import json

import harness
import ml_dtypes
import numpy as np
import pytest

import manifest  # kernels/manifest.py
import trace as export

from tests import isa_tour  # the name under which an export imports it

ALL = export.examples()


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return {name: text for example in ALL for name, text in export.files(example).items()}


def test_checked_in_programs_are_current(made):
    there = {p.name: p.read_bytes() for p in export.PROGRAMS.iterdir()}
    assert sorted(there) == sorted(made), "run `python kernels/trace.py --all`"
    stale = [name for name, text in made.items() if not export.current(name, there[name], text)]
    assert not stale, f"run `python kernels/trace.py --all`: {stale}"


def test_a_changed_input_or_exact_output_is_noticed(made):
    from safetensors.numpy import load, save

    for name in (n for n in made if n.endswith(".safetensors")):
        data = load(made[name])
        fixed = [k for k in data if k.startswith("in.") or (k.startswith("out.") and f"bound.{k[4:].split('@')[0]}" not in data)]
        for key in fixed:
            changed = dict(data)
            changed[key] = data[key] ^ 1
            assert not export.current(name, save(changed), made[name]), f"{name}: {key}"
        assert not export.current(name, save({k: v for k, v in data.items() if k != fixed[0]}), made[name])


def test_export_is_deterministic(made):
    for example in ALL[:3]:
        for name, text in export.files(example).items():
            assert text == made[name]


@pytest.mark.parametrize("example", ALL, ids=lambda e: e.stem)
def test_every_reference_resolves(example):
    made, data = export.program(example)
    tensors = len(made["tensors"])
    assert made["instructions"]
    for port in made["inputs"]:
        assert made["tensors"][port["tensor"]]["name"] == port["name"]
        assert f"in.{port['name']}" in data
    for port in made["outputs"]:
        assert 0 <= port["tensor"] < tensors and f"out.{port['name']}" in data
    for instruction in made["instructions"]:
        for operand in [*instruction["writes"].values(), *instruction["reads"].values()]:
            assert 0 <= operand[0] < tensors
            assert all(stride >= 0 and count > 0 for stride, count in operand[3])


def test_every_manifest_kernel_has_programs():
    kernels = set(manifest.kernels())
    assert kernels <= {e.entry for e in ALL}


def test_sources_follow_imports():
    found = export.sources(export.KERNELS / "matmul_fp8.py")
    assert {"matmul_fp8.py", "matmul_tiles.py"} <= set(found)
    assert all(len(v) == 64 for v in found.values())


def test_runs_give_the_bytes_back():
    rng = np.random.default_rng(0)
    for data, itemsize in (
        (np.eye(128, dtype=np.float32).view(np.uint8).reshape(-1), 4),
        (rng.integers(0, 256, 600, np.uint8), 1),
        (np.zeros(4096, np.uint8), 2),
        (np.repeat(rng.integers(0, 3, 50, np.uint8), rng.integers(1, 20, 50)), 1),
    ):
        runs = export._runs(data, itemsize)
        assert b"".join(bytes.fromhex(text) * n for n, text in runs) == data.tobytes()
    assert len(export._runs(np.zeros(4096, np.uint8), 2)) == 1


def test_the_other_block_scale_is_exported_and_differs():
    example = next(e for e in ALL if e.entry == "tour_mx")
    made, data = export.program(example)
    names = [p["name"] for p in made["outputs"]]
    assert any(not np.array_equal(data[f"out.{n}"], data[f"out.{n}@ocp"]) for n in names)


def test_numbers_that_json_has_not():
    numbers = export.Numbering()
    assert [numbers.attr(v) for v in (float("-inf"), float("inf"), 0.1)] == ["-inf", "inf", float(np.float32(0.1))]
    assert numbers.attr(float("nan")) == "nan"
    assert numbers.attr({"register": 812}) == {"register": 0}


def _program(kernel, args):
    setattr(isa_tour, kernel.__name__, kernel)
    try:
        return export.program(export.Example("x", "trn2", "tests/isa_tour.py", kernel.__name__, args))[0]
    finally:
        delattr(isa_tour, kernel.__name__)


def test_a_loop_becomes_its_turns():
    import nki
    import nki.isa as nisa
    import nki.language as nl

    @nki.jit
    def looped(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)

        def body(i):
            tile = nl.ndarray((1, x.shape[1]), dtype=x.dtype, buffer=nl.sbuf)
            row = [[x.shape[1], 1], [1, x.shape[1]]]
            nisa.dma_copy(dst=tile, src=x.ap(row, offset=0, scalar_offset=i, indirect_dim=0))
            nisa.dma_copy(dst=out.ap(row, offset=0, scalar_offset=i, indirect_dim=0), src=tile)

        nl.fori_loop(0, 3, body)
        return out

    made = _program(looped, {"x": np.arange(12, dtype=np.float32).reshape(3, 4)})
    assert [i["reads"]["src"][2] for i in made["instructions"][::2]] == [0, 4, 8]
    assert "register" not in json.dumps(made["instructions"])


def test_a_loop_whose_length_is_data_is_refused():
    import nki
    import nki.isa as nisa
    import nki.language as nl

    @nki.jit
    def counted(n):
        out = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.shared_hbm)
        tile = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf)
        last = nisa.register_alloc()
        nisa.register_load(last, n)

        def body(i):
            nisa.memset(dst=tile, value=1.0)

        nl.fori_loop(0, last, body)
        nisa.dma_copy(dst=out, src=tile)
        return out

    with pytest.raises(export.TraceError, match="depends on data"):
        _program(counted, {"n": np.array([[2]], np.int32)})


def test_part_of_a_tensor_is_no_output():
    import nki
    import nki.isa as nisa
    import nki.language as nl

    @nki.jit
    def half(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=x)
        return out[0:1]

    with pytest.raises(export.TraceError, match="whole tensor"):
        _program(half, {"x": np.zeros((2, 4), ml_dtypes.bfloat16)})


def test_unknown_kernel_is_named():
    with pytest.raises(export.TraceError, match="nothing_of_the_kind"):
        export.examples(["nothing_of_the_kind"])
