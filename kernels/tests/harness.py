"""What every kernel test needs: load a kernel (or a mutant of it), run it on the backend, compare with its reference."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

KERNELS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(KERNELS), str(KERNELS / "sim")]

import run as backend  # noqa: E402  (kernels/sim/run.py)

_serial = itertools.count()


def load(name: str, mutation: tuple[str, ...] | None = None):
    """Module `kernels/NAME.py` on the active backend.

    With `mutation=(old, new)` the source is changed first, with `mutation=(file, old, new)` that of `kernels/FILE.py`,
    which the kernel imports. `old` must stand in it exactly once, so that a mutant that no longer applies fails loudly
    instead of passing as the original.
    """
    backend.backend()
    if mutation is None or len(mutation) == 2:
        return _module(name, mutation)
    helper, *change = mutation
    before = sys.modules.get(helper)
    sys.modules[helper] = _module(helper, change)
    try:
        return _module(name, None)
    finally:
        if before is None:
            del sys.modules[helper]
        else:
            sys.modules[helper] = before


def _module(name: str, change):
    path = KERNELS / f"{name}.py"
    source = path.read_text()
    if change is not None:
        old, new = change
        if source.count(old) != 1:
            raise ValueError(f"{name}: mutation text occurs {source.count(old)} times, need once: {old!r}")
        source = source.replace(old, new)
    spec = importlib.util.spec_from_loader(f"{name}_{next(_serial)}", loader=None, origin=str(path))
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def counters(kernel) -> dict:
    """What the last launch of a kernel did, by the simulator's counters; the test is skipped on the official backend."""
    if backend.backend()[0] != "sim":
        pytest.skip("the official simulator counts nothing")
    return kernel.report.counters.as_dict()


def golden(name: str):
    """(manifest, tensors) of golden/NAME, from TRN_KERNELS_GOLDEN if set. Tensors are loaded when looked up."""
    root = Path(os.environ.get("TRN_KERNELS_GOLDEN") or KERNELS.parent / "tests" / "golden")
    manifest = json.loads((root / f"{name}.json").read_text())
    return manifest, safe_open(root / f"{name}.safetensors", framework="numpy")


def launch(kernel, *args, target: str, **kwargs):
    """Outputs of a kernel as a tuple of arrays."""
    out = backend.run(kernel, *args, target_name=target, **kwargs)
    return out if isinstance(out, tuple) else (out,)


def within(got, want, bound) -> bool:
    """Whether |got - want| <= bound everywhere; NaN is never within."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return got.shape == want.shape and bool(np.all(np.abs(got - want) <= bound))


# What Python raises about a mutant that is no kernel any more: its death would prove nothing.
_NO_KERNEL = (SyntaxError, NameError, TypeError, AttributeError, LookupError)


def killed(name: str, mutation: tuple[str, ...], check) -> str | None:
    """How a mutant dies: `numerics` if `check(module)` is false, the error's type if a check raises; None if it survives.

    A mutant that Python itself cannot run is not killed: its error is raised.
    """
    module = load(name, mutation)
    try:
        return None if check(module) else "numerics"
    except _NO_KERNEL:
        raise
    except Exception as error:  # any refusal counts: the simulator's checks are the point
        return type(error).__name__
