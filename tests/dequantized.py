"""Quantized checkpoints read as `tpllm/quantization.py` documents them, in numpy; the reference with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from makers import half_split
from numpy.typing import NDArray
from reference import Reference
from safetensors import safe_open
from torch import Tensor

Array = NDArray[Any]
GROUP = 128


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def int4_numbers(words: Array) -> Array:
    """`[out, groups, 128]` from -8 to 7: bits 4i to 4i + 3 of word j of a group are column 16i + j, 8 is zero."""
    rows = words.view(np.uint32).reshape(len(words), -1, 16)
    numbers = np.empty((*rows.shape[:2], GROUP), np.int64)
    for i in range(8):
        for j in range(16):
            numbers[:, :, 16 * i + j] = (rows[:, :, j] >> np.uint32(4 * i)).astype(np.int64) % 16 - 8
    return numbers


def dequantize(tensors: dict[str, Tensor], name: str, columns: int) -> Array:
    """The matrix `[out, columns]` of `NAME.weight`, in float64."""
    weight = tensors[f"{name}.weight"].numpy()
    if weight.dtype == np.int8:
        return weight * tensors[f"{name}.per_channel_scale"].double().numpy()[:, None]
    scale = tensors[f"{name}.weights_scaling_factor"].double().numpy()
    whole: Array = (int4_numbers(weight) * scale[:, :, None]).reshape(len(weight), -1)[:, :columns]
    return whole


def pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`: Meta's order of rows."""
    order = half_split(torch.arange(len(rows)), heads)
    back = torch.empty_like(rows)
    back[order] = rows
    return back


def dequantized_reference(meta: Path, checkpoint: Path, ranks: int) -> Reference:
    """The float32 reference on what the ranks' quantized weights stand for."""
    reference = Reference(meta)
    p, shards = reference.params, [read(checkpoint / f"rank{rank}.safetensors") for rank in range(ranks)]
    inner = len(reference.weights["layers.0.feed_forward.w1.weight"]) // ranks
    heads, kv_heads = p.n_heads // ranks, p.n_kv_heads // ranks

    def parts(name: str, columns: int) -> list[Tensor]:
        return [torch.from_numpy(dequantize(shard, name, columns)).float() for shard in shards]

    for layer in range(p.n_layers):
        theirs, ours = f"layers.{layer}", f"transformer.layers.{layer}"
        split = [part.split([n * p.head_dim for n in (heads, kv_heads, kv_heads)])
                 for part in parts(f"{ours}.attention.qkv", p.dim)]  # fmt: skip
        q, k, v = (torch.cat(piece) for piece in zip(*split, strict=True))
        reference.weights |= {
            f"{theirs}.attention.wq.weight": pairs(q, p.n_heads),
            f"{theirs}.attention.wk.weight": pairs(k, p.n_kv_heads),
            f"{theirs}.attention.wv.weight": v,
            f"{theirs}.attention.wo.weight": torch.cat(parts(f"{ours}.attention.dense", heads * p.head_dim), 1),
            f"{theirs}.feed_forward.w1.weight": torch.cat(parts(f"{ours}.mlp.fc", p.dim)),
            f"{theirs}.feed_forward.w3.weight": torch.cat(parts(f"{ours}.mlp.gate", p.dim)),
            f"{theirs}.feed_forward.w2.weight": torch.cat(parts(f"{ours}.mlp.proj", inner), 1),
        }  # fmt: skip
    return reference
