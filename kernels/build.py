"""Compile the kernels that a model needs into NEFFs, on a Trainium host.

    python kernels/build.py kernels/sets/gpt_oss_20b.toml --out neffs              # on a host with AWS's nki package
    python kernels/build.py kernels/sets/gpt_oss_20b.toml --out neffs --emulated   # for the emulated runtime, anywhere
    python kernels/build.py kernels/sets/gpt_oss_20b.toml --out neffs --check      # run all on the simulator, write nothing

A set is a TOML file: `[[bucket]]` tables with `kernel`, `shape` (kernels/shapes.toml says what a shape may say; `trnk cost` takes the
same text) and `use`, which says what the call is for. Compiled code is for one shape, one target: a runtime pads a call to the
next larger bucket.

On a Trainium host (once):
    pip install nki neuronx-cc --extra-index-url=<the Neuron package index>       # see AWS's setup guide
    pip install -r kernels/requirements.txt
    python kernels/build.py SET.toml --out DIR --target trn3

Every kernel is first run on the simulator with zeros, so that a shape it does not serve is refused before anything is
compiled. Then a child process calls it through the official package with NKI_ARTIFACTS_DIR, NEURON_PLATFORM_TARGET_OVERRIDE and
NKI_BACKEND=official set before nki is imported; the package leaves `kernel.neff` there, even where no device can run it.

DIR gets `KERNEL-TARGET-lncN-HASH.neff` for each bucket, `manifest.toml` (format trn-kernels.neffs.1: what each file takes and gives),
and `build.json`, by which a second run skips what is finished and unchanged. One folder for one set.

Exit status: 0 done; 1 a kernel failed (what was finished before is kept); 2 the command line or the set is wrong; 3 everything ran on
the simulator, but the official package is not here to compile it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

import numpy as np

KERNELS = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(KERNELS), str(KERNELS / "sim")) if p not in sys.path]

import run as backend  # noqa: E402  (kernels/sim/run.py)
import trace as export  # noqa: E402

FORMAT = "trn-kernels.neffs.1"
TARGETS = ("trn2", "trn3")
CORES = 1  # physical cores of a logical one: the kernels are written for one
# NEFF header: package version that no real runtime takes, and the container's size.
EMULATED = 0xFA4E
HEADER = 1024


class BuildError(Exception):
    """A set that is wrong, or a kernel that does not build."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One kernel at one shape."""

    kernel: str
    shape: str
    target: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.shape} ({self.target})"

    def example(self) -> export.Example:
        """Its arguments."""
        return export.of_shape(self.kernel, self.target, self.shape)


def read_set(path: Path, target: str) -> list[Bucket]:
    """The buckets of a set. BuildError names what is wrong."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BuildError(f"{path}: {error}") from error
    known = {k["name"]: k["targets"] for k in tomllib.loads((KERNELS / "manifest.toml").read_text())["kernel"]}
    rows = table.get("bucket")
    if not isinstance(rows, list) or not rows or set(table) != {"bucket"}:
        raise BuildError(f"{path}: need [[bucket]] tables and nothing else")
    found: list[Bucket] = []
    for i, row in enumerate(rows):
        at = f"{path}: bucket {i + 1}"
        if not isinstance(row, dict) or not {"kernel", "shape"} <= set(row) <= {"kernel", "shape", "use"}:
            raise BuildError(f"{at}: need kernel, shape and use")
        if not all(isinstance(v, str) for v in row.values()):
            raise BuildError(f"{at}: kernel, shape and use are strings")
        bucket = Bucket(row["kernel"], row["shape"], target)
        try:
            export.dimensions(bucket.kernel, bucket.shape)
        except export.ShapeError as error:
            raise BuildError(f"{at}: {error}") from error
        if target not in known[bucket.kernel]:
            raise BuildError(f"{at}: {bucket.kernel} is for {' and '.join(known[bucket.kernel])}, not {target}")
        if bucket in found:
            raise BuildError(f"{at}: {bucket} stands here twice")
        found.append(bucket)
    return found


# -- what a bucket is ---------------------------------------------------------------------------------------------------


def describe(bucket: Bucket) -> tuple[dict, bytes]:
    """The bucket's manifest entry without file, and its program, from a run on the simulator. BuildError if it is refused."""
    try:
        _, text = export.shaped_program(bucket.kernel, bucket.target, bucket.shape)
    except export.TraceError as error:
        raise BuildError(f"{bucket}: {error}") from error
    made = json.loads(text)
    outputs = {p["tensor"] for p in made["outputs"]}

    def port(p: dict, given: bool) -> dict:
        tensor = made["tensors"][p["tensor"]]
        out = {"name": p["name"], "dtype": tensor["dtype"], "shape": tensor["shape"]}
        if given and p["tensor"] in outputs:
            out["alias"] = p["name"]
        return out

    entry = {
        "kernel": bucket.kernel,
        "target": bucket.target,
        "lnc": CORES,
        "parameters": dict(made["parameters"]),
        "inputs": [port(p, True) for p in made["inputs"]],
        "outputs": [port(p, False) for p in made["outputs"]],
    }
    return entry, text


def stem(entry: dict) -> str:
    """File name of a bucket, without suffix: kernel, target, cores, and a hash of everything else in its entry."""
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:12]
    return f"{entry['kernel']}-{entry['target']}-lnc{entry['lnc']}-{digest}"


def source_hash(bucket: Bucket, how: str) -> str:
    """What a finished file depends on: the kernel's sources, the bucket, and how it is made (compiler and its version)."""
    manifest = tomllib.loads((KERNELS / "manifest.toml").read_text())["kernel"]
    file = next(k["file"] for k in manifest if k["name"] == bucket.kernel)
    parts = [how, str(bucket), export.sources(KERNELS / file), hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# -- files --------------------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> None:
    """Writes a file all at once."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def as_toml(value) -> str:
    """A value of the manifest as inline TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)  # a basic string: JSON's escapes are TOML's
    if isinstance(value, list):
        return f"[{', '.join(as_toml(v) for v in value)}]"
    return "{ " + ", ".join(f"{k} = {as_toml(v)}" for k, v in value.items()) + " }" if value else "{}"


def manifest(entries: list[dict]) -> bytes:
    """manifest.toml of a folder."""
    order = ("kernel", "file", "sha256", "target", "lnc", "parameters", "inputs", "outputs")
    lines = [f"format = {as_toml(FORMAT)}"]
    for entry in entries:
        lines += ["", "[[neff]]"]
        for key in order:
            if key in ("inputs", "outputs"):
                lines += [f"{key} = [", *(f"  {as_toml(port)}," for port in entry[key]), "]"]
            else:
                lines.append(f"{key} = {as_toml(entry[key])}")
    return ("\n".join(lines) + "\n").encode()


def emulated(bucket: Bucket, entry: dict, program: bytes) -> bytes:
    """A NEFF for the emulated runtime: the real container, with the exported program instead of machine code.

    The same program gives the same bytes. An input that is changed in place is `NAME.must_alias_input`, its output NAME.
    """
    bits = {"bfloat16": 16, "float8_e4m3": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "float32": 32, "int32": 32, "uint32": 32, "uint16": 16, "uint8": 8}
    variables: dict[str, dict] = {}
    for kind, ports in (("input", entry["inputs"]), ("output", entry["outputs"])):
        for port in ports:
            name = f"{port['name']}.must_alias_input" if "alias" in port else port["name"]
            size = bits[port["dtype"]] // 8 * int(np.prod(port["shape"], dtype=np.int64))
            variables[name] = {"type": kind, "var_id": len(variables), "size": size}
    payload = io.BytesIO()
    with tarfile.open(fileobj=payload, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (("sg00/def.json", json.dumps({"dma_queue": {}, "var": variables}).encode()), ("program.json", program)):
            member = tarfile.TarInfo(name)  # mtime 0, no owner
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = payload.getvalue()
    digest = hashlib.sha256(data).digest()
    name = f"trn-kernels.{bucket.kernel}.{bucket.shape}".encode()[:255]
    header = struct.pack(
        "<5Q128sI32s16s256sI64sQI",
        EMULATED, HEADER, len(data), 2, 0, b"trn-kernels", 1, digest, digest[:16], name, 1, b"\x01", 0, CORES,
    )  # fmt: skip
    return header.ljust(HEADER, b"\0") + data


# -- compiling ----------------------------------------------------------------------------------------------------------


def child(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """This file again, in a process of its own: nki reads its environment when it is imported."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def official_version() -> str | None:
    """Version of the official package, or None if there is none."""
    found = child({"NKI_BACKEND": "official"}, "--official-version")
    return found.stdout.strip() or "unknown" if found.returncode == 0 else None


def compiled(bucket: Bucket) -> bytes:
    """The NEFF of a bucket by the official package. BuildError has the last lines that the child said."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "NKI_ARTIFACTS_DIR": folder,
            "NEURON_PLATFORM_TARGET_OVERRIDE": bucket.target,
            "NKI_BACKEND": "official",
        }
        done = child(environment, "--call", bucket.kernel, bucket.shape, "--target", bucket.target)
        neff = Path(folder) / "kernel.neff"
        if not neff.is_file():
            said = "\n    ".join(done.stderr.strip().splitlines()[-8:]) or "nothing"
            raise BuildError(f"{bucket}: no kernel.neff; the compiler ended with {done.returncode} and said\n    {said}")
        return neff.read_bytes()


def call(bucket: Bucket) -> None:
    """In the child: call the kernel with zeros, so that the official package compiles it."""
    import importlib

    backend.backend("official")
    example = bucket.example()
    module = importlib.import_module(example.file.removesuffix(".py"))
    getattr(module, example.entry)(**example.args)


def load_state(path: Path) -> dict:
    """build.json, or nothing if it is not there or is not one."""
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def finished(out: Path, entry: dict | None) -> bool:
    """Whether an entry of build.json still has its file."""
    if not isinstance(entry, dict) or not isinstance(entry.get("entry"), dict):
        return False
    path = out / str(entry["entry"].get("file"))
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == entry["entry"].get("sha256")


def write_programs(buckets: list[Bucket], out: Path) -> None:
    """The programs of a set, whose file names in the manifest end in `.json`; other programs in `out` are removed."""
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for bucket in buckets:
        entry, program = describe(bucket)
        entry |= {"file": f"{stem(entry)}.json", "sha256": hashlib.sha256(program).hexdigest()}
        write(out / entry["file"], program)
        entries.append(entry)
    write(out / "manifest.toml", manifest(entries))
    for path in out.glob("*.json"):
        if path.name not in {e["file"] for e in entries}:
            path.unlink()


def build(buckets: list[Bucket], out: Path, how: str, make) -> None:
    """Makes every NEFF, or keeps it if it is finished; the manifest lists what there is after each."""
    out.mkdir(parents=True, exist_ok=True)
    state = load_state(out / "build.json")
    kept, entries = {}, []
    for i, bucket in enumerate(buckets):
        source = source_hash(bucket, how)
        place = f"{i + 1}/{len(buckets)} {bucket}"
        if finished(out, state.get(source)):
            entry = state[source]["entry"]
            print(f"{place}: {entry['file']} is finished", file=sys.stderr)
        else:
            entry, program = describe(bucket)
            data = make(bucket, entry, program)
            entry |= {"file": f"{stem(entry)}.neff", "sha256": hashlib.sha256(data).hexdigest()}
            write(out / entry["file"], data)
            print(f"{place}: {entry['file']}, {len(data)} bytes", file=sys.stderr)
        kept[source] = {"entry": entry}
        entries.append(entry)
        write(out / "build.json", (json.dumps(state | kept, indent=1) + "\n").encode())
        write(out / "manifest.toml", manifest(entries))
    write(out / "build.json", (json.dumps(kept, indent=1) + "\n").encode())


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, nargs="?", metavar="SET.toml", help="which kernels at which shapes; see kernels/sets")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go")
    parser.add_argument("--target", choices=TARGETS, default="trn3", help="the device; trn3 if not given")
    parser.add_argument("--lnc", type=int, default=CORES, help="physical cores of a logical core: 1, what the kernels use")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--emulated", action="store_true", help="write NEFFs for the emulated runtime; needs no compiler")
    how.add_argument("--programs", action="store_true", help="write the exported programs alone (.json), as tests/data/tiny-gpt-oss-programs has them")
    how.add_argument("--check", action="store_true", help="run every kernel on the simulator and write nothing")
    how.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    how.add_argument("--official-version", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.lnc != CORES:
        parser.error(f"--lnc {options.lnc}: the kernels use one core; load them with NEURON_LOGICAL_NC_CONFIG=1")
    if not (options.call or options.official_version):
        if options.set is None:
            parser.error("name a set: kernels/sets/gpt_oss_20b.toml")
        if options.out is None and not options.check:
            parser.error("say where: --out DIR")
    return options


def main(argv: list[str]) -> int:
    """The command line; see the module's docstring."""
    options = parse(argv)
    if options.official_version:
        print(getattr(backend.backend("official")[1], "__version__", ""))
        return 0
    if options.call:
        call(Bucket(*options.call, options.target))
        return 0
    try:
        buckets = read_set(options.set, options.target)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    version = None if options.emulated or options.programs or options.check else official_version()
    try:
        if options.emulated:
            build(buckets, options.out, "emulated", emulated)
        elif options.programs:
            write_programs(buckets, options.out)
        elif version is not None:
            build(buckets, options.out, f"official {version}", lambda bucket, entry, program: compiled(bucket))
        else:
            for i, bucket in enumerate(buckets):
                describe(bucket)
                print(f"{i + 1}/{len(buckets)} {bucket}: runs on the simulator", file=sys.stderr)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check or options.emulated or options.programs or version is not None:
        return 0
    print(
        "compiling is not available here: the official nki package is not installed (what the public index calls nki is a "
        "placeholder). Every kernel of the set ran on the simulator. Run this command on a Trainium host, or use --emulated.",
        file=sys.stderr,
    )
    return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
