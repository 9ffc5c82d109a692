"""kernels/build.py: sets, emulated NEFFs, the official package (a stand-in), resuming, errors."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import struct
import tarfile
import tomllib
from pathlib import Path

import harness
import pytest

import build
import trace as export

SETS = sorted((harness.KERNELS / "sets").glob("*.toml"))
TINY = harness.KERNELS / "sets" / "tiny_gpt_oss.toml"
PROGRAMS = harness.KERNELS.parent / "tests" / "data" / "tiny-gpt-oss-programs"
SMALL = [("matmul_mx", "m=3,n=40,k=64,out=f32"), ("kv_append", "t=2,n=3,hkv=1,d=8"), ("kv_append", "t=2,n=3,hkv=1,d=8,cache=e4m3fn")]


def write_set(folder: Path, buckets) -> Path:
    path = folder / "set.toml"
    path.write_text("".join(f'[[bucket]]\nkernel = "{k}"\nshape = "{s}"\nuse = "test"\n' for k, s in buckets))
    return path


def entries(out: Path) -> list[dict]:
    table = tomllib.loads((out / "manifest.toml").read_text())
    assert table["format"] == "trn-kernels.neffs.1"
    return table.get("neff", [])


@pytest.fixture
def small(tmp_path):
    return write_set(tmp_path, SMALL), tmp_path / "out"


@pytest.fixture
def without_official():
    if build.official_version() is not None:
        pytest.skip("the official package is installed")


@pytest.mark.parametrize("path", SETS, ids=lambda p: p.stem)
def test_every_set_reads_and_its_arguments_can_be_made(path):
    buckets = build.read_set(path, "trn3")
    assert {b.kernel for b in buckets} >= {
        "matmul_mx", "grouped_matmul_mx", "kv_append", "attention_prefill", "attention_decode",
    }  # fmt: skip
    for bucket in buckets:
        assert bucket.example().entry == bucket.kernel
    for row in tomllib.loads(path.read_text())["bucket"]:
        assert row["use"]


@pytest.mark.parametrize("path", SETS, ids=lambda p: p.stem)
def test_blocks_hold_any_routing(path):
    """The worst routing: as many experts as possible with one row more than fills their blocks."""
    for bucket in build.read_set(path, "trn3"):
        if bucket.kernel == "grouped_matmul_mx":
            dims = export.dimensions(bucket.kernel, bucket.shape)
            rows, slots, experts = dims["y"], dims["r"], dims["e"]
            used = min(experts, rows)
            assert dims["b"] >= used + (rows - used) // slots
            assert rows == 4 * dims["x"]


def test_check_runs_everything_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build.main([str(TINY), "--check"]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("runs on the simulator") == len(build.read_set(TINY, "trn3"))
    assert not list(tmp_path.iterdir())


def test_without_the_official_package_it_says_so(small, capsys, without_official):
    path, out = small
    assert build.main([str(path), "--out", str(out)]) == 3
    said = capsys.readouterr().err
    assert said.count("runs on the simulator") == len(SMALL)
    assert "compiling is not available here" in said and "--emulated" in said
    assert not out.exists()


def test_the_checked_in_programs_are_current(tmp_path):
    assert build.main([str(TINY), "--programs", "--out", str(tmp_path)]) == 0
    read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}  # noqa: E731
    assert read(tmp_path) == read(PROGRAMS), "run build.py with --programs as tests/emulator.rs says"
    assert sum(len(b) for b in read(PROGRAMS).values()) < 4 << 20


def test_programs_that_are_gone_are_removed(small):
    path, out = small
    out.mkdir()
    (out / "old.json").write_text("{}")
    assert build.main([str(path), "--programs", "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {e["file"] for e in entries(out)} | {"manifest.toml"}


# -- emulated -----------------------------------------------------------------------------------------------------------


def test_an_emulated_neff(small):
    path, out = small
    assert build.main([str(path), "--out", str(out), "--emulated"]) == 0
    found = entries(out)
    assert [e["kernel"] for e in found] == [k for k, _ in SMALL]
    assert len({e["file"] for e in found}) == len(SMALL)
    for entry, (kernel, shape) in zip(found, SMALL, strict=True):
        data = (out / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert entry["file"].startswith(f"{kernel}-trn3-lnc1-") and entry["file"].endswith(".neff")
        version, header, size = struct.unpack_from("<3Q", data)
        assert (version, header, size) == (0xFA4E, 1024, len(data) - 1024)
        assert data[172:204] == hashlib.sha256(data[1024:]).digest()
        assert data[220:476].rstrip(b"\0").decode() == f"trn-kernels.{kernel}.{shape}"
        assert struct.unpack_from("<I", data, 168) == struct.unpack_from("<I", data, 552) == (1,)
        with tarfile.open(fileobj=io.BytesIO(data[1024:])) as archive:
            members = {m.name: (m.mtime, archive.extractfile(m).read()) for m in archive.getmembers()}
        assert set(members) == {"sg00/def.json", "program.json"} and {t for t, _ in members.values()} == {0}
        assert members["program.json"][1] == export.shaped_program(kernel, "trn3", shape)[1]
        variables = json.loads(members["sg00/def.json"][1])["var"]
        assert sorted(v["var_id"] for v in variables.values()) == list(range(len(variables)))
        assert {n for n, v in variables.items() if v["type"] == "output"} == {p["name"] for p in entry["outputs"]}
        assert {n for n, v in variables.items() if v["type"] == "input"} == {
            p["name"] + (".must_alias_input" if "alias" in p else "") for p in entry["inputs"]
        }
        made = json.loads(members["program.json"][1])
        shapes = {p["name"]: made["tensors"][p["tensor"]]["shape"] for p in made["inputs"] + made["outputs"]}
        assert all(p["shape"] == shapes[p["name"]] for p in entry["inputs"] + entry["outputs"])
    assert found[0]["parameters"]["x_terms"] == 1 and found[0]["parameters"]["n"] == 40
    in_place = [p["alias"] for p in found[1]["inputs"] if "alias" in p]
    assert in_place == ["k_cache", "v_cache"] == [p["name"] for p in found[1]["outputs"]]
    assert json.loads(members["sg00/def.json"][1])["var"]["k_cache.must_alias_input"]["size"] == 3 * 16 * 8
    assert found[2]["inputs"][3]["dtype"] == "float8_e4m3fn"


def test_the_same_set_gives_the_same_bytes(small, tmp_path):
    path, out = small
    for folder in (out, tmp_path / "again"):
        assert build.main([str(path), "--out", str(folder), "--emulated"]) == 0
    read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}  # noqa: E731
    assert read(out) == read(tmp_path / "again")


def test_finished_neffs_are_kept(small, monkeypatch, capsys):
    path, out = small
    again = lambda: build.main([str(path), "--out", str(out), "--emulated"])  # noqa: E731
    assert again() == 0
    made = []
    describe = build.describe
    monkeypatch.setattr(build, "describe", lambda bucket: made.append(str(bucket)) or describe(bucket))
    before = (out / "manifest.toml").read_bytes()
    assert again() == 0 and made == []
    assert capsys.readouterr().err.count("is finished") == len(SMALL)
    # A damaged file, a missing one and another way to make them are each built again.
    files = [out / e["file"] for e in entries(out)]
    files[0].write_bytes(b"cut")
    files[1].unlink()
    assert again() == 0 and len(made) == 2
    assert (out / "manifest.toml").read_bytes() == before
    (out / "build.json").write_text("not JSON")
    assert again() == 0 and len(made) == 2 + len(SMALL)
    source_hash = build.source_hash
    monkeypatch.setattr(build, "source_hash", lambda bucket, how: source_hash(bucket, how + "2"))
    assert again() == 0 and len(made) == 2 + 2 * len(SMALL)


def test_a_kernel_that_is_refused_leaves_what_is_finished(tmp_path, capsys):
    path, out = write_set(tmp_path, [SMALL[0], ("matmul_mx", "m=3,n=40,k=48"), SMALL[1]]), tmp_path / "out"
    assert build.main([str(path), "--out", str(out), "--emulated"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "matmul_mx m=3,n=40,k=48 (trn3): K: got 48, need a multiple of 32 (one scale group)"
    assert [e["kernel"] for e in entries(out)] == ["matmul_mx"] and (out / entries(out)[0]["file"]).is_file()
    write_set(tmp_path, SMALL)
    assert build.main([str(path), "--out", str(out), "--emulated"]) == 0
    assert capsys.readouterr().err.count("is finished") == 1
    assert not list(out.glob("*.part"))


# -- wrong command lines and sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "need [[bucket]] tables"),
        ("bucket = 3", "need [[bucket]] tables"),
        ("[[bucket]\n", "set.toml: "),
        ('kernels = 1\n[[bucket]]\nkernel = "kv_append"\nshape = ""\n', "and nothing else"),
        ('[[bucket]]\nkernel = "matmul_mx"\n', "bucket 1: need kernel, shape"),
        ('[[bucket]]\nkernel = "matmul_mx"\nshape = 3\n', "bucket 1: kernel, shape and use are strings"),
        ('[[bucket]]\nkernel = "matmul_mx"\nshape = ""\nsize = "2"\n', "bucket 1: need kernel, shape"),
        ('[[bucket]]\nkernel = "matmul_my"\nshape = "m=1"\n', "bucket 1: no kernel called 'matmul_my'"),
        ('[[bucket]]\nkernel = "matmul_mx"\nshape = "m=1,n=2"\n', "bucket 1: matmul_mx needs k"),
        (2 * '[[bucket]]\nkernel = "kv_append"\nshape = "t=1,n=1,hkv=1,d=1"\n', "bucket 2: kv_append t=1,n=1,hkv=1,d=1 (trn3) stands"),
    ],
)
def test_a_wrong_set(tmp_path, text, said, capsys):
    path = tmp_path / "set.toml"
    path.write_text(text)
    assert build.main([str(path), "--check"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and len(printed.err.splitlines()) == 1


def test_a_set_that_is_not_there_or_not_for_the_target(small, tmp_path, capsys):
    assert build.main([str(tmp_path / "none.toml"), "--check"]) == 2
    assert "none.toml" in capsys.readouterr().err
    assert build.main([str(small[0]), "--check", "--target", "trn2"]) == 2
    assert "bucket 1: matmul_mx is for trn3, not trn2" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["x.toml"], ["x.toml", "--out", "d", "--lnc", "2"], ["x.toml", "--check", "--emulated"]])
def test_a_wrong_command_line(argv):
    with pytest.raises(SystemExit) as stop:
        build.main(argv)
    assert stop.value.code == 2


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        build.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    commands = [line.split("#")[0] for line in text.splitlines() if line.strip().startswith("python kernels/build.py kernels/")]
    assert len(commands) == 3
    for command in commands:
        options = build.parse(shlex.split(command)[2:])
        assert (harness.KERNELS.parent / options.set).is_file() and options.out == Path("neffs")
    assert "Exit status" in text


# -- the official package, a stand-in -----------------------------------------------------------------------------------

STAND_IN = """
import json, os, sys
__version__ = "9.9"
FOLDER = os.environ.get("NKI_ARTIFACTS_DIR")  # read at import, as the real one does
def simulate(kernel):
    raise RuntimeError("not used")
def jit(fn):
    def launch(**args):
        if os.environ.get("STAND_IN_FAILS") == fn.__name__:
            raise RuntimeError("cannot allocate " + fn.__name__)
        said = {k: [list(v.shape), str(v.dtype), bool(v.any())] for k, v in args.items() if hasattr(v, "shape")}
        said = {"kernel": fn.__name__, "args": said, "target": os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"]}
        with open(os.path.join(FOLDER, "kernel.neff"), "w") as file:
            json.dump(said, file)
        raise RuntimeError("no device to run on")  # the file is there all the same
    return launch
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    package = tmp_path / "site" / "nki"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    for part in ("isa", "language"):
        (package / f"{part}.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    assert build.official_version() == "9.9"


def test_the_official_package_is_called_in_a_child(small, stand_in):
    path, out = small
    assert build.main([str(path), "--out", str(out)]) == 0
    found = entries(out)
    said = [json.loads((out / e["file"]).read_text()) for e in found]
    assert [s["kernel"] for s in said] == [k for k, _ in SMALL] and {s["target"] for s in said} == {"trn3"}
    for entry, child in zip(found, said, strict=True):
        assert {p["name"]: p["shape"] for p in entry["inputs"]} == {n: v[0] for n, v in child["args"].items()}
        assert not any(v[2] for n, v in child["args"].items() if n != "slots")
    emulated = out.with_name("emulated")
    assert build.main([str(path), "--out", str(emulated), "--emulated"]) == 0
    same = ("kernel", "file", "target", "lnc", "parameters", "inputs", "outputs")
    assert [{k: e[k] for k in same} for e in entries(emulated)] == [{k: e[k] for k in same} for e in found]


def test_a_compiler_that_fails_is_quoted(small, stand_in, monkeypatch, capsys):
    path, out = small
    monkeypatch.setenv("STAND_IN_FAILS", "kv_append")
    assert build.main([str(path), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "kv_append t=2,n=3,hkv=1,d=8 (trn3): no kernel.neff; the compiler ended with 1" in said
    assert "cannot allocate kv_append" in said
    assert [e["kernel"] for e in entries(out)] == ["matmul_mx"]
    monkeypatch.delenv("STAND_IN_FAILS")
    assert build.main([str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().err.count("is finished") == 1
