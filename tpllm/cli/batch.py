"""`tpllm batch`: a file of prompts → a file of answers, under mpirun; it can be killed and resumed."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.cli.options import add_engine_arguments, add_sampling_arguments, sampling_params
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.settings import seconds

if TYPE_CHECKING:
    from tpllm.batch import BatchJob
    from tpllm.distributed import World

HELP = "JSONL of prompts -> JSONL of answers, resumable (mpirun -n TP tpllm batch ...)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--input-file", type=Path, required=True, metavar="FILE",
                        help="a JSON object a line: id (default: the line's number from 0), one of prompt, messages, "
                             "token_ids, and sampling options by their names; or OpenAI's batch lines")
    parser.add_argument("--output-file", type=Path, required=True, metavar="FILE",
                        help="an answer a line, as they end; lines that cannot be answered: FILE.errors.jsonl")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true",
                          help="go on with the output file, if there is one: ids that are in it are not answered again")
    existing.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N",
                        help="only every N-th line from line I (from 0) on, as a task of an array job (default: 0/1)")
    parser.add_argument("--drain-seconds", type=float, metavar="S",
                        help="how long answers that have begun may go on after SIGUSR1 or SIGTERM (default: two thirds "
                             "of TPLLM_DRAIN_SECONDS, after which launch ends the job: 20)")
    add_sampling_arguments(parser)
    add_rank_arguments(parser)


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: run(args, world))


def run(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    from tpllm.batch import run_batch
    from tpllm.distributed import SharedError
    from tpllm.errors import InterruptedRun
    from tpllm.runner import ModelRunner

    if world.comm is None:  # without a launcher nothing has been set for a process alone
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(world, "draining", True))
    job = world.together("input", lambda: open_job(args) if world.is_first else None)
    try:
        runner = ModelRunner.from_dir(args.engine_dir, args.tokenizer_dir, args.checkpoint_dir, world)
        world.together("batch", lambda: run_batch(runner, job))
    finally:
        if job:
            job.close()
            world.log.facts = job.summary()
    if job:
        print("batch: {answered} answered, {skipped} had been before, {errors} refused, of {lines} line(s) (shard "
              "{shard}); {tokens} tokens, {tokens_per_s} tokens/s".format_map(world.log.facts))
    if world.broadcast(job.interrupted if job else False):
        raise SharedError("interrupted: the same command with --resume goes on", InterruptedRun.exit_code)
    return 0


def open_job(args: argparse.Namespace) -> BatchJob:
    """Check all that can be checked before the engine loads."""
    from tpllm.batch import BatchJob
    from tpllm.errors import UsageError

    drain = seconds("TPLLM_DRAIN_SECONDS") * 2 / 3 if args.drain_seconds is None else args.drain_seconds
    if not 0 <= drain < float("inf"):
        raise UsageError(f"--drain-seconds is {drain}; it starts at 0")
    return BatchJob(args.input_file, args.output_file, sampling_params(args), args.shard, args.resume, args.overwrite,
                    drain)
