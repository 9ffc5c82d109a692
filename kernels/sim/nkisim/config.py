"""Switches: one for each place where the documents say two things or leave a choice.

Set them with `configured(...)` around a launch, or by environment variables `NKI_SIM_<NAME>` (for example
`NKI_SIM_MX_SCALE=ocp`). The defaults follow the newest API reference; `error` means that the case is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading

_CHOICES = {
    "mx_scale": ("neuron", "ocp"),
    "ap_on_view": ("compose", "whole", "error"),
    "fp8_overflow": ("error", "saturate", "nonsaturating"),
    "activation_range": ("error", "ignore"),
    "psum_after_eviction": ("error", "accumulate", "overwrite"),
    "nan_to_int": ("error", "zero"),
    "mx_special": ("error", "propagate"),
    "mx_96_partitions": ("allow", "error"),
    "fp8_transpose": ("same", "error"),
    "range_bounds": ("first", "error"),
    "uninitialized": ("error", "fill"),
    "capacity": ("error", "ignore"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """One setting of every switch.

    * `mx_scale`: `quantize_mx` block scale. `neuron` is the rule documented since NKI 0.5 (exponent of amax minus
      Emax-1), `ocp` the rule of the older published goldens (exponent minus Emax, then clamp).
    * `ap_on_view`: `t.ap(offset=...)` on a view whose own offset is not zero. `compose` adds the two (API reference),
      `whole` counts from the start of the tensor (two guide pages), `error` refuses.
    * `fp8_overflow`: a finite value beyond the largest FP8 value. The documents give no result for e4m3fn.
    * `activation_range`: a ScalarE function outside its documented input range returns garbage on the device.
    * `psum_after_eviction`: a matmul with `accumulate=None` onto a tile that was read since its last matmul.
    * `nan_to_int`: NaN converted to an integer.
    * `mx_special`: NaN, infinity or scale 255 in MX operands.
    * `mx_96_partitions`: MX operands of 96 partitions. The API reference takes any multiple of 32, a library comment
      excludes 96.
    * `fp8_transpose`: an FP8 transpose on TensorE. The API reference keeps the dtype, the architecture guide says the
      array writes 16-bit results.
    * `range_bounds`: bounds of `range_select` with more partitions than the tile. The API reference wants equal counts,
      AWS's prefill kernel passes 128 rows for a shorter last tile (its first rows are meant).
    * `uninitialized`: arithmetic on elements that nothing has written. `fill` reads them as the official simulator's
      fresh memory does (float NaN, integer 4); some library kernels compute on the unused rows of a short last tile.
    * `capacity`: whether SBUF and PSUM sizes are enforced (the official simulator does not).
    """

    mx_scale: str = "neuron"
    ap_on_view: str = "compose"
    fp8_overflow: str = "error"
    activation_range: str = "error"
    psum_after_eviction: str = "error"
    nan_to_int: str = "error"
    mx_special: str = "error"
    mx_96_partitions: str = "allow"
    fp8_transpose: str = "same"
    range_bounds: str = "first"
    uninitialized: str = "error"
    capacity: str = "error"

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"switch {name}: got {value!r}, need one of {', '.join(allowed)}")


_local = threading.local()


def _from_environment() -> Settings:
    found = {
        name: os.environ[f"NKI_SIM_{name.upper()}"] for name in _CHOICES if f"NKI_SIM_{name.upper()}" in os.environ
    }
    return Settings(**found)


def current() -> Settings:
    """The settings in force on this thread."""
    return getattr(_local, "settings", None) or _from_environment()


@contextlib.contextmanager
def configured(settings: Settings | None = None, **switches):
    """Run a block under other settings: `with configured(mx_scale="ocp"): kernel(...)`."""
    before = getattr(_local, "settings", None)
    _local.settings = dataclasses.replace(settings or current(), **switches)
    try:
        yield _local.settings
    finally:
        _local.settings = before
