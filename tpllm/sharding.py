"""How checkpoint tensors are named, where they come from, and which part of each a rank holds.

A model is a table of `Weight`s. Every dimension of a tensor is labelled with an `Axis`; the label alone
says how long the dimension is and how ranks share it, so that one pure function, `shard`, serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from tpllm.config import ModelConfig
from tpllm.mapping import Mapping, padded

if TYPE_CHECKING:
    import torch


class Axis(Enum):
    """What a tensor's dimension counts, and with that, how it is split."""

    HIDDEN = auto()  # whole on every rank
    HEADS = auto()  # rows or columns of query heads, split by head
    KV_HEADS = auto()  # key/value heads, split by head, repeated when there are fewer than ranks
    INTERMEDIATE = auto()  # the MLP's inner width, split evenly
    VOCAB = auto()  # padded with zeros to a multiple of the ranks, then split
    EMBEDDING_VOCAB = auto()  # as VOCAB with use_parallel_embedding and embedding_sharding_dim 0, else whole
    EMBEDDING_HIDDEN = auto()  # split evenly with use_parallel_embedding and embedding_sharding_dim 1, else whole


@dataclass(frozen=True)
class Source:
    """One tensor of a source checkpoint: its names (`meta`, `hf`) and its axes.

    `rotary` marks rows that RoPE rotates: Meta stores them as adjacent pairs and they are permuted to halves.
    """

    meta: str
    hf: str
    axes: tuple[Axis, ...]
    rotary: bool = False


@dataclass(frozen=True)
class Weight:
    """One tensor of a rank's file: its name, and the sources whose slices are joined along dimension 0.

    Names of `layer_weights` are relative to their layer.
    """

    name: str
    sources: tuple[Source, ...]


def axis_size(axis: Axis, config: ModelConfig) -> int:
    """Length of a full, unpadded dimension."""
    if axis in (Axis.HIDDEN, Axis.EMBEDDING_HIDDEN):
        return config.hidden_size
    if axis in (Axis.VOCAB, Axis.EMBEDDING_VOCAB):
        return config.vocab_size
    if axis is Axis.INTERMEDIATE:
        return config.intermediate_size
    heads = config.num_attention_heads if axis is Axis.HEADS else config.num_key_value_heads
    return heads * config.head_size


def axis_slice(axis: Axis, config: ModelConfig, mapping: Mapping) -> tuple[int, int]:
    """(start, stop) of a rank's part of a dimension; for padded axes `stop` may lie beyond the full length."""
    size, tp, rank = axis_size(axis, config), mapping.tp_size, mapping.tp_rank
    whole = {
        Axis.HIDDEN: True,
        Axis.EMBEDDING_VOCAB: not (config.use_parallel_embedding and config.embedding_sharding_dim == 0),
        Axis.EMBEDDING_HIDDEN: not (config.use_parallel_embedding and config.embedding_sharding_dim == 1),
    }
    if whole.get(axis):
        return 0, size
    if axis in (Axis.VOCAB, Axis.EMBEDDING_VOCAB):
        size = padded(size, tp)
    if axis is Axis.KV_HEADS and config.num_key_value_heads < tp:
        # tp / kv consecutive ranks share one head, the one their query heads attend with.
        head = rank // (tp // config.num_key_value_heads)
        return head * config.head_size, (head + 1) * config.head_size
    return rank * (size // tp), (rank + 1) * (size // tp)


def full_shape(source: Source, config: ModelConfig) -> tuple[int, ...]:
    """Shape of a whole source tensor."""
    return tuple(axis_size(axis, config) for axis in source.axes)


def shard(tensor: torch.Tensor, axes: tuple[Axis, ...], config: ModelConfig, mapping: Mapping) -> torch.Tensor:
    """A rank's part of a full tensor: a view wherever no padding is needed.

    `tensor` has the full shape its axes say; rows and columns beyond it are zeros.
    """
    for dim, axis in enumerate(axes):
        start, stop = axis_slice(axis, config, mapping)
        inside = max(0, min(stop, tensor.shape[dim]) - start)
        part = tensor.narrow(dim, min(start, tensor.shape[dim]), inside)
        if inside < stop - start:
            shape = list(part.shape)
            shape[dim] = stop - start
            whole = part.new_zeros(shape)
            whole.narrow(dim, 0, inside).copy_(part)
            part = whole
        tensor = part
    return tensor


def unshard(parts: Sequence[torch.Tensor], axes: tuple[Axis, ...], config: ModelConfig) -> torch.Tensor:
    """The full tensor of which `parts` are the ranks' shards, in the order of tensor-parallel ranks.

    What every rank holds whole is the first rank's own tensor. Of repeated heads the last rank's are taken, and
    padding is left out: whether ranks agree is told by `shard`ing the result again.
    """
    shape = [axis_size(axis, config) for axis in axes]
    mappings = Mapping.all_ranks(len(parts))
    if all(axis_slice(axis, config, mappings[-1]) == (0, size) for axis, size in zip(axes, shape, strict=True)):
        return parts[0]
    full = parts[0].new_empty(shape)
    for part, mapping in zip(parts, mappings, strict=True):
        place = full
        for dim, axis in enumerate(axes):
            start, stop = (min(end, shape[dim]) for end in axis_slice(axis, config, mapping))
            place, part = place.narrow(dim, start, stop - start), part.narrow(dim, 0, stop - start)
        place.copy_(part)
    return full


def local_shape(weight: Weight, config: ModelConfig, mapping: Mapping) -> tuple[int, ...]:
    """Shape of a rank's tensor of that name."""
    def length(axis: Axis) -> int:
        start, stop = axis_slice(axis, config, mapping)
        return stop - start

    rows = sum(length(source.axes[0]) for source in weight.sources)
    return (rows, *(length(axis) for axis in weight.sources[0].axes[1:]))
