"""What the Python peers share: shapes, weights that rotate past the caches, timing, and `trnk bench matmul` between the calls.

A Python peer cannot be called in one process with the Rust kernels, so neighbours are processes: for each case the peer is timed,
then trnk, and so on for some rounds; the ratio is the median over rounds of (peer's median / trnk's median). Use it to rank,
and `cargo run` in this folder where a peer can be called in one process.
"""

import argparse
import csv
import pathlib
import statistics
import subprocess
import tempfile
import time


def arguments(description, schemes):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,2880x2880,5760x2880", help="NxK,... (%(default)s)")
    parser.add_argument("--m", default="1,4,16,64,512,2048", help="rows of activations (%(default)s)")
    parser.add_argument("--schemes", default=schemes, help="what trnk is asked for beside the peer (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trnk", default="target/release/trnk", help="the program of this crate (%(default)s)")
    args = parser.parse_args()
    args.shapes = [tuple(int(v) for v in shape.split("x")) for shape in args.shapes.split(",")]
    args.m = [int(m) for m in args.m.split(",")]
    args.schemes = args.schemes.split(",")
    if not pathlib.Path(args.trnk).is_file():
        parser.error(f"--trnk: no file {args.trnk}; build it: cargo build --release --features cli --bin trnk")
    return args


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
    """Copies that together exceed twice the last-level caches, two at least."""
    return max(2, 2 * last_level_caches() // weight_bytes + 1)


def timed(calls, budget=0.4):
    """Median seconds of a call; `calls` rotate. The first is not counted."""
    calls[0]()
    seconds, begin, number = [], time.perf_counter(), 0
    while len(seconds) < 3 or (time.perf_counter() - begin < budget and len(seconds) < 400):
        number += 1
        start = time.perf_counter()
        calls[number % len(calls)]()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ours(args, shape, m, scheme):
    """The record of `trnk bench matmul` for one case."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run.csv"
        command = [args.trnk, "bench", "matmul", "--shapes", f"{shape[0]}x{shape[1]}", "--m", m, "--schemes", scheme]
        command += ["--threads", args.threads, "--out", out]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        with out.open() as file:
            return next(csv.DictReader(file))


def compare(args, name, shape, m, weight_bytes, calls):
    """Prints one line: the peer's rates and, for each scheme, its time as a multiple of ours."""
    peer, times, last = [], {scheme: [] for scheme in args.schemes}, {}
    for _ in range(args.rounds):
        peer.append(timed(calls))
        for scheme in args.schemes:
            last[scheme] = ours(args, shape, m, scheme)
            times[scheme].append(peer[-1] / float(last[scheme]["seconds_median"]))
    seconds = statistics.median(peer)
    flop = 2.0 * m * shape[0] * shape[1]
    read = statistics.median(float(record["limit_read_gb_per_s"]) for record in last.values())
    rate = weight_bytes / seconds / 1e9
    text = f"{name:<22}{m:>6} {shape[0]:>6}x{shape[1]:<6}{1e3 * seconds:>10.3f} ms {rate:>7.2f} GB/s {rate / read:>5.2f} of read"
    text += f" {flop / seconds / 1e9:>9.1f} GFLOP/s"
    for scheme, ratios in times.items():
        text += f"  {statistics.median(ratios):.2f} x ours ({scheme})"
    print(text, flush=True)
