"""JSONL of prompts → JSONL of answers, each in the file as soon as it ends, so that a killed job can go on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from tpllm.answer import Job, TokenEvent
from tpllm.errors import DataError, PreflightError, TpllmError, UsageError
from tpllm.inputs import parse_line
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

MAX_LINE = 16 << 20  # bytes; more is no prompt
SYNC_SECONDS = 1.0  # that finished answers may wait for the disk
SHOWN_ERRORS = 10  # on the console; the file has all
BAR_SECONDS, LINE_SECONDS = 0.5, 30.0  # between two states of the progress bar, on a terminal and in a log


class JsonLines:
    """Appends objects to a file, one a line, of which only whole ones stay."""

    def __init__(self, path: Path) -> None:
        """Opens and locks it, and changes nothing yet; raises UsageError where it cannot be written."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)
        except OSError as e:
            raise UsageError(f"cannot write {path}: {e.strerror}") from None
        self.size = self._synced = self._file.tell()
        self._sync_at = 0.0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {path}; wait for it or give another --output-file") from None
        except OSError:
            pass  # a file system without locks

    def cut(self, size: int) -> None:
        self._file.truncate(size)
        self.size = size

    def write(self, data: dict[str, Any]) -> None:
        line = memoryview(json.dumps(data).encode() + b"\n")
        end = self.size + len(line)
        with self._refusing():
            while line:
                line = line[self._file.write(line):]
        self.size = end

    def sync(self, now: bool = False) -> None:
        """Have the disk hold what was written, at most once in a while: a slow disk must not hold up the ranks."""
        started = time.monotonic()
        if self._synced != self.size and (now or started >= self._sync_at):
            with self._refusing():
                os.fsync(self._file.fileno())
            self._synced, ended = self.size, time.monotonic()
            self._sync_at = ended + max(SYNC_SECONDS, 20 * (ended - started))

    def close(self, keep_empty: bool) -> None:
        if not self.size and not keep_empty:
            self.path.unlink(missing_ok=True)
        self._file.close()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            with contextlib.suppress(OSError):
                self.cut(self.size)
            raise PreflightError(f"cannot write {self.path}: {e.strerror}; what is in it is whole: make room, and the "
                                 "same command with --resume goes on") from None


class BatchJob:
    """The lines of a file, or every n-th of them, on their way into the answers' file; lives on rank 0.

    Of what was read it keeps the ids alone.
    """

    def __init__(self, input_file: Path, output_file: Path, params: SamplingParams, shard: tuple[int, int] = (0, 1),
                 resume: bool = False, overwrite: bool = False, drain_seconds: float = 0.0) -> None:
        """Raises UsageError or DataError for files that cannot be used, before anything is changed."""
        self.drain_seconds = drain_seconds
        self._path, self._params, self._shard = input_file, params, shard
        errors_file = output_file.with_name(output_file.name + ".errors.jsonl")
        check_files(input_file, output_file, errors_file, resume or overwrite)
        lines = Counter(number % shard[1] for number, _ in read_lines(input_file))
        if not lines:
            raise DataError(f"{input_file} has no prompts")
        self._output = JsonLines(output_file)
        self._answered, self._whole = answered_ids(output_file) if resume else (set(), 0)
        self._errors = JsonLines(errors_file)
        self._lines: dict[int | str, int] = {}  # id → its line
        self._running: dict[int, int | str] = {}  # line → id
        self._exhausted = False
        self.counts = {"lines": lines[shard[0]], "answered": 0, "skipped": 0, "errors": 0, "tokens": 0}
        self._started = self._show_at = time.monotonic()

    def source(self, runner: ModelRunner) -> Iterator[Job]:
        """What is to be answered, line by line; a line that cannot be is reported and left out."""
        self._output.cut(self._whole)
        self._errors.cut(0)
        self._started = time.monotonic()
        self._show_at = self._started + (BAR_SECONDS if sys.stderr.isatty() else LINE_SECONDS)
        for number, line in read_lines(self._path):
            mine, data = number % self._shard[1] == self._shard[0], None
            try:
                data = decode(line)
                request = parse_line(data, number, "")
                # The lines of other shards too: an id that comes twice is answered in one place.
                if (first := self._lines.setdefault(request.id, number)) != number:
                    raise DataError(f"id {request.id!r} is that of line {first + 1} already")
                if not mine:
                    continue
                if request.id in self._answered:
                    self.counts["skipped"] += 1
                    continue
                job = runner.prepare(number, request.templated(runner.tokenizer).prompt,
                                     replace(self._params, **request.sampling))
            except (TpllmError, ValueError, RecursionError) as e:
                if mine:
                    self._refuse(number, data, str(e)[:500])
                continue
            self._running[number] = request.id
            yield job
        self._exhausted = True

    def take(self, event: TokenEvent) -> None:
        """Write the answer if this was its last token."""
        self.counts["tokens"] += 1
        if event.last:
            event.answer.id = self._running.pop(event.index)
            self._output.write(event.answer.to_json())
            self.counts["answered"] += 1
        self._output.sync()
        if time.monotonic() >= self._show_at:
            self._show()

    @property
    def interrupted(self) -> bool:
        """Lines are left that were neither answered nor refused."""
        return not self._exhausted or bool(self._running)

    def finish(self) -> None:
        """All that was written is on the disk; raises DataError when nothing but bad lines was there."""
        self._show(end="\n")
        self._output.sync(now=True)
        self._errors.sync(now=True)
        if self.counts["errors"] == self.counts["lines"]:
            raise DataError(f"no line could be answered: see {self._errors.path}")

    def close(self) -> None:
        """Files without a line go, unless they are the whole result."""
        self._output.close(keep_empty=not self.interrupted)
        self._errors.close(keep_empty=False)

    def summary(self) -> dict[str, Any]:
        """Facts for the run's record."""
        rate = self.counts["tokens"] / (time.monotonic() - self._started)
        return {**self.counts, "tokens_per_s": round(rate, 1), "shard": "{}/{}".format(*self._shard)}

    def _refuse(self, number: int, data: Any, why: str) -> None:
        """Report a line, under its id if one can be told."""
        identity = data.get("id", data.get("custom_id", number)) if isinstance(data, dict) else None
        self._errors.write({"line": number + 1, "id": identity if isinstance(identity, int | str) else None,
                            "error": why})
        self.counts["errors"] += 1
        if self.counts["errors"] <= SHOWN_ERRORS:
            print(f"batch: line {number + 1}: {why}", file=sys.stderr, flush=True)
        elif self.counts["errors"] == SHOWN_ERRORS + 1:
            print(f"batch: more lines like these are in {self._errors.path}", file=sys.stderr, flush=True)

    def _show(self, end: str = "") -> None:
        """The progress bar: redrawn on a terminal, a line of its own in a log."""
        now, terminal, facts = time.monotonic(), sys.stderr.isatty(), self.summary()
        self._show_at = now + (BAR_SECONDS if terminal else LINE_SECONDS)
        done = facts["answered"] + facts["skipped"] + facts["errors"]
        meter = tqdm.format_meter(done, facts["lines"], now - self._started, prefix="batch", ascii=True, unit=" lines",
                                  initial=facts["skipped"], postfix=f"{facts['tokens_per_s']} tokens/s")
        print(f"\r\033[K{meter}" if terminal else meter, end=end if terminal else "\n", file=sys.stderr, flush=True)


def run_batch(runner: ModelRunner, job: BatchJob | None) -> None:
    """Answer a job until its end, or until it is drained; collective, and only rank 0 has the job."""
    served = runner.serve(job.source(runner), job.drain_seconds) if job else runner.serve(iter(()))
    # Closed when writing fails, too: the other ranks wait for the end.
    with contextlib.closing(cast("Generator[TokenEvent]", served)) as events:
        for event in events:
            assert job
            job.take(event)
    if job:
        job.finish()


def check_files(input_file: Path, output_file: Path, errors_file: Path, may_exist: bool) -> None:
    """Refuse what would be lost."""
    if not input_file.is_file():
        raise UsageError(f"no such --input-file: {input_file}")
    for path in (output_file, errors_file):
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file; give another --output-file")
        if path.exists() and path.samefile(input_file):
            raise UsageError(f"{path} is the --input-file and would be written over; give another --output-file")
    if output_file.exists() and output_file.stat().st_size and not may_exist:
        raise UsageError(f"{output_file} exists; --resume goes on with it, --overwrite begins anew")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 0, line) of all that are not blank; what is beyond `MAX_LINE` comes cut."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b"")):
            rest = line
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE + 1)
            if line.strip():
                yield number, line


def decode(line: bytes) -> Any:
    if len(line) > MAX_LINE:
        raise DataError(f"longer than {MAX_LINE} bytes")
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON: {e.msg} (character {e.pos})") from None


def answered_ids(path: Path) -> tuple[set[int | str], int]:
    """The ids in an answers' file, and the length of its whole lines; a kill may have torn the last one."""
    ids: set[int | str] = set()
    whole = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                ids.add(json.loads(line)["id"])
            except (ValueError, TypeError, LookupError):
                raise DataError(f"{path} line {number} is no answer of this verb; mend it, or begin anew with "
                                "--overwrite") from None
            whole += len(line)
    return ids, whole
