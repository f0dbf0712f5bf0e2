"""What the verbs that run under mpirun share: the world, and how its errors end the process."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tpllm.distributed import SharedError, World
from tpllm.doctor import preflight
from tpllm.errors import RankError, TpllmError
from tpllm.launched import leave_mark
from tpllm.runlog import RankLog, date, installed_versions, run_directory
from tpllm.settings import DEFAULTS, setting


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every verb that runs on ranks."""
    parser.add_argument("--heartbeat", type=float, metavar="S",
                        help="end the job when a rank is silent for S seconds, 0: never "
                             f"(default: TPLLM_HEARTBEAT, {DEFAULTS['TPLLM_HEARTBEAT']})")
    parser.add_argument("--log-dir", type=Path, default=Path(setting("TPLLM_LOG_DIR")), metavar="DIR",
                        help="a log for each rank and a record of the run go into a new directory of it")


def with_world(args: argparse.Namespace, work: Callable[[World], int], checked: bool = True) -> int:
    """Run `work` on every rank, with a log of each and a record of the whole; returns the exit code.

    `checked`: what can be looked at quickly is, before.
    """
    def checked_work(world: World) -> int:
        if checked:
            preflight(world, getattr(args, "engine_dir", None), getattr(args, "checkpoint_dir", None))
        return work(world)

    if args.heartbeat is not None:
        os.environ["TPLLM_HEARTBEAT"] = str(args.heartbeat)
    world, started = World.start(), time.time()
    world.log = RankLog(world.broadcast(run_directory(args.log_dir, args.verb)), world.rank)
    world.log.write(f"rank {world.rank} of {world.size} on {world.host}, process {os.getpid()}: {shlex.join(sys.argv)}")
    code = RankError.exit_code
    try:
        code = end_in_order(world, checked_work)
    except TpllmError as e:
        code = e.exit_code
        raise
    finally:
        world.exit_code = code
        world.log.write(f"ends with {code}")
        if world.is_first:
            world.log.record(verb=args.verb, command=shlex.join(sys.argv), exit_code=code,
                             ranks=[vars(place) for place in world.places],
                             date=date(started), seconds=round(time.time() - started, 3), versions=installed_versions())
    return code


def end_in_order(world: World, work: Callable[[World], int]) -> int:
    """`work`'s exit code. An error that all ranks agreed on is printed once; any other ends the job at once."""
    try:
        code = work(world)
        if world.is_first:
            leave_mark(code)
        return code
    except SharedError as e:
        world.log.write(str(e))
        if world.is_first:
            print(f"tpllm: {e}", file=sys.stderr, flush=True)
            leave_mark(e.exit_code)
        world.barrier()  # a launcher may kill the others, rank 0 among them, as soon as one has left
        return e.exit_code
    except TpllmError:
        if world.size > 1:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise
    except KeyboardInterrupt:
        world.abort(130)
