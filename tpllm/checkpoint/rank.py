"""TensorRT-LLM's checkpoint directory: `config.json`, `rank{N}.safetensors`, and a manifest of digests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tpllm.checkpoint.safetensors_file import tensor_bytes
from tpllm.config import ModelConfig
from tpllm.errors import DataError, UsageError
from tpllm.files import DIGEST, digest, read_json
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.sharding import local_shape

MANIFEST = "manifest.json"


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` says: the model and over how many ranks it is split."""

    model: ModelConfig
    tp_size: int
    pp_size: int = 1

    def to_json(self) -> dict[str, Any]:
        mapping = {"world_size": self.tp_size * self.pp_size, "tp_size": self.tp_size, "pp_size": self.pp_size,
                   "cp_size": 1, "gpus_per_node": 8}
        return self.model.to_json() | {"mapping": mapping, "quantization": {
            "quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CheckpointConfig:
        mapping = data.get("mapping") or {}
        config = cls(ModelConfig.from_json(data), mapping.get("tp_size", 1), mapping.get("pp_size", 1))
        world = mapping.get("world_size", config.tp_size * config.pp_size)
        if world != config.tp_size * config.pp_size or mapping.get("cp_size", 1) != 1:
            raise DataError(f"config.json: mapping {mapping} is not tp_size x pp_size ranks")
        return config

    @classmethod
    def load(cls, directory: Path) -> CheckpointConfig:
        if not directory.is_dir():
            raise UsageError(f"no such checkpoint directory: {directory}")
        return cls.from_json(read_json(directory / "config.json", "a checkpoint directory"))


class RankCheckpoint:
    """One rank's weights, checked against its model's table: names, shapes and dtypes must be exactly those."""

    def __init__(self, directory: Path, model: Model, mapping: Mapping) -> None:
        self.path = directory / rank_file(mapping.rank)
        if not self.path.is_file():
            raise DataError(f"{directory} lacks {self.path.name}")
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise DataError(f"{self.path} ({self.path.stat().st_size} bytes) is torn: {e}") from None
        self.shapes = {name: local_shape(weight, model.config, mapping)
                       for name, weight, _ in model.rank_weights(mapping)}
        self._dtype = getattr(torch, model.config.dtype)
        self._check_names()
        self._manifest = self._read_manifest(directory)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight in sorted order; each is compared with the manifest's digest."""
        for name in sorted(self.shapes):
            tensor = self._file.get_tensor(name)
            if tensor.dtype != self._dtype or tuple(tensor.shape) != self.shapes[name]:
                raise DataError(f"{self.path}: {name} is {tensor.dtype} {list(tensor.shape)}, config.json says "
                                f"{self._dtype} {list(self.shapes[name])}")
            yield name, tensor

    def load(self) -> tuple[dict[str, torch.Tensor], str]:
        """All weights, and the fingerprint of what was really read."""
        weights, digests = dict(self.tensors()), {}
        for name, tensor in weights.items():
            digests[name] = digest(tensor_bytes(tensor))
            if self._manifest and self._manifest["tensors"].get(name) != digests[name]:
                raise DataError(f"{self.path}: {name} is not what {MANIFEST} says was written; "
                                "copy or convert the checkpoint again")
        return weights, fingerprint(digests)

    def fingerprint(self) -> str:
        """The fingerprint that the converter recorded, or, for a checkpoint without manifest, of the file itself."""
        return str(self._manifest["fingerprint"]) if self._manifest else self.load()[1]

    def _check_names(self) -> None:
        present = set(self._file.keys())
        for names, verb in ((self.shapes.keys() - present, "lacks"), (present - self.shapes.keys(), "has unknown")):
            if names:
                raise DataError(f"{self.path} {verb} tensor(s): {', '.join(sorted(names)[:5])}")

    def _read_manifest(self, directory: Path) -> dict[str, Any] | None:
        if not (directory / MANIFEST).is_file():
            return None
        data = read_json(directory / MANIFEST, "a checkpoint directory")
        try:
            entry = data["ranks"][self.path.name]
            if data["digest"] == DIGEST and entry["bytes"] == self.path.stat().st_size and entry["tensors"]:
                return dict(entry)
        except (KeyError, TypeError, ValueError):
            pass
        raise DataError(f"{directory / MANIFEST} does not describe {self.path.name} "
                        f"({self.path.stat().st_size} bytes); copy or convert the checkpoint again")


def fingerprint(digests: dict[str, str]) -> str:
    """One digest over the digests of all of a rank's tensors."""
    return digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())
