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
    return {name: text for example in ALL for name, text in export.files(example).items()} | export.large()


def test_checked_in_programs_are_current(made):
    there = {name: p.read_bytes() for name, p in export.checked_in().items()}
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


# A small shape of every kernel, on a target that it serves.
SHAPED = {
    "matmul_fp8": ("trn2", "m=3,n=40,k=300,scales=blocks,bias=bf16,activation=silu"),
    "matmul_mx": ("trn3", "m=3,n=40,k=64,x=packed,w_element=e5m2,bias=f32"),
    "grouped_matmul_mx": ("trn3", "b=3,r=4,h=64,i=96,e=2"),
    "attention_decode": ("trn3", "b=2,hq=8,hkv=2,d=64,m=8,cache=e4m3fn,w=40"),
    "attention_prefill": ("trn2", "b=2,sq=40,hq=2,hkv=1,d=64,sp=130"),
    "kv_append": ("trn2", "t=5,n=3,hkv=2,d=32,cache=e4m3"),
    "rmsnorm_quantize_fp8": ("trn2", "m=5,k=256,x=f32"),
    "rmsnorm_quantize_mx": ("trn3", "m=5,k=256"),
}


@pytest.mark.parametrize("kernel", SHAPED)
def test_a_shape_of_every_kernel(kernel):
    target, shape = SHAPED[kernel]
    name, text = export.shaped_program(kernel, target, shape)
    made = json.loads(text)
    assert name == f"{kernel}.{target}.{shape}.json"
    assert (made["kernel"], made["example"], made["target"]) == (kernel, shape, target)
    assert made["instructions"]


def test_a_shape_gives_the_examples_program():
    """Zeros or not: the instructions and tensors are those that an example of the same shape has."""
    of_shape = json.loads(export.shaped_program("matmul_mx", "trn3", "m=5,n=70,k=320,out=f32")[1])
    example = json.loads((export.PROGRAMS / "matmul_mx.mxfp4.json").read_text())
    assert of_shape.keys() == example.keys()
    assert {k for k in example if of_shape[k] != example[k]} == {"example"}


def test_shapes_toml_has_every_kernel_of_the_manifest():
    import tomllib

    read = lambda name: tomllib.loads((harness.KERNELS / name).read_text())  # noqa: E731
    assert set(read("shapes.toml")) == {k["name"] for k in read("manifest.toml")["kernel"]} == set(SHAPED)


@pytest.mark.parametrize(
    ("kernel", "shape", "said"),
    [
        ("matmul", "m=1", "no kernel called 'matmul'; there are matmul_fp8"),
        ("matmul_mx", "m=1,n=2", "matmul_mx needs k"),
        ("matmul_mx", "m=1,n=2,k=x", "k: got 'x', need a number"),
        ("matmul_mx", "m=1,n=2,k=-32", "k: got '-32', need a number"),
        ("matmul_mx", "m=1,n=0,k=32", "n: got 0, need at least 1"),
        ("matmul_mx", "m=1,n=2,k=32,k=64", "k is given twice"),
        ("matmul_mx", "m=1,n=2,k=32,hq=4", "matmul_mx has no dimension 'hq'; it has m, n, k, w_element"),
        ("matmul_mx", "m=1,n=2,k=32,out=f16", "out: got 'f16', need bf16 or f32"),
    ],
)
def test_what_a_shape_may_not_say(kernel, shape, said, capsys):
    assert export.main(["--kernel", kernel, "--shape", shape]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(said)


@pytest.mark.parametrize(
    ("target", "shape", "said"),
    [
        ("trn3", "m=1,n=2,k=48", "K: got 48, need a multiple of 32"),
        ("trn2", "m=1,n=2,k=64", "target: need trn3"),
        ("trn3", "m=1000000000000,n=1000000,k=64", "too large to make here: "),
    ],
)
def test_a_refused_shape_says_the_constraint(target, shape, said, capsys):
    assert export.main(["--kernel", "matmul_mx", "--shape", shape, "--target", target]) == 3
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(said)


def test_a_shape_is_written_to_a_folder(tmp_path, capsys):
    target, shape = SHAPED["matmul_mx"]
    assert export.main(["--kernel", "matmul_mx", "--shape", shape, "--target", target, "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.iterdir()
    assert written.read_bytes() == export.shaped_program("matmul_mx", target, shape)[1]
    assert capsys.readouterr().out == ""
