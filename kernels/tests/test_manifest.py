"""manifest.toml says what the kernels' own assertions say: one verdict and one constraint's name, in Python and in Rust.

`refusals.json` has calls at the edge of every constraint and one past it. Here each goes through the kernel and through
manifest.py; tests/manifest.rs sends the same calls through the Rust reading.
"""

from __future__ import annotations

import inspect
import json
import random

import harness
import numpy as np
import pytest

import manifest  # kernels/manifest.py
import trace as tracer

KERNELS = manifest.kernels()
TABLE = json.loads((harness.KERNELS / "tests" / "refusals.json").read_text())
ENTRIES = {name: getattr(harness.load(row["file"].removesuffix(".py")), row["entry"]) for name, row in KERNELS.items()}


class Passed(Exception):
    """The kernel made its first tensor: all its assertions held."""


@pytest.fixture
def first_tensor(monkeypatch):
    """Stops a kernel where its checks end, at its first nl.ndarray."""
    if harness.backend.backend()[0] != "sim":
        pytest.skip("the official package compiles a kernel before it runs: it cannot be stopped after its checks")
    import nki.language as nl

    def stop(*args, **kwargs):
        raise Passed

    monkeypatch.setattr(nl, "ndarray", stop)


def call(name: str, change: dict) -> tuple[str, dict, dict]:
    """(target, inputs, parameters) of a kernel's ordinary call with a change."""
    base, entry = TABLE[name], KERNELS[name]
    parameters = {row["name"] for row in entry["parameters"]}
    inputs = base["inputs"] | {k: v for k, v in change.items() if k not in parameters and k != "target"}
    values = base["parameters"] | {k: v for k, v in change.items() if k in parameters}
    given = {k: (v[0], tuple(v[1])) for k, v in inputs.items() if v is not None}
    return change.get("target", base["target"]), given, values


def by_manifest(name: str, change: dict) -> str | None:
    """The constraint that refuses the call; None if it is served."""
    target, inputs, parameters = call(name, change)
    try:
        manifest.check(KERNELS[name], target, inputs, parameters)
    except manifest.Refused as refused:
        return refused.constraint
    return None


def launch(name: str, change: dict):
    """Runs the kernel on arrays of zeros."""
    from nkisim.dtypes import resolve

    target, inputs, parameters = call(name, change)
    arrays = {k: np.zeros(shape, resolve(dtype).np) for k, (dtype, shape) in inputs.items()}
    if "put" in arrays:  # every row of the output is the target of one slot
        arrays["put"].reshape(-1)[:] = np.arange(arrays["put"].size)
    return harness.launch(ENTRIES[name], target=target, **arrays, **parameters)


def by_kernel(name: str, change: dict) -> str | None:
    """The constraint that the kernel's assertion names; None if it gets past them."""
    try:
        launch(name, change)
    except Passed:
        return None
    except AssertionError as refused:
        return str(refused).partition(": ")[0]
    raise ValueError("the kernel ended without a tensor")


@pytest.mark.parametrize("name", TABLE)
def test_kernel_and_manifest_agree(name, first_tensor):
    for case in TABLE[name]["cases"]:
        verdicts = by_kernel(name, case["change"]), by_manifest(name, case["change"])
        assert verdicts == (case["refused"],) * 2, case


@pytest.mark.parametrize(
    ("name", "change"), [(name, c["change"]) for name in TABLE for c in TABLE[name]["cases"] if c.get("run")]
)
def test_what_is_accepted_runs_to_its_end(name, change):
    """Also that outputs are what the manifest says."""
    target, inputs, parameters = call(name, change)
    outputs = manifest.check(KERNELS[name], target, inputs, parameters)["outputs"]
    got = launch(name, change)
    assert [(str(nki_type(a)), a.shape) for a in got] == list(outputs.values())


def nki_type(array) -> str:
    """NKI name of an array's type."""
    from nkisim.dtypes import resolve

    return resolve(array.dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_every_constraint_has_a_refused_case_and_every_kernel_a_run(name):
    refused = {c["refused"] for c in TABLE[name]["cases"]}
    assert refused - {None} == {c["name"] for c in KERNELS[name]["constraints"]}
    assert any(c.get("run") for c in TABLE[name]["cases"])


def mutations(name: str, rng: random.Random):
    """Calls that differ from the accepted ones in one thing."""
    entry = KERNELS[name]
    accepted = [c["change"] for c in TABLE[name]["cases"] if c["refused"] is None]
    choices = {row["name"]: [t.strip() for t in row["kind"].split("|")] for row in entry["parameters"]}
    while True:
        change = dict(rng.choice(accepted))
        _, inputs, _ = call(name, change)
        if choices and rng.random() < 0.2:
            parameter = rng.choice(list(choices))
            kind = choices[parameter]
            if kind == ["int"]:
                change[parameter] = rng.choice([-1, 0, 1, 2, 31, 32, 64, 4096])
            elif kind == ["f32"]:
                change[parameter] = rng.choice([-1.0, 0.0, 1e-30, 1.0, 1e30])
            else:
                change[parameter] = rng.choice([True, False] if kind == ["bool"] else [*kind, "e3m4"])
        else:
            tensor = rng.choice(list(inputs))
            dtype, shape = inputs[tensor][0], list(inputs[tensor][1])
            at = rng.randrange(len(shape))
            match rng.randrange(5):
                case 0:
                    dtype = rng.choice(list(manifest.TYPES))
                case 1:
                    shape.insert(at, 1)
                case 2 if len(shape) > 1:
                    del shape[at]
                case _:
                    shape[at] = rng.choice([1, max(1, shape[at] - 1), shape[at] + 1, 2 * shape[at]])
            change[tensor] = [dtype, shape]
        if all(np.prod(shape, dtype=object) < 2**24 for _, shape in call(name, change)[1].values()):
            yield change


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_and_manifest_agree_on_random_changes(name, first_tensor):
    rng = random.Random(name)
    seen = set()
    for change, _ in zip(mutations(name, rng), range(400), strict=False):
        kernel, failing = by_kernel(name, change), manifest.refusals(KERNELS[name], *call(name, change))
        # Where more than one constraint fails, the kernel may come to another of them first.
        assert kernel in failing if failing else kernel is None, (change, kernel, failing)
        assert by_manifest(name, change) == (failing[0] if failing else None), change
        seen.add(kernel)
    assert None in seen and len(seen) > 4


@pytest.mark.parametrize("name", KERNELS)
def test_parameters_and_defaults_are_those_of_the_signature(name):
    signature = inspect.signature(ENTRIES[name].fn).parameters
    entry = KERNELS[name]
    assert set(signature) == {row["name"] for kind in ("inputs", "parameters") for row in entry[kind]}
    for kind in ("inputs", "parameters"):
        for row in entry[kind]:
            default = signature[row["name"]].default
            if row.get("optional"):
                assert default is None, row
            else:
                assert default == row.get("default", inspect.Parameter.empty), row


def test_examples_are_served_and_their_outputs_are_as_said():
    """Every example that a program is made of, against the program's own tensors."""
    for path in sorted(tracer.PROGRAMS.glob("*.json")):
        program = json.loads(path.read_text())
        if program["kernel"] not in KERNELS:
            continue  # a tour of the instruction set, not a kernel
        tensor = lambda port: (lambda t: (t["dtype"], tuple(t["shape"])))(program["tensors"][port["tensor"]])  # noqa: E731
        inputs = {port["name"]: tensor(port) for port in program["inputs"]}
        bound = manifest.check(KERNELS[program["kernel"]], program["target"], inputs, program["parameters"])
        outputs = {port["name"]: tensor(port) for port in program["outputs"]}
        assert bound["outputs"] == outputs, path.name


def test_expressions_mean_in_both_languages_what_they_mean_in_python():
    """`expressions.json`, over a tensor x bfloat16 [M, K] = [6, 5] and n = -7; null has no value. tests/manifest.rs has it too."""
    entry = {
        "name": "k", "targets": ["trn2"], "outputs": [],
        "inputs": [{"name": "x", "dtype": "bf16", "shape": "[M, K]"}],
        "parameters": [{"name": "n", "kind": "int", "optional": True}],
    }  # fmt: skip
    for check, needed in json.loads((harness.KERNELS / "tests" / "expressions.json").read_text()):
        entry["constraints"] = [{"name": "c", "text": "t", "check": check}]
        try:
            manifest.check(entry, "trn2", {"x": ("bfloat16", (6, 5))}, {"n": -7})
            got = True
        except manifest.Refused as refused:
            got = None if ";" in str(refused) else False
        assert got == needed, check


def test_missing_unknown_and_empty_arguments_are_refused_by_their_names():
    for change, constraint in [({"w": None}, "w"), ({"v": ["uint8", [1]]}, "v"), ({"x": ["uint8", [0, 256]]}, "x")]:
        assert by_manifest("matmul_fp8", change) == constraint
