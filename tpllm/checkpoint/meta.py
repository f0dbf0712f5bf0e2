"""A directory of Meta's LLaMA weights seen as full named tensors, whatever its number of shards."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tpllm.checkpoint.source import all_sources, check_names
from tpllm.config import ModelConfig, RopeScaling
from tpllm.errors import DataError, UsageError
from tpllm.files import read_json
from tpllm.models.base import Model
from tpllm.sharding import Axis, Source, full_shape

# Meta's params.json says only `use_scaled_rope`. Its 3.1 code means factor 8; for these published 3.2 models
# (dim, n_layers) the released Hugging Face configurations say 32.
FACTOR_32_MODELS = {(2048, 16): "Llama 3.2 1B", (3072, 28): "Llama 3.2 3B"}
REFUSED_PARAMS = ("quantization_args", "lora_args", "moe", "moe_args", "vision_chunk_size")


class MetaCheckpoint:
    """`params.json` + `consolidated.NN.pth`; tensors are mapped from disk and joined one at a time."""

    kind = "meta"

    def __init__(self, directory: Path, model: type[Model], rope_scaling_factor: float | None = None,
                 max_position_embeddings: int | None = None, checklist: bool = True) -> None:
        if not directory.is_dir():
            raise UsageError(f"no such directory: {directory}")
        self.directory = directory
        self.notes: list[str] = []
        self.model = model
        params = read_json(directory / "params.json", "a directory of Meta LLaMA weights")
        self.files = shard_files(directory)
        if checklist:
            verify_checklist(directory)
        self._shards = [load_shard(path) for path in self.files]
        self.config = self._read_config(params, rope_scaling_factor, max_position_embeddings)
        self._check_names()

    def tensor(self, source: Source, layer: int | None) -> torch.Tensor:
        """The whole tensor `[full_shape]` of a source, Meta's row order; one shard's is a view of the file."""
        name = self._name(source, layer)
        if name not in self._shards[0] and source.meta == "output.weight":
            name = "tok_embeddings.weight"  # tied embeddings
        return join_shards(name, [shard[name] for shard in self._shards], source, self.config)

    def _name(self, source: Source, layer: int | None) -> str:
        return source.meta if layer is None else f"layers.{layer}.{source.meta}"

    def _read_config(self, params: dict[str, Any], rope_factor: float | None,
                     max_positions: int | None) -> ModelConfig:
        for key in REFUSED_PARAMS:
            if params.get(key):
                raise DataError(f"{self.directory}/params.json has {key}, which is not supported")
        try:
            dim, n_layers, n_heads = params["dim"], params["n_layers"], params["n_heads"]
            head_size = params.get("head_dim") or dim // n_heads
            scaling = None
            if params.get("use_scaled_rope"):
                scaling = RopeScaling(factor=self._rope_factor(dim, n_layers, rope_factor))
            elif rope_factor is not None:
                raise UsageError("--rope-scaling-factor is for models whose params.json says use_scaled_rope")
            return ModelConfig(
                architecture=self.model.architecture,
                dtype=str(self._shards[0]["tok_embeddings.weight"].dtype).removeprefix("torch."),
                vocab_size=self._vocab_size(params, dim), hidden_size=dim, num_hidden_layers=n_layers,
                num_attention_heads=n_heads, num_key_value_heads=params.get("n_kv_heads") or n_heads,
                head_size=head_size, intermediate_size=self._intermediate_size(),
                norm_epsilon=params.get("norm_eps", 1e-5), rotary_base=float(params.get("rope_theta", 10000.0)),
                max_position_embeddings=max_positions or self._max_positions(params), rotary_scaling=scaling)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise DataError(f"{self.directory} is not a whole LLaMA checkpoint: {type(e).__name__}: {e}") from None

    def _rope_factor(self, dim: int, n_layers: int, override: float | None) -> float:
        if override is not None:
            if not 0.0 < override < float("inf"):
                raise UsageError(f"--rope-scaling-factor is {override}; it lies above 0")
            return override
        if model := FACTOR_32_MODELS.get((dim, n_layers)):
            self.notes.append(f"use_scaled_rope: dimensions of {model}, so the RoPE scaling factor is 32 "
                              "(--rope-scaling-factor overrides)")
            return 32.0
        self.notes.append("use_scaled_rope: the RoPE scaling factor is 8 (--rope-scaling-factor overrides)")
        return 8.0

    def _vocab_size(self, params: dict[str, Any], dim: int) -> int:
        if params.get("vocab_size", -1) > 0:
            return int(params["vocab_size"])
        if any("output.weight" in shard for shard in self._shards):
            return sum(shard["output.weight"].shape[0] for shard in self._shards)
        rows, columns = self._shards[0]["tok_embeddings.weight"].shape
        return int(rows * len(self._shards) if columns == dim else rows)

    def _intermediate_size(self) -> int:
        # The weight itself is surer than the formula over multiple_of, whose default differs between tools.
        return sum(shard["layers.0.feed_forward.w1.weight"].shape[0] for shard in self._shards)

    def _max_positions(self, params: dict[str, Any]) -> int:
        if "max_seq_len" in params:
            return int(params["max_seq_len"])
        if params.get("use_scaled_rope"):
            guess, why = 131072, "use_scaled_rope"
        elif params.get("rope_theta", 10000.0) >= 500000:
            guess, why = 8192, "rope_theta of Llama 3"
        elif params.get("norm_eps", 1e-5) <= 1e-6:
            guess, why = 2048, "norm_eps of LLaMA 1"
        else:
            guess, why = 4096, "parameters of Llama 2"
        self.notes.append(f"params.json has no context length; {why}: max_position_embeddings is {guess} "
                          "(--max-position-embeddings overrides)")
        return guess

    def _check_names(self) -> None:
        """Every shard must hold exactly the tensors of the model's table."""
        expected = {self._name(source, layer) for source, layer in all_sources(self.model(self.config))}
        if not any("output.weight" in shard for shard in self._shards):
            expected.discard("output.weight")
            self.notes.append("no output.weight: the embedding table is used for the head too (tied)")
        for path, shard in zip(self.files, self._shards, strict=True):
            present = [name for name in shard if not name.endswith("rope.freqs")]
            check_names(path, present, expected, self.model.architecture)


def shard_files(directory: Path) -> list[Path]:
    """`consolidated.00.pth`, `.01.pth`, … in order, refused when a number is missing."""
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        raise DataError(f"{directory} is not a directory of Meta LLaMA weights: it has no consolidated.00.pth")
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    for want, path in zip(expected, files, strict=True):
        if path.name != want:
            raise DataError(f"{directory} lacks {want} (it has {len(files)} shards up to {files[-1].name})")
    return files


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """A shard's tensors, mapped from disk rather than read."""
    try:
        data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:
        first_line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(f"{path} ({path.stat().st_size} bytes) is truncated or not a PyTorch checkpoint: "
                        f"{first_line}") from None
    if not isinstance(data, dict) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise DataError(f"{path} does not hold a flat dictionary of tensors")
    return data


def join_shards(name: str, parts: list[torch.Tensor], source: Source, config: ModelConfig) -> torch.Tensor:
    """One full tensor from all shards' parts; the axis they were split along is told by their shape.

    Inferring it for every tensor needs no table of names, and it is the only way for `tok_embeddings`, which
    Llama 2 splits along the hidden dimension and Llama 3 along the vocabulary.
    """
    want, shape, count = full_shape(source, config), tuple(parts[0].shape), len(parts)
    if any(tuple(part.shape) != shape for part in parts):
        raise DataError(f"{name} has different shapes in different shards: {[tuple(p.shape) for p in parts]}")
    if shape == want:
        return parts[0]  # one shard, or a copy in each
    for dim in range(len(want)):
        rest_equal = shape[:dim] + shape[dim + 1:] == want[:dim] + want[dim + 1:]
        if rest_equal and shape[dim] * count == want[dim]:
            return torch.cat(parts, dim)
    # More shards than key/value heads: consecutive shards repeat a head.
    if source.axes[0] is Axis.KV_HEADS and shape[1:] == want[1:]:
        repeats, remainder = divmod(shape[0] * count, want[0])
        if repeats > 1 and not remainder and shape[0] == config.head_size:
            for i in range(0, count, repeats):
                if any(not torch.equal(parts[i], part) for part in parts[i + 1:i + repeats]):
                    raise DataError(f"{name}: shards {i} to {i + repeats - 1} should hold the same key/value head")
            return torch.cat(parts[::repeats], 0)
    raise DataError(f"{name} has shape {list(shape)} in each of {count} shard(s); that does not make "
                    f"{list(want)} along any dimension")


def verify_checklist(directory: Path) -> None:
    """Compare the files with Meta's `checklist.chk` (lines of `md5  name`), when there is one."""
    checklist = directory / "checklist.chk"
    if not checklist.is_file():
        return
    entries = []
    for line in checklist.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](\S.*)", line)
        if line.strip() and not match:
            raise DataError(f"{checklist} has a line that is not 'md5  file': {line!r}")
        if match and "/" not in match[2]:
            entries.append((match[1].lower(), directory / match[2]))
    total = sum(path.stat().st_size for _, path in entries if path.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="checklist", leave=False, disable=None) as bar:
        for want, path in entries:
            if not path.is_file():
                raise DataError(f"{checklist} lists {path.name}, which is not there")
            md5 = hashlib.md5(usedforsecurity=False)
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    md5.update(block)
                    bar.update(len(block))
            if md5.hexdigest() != want:
                raise DataError(f"{path}: MD5 is {md5.hexdigest()}, checklist.chk says {want}; download it again")
