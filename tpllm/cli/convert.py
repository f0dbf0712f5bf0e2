"""`tpllm convert`: weights → checkpoint directory. No ranks, no MPI."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tpllm.config import DTYPES

HELP = "weights -> checkpoint directory (TensorRT-LLM's format), split for any number of ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--meta-ckpt-dir", type=Path, required=True, metavar="DIR",
                        help="Meta's weights: params.json and consolidated.NN.pth")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--tp-size", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp-size", type=int, default=1, help="pipeline-parallel stages")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto is the source's")
    parser.add_argument("--use-parallel-embedding", action="store_true", help="split the embedding table too")
    parser.add_argument("--embedding-sharding-dim", type=int, choices=(0, 1), default=0,
                        help="along 0, the vocabulary, or 1, the hidden dimension")
    parser.add_argument("--rope-scaling-factor", type=float, metavar="F",
                        help="for use_scaled_rope (default: 8, or 32 for the dimensions of Llama 3.2 1B and 3B)")
    parser.add_argument("--max-position-embeddings", type=int, metavar="N",
                        help="context length (default: from the parameters, said aloud)")
    parser.add_argument("--model-file", type=Path, metavar="FILE.py", help="a model of your own (see README)")


def work(args: argparse.Namespace) -> int:
    from tpllm.checkpoint.convert import ConvertOptions, convert
    from tpllm.checkpoint.meta import MetaCheckpoint
    from tpllm.models import MODELS, load_model_file

    started = time.perf_counter()
    model = load_model_file(args.model_file) if args.model_file else MODELS["LlamaForCausalLM"]
    source = MetaCheckpoint(args.meta_ckpt_dir, model, args.rope_scaling_factor, args.max_position_embeddings)
    options = ConvertOptions(args.tp_size, args.pp_size, args.dtype, args.use_parallel_embedding,
                             args.embedding_sharding_dim)
    checkpoint = convert(source, model, args.output_dir, options, lambda text: print(f"convert: {text}"))
    files = sorted(args.output_dir.glob("rank*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"convert: {len(source.files)} shard(s) of {checkpoint.model.architecture} -> {len(files)} rank file(s) in "
          f"{args.output_dir}, {checkpoint.model.dtype}, {size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")
    return 0
