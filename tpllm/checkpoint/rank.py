"""TensorRT-LLM's checkpoint directory: `config.json`, `rank{N}.safetensors`, and a manifest of digests.

Only reading weights imports torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tpllm.config import ModelConfig
from tpllm.errors import DataError, UsageError
from tpllm.files import DIGEST, digest, json_digest, read_json
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.sharding import Axis, shard

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' own
HEAD, TABLE = "lm_head.weight", "transformer.vocab_embedding.weight"
STORED_NAMES = DTYPE_NAMES | {"int8": "I8", "int32": "I32"}


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
        return self.model.to_json() | {"mapping": mapping}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CheckpointConfig:
        mapping, model = data.get("mapping") or {}, ModelConfig.from_json(data)
        sizes = ([mapping.get(f"{kind}_size", 1) for kind in ("tp", "pp", "cp")] if isinstance(mapping, dict) else [])
        if not sizes or any(type(n) is not int or n < 1 for n in sizes) or sizes[2] != 1 or mapping.get(
                "world_size", sizes[0] * sizes[1]) != sizes[0] * sizes[1]:
            raise DataError(f"config.json: mapping {mapping} is not tp_size x pp_size ranks")
        if (problem := model.tp_problem(sizes[0])) or sizes[1] > model.num_hidden_layers:
            raise DataError(f"config.json: mapping {mapping} does not fit the model: "
                            f"{problem or f'it has {model.num_hidden_layers} layers'}")
        return cls(model, sizes[0], sizes[1])

    @classmethod
    def load(cls, directory: Path) -> CheckpointConfig:
        if not directory.is_dir():
            raise UsageError(f"no such checkpoint directory: {directory}")
        data = read_json(directory / "config.json", "a checkpoint directory")
        written = (read_manifest(directory) or {}).get("config")
        if written is not None and written != json_digest(data):
            raise DataError(f"{directory / 'config.json'} is not what {MANIFEST} says was written; convert again, or, "
                            f'if you changed it on purpose, remove "config" from {MANIFEST}')
        return cls.from_json(data)


def open_weights(path: Path, framework: str = "pt") -> safe_open:
    """A safetensors file whose tensors are mapped when asked for; for headers alone, "numpy" does without torch."""
    if not path.is_file():
        raise DataError(f"{path.parent} lacks {path.name}")
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} ({path.stat().st_size} bytes) is torn: {e}") from None


def read_header(file: safe_open) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor's dtype, in safetensors' spelling, and shape."""
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """What the converter wrote down; None in a checkpoint of another tool."""
    path = directory / MANIFEST
    return read_json(path, "a checkpoint directory") if path.is_file() else None


def manifest_entry(directory: Path, mapping: Mapping) -> dict[str, Any] | None:
    """The manifest's entry of one rank's file: `bytes`, `tensors` with their digests, `fingerprint` of them all."""
    data, path = read_manifest(directory), directory / rank_file(mapping.rank)
    if data is None:
        return None
    try:
        entry = data["ranks"][path.name]
        if (data["digest"] == DIGEST and entry["bytes"] == path.stat().st_size
                and entry["fingerprint"] == fingerprint(entry["tensors"])):
            return dict(entry)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise DataError(f"{directory / MANIFEST} does not describe {path.name} ({path.stat().st_size} bytes); "
                    "copy or convert the checkpoint again")


class RankCheckpoint:
    """One rank's weights, checked against its model's table: names, shapes and dtypes must be exactly those.

    Only a head that is the embedding table may be missing, as TensorRT-LLM leaves it out (`share_embedding_table`).
    """

    def __init__(self, directory: Path, model: Model, mapping: Mapping) -> None:
        self.path = directory / rank_file(mapping.rank)
        self._file = open_weights(self.path)
        self.tensors = model.rank_tensors(mapping)
        header = read_header(self._file)
        self._shares = HEAD not in header and TABLE in header and HEAD in self.tensors and (
            self.tensors[TABLE][1][1] == self.tensors[HEAD][1][1])  # else its columns are split
        self._head_of = functools.partial(shard, axes=(Axis.VOCAB, Axis.HIDDEN), config=model.config, mapping=mapping)
        self._check(header)
        self._manifest = manifest_entry(directory, mapping)

    def tensor(self, name: str) -> torch.Tensor:
        """A weight, mapped from disk; compared with the manifest's digest."""
        return self._read(name)[0]

    def load(self) -> tuple[dict[str, torch.Tensor], str]:
        """All weights, and the fingerprint of what was really read."""
        found = {name: self._read(name) for name in sorted(self.tensors)}
        return ({name: tensor for name, (tensor, _) in found.items()},
                fingerprint({name: read for name, (_, read) in found.items()}))

    def fingerprint(self) -> str:
        """The fingerprint that the converter recorded, or, for a checkpoint without manifest, of the file itself."""
        return str(self._manifest["fingerprint"]) if self._manifest else self.load()[1]

    def _read(self, name: str) -> tuple[torch.Tensor, str]:
        from tpllm.checkpoint.safetensors_file import tensor_bytes

        if name == HEAD and self._shares:
            table, read = self._read(TABLE)  # whole, or split as the head is
            return table if table.shape == self.tensors[HEAD][1] else self._head_of(table), read
        tensor = self._file.get_tensor(name)
        read = digest(tensor_bytes(tensor))
        if self._manifest and self._manifest["tensors"].get(name) != read:
            raise DataError(f"{self.path}: {name} is not what {MANIFEST} says was written; "
                            "copy or convert the checkpoint again")
        return tensor, read

    def _check(self, header: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        needed = self.tensors.keys() - ({HEAD} if self._shares else set())
        for names, verb in ((needed - header.keys(), "lacks"),
                            (header.keys() - self.tensors.keys(), "has unknown")):
            if names:
                raise DataError(f"{self.path} {verb} tensor(s): {', '.join(sorted(names)[:5])}")
        for name in sorted(needed):
            dtype, shape = self.tensors[name]
            if header[name] != (STORED_NAMES[dtype], shape):
                raise DataError(f"{self.path}: {name} is {header[name][0]} {list(header[name][1])}, config.json says "
                                f"{STORED_NAMES[dtype]} {list(shape)}")


def fingerprint(digests: dict[str, str]) -> str:
    """One digest over the digests of all of a rank's tensors."""
    return digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())
