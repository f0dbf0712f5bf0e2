"""Work for a process of its own while this one does something else: it ends with what began it, whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from tpllm.errors import RankError, TpllmError

R = TypeVar("R")
PR_SET_PDEATHSIG = 1
START = f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {__name__} import answer; answer()"


class Aside(Generic[R]):
    """`work(*arguments)` in a fresh process. Leaving this as a context ends it, done or not.

    No fork, as a process that has used CUDA or threads cannot be forked; and none of multiprocessing's, which would run
    the user's script again in it.
    """

    def __init__(self, work: Callable[..., R], *arguments: Any) -> None:
        mine, theirs = os.pipe()
        self._answer = os.fdopen(mine, "rb")
        self._process = subprocess.Popen([sys.executable, "-c", START, str(theirs)], stdin=subprocess.PIPE,
                                         pass_fds=[theirs])
        os.close(theirs)  # else this process would hold it open, and wait for what has died
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            for part in (sys.path, (work, arguments)):
                pickle.dump(part, stdin)

    def result(self) -> R:
        """What the work returned; what it raised is raised here."""
        answer = self._answer.read()
        if code := self._process.wait():
            raise RankError(f"the process that compiled beside this one died (exit code {code})")
        result: R
        result, error = pickle.loads(answer)
        if error is not None:
            raise error
        return result

    def __enter__(self) -> Aside[R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._answer.close()


def answer() -> None:
    """What the other process does."""
    # The kernel ends this process when the one that began it is gone, even by SIGKILL.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to both
    work, arguments = pickle.load(sys.stdin.buffer)
    error: TpllmError | None = None
    try:
        result = work(*arguments)
    except TpllmError as e:
        result, error = None, e
    except Exception as e:  # many of the compiler's own cannot be pickled
        result, error = None, RankError(f"{type(e).__name__}: {e}")
    with os.fdopen(int(sys.argv[1]), "wb") as out:
        pickle.dump((result, error), out)
