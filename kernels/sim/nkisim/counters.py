"""Counts of what a kernel makes the machine do."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass
class Counters:
    """Totals of one core.

    * `instructions`: by engine (tensor, vector, scalar, gpsimd, dma, sync).
    * `by_name`: by instruction name.
    * `matmul_columns`: moving columns streamed through TensorE, by kind (fp32, half, fp8, double_row, mx, transpose).
      Time on the array is proportional to columns.
    * `matmul_macs`: multiply-accumulates of the matmuls (transposes not counted).
    * `dma_bytes_read`, `dma_bytes_written`: bytes moved by DMA, by memory (`hbm`, `sbuf`).
    * `dma_transfers`, `dma_descriptors`: DMA instructions, and the pieces contiguous on both sides that they break into
      (for a transpose: contiguous in the source).
    * `vector_elements`: elements per partition processed, by engine (vector, scalar, gpsimd).
    * `sbuf_high_water`, `psum_high_water`: most bytes of one partition live at once; `psum_banks_high_water` banks.
    """

    instructions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    by_name: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    matmul_columns: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    matmul_macs: int = 0
    dma_bytes_read: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    dma_bytes_written: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    dma_transfers: int = 0
    dma_descriptors: int = 0
    vector_elements: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    sbuf_high_water: int = 0
    psum_high_water: int = 0
    psum_banks_high_water: int = 0

    @property
    def total_instructions(self) -> int:
        """Instructions on all engines."""
        return sum(self.instructions.values())

    def as_dict(self) -> dict:
        """Plain data, stable order."""
        out = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            out[field.name] = dict(sorted(value.items())) if isinstance(value, collections.Counter) else value
        return out
