"""`nl.tile_size`: sizes of the current target."""

from __future__ import annotations

import os

from . import chip as chips
from . import program
from .memory import PSUM_ALIGN


def _chip() -> chips.Chip:
    return program.current().chip if program.active() else chips.from_environment()


class TileSize:
    """Hardware tile limits; those that depend on the target follow the running kernel or the environment."""

    pmax = chips.PARTITIONS
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512
    psum_fmax = psum_bank_fmax = chips.PSUM_BANK_BYTES // 4
    psum_bank_fmax_bytes = psum_fmax_bytes = chips.PSUM_BANK_BYTES
    psum_min_align = PSUM_ALIGN
    sbuf_min_align = 1

    @property
    def psum_num_banks(self) -> int:
        """8, or 7 where DMA transposes run on TensorE (NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE) and bank 7 is reserved."""
        lowered = os.environ.get("NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE", "").lower() == "true"
        return chips.PSUM_BANKS - 1 if lowered and _chip().gen >= 3 else chips.PSUM_BANKS

    @property
    def sbuf_fmax_bytes(self) -> int:
        """SBUF bytes of one partition."""
        return _chip().sbuf_bytes

    @property
    def sbuf_fmax(self) -> int:
        """SBUF float32 elements of one partition."""
        return _chip().sbuf_bytes // 4

    @property
    def sbuf_size_bytes(self) -> int:
        """SBUF bytes of all partitions."""
        return _chip().sbuf_bytes * chips.PARTITIONS

    total_available_sbuf_size = sbuf_fmax_bytes


tile_size = TileSize()
