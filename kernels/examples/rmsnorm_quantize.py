"""Examples of rmsnorm_quantize on data without rounding: rows of one magnitude, a power of two, so that 1 / rms is one too."""

import ml_dtypes
import numpy as np
from trace import Example

BF16 = ml_dtypes.bfloat16
# entry: name: target, M, K, element, type of x
CASES = {
    "rmsnorm_quantize_fp8": {
        "trn2": ("trn2", 5, 96, "e4m3", BF16),
        "trn3": ("trn3", 130, 40, "e4m3fn", np.float32),
    },
    "rmsnorm_quantize_mx": {
        "e4m3fn": ("trn3", 5, 96, "e4m3fn", BF16),
        "e5m2": ("trn3", 34, 544, "e5m2", BF16),
    },
}
# Largest value of each element: as a row's largest result it makes the row's scale 1.
TOP = {"e4m3": 240.0, "e4m3fn": 448.0, "e5m2": 57344.0}


def examples() -> list[Example]:
    """One for each case; executors must agree to the bit."""
    return [_example(e, name, case) for e, cases in CASES.items() for name, case in cases.items()]


def _example(entry: str, name: str, case: tuple) -> Example:
    target, m, k, element, x_type = case
    rng = np.random.default_rng(m * k)
    signs = rng.choice([-1.0, 1.0], (m, k))
    x = signs * np.exp2(rng.integers(-6, 7, (m, 1)))
    gamma = rng.integers(1, 16, (1, k)) * np.exp2(rng.integers(-3, 3, (1, k)))
    gamma[0, 0] = TOP[element]
    args = {
        "x": x.astype(x_type),
        "gamma": gamma.astype(np.float32).astype(BF16),
        "eps": 2.0**-80,  # nothing beside the mean
        "element": element,
    }
    return Example(name, target, "rmsnorm_quantize.py", entry, args, (None, None))
