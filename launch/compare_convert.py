#!/usr/bin/env python3
"""Converting Meta's weights beside `cp` of the same bytes, in turns, cold and warm; and the memory that it takes.

Cold: the page cache is dropped before each (root only). Warm: the source is read before each. Peak memory is the
process's anonymous memory, sampled; pages of mapped files are the kernel's to take back. On an idle machine:

    .venv/bin/python launch/make_checkpoint.py --model llama-2-7b /scratch/llama-2-7b
    .venv/bin/python launch/compare_convert.py /scratch/llama-2-7b --output-file launch/results/convert.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tpllm.bench import commit, processor_name
from tpllm.engine.base import versions
from tpllm.runlog import date

UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a directory in Meta's layout; copies go beside it")
    parser.add_argument("--model", default="llama-2-7b", help="its name in the records")
    parser.add_argument("--tp-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--workers", type=int, nargs="+", default=[min(4, len(os.sched_getaffinity(0)))])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--caches", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--memory-only", action="store_true", help="without cp")
    parser.add_argument("--output-file", type=Path, metavar="FILE.jsonl", help="where the records are added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tpllm-", dir=args.source.resolve().parent) as scratch:
        for tp_size in args.tp_sizes:
            for workers in args.workers:
                for cache in args.caches:
                    record = measure(args, Path(scratch), tp_size, workers, cache)
                    print(json.dumps(record), flush=True)
                    if args.output_file:
                        with args.output_file.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(record) + "\n")


def measure(args: argparse.Namespace, scratch: Path, tp_size: int, workers: int, cache: str) -> dict[str, Any]:
    """One record: medians over the rounds."""
    config = ["--tp-size", str(tp_size), "--workers", str(workers)]
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    loads: list[float] = []
    for number in range(args.rounds):
        if not args.memory_only:
            loads.append(prepare(args.source, cache))
            theirs.append(copy(args.source, scratch / "copy"))
        loads.append(prepare(args.source, cache))
        ours.append(convert(args.source, scratch / "checkpoint", config))
        print(f"tp {tp_size}, {workers} worker(s), {cache}, round {number + 1}: convert {ours[-1]['seconds']:.1f} s"
              + (f", cp {theirs[-1]:.1f} s" if theirs else ""), flush=True)
    seconds = [run["seconds"] for run in ours]
    middle = statistics.median(seconds)
    record: dict[str, Any] = {
        "kind": "convert", "model": args.model, "weights": "random",
        "source": f"meta, {len(list(args.source.glob('consolidated.*')))} shard(s)", "tp_size": tp_size,
        "dtype": "bfloat16", "quant_algo": None, "workers": workers, "cache": cache, "repeats": args.rounds,
        "seconds": round(middle, 2), "spread": [round(min(seconds), 2), round(max(seconds), 2)],
        "bytes_read": total_bytes(args.source), "bytes_written": int(ours[0]["written"]),
        "gb_s": round(ours[0]["written"] / middle / 1e9, 3),
        "peak_anonymous_bytes": int(max(run["peak"] for run in ours)),
        "anonymous_bytes_before": int(max(run["before"] for run in ours)), "promised_bytes": int(ours[0]["promised"])}
    if theirs:
        ratios = [run / other for run, other in zip(seconds, theirs, strict=True)]  # in turns
        record |= {"cp_seconds": round(statistics.median(theirs), 2),
                   "cp_spread": [round(min(theirs), 2), round(max(theirs), 2)],
                   "ratio": round(statistics.median(ratios), 2),
                   "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)]}
    return record | {
        "load_average": [min(loads), max(loads)], "device": processor_name(), "hosts": 1, "versions": versions(),
        "commit": commit(), "command": shlex.join(["python", "launch/compare_convert.py", *sys.argv[1:]]),
        "date": date()}


def prepare(source: Path, cache: str) -> float:
    """Drop the page cache, or read the source into it; returns the machine's load average."""
    os.sync()
    if cache == "cold":
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="utf-8")
        except OSError as e:
            sys.exit(f"cannot drop the page cache ({e.strerror}): run it as root, or with --caches warm")
    else:
        for path in sorted(source.iterdir()):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    return round(os.getloadavg()[0], 2)


def copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def convert(source: Path, target: Path, config: list[str]) -> dict[str, float]:
    """Seconds of the whole command, bytes written, and anonymous memory before any weight is read and at its peak."""
    command = [sys.executable, "-m", "tpllm", "convert", "--meta-ckpt-dir", str(source), "--output-dir", str(target),
               *config]
    found = {"before": 0.0, "peak": 0.0, "promised": 0.0}
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        def sample() -> None:
            while process.poll() is None:
                found["peak"] = max(found["peak"], anonymous(process.pid))
                time.sleep(0.005)

        threading.Thread(target=sample, daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            if said := re.search(r"takes up to ([\d.]+)([kMG]?)B of memory", line):
                found |= {"before": anonymous(process.pid), "promised": float(said[1]) * UNITS[said[2]]}
    found["seconds"] = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {shlex.join(command)}")
    found["written"] = total_bytes(target)
    shutil.rmtree(target)
    return found


def anonymous(pid: int) -> float:
    """Bytes of a process's anonymous memory; 0 when it has ended."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.M)
    except OSError:
        return 0.0
    return float(found[1]) * 1024 if found else 0.0


def total_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


if __name__ == "__main__":
    main()
