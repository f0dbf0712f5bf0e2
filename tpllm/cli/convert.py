"""`tpllm convert`: weights → checkpoint directory, by one process or, under mpirun, by its ranks together."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.cli.options import add_quantization_arguments, quant_algo
from tpllm.cli.ranked import add_rank_arguments, with_world
from tpllm.config import DTYPES
from tpllm.distributed import World
from tpllm.errors import UsageError
from tpllm.launched import launched_by

if TYPE_CHECKING:
    from tpllm.checkpoint.source import SourceCheckpoint

HELP = "weights -> checkpoint directory (TensorRT-LLM's format), split for any number of ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--meta-ckpt-dir", type=Path, metavar="DIR",
                        help="Meta's weights: params.json and consolidated.NN.pth")
    source.add_argument("--hf-model-dir", "--model-dir", type=Path, metavar="DIR",
                        help="Hugging Face's: config.json and model*.safetensors")
    source.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                        help="TensorRT-LLM's: config.json and rankN.safetensors, to be split anew")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp-size", type=int, default=1, help="pipeline-parallel stages")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is the source's")
    add_quantization_arguments(parser)
    parser.add_argument("--use-parallel-embedding", action="store_true", help="split the embedding table too")
    parser.add_argument("--embedding-sharding-dim", type=int, choices=(0, 1), default=0,
                        help="along 0, the vocabulary, or 1, the hidden dimension")
    parser.add_argument("--rope-scaling-factor", type=float, metavar="F",
                        help="for Meta's use_scaled_rope (default: 8, or 32 for the dimensions of Llama 3.2 1B and 3B)")
    parser.add_argument("--max-position-embeddings", type=int, metavar="N",
                        help="context length of Meta's weights (default: from the parameters, said aloud)")
    parser.add_argument("--model-file", type=Path, metavar="FILE.py", help="a model of your own (see README)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads, each of which holds a weight in memory "
                        "(default: one a core, up to 4)")
    add_rank_arguments(parser)


def open_source(args: argparse.Namespace, checklist: bool) -> SourceCheckpoint:
    """The directory that one of the three options gives; with `checklist` Meta's files are compared with theirs."""
    from tpllm.checkpoint.hf import HfCheckpoint
    from tpllm.checkpoint.meta import MetaCheckpoint
    from tpllm.checkpoint.reshard import ShardedCheckpoint
    from tpllm.models import MODELS, load_model_file

    if args.meta_ckpt_dir:
        model = load_model_file(args.model_file) if args.model_file else MODELS["LlamaForCausalLM"]
        return MetaCheckpoint(args.meta_ckpt_dir, model, args.rope_scaling_factor, args.max_position_embeddings,
                              checklist)
    if args.rope_scaling_factor is not None or args.max_position_embeddings is not None:
        raise UsageError("--rope-scaling-factor and --max-position-embeddings are for Meta's weights; this source's "
                         "config.json says both")
    return (HfCheckpoint(args.hf_model_dir, args.model_file) if args.hf_model_dir
            else ShardedCheckpoint(args.checkpoint_dir, args.model_file))


def work(args: argparse.Namespace) -> int:
    launched = launched_by(os.environ)
    if launched is None or launched.size == 1:  # a batch script is no launch: MPI stays out of it
        return convert(args, World())
    return with_world(args, lambda world: convert(args, world), checked=False)


def convert(args: argparse.Namespace, world: World) -> int:
    """The verb, on every rank."""
    from tpllm.checkpoint.convert import ConvertOptions
    from tpllm.checkpoint.convert import convert as write

    started = time.perf_counter()
    algo = world.together("read", lambda: quant_algo(args))
    source = world.together("read", lambda: open_source(args, world.is_first))
    options = ConvertOptions(args.tp_size, args.pp_size, args.dtype, args.use_parallel_embedding,
                             args.embedding_sharding_dim, algo,
                             **({} if args.workers is None else {"workers": args.workers}))
    checkpoint = write(source, args.output_dir, options, world)
    files = sorted(args.output_dir.glob("rank*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    world.say(f"convert: {len(source.files)} shard(s) of {checkpoint.model.architecture} -> {len(files)} rank file(s) "
              f"in {args.output_dir}, {checkpoint.model.dtype}, {size / 1e6:.1f} MB, "
              f"{time.perf_counter() - started:.1f} s")
    return 0
