"""Random weights of a model, to measure it without a checkpoint: the same model, however many ranks share it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.quantization import quantized
from tpllm.sharding import full_shape, shard

SPREAD = 0.02  # standard deviation of matrices, that of a LLaMA before its training; vectors are ones


def random_weights(model: Model, mapping: Mapping, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """One by one what a rank's checkpoint file would hold, on `device`.

    Each weight is drawn in full from a seed of its own and then cut as `convert` cuts it; so it takes the memory of
    a whole weight and its part, and devices of different kinds draw different numbers.
    """
    config, dtype = model.config, getattr(torch, model.config.dtype)
    for name, weight, layer in model.rank_weights(mapping):
        parts = []
        for number, source in enumerate(weight.sources):
            full = torch.ones(full_shape(source, config), dtype=dtype, device=device)
            if full.dim() > 1:
                seed = zlib.crc32(f"{layer} {weight.name} {number}".encode())
                full.normal_(std=SPREAD, generator=torch.Generator(device).manual_seed(seed))
            parts.append(shard(full, source.axes, config, mapping))
        yield from quantized(torch.cat(parts), model.stored(name, weight, layer, mapping)).items()
