"""What a source of weights is: a directory seen as full named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tpllm.config import ModelConfig
from tpllm.errors import DataError
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.sharding import Source, Weight, shard

if TYPE_CHECKING:
    import torch


class SourceCheckpoint(Protocol):
    """Weights to convert; `kind` is "meta" (rotary rows in adjacent pairs), "hf" or "checkpoint" (in halves)."""

    kind: str
    directory: Path
    files: list[Path]
    model: type[Model]
    config: ModelConfig
    notes: list[str]

    def tensor(self, source: Source, layer: int | None) -> torch.Tensor:
        """A whole tensor, mapped from disk where it lies in one piece."""


def source_weights(model: Model) -> list[tuple[Weight, int | None]]:
    """Every weight of the whole model once, with its global layer number."""
    return [(weight, layer) for _, weight, layer in model.rank_weights(Mapping(1))]


def all_sources(model: Model) -> Iterator[tuple[Source, int | None]]:
    """Every tensor of a source checkpoint, with its layer number."""
    return ((part, layer) for weight, layer in source_weights(model) for part in weight.sources)


def cut(tensor: torch.Tensor, part: Source, kind: str, config: ModelConfig, mapping: Mapping) -> torch.Tensor:
    """A rank's slice of a source tensor, rotary rows in half-split order."""
    piece = shard(tensor, part.axes, config, mapping)
    return halves(piece, config.head_size) if part.rotary and kind == "meta" else piece


def halves(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Per head, rows of adjacent pairs (x0, x1), (x2, x3), … as all first members, then all second ones.

    Meta rotates adjacent pairs, TensorRT-LLM and Hugging Face the pairs (i, i + head_size/2).
    """
    heads = rows.shape[0] // head_size
    return rows.view(heads, head_size // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def check_names(where: Path, present: Iterable[str], expected: set[str], architecture: str) -> None:
    """Refuse a file or directory that lacks a tensor of the model's table or has another one."""
    missing, extra = sorted(expected - set(present)), sorted(set(present) - expected)
    if missing:
        raise DataError(f"{where} lacks {len(missing)} tensor(s): {', '.join(missing[:5])}")
    if extra:
        raise DataError(f"{where} has {len(extra)} tensor(s) that {architecture} does not have: "
                        f"{', '.join(extra[:5])}")
