"""`tpllm build`: checkpoint directory → engine directory, every rank its own engine, under mpirun."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.engine import BACKENDS
from tpllm.engine.base import STEP_TOKENS, BuildConfig

if TYPE_CHECKING:
    from tpllm.config import ModelConfig
    from tpllm.distributed import World

HELP = "checkpoint directory -> engine directory (mpirun -n TP tpllm build ...)"

# Switches of TensorRT-LLM's plugins and runtime: scripts written for trtllm-build may carry them.
PLUGIN_SWITCHES = (
    "gemm-plugin", "gpt-attention-plugin", "nccl-plugin", "context-fmha", "remove-input-padding", "paged-kv-cache",
    "kv-cache-type", "use-fused-mlp", "reduce-fusion", "multiple-profiles", "use-paged-context-fmha",
    "use-custom-all-reduce", "strongly-typed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    limits = BuildConfig()
    parser.add_argument("--checkpoint-dir", type=Path, required=True, metavar="DIR", help="made by tpllm convert")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the engines go")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default=limits.backend,
                        help="inductor: compiled ahead of time; eager: uncompiled, needs no C++ compiler; tensorrt: "
                             "TensorRT's native layers, for GPUs")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default=limits.device, help="where engines run")
    parser.add_argument("--max-batch-size", type=int, default=limits.max_batch_size, help="sequences at a time")
    parser.add_argument("--max-input-len", type=int, metavar="N",
                        help=f"tokens of a prompt (default: {limits.max_input_len}, or --max-seq-len if less)")
    parser.add_argument("--max-seq-len", type=int, metavar="N",
                        help=f"tokens of prompt and answer (default: {limits.max_seq_len}, or the model's if less)")
    parser.add_argument("--max-num-tokens", type=int, metavar="N",
                        help="tokens of a step, longer prompts come in chunks (default: "
                             f"{STEP_TOKENS['cuda']} on GPUs, {STEP_TOKENS['cpu']} on CPUs)")
    parser.add_argument("--model-file", type=Path, metavar="FILE.py", help="the model of your own that was converted")
    add_rank_arguments(parser)
    for name in PLUGIN_SWITCHES:
        parser.add_argument(f"--{name}", nargs="?", const="enable", help=argparse.SUPPRESS)


def work(args: argparse.Namespace) -> int:
    return with_world(args, lambda world: build(args, world))


def build(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    import time

    from tpllm.checkpoint.rank import CheckpointConfig
    from tpllm.engine import build_engines
    from tpllm.engine.base import EngineConfig, versions
    from tpllm.errors import UsageError

    started = time.perf_counter()
    say = world.say

    def plan() -> EngineConfig:
        checkpoint = CheckpointConfig.load(args.checkpoint_dir)
        if checkpoint.pp_size > 1:
            raise UsageError(f"{args.checkpoint_dir} is split into {checkpoint.pp_size} pipeline stages, which engines "
                             "do not support; convert again with --pp-size 1")
        world.require_size(checkpoint.tp_size, f"checkpoint {args.checkpoint_dir}",
                           f"build --checkpoint-dir {args.checkpoint_dir}")
        return EngineConfig(checkpoint.model, limits(args, checkpoint.model, say), checkpoint.tp_size,
                            str(args.checkpoint_dir.resolve()), versions())

    config = world.together("build", plan)
    switches = [f"--{name}" for name in PLUGIN_SWITCHES if getattr(args, name.replace("-", "_")) is not None]
    if switches:
        say(f"build: {', '.join(switches)} mean nothing here: these engines have no plugins")
    config = build_engines(config, args.output_dir, args.checkpoint_dir, world, args.model_file)
    if world.is_first:
        size = sum(path.stat().st_size for path in args.output_dir.glob("rank*.engine"))
        say(f"build: {config.tp_size} engine(s) in {args.output_dir}, backend {config.build.backend}, "
              f"{size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")
    return 0


def limits(args: argparse.Namespace, model: ModelConfig, say: Callable[[str], None]) -> BuildConfig:
    """The build's limits: never beyond the model's context, defaults cut to fit."""
    default = BuildConfig()
    seq = min(args.max_seq_len or default.max_seq_len, model.max_position_embeddings)
    if args.max_seq_len and seq < args.max_seq_len:
        say(f"build: --max-seq-len {args.max_seq_len} is beyond the model's {seq}; using {seq}")
    return BuildConfig(backend=args.backend, device=args.device, max_batch_size=args.max_batch_size,
                       max_input_len=args.max_input_len or min(default.max_input_len, seq), max_seq_len=seq,
                       max_num_tokens=args.max_num_tokens)
