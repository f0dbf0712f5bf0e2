"""What a model is: a table of weights and a forward pass in the verbs of `Ops`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, TypeVar

from tpllm.config import ModelConfig
from tpllm.mapping import Mapping
from tpllm.models.ops import Ops
from tpllm.quantization import Spec, stored
from tpllm.sharding import Weight, local_shape

T = TypeVar("T")


class Model(ABC):
    """Subclass this, in the package or in a file of your own, and give it to `--model-file`.

    `architecture` is the name under which checkpoints carry it. `first_weights` belong to the first pipeline
    stage, `last_weights` to the last, `layer_weights` to each layer.
    """

    architecture: ClassVar[str]
    first_weights: ClassVar[tuple[Weight, ...]]
    layer_weights: ClassVar[tuple[Weight, ...]]
    last_weights: ClassVar[tuple[Weight, ...]]

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @abstractmethod
    def forward(self, ops: Ops[T]) -> T:
        """Logits `[rows, vocab]` of one step; `ops` holds the step's tokens, positions and cache."""

    @staticmethod
    def layer_prefix(layer: int) -> str:
        """Prefix of a layer's names; `layer` counts from 0 within a pipeline stage, as TensorRT-LLM does."""
        return f"transformer.layers.{layer}."

    def rank_weights(self, mapping: Mapping) -> Iterator[tuple[str, Weight, int | None]]:
        """(full name in the rank's file, weight, global layer number or None) of all that one rank holds."""
        if mapping.pp_rank == 0:
            yield from ((w.name, w, None) for w in self.first_weights)
        for local, layer in enumerate(mapping.layers(self.config.num_hidden_layers)):
            yield from ((self.layer_prefix(local) + w.name, w, layer) for w in self.layer_weights)
        if mapping.pp_rank == mapping.pp_size - 1:
            yield from ((w.name, w, None) for w in self.last_weights)

    def stored(self, name: str, weight: Weight, layer: int | None, mapping: Mapping) -> dict[str, Spec]:
        """Dtype and shape of what holds one of these weights in the rank's file: of layers, they may be quantized."""
        config = self.config
        return stored(name, local_shape(weight, config, mapping), config.dtype,
                      None if layer is None else config.quant_algo)

    def rank_tensors(self, mapping: Mapping) -> dict[str, Spec]:
        """Everything in one rank's file."""
        specs: dict[str, Spec] = {}
        for name, weight, layer in self.rank_weights(mapping):
            specs |= self.stored(name, weight, layer, mapping)
        return specs
