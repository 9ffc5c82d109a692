"""Examples of kernels/tests/isa_tour.py and isa_tour_more.py: integers and powers of two, so that no executor may round differently."""

import ml_dtypes
import numpy as np
from trace import Example

FILE = "tests/isa_tour.py"
MORE = "tests/isa_tour_more.py"


def examples() -> list[Example]:
    """Every tour kernel, on the targets that have its instructions."""
    rng = np.random.default_rng(20)
    ints = lambda shape, low, high: rng.integers(low, high, shape, endpoint=True)  # noqa: E731
    fp32 = lambda shape, low, high: ints(shape, low, high).astype(np.float32)  # noqa: E731
    out = []
    for target, fp8 in (("trn2", ml_dtypes.float8_e4m3), ("trn3", ml_dtypes.float8_e4m3fn)):
        args = {
            "x": fp32((256, 48), -8, 8).astype(fp8),
            "w": fp32((256, 80), -8, 8).astype(fp8),
            "scale": np.exp2(fp32((48, 1), -3, 3)),
        }
        out.append(Example(target, target, FILE, "tour_double_row", args))
    mx = {
        "x": fp32((128, 4 * 6), -15, 15).astype(ml_dtypes.bfloat16),
        "w": ints((128, 24), 0, 0xFFFF).astype(np.uint16),
        "w_scale": ints((16, 24), 120, 134).astype(np.uint8),
    }
    out.append(Example("trn3", "trn3", FILE, "tour_mx", mx))
    vector = {"a": fp32((32, 40), -60, 60), "b": fp32((32, 40), -60, 60), "column": np.exp2(fp32((32, 1), -4, 4))}
    out.append(Example("trn3", "trn3", FILE, "tour_vector", vector))
    select = {"a": fp32((16, 24), -40, 40), "low": fp32((16, 1), 0, 8), "high": fp32((16, 1), 9, 26)}
    out.append(Example("trn2", "trn2", FILE, "tour_select", select))
    move = {
        "table": fp32((64, 32), -14, 14).astype(ml_dtypes.bfloat16),
        "rows": rng.permutation(64)[:32].reshape(32, 1).astype(np.int32),
        "start": np.array([[5]], np.int32),
    }
    out.append(Example("trn2", "trn2", FILE, "tour_move", move))
    return out + _more(rng)


def _more(rng) -> list[Example]:
    """Those of isa_tour_more.py."""
    ints = lambda shape, low, high: rng.integers(low, high, shape, endpoint=True)  # noqa: E731
    fp32 = lambda shape, low, high: ints(shape, low, high).astype(np.float32)  # noqa: E731
    out = []
    # 32 elements, small: means and variances are exact in float32.
    running = {"a": fp32((32, 32), -4, 4), "b": fp32((32, 32), -4, 4), "column": fp32((32, 1), -2, 2)}
    out.append(Example("trn2", "trn2", MORE, "tour_running", running))
    activate = {"a": fp32((32, 24), -20, 20), "column": np.exp2(fp32((32, 1), -2, 2))}
    out.append(Example("trn3", "trn3", MORE, "tour_activate2", activate))
    distinct = np.stack([rng.permutation(np.arange(-30, 30)) for _ in range(64)]).astype(np.float32)
    search = {
        "a": distinct,
        "index": ints((64, 20), 0, 59).astype(np.uint32),
        "near": ints((64, 4), 0, 59).astype(np.uint16),
        "segments": np.repeat([3, 1, 0, 4, 2, 0], [7, 20, 3, 1, 25, 4]).reshape(1, 60).astype(np.float32),
    }
    out.append(Example("trn2", "trn2", MORE, "tour_search", search))
    compute = {
        "a": fp32((16, 24), -9, 9),
        "b": fp32((16, 24), -9, 9),
        "table": fp32((40, 24), -9, 9).astype(ml_dtypes.bfloat16),
        "rows": rng.permutation(40)[:16].reshape(16, 1).astype(np.int32),
    }
    out.append(Example("trn2", "trn2", MORE, "tour_dma_compute", compute))
    return out
