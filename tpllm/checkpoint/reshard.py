"""A TensorRT-LLM checkpoint directory as a source: the ranks' shards joined to full tensors again."""

from __future__ import annotations

from pathlib import Path

import torch

from tpllm.checkpoint.rank import CheckpointConfig, RankCheckpoint
from tpllm.checkpoint.safetensors_file import tensor_bytes
from tpllm.errors import DataError
from tpllm.files import digest
from tpllm.mapping import Mapping
from tpllm.models import find_model
from tpllm.sharding import Source, axis_slice, shard, unshard


class ShardedCheckpoint:
    """All ranks' files at once; a full tensor is joined when it is asked for, and the ranks must agree on it."""

    kind = "checkpoint"

    def __init__(self, directory: Path, model_file: Path | None = None) -> None:
        checkpoint = CheckpointConfig.load(directory)
        self.directory, self.config = directory, checkpoint.model
        self.notes: list[str] = []
        self.model = find_model(self.config.architecture, model_file)
        model = self.model(self.config)
        self.ranks = {m: RankCheckpoint(directory, model, m)
                       for m in Mapping.all_ranks(checkpoint.tp_size, checkpoint.pp_size)}
        self.files = [rank.path for rank in self.ranks.values()]
        # Where each source lies: the name of its weight and the sources before it in there.
        self._places = {(part, layer): (mapping, name, weight.sources[:i])
                        for mapping in self.ranks for name, weight, layer in model.rank_weights(mapping)
                        for i, part in enumerate(weight.sources) if mapping.tp_rank == 0}

    def tensor(self, source: Source, layer: int | None) -> torch.Tensor:
        """The whole tensor `[full_shape]` of a source; a view of the first rank's file if all ranks hold it all."""
        first, name, before = self._places[source, layer]
        mappings = [m for m in self.ranks if m.pp_rank == first.pp_rank]

        def rows(part: Source, mapping: Mapping) -> int:
            start, stop = axis_slice(part.axes[0], self.config, mapping)
            return stop - start

        parts = [self.ranks[m].tensor(name).narrow(0, sum(rows(part, m) for part in before), rows(source, m))
                 for m in mappings]
        full = unshard(parts, source.axes, self.config)
        for mapping, part in zip(mappings, parts, strict=True):
            if digest(tensor_bytes(shard(full, source.axes, self.config, mapping))) != digest(tensor_bytes(part)):
                raise DataError(f"{self.directory}: rank {mapping.rank}'s {name} does not fit the other ranks': what "
                                "they repeat differs, or padding is not zero; convert the original weights")
        return full
