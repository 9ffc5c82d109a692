"""Writes the keys and values of new tokens into the paged KV caches, in place (Trn2, Trn3).

Dimensions
    T    new tokens of the call, over all sequences
    N    pages of the cache (num_pages), S tokens of a page (page_size)
    HKV  kv heads (num_kv_heads), D head_dim; a row is HKV * D elements, at most 8192

Tensors (HBM)
    k, v      [T, HKV, D]     rows of the new tokens, in the cache's dtype: they are moved, not converted
    slots     [T]             int32: page * S + offset of each token; outside 0..N * S, by convention -1: the token is skipped
    k_cache   [N, S, HKV, D]  any dtype of one, two or four bytes (libnrt may call FP8 u8); changed in place and returned
    v_cache   [N, S, HKV, D]  as k_cache

Two tokens of a call may not have one slot. Rows without a token keep their bytes.
"""

import nki
import nki.isa as nisa
import nki.language as nl

P_MAX = 128
ROW = 8192  # elements: a row of K and one of V, of up to 32 KiB each, lie in a partition at a time


def load_rows(rows, first, count):
    """Rows first..first + count of [T, HKV, D] as [count, HKV * D], one to a partition."""
    width = rows.shape[1] * rows.shape[2]
    tile = nl.ndarray((count, width), dtype=rows.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=rows[first : first + count].reshape((count, width)))
    return tile


def scatter(cache, tile, index):
    """Row p of `tile` to row index[p] of the cache, seen as [N * S, HKV * D]; an index outside it is skipped."""
    pages, page_size = cache.shape[0], cache.shape[1]
    count, width = tile.shape
    target = cache.reshape((pages * page_size, width))
    nisa.dma_copy(
        dst=target.ap([[width, count], [1, width]], offset=0, vector_offset=index),
        src=tile,
        oob_mode=nisa.oob_mode.skip,
    )


@nki.jit
def kv_append(k, v, slots, k_cache, v_cache):
    """k_cache and v_cache with the rows of the new tokens; constraints are those of manifest.toml."""
    version = nisa.get_nc_version()
    assert version == nisa.nc_version.gen3 or version == nisa.nc_version.gen4, "target: need trn2 or trn3"
    assert len(k.shape) == 3, f"k: got {k.shape}, need [T, HKV, D]"
    tokens, heads, d = k.shape
    assert v.shape == k.shape and v.dtype == k.dtype, f"v: got {v.shape} {v.dtype}, need {k.shape} {k.dtype} as k"
    assert slots.shape == (tokens,) and slots.dtype == nl.int32, (
        f"slots: got {slots.shape} {slots.dtype}, need ({tokens},) int32"
    )
    assert len(k_cache.shape) == 4 and k_cache.shape[2] == heads and k_cache.shape[3] == d and k_cache.dtype == k.dtype, (
        f"k_cache: got {k_cache.shape} {k_cache.dtype}, need [N, S, {heads}, {d}] {k.dtype}"
    )
    assert v_cache.shape == k_cache.shape and v_cache.dtype == k_cache.dtype, (
        f"v_cache: got {v_cache.shape} {v_cache.dtype}, need {k_cache.shape} {k_cache.dtype} as k_cache"
    )
    assert heads * d <= ROW, f"row: got {heads * d} elements, need at most {ROW}"
    for first in range(0, tokens, P_MAX):
        count = min(P_MAX, tokens - first)
        index = nl.ndarray((count, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=index, src=slots[first : first + count].reshape((count, 1)))
        k_rows = load_rows(k, first, count)
        v_rows = load_rows(v, first, count)
        scatter(k_cache, k_rows, index)
        scatter(v_cache, v_rows, index)
    return k_cache, v_cache
