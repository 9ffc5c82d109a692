"""Run NKI kernels: on the official `nki` if it is installed, else on the simulator of this directory.

    python kernels/sim/run.py script.py [arguments]     # run a script with `import nki` resolved
    NKI_BACKEND=official|sim ...                          # insist on one

From Python:

    from run import backend, run
    out = run(kernel, a, b, target_name="trn3")

The public package index holds placeholder packages called `nki` whose import fails; only a package with
`nki.simulate` counts as the official one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import runpy
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


class BackendError(ImportError):
    """The backend asked for is not there."""


def _without_simulator() -> list[str]:
    return [p for p in sys.path if os.path.abspath(p or ".") != _HERE]


def _official():
    """The official package, or None."""
    before = sys.path
    sys.path = _without_simulator()
    try:
        module = importlib.import_module("nki")
        if hasattr(module, "simulate") and not hasattr(module, "SIMULATOR"):
            return module
    except Exception:  # a placeholder may raise anything at import
        pass
    finally:
        sys.path = before
    for name in [n for n in sys.modules if n == "nki" or n.startswith("nki.")]:
        del sys.modules[name]
    return None


def _simulator():
    sys.path[:] = [_HERE, *_without_simulator()]
    return importlib.import_module("nki")


def backend(wanted: str | None = None):
    """Make `import nki` work and return (name, module); name is `official` or `sim`.

    `wanted` defaults to NKI_BACKEND; empty means: official if installed, else sim. BackendError if it is not there.
    """
    wanted = wanted or os.environ.get("NKI_BACKEND") or ""
    if wanted not in ("", "official", "sim"):
        raise BackendError(f"NKI_BACKEND is {wanted!r}, need official or sim")
    loaded = sys.modules.get("nki")
    if loaded is not None:
        name = "sim" if hasattr(loaded, "SIMULATOR") else "official"
        if wanted in ("", name):
            return name, loaded
        raise BackendError(f"{name} nki is already imported, {wanted} was asked for")
    if wanted != "sim":
        module = _official()
        if module is not None:
            return "official", module
        if wanted == "official":
            raise BackendError("NKI_BACKEND=official, but the official nki package is not installed")
    return "sim", _simulator()


@contextlib.contextmanager
def target(name: str | None):
    """Compile and run for another target inside the block."""
    key = "NEURON_PLATFORM_TARGET_OVERRIDE"
    before = os.environ.get(key)
    if name is not None:
        os.environ[key] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = before


def run(kernel, *args, target_name: str | None = None, cores: int = 1, **kwargs):
    """Simulate a kernel on arrays (both backends have `nki.simulate`) and return its outputs."""
    _, nki = backend()
    with target(target_name):
        launched = nki.simulate(kernel[cores] if cores > 1 else kernel)
        return launched(*args, **kwargs)


def main(argv: list[str]) -> int:
    """Run a script with the backend resolved."""
    if not argv:
        print(__doc__)
        return 2
    # Tiles are at most 128 x 128 x 512: threads only cost time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    name, module = backend()
    print(f"nki backend: {name} {getattr(module, '__version__', '')}", file=sys.stderr)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    runpy.run_path(argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
