"""`tpllm verify`: is a checkpoint or an engine whole, and is it what it was made from? No ranks, no MPI."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.cli.inspect import engine_ranks, is_engine
from tpllm.errors import UsageError

if TYPE_CHECKING:
    from tpllm.checkpoint.source import SourceCheckpoint
    from tpllm.models.base import Model

HELP = "is a checkpoint or engine directory whole; with --against, are its weights those of a source"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint or engine directory")
    parser.add_argument("--against", type=Path, metavar="SOURCE",
                        help="Meta's, Hugging Face's or a checkpoint directory: compare every weight with it")
    parser.add_argument("--model-file", type=Path, metavar="FILE.py", help="the model of your own that was converted")


def work(args: argparse.Namespace) -> int:
    def say(text: str) -> None:
        print(f"verify: {text}", flush=True)

    if is_engine(args.directory):
        if args.against:
            raise UsageError("--against compares weights, which are not in an engine; give its checkpoint directory")
        config, ranks = engine_ranks(args.directory)
        say(f"{len(ranks)} engine(s) are whole and belong to config.json; their weights: {config.checkpoint_dir}")
        return 0
    from tpllm.checkpoint.reshard import ShardedCheckpoint
    from tpllm.checkpoint.verify import compare, verify_checkpoint

    verify_checkpoint(args.directory, args.model_file, say)
    if args.against:
        ours = ShardedCheckpoint(args.directory, args.model_file)
        say(f"all {compare(ours, find_source(args, ours.model))} tensors are those of {args.against}, bit for bit")
    say(f"{args.directory} is whole")
    return 0


def find_source(args: argparse.Namespace, model: type[Model]) -> SourceCheckpoint:
    """`--against`: Meta's, TensorRT-LLM's or Hugging Face's directory, as its files tell."""
    from tpllm.checkpoint.hf import HfCheckpoint
    from tpllm.checkpoint.meta import MetaCheckpoint
    from tpllm.checkpoint.rank import rank_file
    from tpllm.checkpoint.reshard import ShardedCheckpoint

    if (args.against / "params.json").is_file():
        return MetaCheckpoint(args.against, model)
    ranked = (args.against / rank_file(0)).is_file()
    return (ShardedCheckpoint if ranked else HfCheckpoint)(args.against, args.model_file)
