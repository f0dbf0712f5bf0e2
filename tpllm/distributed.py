"""The ranks of this run: MPI's world, agreement on errors, and dying together. The only module that imports MPI."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from tpllm.errors import MismatchError, OutOfMemory, RankError, TimeOutError, TpllmError
from tpllm.heartbeat import Failure, Heartbeat
from tpllm.launched import check_world, launched_by, name_failure, oom_kills
from tpllm.runlog import RankLog
from tpllm.settings import seconds

R = TypeVar("R")

ABORT_SECONDS = 3.0  # for MPI to end the job in order; then this process ends by itself
MESSAGE_SECONDS = 0.5  # for a failure's message to reach the console before its job is ended
FINALIZE_SECONDS = 10.0  # for MPI to end in order once all ranks are done: MPICH 4.0 over two hosts may never do


class SharedError(TpllmError):
    """An error that all ranks know of: rank 0 reports it and everyone leaves in order."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Place:
    """Where a rank is; on CPU without the GPU's number in that process, its UUID and its NUMA node."""

    rank: int
    host: str
    gpu: int | None = None
    uuid: str | None = None
    numa: int | None = None


class World:
    """This process among its ranks. Without a launcher it is a world of one, and MPI is never imported."""

    def __init__(self, comm: Any = None) -> None:
        self.comm = comm
        self.rank: int = comm.rank if comm else 0
        self.size: int = comm.size if comm else 1
        self.host = socket.gethostname()
        # Not arithmetic and no environment variable: under mpirun inside Slurm those are wrong.
        node = comm.Split_type(_mpi().COMM_TYPE_SHARED) if comm else None
        self.local_rank: int = node.rank if node else 0
        self.local_size: int = node.size if node else 1
        self.places = self.allgather(Place(self.rank, self.host))
        self.log = RankLog(None, self.rank)
        self.exit_code = 0  # with which this process ends if MPI's own end never returns
        self.draining = False  # set by SIGUSR1, under srun also SIGTERM: finish what is begun, start nothing new
        self._heartbeat: Heartbeat | None = None
        self._oom_kills = oom_kills()
        self._ends: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()
        self._aborting = threading.Lock()
        if self.size > 1:
            # From the start on: at the end of the program no thread can be started any more.
            threading.Thread(target=self._end_within, name="tpllm-end", daemon=True).start()

    @classmethod
    def start(cls) -> World:
        """Join the launcher's world, once a process; a world that does not match its launcher is refused.

        From then on an uncaught exception, a death or the silence of any rank ends all of them.
        """
        return _started()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on the console, once for all ranks."""
        if self.is_first:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Print something beside the results, once for all ranks."""
        if self.is_first and text:
            print(text, file=sys.stderr, flush=True)

    def require_size(self, tp_size: int, what: str, verb: str) -> None:
        """Refuse a launch whose number of ranks is not the one `what` was made for."""
        if self.size != tp_size:
            raise MismatchError(f"{what} is for {tp_size} rank(s), this launch has {self.size}; "
                                f"type: mpirun -n {tp_size} tpllm {verb} …")

    def broadcast(self, value: R) -> R:
        """Rank 0's `value` on every rank (pickled; for control, not for weights)."""
        return self.comm.bcast(value) if self.comm else value

    def allgather(self, value: R) -> list[R]:
        return self.comm.allgather(value) if self.comm else [value]

    def barrier(self) -> None:
        """Wait for all ranks without burning a core: the others may still be compiling on it."""
        if self.comm:
            request, pause = self.comm.Ibarrier(), 1e-4
            while not request.Test():
                time.sleep(pause)
                pause = min(2 * pause, 0.005)

    def enter(self, stage: str) -> None:
        """Name what this rank does from now on, for messages about it and its log."""
        self.log.write(stage)
        if self._heartbeat:
            self._heartbeat.enter(stage)

    def together(self, stage: str, work: Callable[[], R]) -> R:
        """Run `work` on every rank; if it fails on any with an error of ours, all raise that same error."""
        self.enter(stage)
        try:
            result, error = work(), None
        except TpllmError as e:
            result, error = None, (str(e), e.exit_code)
        self.barrier()
        failures = [(rank, e) for rank, e in enumerate(self.allgather(error)) if e]
        if failures:
            rank, (message, code) = failures[0]
            where = f"rank {rank} of {self.size}, {stage}: " if rank else ""
            raise SharedError(where + message, code)
        return result  # type: ignore[return-value]

    def abort(self, code: int) -> NoReturn:
        """End every rank now, in `ABORT_SECONDS` at most even if MPI itself is stuck."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._ends.put((ABORT_SECONDS, code))
        if self.comm and self.size > 1:
            # Never released: this thread and the heartbeat's may come at once, in which Open MPI 4 crashes.
            self._aborting.acquire()
            mpi_call("MPI_Abort", ctypes.c_void_p(_mpi()._handleof(self.comm)), code)
        os._exit(code)

    def finish(self) -> None:
        """Leave MPI at the end of the program, in `FINALIZE_SECONDS` at most once all ranks have come here."""
        if _mpi().Is_finalized():
            return
        sys.stdout.flush()  # before any rank may end, and a launcher all others with it
        sys.stderr.flush()
        self.barrier()  # under the watch of the heartbeat
        if self._heartbeat:
            self._heartbeat.leave()
        self._ends.put((FINALIZE_SECONDS, self.exit_code))
        mpi_call("MPI_Finalize")

    def _drain(self, *_: Any) -> None:
        self.draining = True

    def _leave_late(self, *_: Any) -> None:
        """After SIGTERM: the heartbeat gets a moment to name the rank that died."""
        time.sleep(MESSAGE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    def _end_within(self) -> None:
        """Wait until the end has begun, then end this process if it is still there after that many seconds."""
        limit, code = self._ends.get()
        time.sleep(limit)
        os._exit(code)

    def watch(self, timeout: float) -> None:
        """Begin to watch the other ranks; collective."""
        heartbeat = Heartbeat(self.rank, self.host, timeout, self._on_failure)
        hosts = [place.host for place in self.places]
        server, meeting = heartbeat.listen(len(set(hosts)) > 1) if self.is_first else (None, None)
        meeting = self.broadcast(meeting)
        assert meeting is not None
        reached = heartbeat.connect(meeting, hosts[0]) if server is None else True
        came = heartbeat.accept(server, meeting, self.size - 1) if server else []
        if self.is_first and (absent := set(range(1, self.size)) - set(came)):
            print(f"tpllm: no heartbeat with rank(s) {sorted(absent)}: {hosts[min(absent)]} cannot reach port "
                  f"{meeting.port} of {', '.join(meeting.addresses)}; their deaths may go unnoticed", file=sys.stderr)
        if reached:
            self._heartbeat = heartbeat
            heartbeat.start()

    def _on_failure(self, failure: Failure, told: bool) -> None:
        """Another rank failed: name it, unless it has done so itself, and end."""
        code, why = failure.exit_code, failure.what
        self.log.write(f"ends because rank {failure.rank} on {failure.host} failed in {failure.stage}: {why}")
        if why == "died" and oom_kills() > self._oom_kills:
            code, why = OutOfMemory.exit_code, "was killed for lack of memory (the cgroup's oom_kill counter rose)"
        elif why == "died":
            why = "died without a word: killed, crashed, or its host is lost"
        if not told:
            # A rank on a host that was cut off finds rank 0 silent, and its file system may be there still.
            overrule = self.is_first and code == TimeOutError.exit_code
            name_failure(f"tpllm: rank {failure.rank} of {self.size} on {failure.host} failed in {failure.stage}: it "
                         f"{why}", code, overrule)
        time.sleep(MESSAGE_SECONDS)  # aborting a job drops what is on its way to the console
        self.abort(code)

    def _die(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Uncaught exception: name the rank on the console, then take the others along."""
        stage = self._heartbeat.stage if self._heartbeat else "start"
        code = getattr(error, "exit_code", RankError.exit_code)
        what = f"{kind.__name__}: {error}"
        self.log.write("".join(traceback.format_exception(kind, error, trace)))
        if not isinstance(error, TpllmError):
            traceback.print_exception(kind, error, trace)
        name_failure(f"tpllm: rank {self.rank} of {self.size} on {self.host} failed in {stage}: {what}", code)
        if self._heartbeat:
            self._heartbeat.tell(failed=vars(Failure(self.rank, self.host, stage, what, code)))
        sys.stderr.flush()
        time.sleep(MESSAGE_SECONDS)  # as above
        self.abort(code)


@functools.cache  # a process belongs to one world
def _started() -> World:
    launched = launched_by(os.environ)
    if launched is None:
        return World()
    mpi = _mpi()
    try:
        check_world(launched, mpi.COMM_WORLD.size, mpi.Get_library_version().split(",")[0].strip("\0 \n"))
    except TpllmError as e:
        # Each process is alone in its world: the launcher's number alone can tell who speaks.
        raise SharedError(str(e) if launched.rank == 0 else "", e.exit_code) from None
    world = World(mpi.COMM_WORLD)
    signal.signal(signal.SIGUSR1, world._drain)
    # srun has no other word for the end of a job's time; an mpirun says it when it ends all because one rank died.
    signal.signal(signal.SIGTERM, world._drain if launched.launcher == "srun" else world._leave_late)
    if world.size > 1:
        sys.excepthook = world._die
        atexit.register(world.finish)
        if timeout := seconds("TPLLM_HEARTBEAT"):
            world.watch(timeout)
    return world


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI


def mpi_call(name: str, *arguments: Any) -> None:
    """Call the library itself: mpi4py would keep the interpreter's lock, and no timer could end a call that hangs."""
    getattr(ctypes.CDLL(_mpi().__file__), name)(*arguments)
