"""Examples of matmul_fp8: each scale granularity, both targets, odd half chunks, ragged edges, epilogues."""

import ml_dtypes
import numpy as np
import matmul_fp8_ref as ref
from trace import FLOATS, Example

# name: target, M, K, N, x and w element, scales, bias, activation, out, integer-valued
CASES = {
    "tensor_exact": ("trn2", 21, 384, 70, "e4m3", "e4m3", "tensor", None, "none", "f32", True),
    "channel": ("trn2", 5, 300, 96, "e5m2", "e4m3", "channel", np.float32, "silu", "bf16", False),
    "blocks": ("trn3", 33, 256, 160, "e4m3fn", "e4m3fn", "blocks", ml_dtypes.bfloat16, "none", "f32", False),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


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


def shaped(kernel: str, target: str, dims: dict) -> dict[str, object]:
    """Arguments of a shape, zeros: what is computed on does not change the program."""
    m, n, k, scales = dims["m"], dims["n"], dims["k"], dims["scales"]
    halves, columns = -(-k // 128), -(-n // 32) * 32
    x_shape, w_shape = {
        "tensor": ((1, 1), (1, 1)),
        "channel": ((m, 1), (1, columns)),
        "blocks": ((m, halves), (-(-n // 128), halves)),
    }[scales]
    return {
        "x": np.zeros((m, k), np.uint8),
        "w": np.zeros((128, halves, columns), np.uint8),
        "x_scale": np.ones(x_shape, np.float32),
        "w_scale": np.ones(w_shape, np.float32),
        "bias": None if dims["bias"] == "none" else np.zeros((1, columns), FLOATS[dims["bias"]]),
        "n": n,
        "blocks": scales == "blocks",
        **{name: dims[name] for name in ("x_element", "w_element", "activation", "out")},
    }
