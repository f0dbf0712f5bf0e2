"""`tpllm doctor`: a staged preflight of ranks, MPI, files, memory, GPUs and all-reduce."""

from __future__ import annotations

import argparse
from pathlib import Path

from tpllm.cli.ranked import add_rank_arguments, with_world

HELP = "staged preflight of what a job needs (mpirun -n N tpllm doctor, or tpllm launch doctor)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine-dir", type=Path, metavar="DIR", help="must be there on all hosts")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="likewise; its weights must fit in memory")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    add_rank_arguments(parser)


def work(args: argparse.Namespace) -> int:
    from tpllm.doctor import Patient, examine

    directories = [path for path in (args.engine_dir, args.checkpoint_dir) if path is not None]
    return with_world(args, lambda world: examine(Patient(world, directories), args.json), checked=False)
