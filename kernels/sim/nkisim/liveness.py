"""How much SBUF and PSUM is live at once.

A tensor is live from the first to the last instruction that touches it: no allocator can do with less without
reordering. Tensors with an address occupy exactly their bytes; the others are placed by the compiler and are counted
by size.
"""

from __future__ import annotations

import numpy as np

from . import chip as chips
from .memory import PSUM, MemoryRegion, Storage


def high_water(storages: list[Storage], buffer: MemoryRegion, capacity: int) -> tuple[int, int, Storage | None]:
    """Peak bytes of a partition, peak PSUM banks, and the tensor whose first use makes the byte peak.

    A tensor in PSUM without an address counts as whole banks for the bank figure and as its bytes for the byte figure.
    """
    live = [s for s in storages if s.buffer is buffer and s.first_use is not None]
    starts = sorted(live, key=lambda s: (s.first_use, s.id))
    ends = sorted(live, key=lambda s: s.last_use)
    occupied = np.zeros(capacity, np.int32)
    placed = floating = floating_banks = 0
    peak, peak_banks, at = 0, 0, None
    next_end = 0
    for storage in starts:
        while ends[next_end].last_use < storage.first_use:
            gone = ends[next_end]
            next_end += 1
            if gone.address is None:
                floating -= gone.row_bytes
                floating_banks -= _banks(gone)
            else:
                occupied[_span(gone)] -= 1
                placed = int(np.count_nonzero(occupied))
        if storage.address is None:
            floating += storage.row_bytes
            floating_banks += _banks(storage)
        else:
            occupied[_span(storage)] += 1
            placed = int(np.count_nonzero(occupied))
        if placed + floating > peak:
            peak, at = placed + floating, storage
        if buffer is PSUM:
            filled = np.count_nonzero(occupied.reshape(-1, chips.PSUM_BANK_BYTES).any(axis=1)) if placed else 0
            peak_banks = max(peak_banks, int(filled) + floating_banks)
    return peak, peak_banks, at


def _banks(storage: Storage) -> int:
    return -(-storage.row_bytes // chips.PSUM_BANK_BYTES)


def _span(storage: Storage) -> slice:
    return slice(storage.start_byte, storage.start_byte + storage.row_bytes)
