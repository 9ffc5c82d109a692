"""The three targets: sizes and generations (AWS NKI architecture guides for NeuronCore-v2, v3 and v4)."""

from __future__ import annotations

import dataclasses
import os

from .errors import TargetError

PARTITIONS = 128
PSUM_BANKS = 8
PSUM_BANK_BYTES = 2048
PSUM_BYTES = PSUM_BANKS * PSUM_BANK_BYTES
QUADRANT = 32


@dataclasses.dataclass(frozen=True)
class Chip:
    """A target: `name`, NeuronCore generation (2, 3 or 4) and SBUF bytes of one partition."""

    name: str
    gen: int
    sbuf_bytes: int


TRN1 = Chip("trn1", 2, 192 * 1024)
TRN2 = Chip("trn2", 3, 224 * 1024)
TRN3 = Chip("trn3", 4, 256 * 1024)

_NAMES = {
    "trn1": TRN1, "inf2": TRN1, "gen2": TRN1, "trn2": TRN2, "gen3": TRN2, "trn3": TRN3, "gen4": TRN3,
}  # fmt: skip


def by_name(name: str) -> Chip:
    """The chip called `name`: trn1, inf2, trn2, trn3 or gen2, gen3, gen4."""
    try:
        return _NAMES[str(name).lower()]
    except KeyError:
        raise TargetError(f"target {name!r} is not one of {', '.join(sorted(_NAMES))}") from None


def from_environment() -> Chip:
    """The chip of NEURON_PLATFORM_TARGET_OVERRIDE; trn3 when it is not set, as in the official simulator."""
    return by_name(os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE") or "trn3")
