"""Run records on disk: JSON objects, one a line, added by any process and read whole.

`kind` is `decode`, `prefill`, `throughput`, `mixed`, `build`, `load` or `convert`; `tokens`, greedy answers to compare
across tp sizes; or `error`, a `case` that could not be measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from pathlib import Path
from typing import Any

from tpllm.errors import DataError, UsageError


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add one line. The tasks of an array job may do so at once; a line that a kill has torn is cut off before."""
    try:
        with path.open("ab+") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if file.tell() != whole:
                file.truncate(whole)
            file.write(json.dumps(record).encode() + b"\n")
    except OSError as e:
        raise UsageError(f"cannot write {path}: {e.strerror}") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, none where there is no file; a torn last line is left out."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            found.append(record)
        elif line.endswith("\n"):
            raise DataError(f"{path} line {number} is no run record; remove that line")
    return found
