"""Golden files: safetensors data with a JSON manifest."""

import json
import os
import pathlib

import ml_dtypes
import numpy as np

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def golden_dir() -> pathlib.Path:
    """TRN_KERNELS_GOLDEN, or the data of the repository."""
    return pathlib.Path(os.environ.get("TRN_KERNELS_GOLDEN") or _REPOSITORY / "tests" / "golden")


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
        kinds = {"U8": np.uint8, "F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
        entry = self._header[name]
        first, last = entry["data_offsets"]
        data = self._bytes[self._start + first : self._start + last]
        return np.frombuffer(data, kinds[entry["dtype"]]).reshape(entry["shape"])
