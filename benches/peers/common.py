"""What the Python peers share: arguments, weights that rotate past the caches, and the loop that calls when it is told to.

A peer here is a child of the program of this folder, which calls it between its own kernels: for each line on standard input one
call is made and its seconds are printed. The child measures, so that the way through the pipe does not count.
"""

import argparse
import pathlib
import sys
import time


def arguments():
    parser = argparse.ArgumentParser(description="A peer of trn-kernels, called by the program in benches/peers.")
    for name in ("n", "k", "m", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("format", nargs="?")
    return parser.parse_args()


def last_level_caches():
    """Bytes of all last-level caches together."""
    seen = {}
    for folder in pathlib.Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level = int((folder / "level").read_text())
        shared = (folder / "shared_cpu_list").read_text()
        seen[level, shared] = int((folder / "size").read_text().strip().rstrip("K")) << 10
    top = max((level for level, _ in seen), default=0)
    return sum(size for (level, _), size in seen.items() if level == top) or 128 << 20


def copies(weight_bytes):
    """Copies that together exceed four times the last-level caches, two at least."""
    return max(2, 4 * last_level_caches() // weight_bytes + 1)


def serve(name, weight_bytes, calls):
    """Says who it is, then makes one of `calls`, in turn, for each line that comes."""
    print(f"{weight_bytes} {name}", flush=True)
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        calls[number % len(calls)]()
        print(time.perf_counter() - start, flush=True)
