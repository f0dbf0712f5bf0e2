"""Whether a checkpoint is whole, and whether it is what a source of weights becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tpllm.checkpoint.convert import destinations, write_weight
from tpllm.checkpoint.rank import CheckpointConfig, RankCheckpoint, rank_file, read_manifest
from tpllm.checkpoint.safetensors_file import tensor_bytes
from tpllm.checkpoint.source import SourceCheckpoint, all_sources, cut, source_weights
from tpllm.errors import DataError
from tpllm.files import digest
from tpllm.mapping import Mapping
from tpllm.models import find_model

if TYPE_CHECKING:
    from tpllm.checkpoint.reshard import ShardedCheckpoint


def verify_checkpoint(directory: Path, model_file: Path | None, say: Callable[[str], None]) -> None:
    """Read every rank's file: exactly the model's tensors, with the digests that were written down.

    Raises one `DataError` that names all files that are not so.
    """
    checkpoint = CheckpointConfig.load(directory)
    model, problems = find_model(checkpoint.model.architecture, model_file)(checkpoint.model), []
    mappings = Mapping.all_ranks(checkpoint.tp_size, checkpoint.pp_size)
    for mapping in mappings:
        try:
            rank = RankCheckpoint(directory, model, mapping)
            say(f"{rank.path.name}: {len(rank.tensors)} tensors, fingerprint {rank.load()[1]}")
        except DataError as e:
            problems.append(str(e))
    if extra := {path.name for path in directory.glob("rank*.safetensors")} - {rank_file(m.rank) for m in mappings}:
        problems.append(f"{directory} has {min(extra)}, but config.json says {len(mappings)} rank(s)")
    if problems:
        raise DataError("; ".join(problems))
    if read_manifest(directory) is None:
        say("no manifest.json: names, shapes and dtypes are right; whether the values are is not known")


class Comparison:
    """Takes the tensors that converting would write into a rank's file, and refuses those that are not in it."""

    def __init__(self, rank: RankCheckpoint) -> None:
        self.rank, self.count = rank, 0

    def holds(self, name: str) -> bool:
        return False

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if digest(tensor_bytes(self.rank.tensor(name))) != digest(tensor_bytes(tensor)):
            raise DataError(f"{name} in {self.rank.path} is not what the source becomes")
        self.count += 1


def compare(ours: ShardedCheckpoint, theirs: SourceCheckpoint) -> int:
    """The number of tensors, after each of ours was found to be theirs bit for bit, in our dtype.

    One full tensor of each side is held at a time. Quantized ones cannot be joined again: theirs are quantized
    instead, for each rank. Raises a `DataError` that names the first one that differs.
    """
    if theirs.config.quant_algo:
        raise DataError(f"{theirs.directory} is quantized ({theirs.config.quant_algo}) itself; compare with the "
                        "weights it was made from")
    if differing := different_fields(ours, theirs):
        raise DataError(f"{ours.directory / 'config.json'} and {theirs.directory}: {differing}")
    if ours.config.quant_algo:
        model, found = ours.model(ours.config), [Comparison(rank) for rank in ours.ranks.values()]
        for weight, layer in source_weights(model):
            places = destinations(weight, layer, model, list(ours.ranks), found)
            write_weight(weight, layer, theirs, model.config, places)
        return sum(comparison.count for comparison in found)
    sources, dtype = list(all_sources(ours.model(ours.config))), getattr(torch, ours.config.dtype)
    for part, layer in sources:
        expected = cut(theirs.tensor(part, layer), part, theirs.kind, ours.config, Mapping(1)).to(dtype)
        if digest(tensor_bytes(ours.tensor(part, layer))) != digest(tensor_bytes(expected)):
            where = "" if layer is None else f" of layer {layer}"
            raise DataError(f"{part.meta} ({part.hf}){where} in {ours.directory} is not that of {theirs.directory}")
    return len(sources)


def different_fields(ours: SourceCheckpoint, theirs: SourceCheckpoint) -> str:
    """What the two say differently of the same model; empty if they agree."""
    mine = ours.config
    other = replace(theirs.config, dtype=mine.dtype, use_parallel_embedding=mine.use_parallel_embedding,
                    embedding_sharding_dim=mine.embedding_sharding_dim, quant_algo=mine.quant_algo)
    if theirs.kind == "meta":  # its params.json holds neither, so converting guessed them or was told
        other = replace(other, max_position_embeddings=mine.max_position_embeddings,
                        rotary_scaling=other.rotary_scaling and mine.rotary_scaling)
    pairs = zip(asdict(mine).items(), asdict(other).values(), strict=True)
    return ", ".join(f"{name} is {here!r} and {there!r}" for (name, here), there in pairs if here != there)
