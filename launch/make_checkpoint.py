#!/usr/bin/env python3
"""A checkpoint in Meta's layout with random weights of a published shape, in a few megabytes of memory.

The 13 GB that `launch/compare_convert.py` measures with are

    .venv/bin/python launch/make_checkpoint.py --model llama-2-7b /scratch/llama-2-7b
"""

from __future__ import annotations

import argparse
import json
import mmap
from dataclasses import replace
from pathlib import Path

import torch

from tpllm.bench import SHAPES, named_config
from tpllm.checkpoint.source import all_sources
from tpllm.config import ModelConfig
from tpllm.models.llama import Llama
from tpllm.sharding import full_shape

COLUMNS = ("wo", "w2", "tok_embeddings")  # split along their columns over Meta's shards, norms not at all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=tuple(SHAPES), default="llama-2-7b")
    parser.add_argument("--num-layers", type=int, metavar="N", help="in place of the shape's own")
    parser.add_argument("--shards", type=int, default=1, help="files")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    config = named_config(args.model, args.dtype)
    make(args.directory, replace(config, num_hidden_layers=args.num_layers or config.num_hidden_layers), args.shards)


def make(directory: Path, config: ModelConfig, shards: int) -> None:
    directory.mkdir(parents=True)
    (directory / "params.json").write_text(json.dumps({
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base, "max_seq_len": config.max_position_embeddings}) + "\n", encoding="utf-8")
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    generator = torch.Generator().manual_seed(0)
    for number in range(shards):
        path = directory / f"consolidated.{number:02d}.pth"
        with torch.serialization.skip_data():  # places for the weights; memory that nobody touches is never taken
            torch.save({name: torch.empty(shape, dtype=getattr(torch, config.dtype))
                        for name, shape in shard_shapes(config, shards).items()}, path)
        for tensor in torch.load(path, mmap=True, weights_only=True).values():
            tensor.normal_(std=0.02, generator=generator)


def shard_shapes(config: ModelConfig, shards: int) -> dict[str, list[int]]:
    """Of the tensors in one of Meta's shards."""
    found = {}
    for source, layer in all_sources(Llama(config)):
        shape = list(full_shape(source, config))
        if len(shape) > 1:
            shape[source.meta.split(".")[-2] in COLUMNS] //= shards
        found[source.meta if layer is None else f"layers.{layer}.{source.meta}"] = shape
    return found


if __name__ == "__main__":
    main()
