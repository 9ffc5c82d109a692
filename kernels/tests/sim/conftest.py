"""Shared set-up: the simulator is importable, and a body can be run as a kernel."""

import os
import pathlib
import sys

# Tiles are at most 128 x 128 x 512: BLAS threads only cost time. Must come before numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402

_KERNELS = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_KERNELS / "sim"))

import nki  # noqa: E402
import nkisim  # noqa: E402


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """Tests choose targets and switches themselves."""
    for name in list(os.environ):
        if name.startswith("NKI_") or name == "NEURON_PLATFORM_TARGET_OVERRIDE":
            monkeypatch.delenv(name)


@pytest.fixture
def sim():
    """Run a function as a kernel: `sim(body, *arrays, target=..., **switches)`; `sim.report` is what it did."""

    def run(body, *args, target="trn3", cores=1, **switches):
        kernel = nki.jit(body, platform_target=target)
        with nkisim.configured(**switches):
            out = (kernel[cores] if cores > 1 else kernel)(*args)
        run.report = nkisim.last_report()
        return out

    return run
