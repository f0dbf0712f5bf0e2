"""A Hugging Face model directory of the Llama kind: `config.json` and safetensors files, seen as full named tensors."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tpllm.checkpoint.rank import DTYPE_NAMES, open_weights, read_header
from tpllm.checkpoint.source import all_sources, check_names
from tpllm.config import ModelConfig, RopeScaling
from tpllm.errors import DataError, UsageError
from tpllm.files import read_json
from tpllm.models import find_model
from tpllm.sharding import Source, full_shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
# Each of these would make another model of the same tensors.
REFUSED = ("quantization_config", "num_local_experts", "num_experts", "original_max_position_embeddings")


class HfCheckpoint:
    """Tensors are mapped from disk one at a time; rows that RoPE rotates are in halves already and stay as they are."""

    kind = "hf"

    def __init__(self, directory: Path, model_file: Path | None = None) -> None:
        if not directory.is_dir():
            raise UsageError(f"no such directory: {directory}")
        self.directory = directory
        self.notes: list[str] = []
        data = read_json(directory / "config.json", "a Hugging Face model directory")
        names = data.get("architectures") or [data.get("model_type")]
        self.model = find_model(str(names[0]) if isinstance(names, list) else str(names), model_file)
        self.files = weight_files(directory)
        self._places: dict[str, Any] = {}  # the open file that holds each tensor
        self._header: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in self.files:
            file = open_weights(path)
            header = read_header(file)
            if twice := self._header.keys() & header.keys():
                raise DataError(f"{path} holds {min(twice)}, and so does another file of {INDEX}")
            self._header |= header
            self._places |= dict.fromkeys(header, file)
        self._tied = data.get("tie_word_embeddings") is True
        try:
            self.config = self._read_config(data)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
            raise DataError(f"{directory / 'config.json'} is not a LLaMA model's: {type(e).__name__}: {e}") from None
        self._check()

    def tensor(self, source: Source, layer: int | None) -> torch.Tensor:
        """The whole tensor `[full_shape]` of a source, a view of its file."""
        name = self._name(source, layer)
        tensor: torch.Tensor = self._places[name].get_tensor(name)
        return tensor

    def _name(self, source: Source, layer: int | None) -> str:
        if layer is not None:
            return f"model.layers.{layer}.{source.hf}"
        return TABLE if self._tied and source.hf == HEAD else source.hf

    def _read_config(self, data: dict[str, Any]) -> ModelConfig:
        biases = any(source.hf.endswith(".bias") for w in self.model.layer_weights for source in w.sources)
        rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
        window = data.get("sliding_window") if data.get("use_sliding_window") is not False else None
        partial = rope.get("partial_rotary_factor", data.get("partial_rotary_factor"))
        for key in (*REFUSED, *(() if biases else ("attention_bias", "mlp_bias"))):
            if data.get(key):
                raise DataError(f"{self.directory}/config.json has {key} {data[key]!r}, which is not supported")
        for key, value, harmless in (
                ("hidden_act", data.get("hidden_act", "silu"), ("silu", "swish")),
                ("partial_rotary_factor", partial, (None, 1)),
                ("sliding_window", window and window < data["max_position_embeddings"], (None, 0, False))):
            if value not in harmless:
                raise DataError(f"{self.directory}/config.json has {key} {data.get(key, value)!r}, which is not "
                                "supported")
        stored = {name: dtype for dtype, name in DTYPE_NAMES.items()}.get(self._header[TABLE][0])
        heads = data["num_attention_heads"]
        return ModelConfig(
            architecture=self.model.architecture, dtype=str(data.get("dtype") or data.get("torch_dtype") or stored),
            vocab_size=data["vocab_size"], hidden_size=data["hidden_size"],
            num_hidden_layers=data["num_hidden_layers"], num_attention_heads=heads,
            num_key_value_heads=data.get("num_key_value_heads") or heads,
            head_size=data.get("head_dim") or data["hidden_size"] // heads,
            intermediate_size=data["intermediate_size"], norm_epsilon=data["rms_norm_eps"],
            rotary_base=rope.get("rope_theta", data.get("rope_theta", 10000.0)),
            max_position_embeddings=data["max_position_embeddings"], rotary_scaling=rope_scaling(rope))

    def _check(self) -> None:
        """Exactly the tensors of the model's table, each of the shape that config.json says."""
        sources = list(all_sources(self.model(self.config)))
        ignored = [name for name in self._header if name.endswith("rotary_emb.inv_freq")]  # computed, not read
        ignored += [HEAD] if self._tied else []
        check_names(self.directory, self._header.keys() - ignored, {self._name(*s) for s in sources},
                    self.model.architecture)
        for source, layer in sources:
            dtype, shape = self._header[self._name(source, layer)]
            if shape != full_shape(source, self.config) or dtype not in DTYPE_NAMES.values():
                raise DataError(f"{self.directory}: {self._name(source, layer)} is {dtype} {list(shape)}; config.json "
                                f"says {list(full_shape(source, self.config))}, in {', '.join(DTYPE_NAMES.values())}")


def rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    """Llama 3.1's scaling, all of whose numbers a Hugging Face configuration must give itself."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3" and (missing := [f.name for f in fields(RopeScaling) if f.name not in rope]):
        raise DataError(f"config.json: rope scaling {rope} lacks {', '.join(missing)}")
    return RopeScaling.from_json(rope | {"type": kind})


def weight_files(directory: Path) -> list[Path]:
    """The safetensors file, or those that the index names; each must lie in the directory itself.

    In a snapshot of Hugging Face's cache files are links into its `blobs`, which is as good.
    """
    names: list[Any] = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            raise DataError(f"{directory} has neither {WEIGHTS} nor {INDEX}; of weights in another form (.bin, .pth) "
                            "transformers' save_pretrained makes safetensors")
        weight_map = read_json(directory / INDEX, "a Hugging Face model directory").get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise DataError(f"{directory / INDEX} has no weight_map of tensor names and files")
    home = directory.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    paths = [directory / name for name in sorted(set(names))]
    for path, name in zip(paths, sorted(set(names)), strict=True):
        if path.name != name or (path.is_file() and path.resolve().parent not in homes):
            raise DataError(f"{path} lies outside of {directory}, or is a link to elsewhere; put the file itself there")
    return paths
