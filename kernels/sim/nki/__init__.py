"""A simulator's `nki`: the names of AWS's Neuron Kernel Interface 0.6, executed by numpy on a CPU.

This package is found only if the official `nki` is not: see `run.py` beside it.
"""

from nkisim.launch import Kernel, jit, simulate

from . import isa, language, typing

__version__ = "0.6.0"
SIMULATOR = "trn-kernels"
__all__ = ["Kernel", "isa", "jit", "language", "simulate", "typing"]

_REMOVED = ("baremetal", "benchmark", "profile", "simulate_kernel", "compiler", "trace", "tensor")


def __getattr__(name):
    hint = " (removed before NKI 0.3; run a kernel by calling it or with nki.simulate)" if name in _REMOVED else ""
    raise AttributeError(f"nki.{name} is not modelled by this simulator{hint}")
