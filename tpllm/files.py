"""Directories that appear whole or not at all, JSON, and content digests."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from tpllm.errors import DataError, PreflightError, UsageError

DIGEST = "xxh3_128"


def digest(data: bytes | memoryview) -> str:
    """Content hash of a buffer; xxh3 runs at the memory's speed, so that loading can afford it."""
    return xxhash.xxh3_128_hexdigest(data)


def json_digest(data: Any) -> str:
    """Content hash of a JSON value, whatever its spacing and the order of its keys."""
    return digest(json.dumps(data, sort_keys=True).encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` names it in messages."""
    if not path.is_file():
        raise DataError(f"{path.parent} is not {what}: it has no {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold a JSON object")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def source_key(source: Path, options: list[str]) -> str:
    """Changes when the source's files or the options do; reads names, sizes and times, not contents."""
    files = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else []
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return digest("\n".join([str(source.resolve()), *stats, *options]).encode())


def require_space(directory: Path, needed: int) -> None:
    """Refuse before anything is written when the file system cannot hold `needed` bytes more than a killed writer's."""
    partial = partial_path(Path(os.path.abspath(directory)))
    needed -= sum(path.stat().st_blocks * 512 for path in partial.glob("*"))
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise PreflightError(f"{directory} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB are needed; "
                             "free some space or give another --output-dir")


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def output_dir(path: Path, key: str = "") -> Iterator[Path]:
    """Yield `<path>.partial` to write into; it becomes `path` if the block ends well and vanishes if not.

    An existing empty directory is accepted, a full one refused. A lock in the partial directory keeps two
    writers apart. What a killed one left behind stays if it gave the same `key`, and is cleared otherwise.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is not empty; remove it or give another --output-dir")
    partial = partial_path(path)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / ".lock", "a+", encoding="utf-8", errors="replace")
    except OSError as e:
        raise UsageError(f"cannot write to {path}: {e.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            writer = None
        except OSError:
            writer = "another process"
        lock.seek(0)
        first, _, left = lock.read().partition("\n")
        if writer:
            raise UsageError(f"{path} is in use: {first or writer} is writing it; wait for it or give another "
                             "--output-dir")
        for leftover in partial.iterdir() if not key or left != key else ():
            if leftover.name != ".lock":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{key}")
        lock.flush()
        try:
            yield partial
            (partial / ".lock").unlink()
            os.replace(partial, path)
        except BaseException as e:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise PreflightError(f"no space left while writing {path}; free some or give another --output-dir"
                                     ) from None
            raise
