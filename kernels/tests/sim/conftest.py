"""Shared set-up: the simulator is importable, goldens are found, a body can be run as a kernel."""

import json
import os
import pathlib
import sys

import numpy as np
import pytest

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


def golden_dir() -> pathlib.Path:
    """TRN_KERNELS_GOLDEN, or the data of the repository."""
    return pathlib.Path(os.environ.get("TRN_KERNELS_GOLDEN") or _KERNELS.parent / "tests" / "golden")


class Golden:
    """Tensors and manifest of one golden file."""

    def __init__(self, name: str):
        self.manifest = json.loads((golden_dir() / f"{name}.json").read_text())
        self._bytes = (golden_dir() / f"{name}.safetensors").read_bytes()
        length = int.from_bytes(self._bytes[:8], "little")
        self._header = json.loads(self._bytes[8 : 8 + length])
        self._start = 8 + length

    def names(self):
        """Tensor names of the file."""
        return [n for n in self._header if n != "__metadata__"]

    def __getitem__(self, name: str) -> np.ndarray:
        import ml_dtypes

        kinds = {"U8": np.uint8, "F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
        entry = self._header[name]
        first, last = entry["data_offsets"]
        data = self._bytes[self._start + first : self._start + last]
        return np.frombuffer(data, kinds[entry["dtype"]]).reshape(entry["shape"])
