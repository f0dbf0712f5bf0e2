"""A launcher from start to end: time-out, Ctrl-C, draining, what its exit code means, and nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tpllm.launched import FAILURE, FINISHED_FILE
from tpllm.settings import seconds

CLASSES = frozenset((2, 10, 11, 12, 20, 21, 22, 75))  # exit codes of tpllm's own, see README
KILL_AFTER = 5.0  # seconds from a SIGTERM to the SIGKILL
INTERRUPT_KILL_AFTER = 10.0  # the same from a Ctrl-C, after which launchers take their time to clean up
LEAVE = 2.0  # seconds that ranks have to go once their launcher has gone
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Watch:
    """One launcher process; `mark` is the file that rank 0 leaves when its verb is done."""

    def __init__(self, argv: list[str], environment: Mapping[str, str], mark: Path, timeout: float | None,
                 crash_codes: frozenset[int] = frozenset()) -> None:
        """`crash_codes`: exit codes that this launcher also uses for a rank's death by a signal."""
        self._argv, self._mark, self._classes = argv, mark, CLASSES - crash_codes
        self._environment = {**environment, FINISHED_FILE: str(mark)}
        self._timeout = math.inf if timeout is None else timeout
        self._drain_seconds = seconds("TPLLM_DRAIN_SECONDS")
        self._received: list[int] = []
        self._reason = ""  # "timeout", "interrupt" or "drain" when the end was asked for
        self._terminate_at = self._kill_at = math.inf

    def run(self) -> int:
        """Start it, wait for its end, and return the exit code that launch has to end with."""
        with self._handlers():
            # A session of its own: Ctrl-C comes here alone, and ssh has no terminal to ask for passwords.
            self._process = subprocess.Popen(self._argv, env=self._environment, stdin=subprocess.DEVNULL,
                                             start_new_session=True, preexec_fn=end_with_parent())
            ends_at = time.monotonic() + self._timeout
            while True:
                try:
                    code = self._process.wait(0.05)
                    break
                except subprocess.TimeoutExpired:
                    self._look(time.monotonic(), ends_at)
            self._sweep()
        failed = None
        with contextlib.suppress(OSError, ValueError):
            first, text = Path(f"{self._mark}{FAILURE}").read_text(encoding="utf-8").split("\n", 1)
            failed = int(first)
            print(text, end="", file=sys.stderr, flush=True)
        return self._meaning(code, failed)

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        old = {number: signal.signal(number, lambda n, _: self._received.append(n)) for number in HANDLED}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _look(self, now: float, ends_at: float) -> None:
        """Act on what came and on the times that are up."""
        received, self._received = self._received, []
        for number in received:
            if number == signal.SIGINT:
                if self._reason == "interrupt":
                    self._kill_at = now
                else:
                    self._reason, self._kill_at = "interrupt", now + INTERRUPT_KILL_AFTER
                    self._send(signal.SIGINT)
            elif number == signal.SIGUSR1:
                self._send(signal.SIGUSR1)
            elif not self._reason:
                # Every mpirun passes SIGUSR1 on to all ranks, which drain; a SIGTERM would end them.
                self._reason, self._terminate_at = "drain", now + self._drain_seconds
                self._send(signal.SIGUSR1)
        if now >= ends_at and not self._reason:
            self._reason, self._terminate_at = "timeout", now
        if now >= self._terminate_at:
            self._terminate_at, self._kill_at = math.inf, now + KILL_AFTER
            self._send(signal.SIGTERM)
        if now >= self._kill_at:
            self._kill_at = math.inf
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        self._process.send_signal(number)

    def _sweep(self) -> None:
        """End what the launcher has left on this host; Open MPI 5 leaves ranks when it is killed or loses a host."""
        gone_by = time.monotonic() + LEAVE
        while (left := self._left()) and time.monotonic() < gone_by and self._process.returncode != -signal.SIGKILL:
            time.sleep(0.1)
        for _ in range(20):
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not (left := self._left()):
                return
            time.sleep(0.1)

    def _left(self) -> list[int]:
        """This user's processes with this job's mark in their environment; ranks have process groups of their own."""
        word = f"{FINISHED_FILE}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if word in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def _marked(self, patience: int) -> int | None:
        """The exit code that rank 0 left; from another host it may take a while to be seen through a file system."""
        for _ in range(patience):
            with contextlib.suppress(OSError, ValueError):
                os.listdir(self._mark.parent)  # makes NFS look again
                return int(self._mark.read_text(encoding="utf-8"))
            time.sleep(0.1)
        return None

    def _meaning(self, code: int, failed: int | None) -> int:
        """Launch's exit code, from the launcher's and that of the first failure a rank has named."""
        name = Path(self._argv[0]).name
        if self._reason == "timeout":
            say(f"stopped: not done within --timeout {self._timeout:g} s")
            return 21
        if self._reason == "interrupt":
            say("interrupted")
            return 130
        # The mark counts for more than the launcher's code: srun's is that of the rank it ended last.
        marked = self._marked(patience=20 if code == 0 else 3)
        if failed is not None and marked is None:
            return failed
        if code == 0 and marked is None:
            say(f"{name} ended with exit code 0, but rank 0 did not get to its end: a host or a rank was lost")
            return 143 if self._reason else 20
        if marked in CLASSES or (marked == 0 and code == 0):
            return int(marked)
        if code in self._classes:
            return code
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        say(f"{name} {how}; what went wrong is above")
        return 143 if self._reason == "drain" else 20


def say(text: str) -> None:
    """On the console, apart from the ranks' output."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def end_with_parent() -> Callable[[], object] | None:
    """For Popen: the kernel sends the child a SIGTERM when this process dies, even by SIGKILL."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGTERM)
