"""What a run leaves behind: one log a rank and one JSON record."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

PACKAGES = ("tpllm", "torch", "mpi4py", "safetensors", "numpy")


def installed_versions() -> dict[str, str]:
    """Of what a run depends on, told without importing any of it."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def date(seconds: float | None = None) -> str:
    """Of a time since the epoch, now if none, as records have it: local, with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def run_directory(root: Path, verb: str) -> Path:
    """`<root>/<verb>-<Slurm job, or the time>`."""
    job = os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")
    directory = root / f"{verb}-{job}"
    number = 1
    while directory.exists():  # several runs in one job, or in one second
        number += 1
        directory = root / f"{verb}-{job}-{number}"
    return directory


class RankLog:
    """A rank's own file of dated lines; without a directory, or where none can be written, it keeps nothing."""

    def __init__(self, directory: Path | None, rank: int) -> None:
        self.directory = directory
        self.facts: dict[str, Any] = {}  # what the verb adds to the record
        self._file = None
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._file = open(directory / f"rank-{rank:03d}.log", "a", encoding="utf-8", buffering=1)
            except OSError:
                self.directory = None

    def write(self, text: str) -> None:
        if self._file:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")

    def record(self, **facts: Any) -> None:
        """Write `record.json`; by one rank."""
        if self.directory is not None:
            path = self.directory / "record.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({**facts, **self.facts}, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
