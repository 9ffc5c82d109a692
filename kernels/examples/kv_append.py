"""Examples of kv_append: bf16 and one-byte caches, skipped slots, more tokens than partitions. Bytes are moved: no bounds."""

import ml_dtypes
import numpy as np
from trace import Example

CACHES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3),
    "e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# name: target, T, N, S, HKV, D, dtype
CASES = {
    "bf16": ("trn3", 5, 4, 8, 2, 32, np.dtype(ml_dtypes.bfloat16)),
    "bytes": ("trn2", 131, 20, 8, 1, 16, np.dtype(np.uint8)),
}


def examples() -> list[Example]:
    """One for each case."""
    return [_example(name, case, i) for i, (name, case) in enumerate(CASES.items())]


def arguments(seed, tokens, pages, page_size, heads, d, dtype) -> dict[str, np.ndarray]:
    """Random bytes, distinct slots, about one in four of them out of range on either side."""
    rng = np.random.default_rng(seed)
    bits = lambda *shape: rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)  # noqa: E731
    total = pages * page_size
    slots = rng.permutation(total)[:tokens].astype(np.int32)
    out = rng.random(tokens)
    slots = np.where(out < 0.15, -1, np.where(out < 0.25, total + slots, slots)).astype(np.int32)
    cache = (pages, page_size, heads, d)
    return {
        "k": bits(tokens, heads, d),
        "v": bits(tokens, heads, d),
        "slots": slots,
        "k_cache": bits(*cache),
        "v_cache": bits(*cache),
    }


def _example(name: str, case: tuple, seed: int) -> Example:
    target, *shape = case
    return Example(name, target, "kv_append.py", "kv_append", arguments(seed, *shape))


def shaped(kernel: str, target: str, dims: dict) -> dict[str, np.ndarray]:
    """Arguments of a shape: what is moved, and where to, does not change the program."""
    tokens, pages, page_size, heads, d = (dims[name] for name in ("t", "n", "s", "hkv", "d"))
    dtype = CACHES[dims["cache"]]
    cache = (pages, page_size, heads, d)
    return {
        "k": np.zeros((tokens, heads, d), dtype),
        "v": np.zeros((tokens, heads, d), dtype),
        "slots": np.where(np.arange(tokens) < pages * page_size, np.arange(tokens), -1).astype(np.int32),
        "k_cache": np.zeros(cache, dtype),
        "v_cache": np.zeros(cache, dtype),
    }
