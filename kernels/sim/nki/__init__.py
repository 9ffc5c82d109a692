"""A simulator's `nki`: the names of AWS's Neuron Kernel Interface 0.6, executed by numpy on a CPU.

This package is found only if the official `nki` is not: see `run.py` beside it.
"""

from nkisim.launch import Kernel, jit, simulate

from . import isa, language, typing

__version__ = "0.6.0"
SIMULATOR = "trn-kernels"
__all__ = ["Kernel", "isa", "jit", "language", "simulate", "typing"]
