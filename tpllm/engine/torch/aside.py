"""Work for a process of its own while this one does something else: it ends with what began it, whatever happens."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from tpllm.errors import RankError, TpllmError

R = TypeVar("R")
PR_SET_PDEATHSIG = 1


class Aside(Generic[R]):
    """`work(*arguments)` in a fresh process. Leaving this as a context ends it, done or not."""

    def __init__(self, work: Callable[..., R], *arguments: Any) -> None:
        # Not forked: a process that has used CUDA or threads cannot be.
        context = get_context("spawn")
        self._inbox, outbox = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(outbox, work, arguments), daemon=True)
        self._process.start()
        outbox.close()  # else this process would hold it open, and wait for what has died

    def result(self) -> R:
        """What the work returned; what it raised is raised here."""
        try:
            found, error = self._inbox.recv()
        except EOFError:
            self._process.join()
            raise RankError(f"the process that compiled beside this one died (exit code {self._process.exitcode})"
                            ) from None
        if error is not None:
            raise error
        result: R = found
        return result

    def __enter__(self) -> Aside[R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()


def _run(outbox: Connection, work: Callable[..., R], arguments: tuple[Any, ...]) -> None:
    # The kernel ends this process when the one that began it is gone, even by SIGKILL.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        outbox.send((work(*arguments), None))
    except TpllmError as e:
        outbox.send((None, e))
    except Exception as e:  # many of the compiler's own cannot be sent
        outbox.send((None, RankError(f"{type(e).__name__}: {e}")))
