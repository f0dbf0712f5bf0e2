"""Whether a checkpoint is whole, and whether it is what a source of weights becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tpllm.checkpoint.convert import cut
from tpllm.checkpoint.hf import HfCheckpoint
from tpllm.checkpoint.meta import MetaCheckpoint
from tpllm.checkpoint.rank import CheckpointConfig, RankCheckpoint, rank_file, read_manifest
from tpllm.checkpoint.reshard import ShardedCheckpoint
from tpllm.checkpoint.safetensors_file import tensor_bytes
from tpllm.checkpoint.source import SourceCheckpoint, source_weights
from tpllm.config import ModelConfig
from tpllm.errors import DataError
from tpllm.files import digest
from tpllm.mapping import Mapping
from tpllm.models import find_model
from tpllm.models.base import Model


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
            say(f"{rank.path.name}: {len(rank.shapes)} tensors, fingerprint {rank.load()[1]}")
        except DataError as e:
            problems.append(str(e))
    if extra := {path.name for path in directory.glob("rank*.safetensors")} - {rank_file(m.rank) for m in mappings}:
        problems.append(f"{directory} has {min(extra)}, but config.json says {len(mappings)} rank(s)")
    if problems:
        raise DataError("; ".join(problems))
    if read_manifest(directory) is None:
        say("no manifest.json: names, shapes and dtypes are right; whether the values are is not known")


def verify_against(directory: Path, source_dir: Path, model_file: Path | None) -> int:
    """The number of tensors, all of them proven to be the source's bit for bit after joining the ranks' shards again.

    One full tensor of each side is held at a time. Raises a `DataError` that names the first one that differs.
    """
    ours = ShardedCheckpoint(directory, model_file)
    theirs = find_source(source_dir, ours.model, model_file)
    if differing := different_fields(ours.config, theirs):
        raise DataError(f"{directory / 'config.json'} and {source_dir}: {differing}")
    count, dtype = 0, getattr(torch, ours.config.dtype)
    for weight, layer in source_weights(ours.model(ours.config)):
        for part in weight.sources:
            expected = cut(theirs.tensor(part, layer), part, theirs.kind, ours.config, Mapping(1)).to(dtype)
            if digest(tensor_bytes(ours.tensor(part, layer))) != digest(tensor_bytes(expected)):
                where = "" if layer is None else f"layer {layer}, "
                raise DataError(f"{directory}: {where}{weight.name} is not what {source_dir} holds as {part.meta} "
                                f"({part.hf})")
            count += 1
    return count


def find_source(directory: Path, model: type[Model], model_file: Path | None) -> SourceCheckpoint:
    """Meta's, TensorRT-LLM's or Hugging Face's, as the files in the directory tell."""
    if (directory / "params.json").is_file():
        return MetaCheckpoint(directory, model)
    if (directory / rank_file(0)).is_file():
        return ShardedCheckpoint(directory, model_file)
    return HfCheckpoint(directory, model_file)


def different_fields(ours: ModelConfig, theirs: SourceCheckpoint) -> str:
    """What the two say differently of the same model; empty if they agree."""
    other = replace(theirs.config, dtype=ours.dtype, use_parallel_embedding=ours.use_parallel_embedding,
                    embedding_sharding_dim=ours.embedding_sharding_dim)
    if theirs.kind == "meta":  # its params.json holds neither, so converting guessed them or was told
        other = replace(other, max_position_embeddings=ours.max_position_embeddings,
                        rotary_scaling=other.rotary_scaling and ours.rotary_scaling)
    pairs = zip(asdict(ours).items(), asdict(other).values(), strict=True)
    return ", ".join(f"{name} is {mine!r} and {yours!r}" for (name, mine), yours in pairs if mine != yours)
