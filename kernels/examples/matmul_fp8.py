"""Examples of matmul_fp8: each scale granularity, both targets, odd half chunks, ragged edges, epilogues."""

import ml_dtypes
import numpy as np
import matmul_fp8_ref as ref
from trace import Example

# name: target, M, K, N, x and w element, scales, bias, activation, out, integer-valued
CASES = {
    "tensor_exact": ("trn2", 21, 384, 70, "e4m3", "e4m3", "tensor", None, "none", "f32", True),
    "channel": ("trn2", 5, 300, 96, "e5m2", "e4m3", "channel", np.float32, "silu", "bf16", False),
    "blocks": ("trn3", 33, 256, 160, "e4m3fn", "e4m3fn", "blocks", ml_dtypes.bfloat16, "none", "f32", False),
}
# Shapes for the cost model only: compute bound, and bound by the weights.
LARGE = {
    "large": ("trn2", 2048, 2048, 2048, "e4m3", "e4m3", "channel", None, "none", "bf16", False),
    "large_decode": ("trn2", 4, 4096, 4096, "e4m3", "e4m3", "channel", None, "none", "bf16", False),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def large() -> list[Example]:
    """Those of LARGE."""
    return [_example(name, case, 0) for name, case in LARGE.items()]


def _example(name: str, case: tuple, seed: int) -> Example:
    target, m, k, n, x_element, w_element, scales, bias, activation, out, exact = case
    rng = np.random.default_rng(seed)

    def codes(shape, element):
        values = rng.integers(-8, 8, shape, endpoint=True) if exact else rng.standard_normal(shape)
        return values.astype(np.float32).astype(ref.ELEMENTS[element]).view(np.uint8)

    w = ref.pack(codes((k, n), w_element))
    halves, columns = w.shape[1:]
    x_shape, w_shape = {
        "tensor": ((1, 1), (1, 1)),
        "channel": ((m, 1), (1, columns)),
        "blocks": ((m, halves), (-(-n // 128), halves)),
    }[scales]
    scale = lambda shape: np.full(shape, 0.5, np.float32) if exact else rng.uniform(0.1, 2.0, shape).astype(np.float32)  # noqa: E731
    args = {
        "x": codes((m, k), x_element),
        "w": w,
        "x_scale": scale(x_shape),
        "w_scale": scale(w_shape),
        "bias": None if bias is None else rng.standard_normal((1, columns)).astype(bias),
        "n": n,
        "x_element": x_element,
        "w_element": w_element,
        "blocks": scales == "blocks",
        "activation": activation,
        "out": out,
    }
    # Each executor is within the kernel's own bound of the exact result. Small integers and powers of two are exact.
    bounds = () if exact else (2.0 * ref.bound(**args),)
    return Example(name, target, "matmul_fp8.py", "matmul_fp8", args, bounds)
