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


def require_space(directory: Path, needed: int) -> None:
    """Refuse before anything is written when the file system cannot hold `needed` bytes."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise PreflightError(f"{directory} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB are needed; "
                             "free some space or give another --output-dir")


@contextmanager
def output_dir(path: Path) -> Iterator[Path]:
    """Yield `<path>.partial` to write into; it becomes `path` if the block ends well and vanishes if not.

    An existing empty directory is accepted, a full one refused. A lock in the partial directory keeps two
    writers apart; what a killed one left behind is cleared.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is not empty; remove it or give another --output-dir")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / ".lock", "a+", encoding="utf-8")
    except OSError as e:
        raise UsageError(f"cannot write to {path}: {e.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(f"{path} is in use: {lock.read().strip() or 'another process'} is writing it; "
                             "wait for it or give another --output-dir") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        for leftover in partial.iterdir():
            if leftover.name != ".lock":
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
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
