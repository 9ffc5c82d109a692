"""One BLAS thread while a kernel runs: its matmuls are at most 128 x 128 x 512, where starting threads costs more than
the arithmetic. Works on the OpenBLAS that numpy's wheels bring along; any other BLAS is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os

import numpy as np

_SPELLINGS = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


@functools.cache
def _controls():
    """(get, set) of the thread count, or None."""
    folder = os.path.join(os.path.dirname(os.path.dirname(np.__file__)), "numpy.libs")
    for path in glob.glob(os.path.join(folder, "*openblas*")):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for spelling in _SPELLINGS:
            get, put = (getattr(library, spelling.format(f"{verb}_num_threads"), None) for verb in ("get", "set"))
            if get is not None and put is not None:
                get.restype, put.restype, put.argtypes = ctypes.c_int, None, [ctypes.c_int]
                return get, put
    return None


@contextlib.contextmanager
def one_thread():
    """Run a block with one BLAS thread."""
    controls = _controls()
    if controls is None:
        yield
        return
    get, put = controls
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)
