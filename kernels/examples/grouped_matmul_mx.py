"""Example of grouped_matmul_mx: two experts, one with more rows than a block has slots."""

import ml_dtypes
import numpy as np
import grouped_matmul_mx_ref as ref
import mx_ref
from trace import Example

BF16 = ml_dtypes.bfloat16
# name: expert row offsets, slots of a block, hidden, intermediate, weight element, out, terms of x
CASES = {
    "mxfp4": ((0, 2, 7), 4, 64, 96, "e2m1", "bf16", 1),
    "two_terms": ((0, 2, 7), 4, 64, 96, "e2m1", "bf16", 2),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def _example(name: str, case: tuple, seed: int) -> Example:
    offsets, slots, hidden, inter, element, out, x_terms = case
    rng = np.random.default_rng(seed)
    experts, rows = len(offsets) - 1, offsets[-1]
    gate_up, down = [], []
    for _ in range(experts):
        w = rng.standard_normal((2 * inter, hidden)) * (5.0 / np.sqrt(hidden))  # gates and ups of a few units: all clamps act
        bias = rng.standard_normal(2 * inter).astype(np.float32)
        gate_up.append(ref.pack_gate_up(*mx_ref.quantize(w, element, "ocp"), bias, element))
        down.append(mx_ref.pack(*mx_ref.quantize(rng.standard_normal((hidden, inter)), element, "ocp"), element))
    take, block_expert = ref.blocks_of(offsets, slots, rows)
    args = {
        "x": rng.standard_normal((rows, hidden)).astype(BF16),
        "take": take,
        "put": take.copy(),
        "block_expert": block_expert,
        "w_gate_up": np.stack([g[0] for g in gate_up]),
        "s_gate_up": np.stack([g[1] for g in gate_up]),
        "b_gate_up": np.stack([g[2] for g in gate_up]),
        "w_down": np.stack([d[0] for d in down]),
        "s_down": np.stack([d[1] for d in down]),
        "b_down": rng.standard_normal((experts, down[0][0].shape[2])).astype(BF16),
        "rows_out": rows,
        "intermediate": inter,
        "w_element": element,
        "limit": 7.0,
        "out": out,
        "x_terms": x_terms,
    }
    # Each executor is within the kernel's own bound of the exact result under either rule of the block scale.
    apart = np.maximum(ref.bound(**args, rule="neuron"), ref.bound(**args, rule="ocp"))
    return Example(name, "trn3", "grouped_matmul_mx.py", "grouped_matmul_mx", args, (2.0 * apart,))


def shaped(kernel: str, target: str, dims: dict) -> dict[str, object]:
    """Arguments of a shape, zeros: what is computed on does not change the program. Block b belongs to expert b mod E."""
    blocks, rows, hidden, inter, experts = (dims[name] for name in ("b", "r", "h", "i", "e"))
    h_tiles, i_tiles, columns = -(-hidden // 512), -(-inter // 512), -(-hidden // 32) * 32
    word = np.uint16 if dims["w_element"] == "e2m1" else np.uint32
    scales = lambda tiles, c: np.zeros((experts, 64, -(-tiles // 4), c), np.uint8)  # noqa: E731
    slots = np.arange(blocks * rows, dtype=np.int32).reshape(blocks, rows)
    rows_in, rows_out = dims["x"] or blocks * rows, dims["y"] or blocks * rows
    return {
        "x": np.zeros((rows_in, hidden), BF16),
        "take": slots,
        "put": slots.copy(),
        "block_expert": (np.arange(blocks, dtype=np.int32) % max(experts, 1)).reshape(1, blocks),
        "w_gate_up": np.zeros((experts, 128, h_tiles, 1024 * i_tiles), word),
        "s_gate_up": scales(h_tiles, 1024 * i_tiles),
        "b_gate_up": np.zeros((experts, 8 * i_tiles, 128), np.float32),
        "w_down": np.zeros((experts, 128, i_tiles, columns), word),
        "s_down": scales(i_tiles, columns),
        "b_down": np.zeros((experts, columns), BF16),
        "rows_out": rows_out,
        "intermediate": inter,
        "w_element": dims["w_element"],
        "limit": 7.0,
        "out": dims["out"],
        "x_terms": int(dims["x_terms"]),
    }
