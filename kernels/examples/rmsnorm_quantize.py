"""Examples of rmsnorm_quantize: data on which every step is exact or rounds once, so that executors agree to the bit.

Rows hold -2..2 with a mean of squares of exactly 1, times a power of two whose square swallows eps: 1 / rms is a power of two
whatever the order of the sum. gamma is integers.
"""

import ml_dtypes
import numpy as np
from trace import FLOATS, Example

BF16 = ml_dtypes.bfloat16
EPS = 2.0**-60
# name: target, entry, M, K (a power of two), element, dtype of x
CASES = {
    "e4m3": ("trn2", "rmsnorm_quantize_fp8", 131, 256, "e4m3", BF16),
    "e5m2_f32": ("trn2", "rmsnorm_quantize_fp8", 20, 64, "e5m2", np.float32),
    "e4m3fn": ("trn3", "rmsnorm_quantize_fp8", 33, 128, "e4m3fn", BF16),
    "ragged": ("trn3", "rmsnorm_quantize_mx", 35, 64, "e4m3fn", BF16),
    "tiles": ("trn3", "rmsnorm_quantize_mx", 8, 4096, "e5m2", BF16),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def _row(rng, k: int) -> np.ndarray:
    """b twos, k - 4 b ones, 3 b zeros, shuffled, with signs: squares sum to k."""
    twos = int(rng.integers(0, k // 4 + 1))
    row = np.concatenate([np.full(twos, 2.0), np.ones(k - 4 * twos), np.zeros(3 * twos)])
    return rng.permutation(row) * rng.choice([-1.0, 1.0], k)


def _example(name: str, case: tuple, seed: int) -> Example:
    target, entry, m, k, element, dtype = case
    rng = np.random.default_rng(seed)
    x = np.stack([_row(rng, k) for _ in range(m)]) * np.exp2(rng.integers(-6, 7, (m, 1)))
    gamma = rng.integers(-15, 16, (1, k)).astype(np.float32)
    args = {"x": x.astype(np.float32).astype(dtype), "gamma": gamma.astype(BF16), "eps": EPS, "element": element}
    return Example(name, target, "rmsnorm_quantize.py", entry, args, (None, None))


def shaped(kernel: str, target: str, dims: dict) -> dict[str, object]:
    """Arguments of a shape, zeros: what is computed on does not change the program."""
    x = np.zeros((dims["m"], dims["k"]), FLOATS[dims["x"]])
    return {"x": x, "gamma": np.zeros((1, dims["k"]), BF16), "eps": EPS, "element": dims["element"]}
