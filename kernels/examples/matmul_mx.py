"""Examples of matmul_mx: MXFP4 and MXFP8 weights, activations quantized on the device and before, padded k, both outputs."""

import ml_dtypes
import numpy as np
import matmul_mx_ref as ref
import mx_ref
from trace import FLOATS, Example

# name: M, K, N, w element, x element, x packed, bias, out, terms of x
CASES = {
    "mxfp4": (5, 320, 70, "e2m1", "e4m3fn", False, None, "f32", 1),
    "mxfp4_bf16": (34, 544, 48, "e2m1", "e5m2", False, ml_dtypes.bfloat16, "bf16", 1),
    "mxfp8": (3, 1056, 40, "e4m3fn", "e4m3fn", False, None, "f32", 1),
    "packed": (8, 512, 64, "e5m2", "e2m1", True, np.float32, "f32", 1),
    "two_terms": (6, 256, 64, "e4m3fn", "e4m3fn", False, np.float32, "f32", 2),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def _example(name: str, case: tuple, seed: int) -> Example:
    m, k, n, w_element, x_element, packed, bias, out, x_terms = case
    rng = np.random.default_rng(seed)
    spread = lambda rows: np.exp2(rng.integers(-6, 7, (rows, k // 32))).repeat(32, axis=1)  # noqa: E731
    w, w_scale = mx_ref.pack(*mx_ref.quantize(rng.standard_normal((n, k)) * spread(n), w_element, "ocp"), w_element)
    x, x_scale = (rng.standard_normal((m, k)) * spread(m)).astype(ml_dtypes.bfloat16), None
    if packed:
        x, x_scale = mx_ref.pack(*mx_ref.quantize(x, x_element, "ocp"), x_element)
    args = {
        "x": x,
        "w": w,
        "w_scale": w_scale,
        "x_scale": x_scale,
        "bias": None if bias is None else rng.standard_normal((1, w.shape[2])).astype(bias),
        "m": m,
        "n": n,
        "w_element": w_element,
        "x_element": x_element,
        "out": out,
        "x_terms": x_terms,
    }
    # Each executor is within the kernel's own bound of the exact result; the rule of the block scale changes both alike.
    apart = np.maximum(ref.bound(**args, rule="neuron"), ref.bound(**args, rule="ocp"))
    return Example(name, "trn3", "matmul_mx.py", "matmul_mx", args, (2.0 * apart,))


def shaped(kernel: str, target: str, dims: dict) -> dict[str, object]:
    """Arguments of a shape, zeros: what is computed on does not change the program."""
    m, n, k = dims["m"], dims["n"], dims["k"]
    tiles, columns, rows = -(-k // 512), -(-n // 32) * 32, -(-m // 32) * 32
    packed = dims["x"] == "packed"
    word = lambda element: np.uint16 if element == "e2m1" else np.uint32  # noqa: E731
    scales = lambda c: np.zeros((64, -(-tiles // 4), c), np.uint8)  # noqa: E731
    x = np.zeros((128, tiles, rows), word(dims["x_element"])) if packed else np.zeros((m, k), ml_dtypes.bfloat16)
    return {
        "x": x,
        "w": np.zeros((128, tiles, columns), word(dims["w_element"])),
        "w_scale": scales(columns),
        "x_scale": scales(rows) if packed else None,
        "bias": None if dims["bias"] == "none" else np.zeros((1, columns), FLOATS[dims["bias"]]),
        **{name: dims[name] for name in ("m", "n", "w_element", "x_element", "out")},
        "x_terms": int(dims["x_terms"]),
    }
