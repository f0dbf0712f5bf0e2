"""Source weights → one file a rank: each tensor is joined, cut and written before the next is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from tpllm import __version__
from tpllm.checkpoint.rank import MANIFEST, CheckpointConfig, fingerprint, rank_file
from tpllm.checkpoint.safetensors_file import SafetensorsFile
from tpllm.checkpoint.source import SourceCheckpoint, source_weights
from tpllm.config import ModelConfig
from tpllm.errors import DataError, PreflightError, UsageError
from tpllm.files import DIGEST, json_digest, output_dir, require_space, write_json
from tpllm.launched import memory_limit
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.quantization import quantized, working_bytes
from tpllm.sharding import Source, Weight, full_shape, shard
from tpllm.tokenizer import end_ids

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
# Beside them, what says how they are used: added tokens, control tokens, the chat's form, what ends an answer.
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.jinja", "chat_template.json")


Shape = tuple[torch.dtype, tuple[int, ...]]


class TensorFile(Protocol):
    """What takes a rank's tensors: its file, or who compares them with one."""

    def write(self, name: str, tensor: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class ConvertOptions:
    """How a checkpoint is split, by how many threads; `dtype` "auto" keeps the source's."""

    tp_size: int = 1
    pp_size: int = 1
    dtype: str = "auto"
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    quant_algo: str | None = None
    workers: int = field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))


def convert(source: SourceCheckpoint, out: Path, options: ConvertOptions, say: Callable[[str], None],
            ) -> CheckpointConfig:
    """Write `source` as a checkpoint directory.

    Memory: for each worker a weight in full (for attention.qkv its three sources) and its slice for one rank.
    The result does not depend on the number of workers.
    """
    config = target_config(source.config, options)
    checkpoint = CheckpointConfig(config, options.tp_size, options.pp_size)
    model, mappings = source.model(config), Mapping.all_ranks(options.tp_size, options.pp_size)
    shapes = [{name: (getattr(torch, dtype), shape) for name, (dtype, shape) in model.rank_tensors(m).items()}
              for m in mappings]
    total = sum(dtype.itemsize * torch.Size(shape).numel() for rank in shapes for dtype, shape in rank.values())
    require_space(out, total)
    require_memory(source, model, shapes, options.workers, total, say)
    for note in source.notes:
        say(note)
    with output_dir(out) as partial:
        files = [SafetensorsFile(partial / rank_file(m.rank), s) for m, s in zip(mappings, shapes, strict=True)]
        with (tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar,
              ThreadPoolExecutor(options.workers) as pool):
            jobs = [pool.submit(write_weight, weight, layer, source, model, mappings, files)
                    for weight, layer in source_weights(model)]
            try:
                for job in jobs:  # in order, so that of several errors the same one is reported every time
                    bar.update(job.result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        for file in files:
            file.close()
        copy_tokenizer(source.directory, partial, say)
        write_json(partial / "config.json", checkpoint.to_json())
        write_json(partial / MANIFEST, manifest(source, checkpoint, files))
    return checkpoint


def target_config(config: ModelConfig, options: ConvertOptions) -> ModelConfig:
    """The source's configuration with the options applied; refused when the model cannot be split so."""
    if config.quant_algo:
        raise DataError(f"the source is quantized ({config.quant_algo}) for the ranks it was split over: its scales "
                        "are theirs, so it cannot be converted again; convert the original weights")
    config = replace(config, dtype=config.dtype if options.dtype == "auto" else options.dtype,
                     use_parallel_embedding=options.use_parallel_embedding,
                     embedding_sharding_dim=options.embedding_sharding_dim, quant_algo=options.quant_algo)
    if options.tp_size < 1 or options.pp_size < 1:
        raise UsageError("--tp-size and --pp-size start at 1")
    if problem := config.tp_problem(options.tp_size):
        sizes = ", ".join(map(str, config.valid_tp_sizes()))
        raise UsageError(f"--tp-size {options.tp_size} does not fit this model: {problem}; sizes that work: {sizes}")
    if options.pp_size > config.num_hidden_layers:
        raise UsageError(f"--pp-size {options.pp_size} is more than the model's {config.num_hidden_layers} layers")
    return config


def require_memory(source: SourceCheckpoint, model: Model, shapes: list[dict[str, Shape]], workers: int, total: int,
                   say: Callable[[str], None]) -> None:
    """Say what converting takes, and refuse it where the host, its cgroup or Slurm gives less."""
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it starts at 1")
    held = getattr(torch, source.config.dtype).itemsize
    full = max(sum(held * torch.Size(full_shape(part, source.config)).numel() for part in weight.sources)
               for weight, _ in source_weights(model))
    item = getattr(torch, model.config.dtype).itemsize
    largest = full + max(working_bytes(*spec, item) for rank in shapes for spec in rank.values())
    available, why = memory_limit()
    if workers * largest > available:
        remedy = f"type --workers {available // largest}" if available >= largest else "use a host with more"
        raise PreflightError(f"converting with {workers} worker(s) takes up to {size(workers * largest)} of memory, "
                             f"there is {size(available)} ({why}); {remedy}")
    say(f"takes up to {size(workers * largest)} of memory for {workers} worker(s), and {size(total)} of disk")


def size(count: int) -> str:
    """Of bytes, to read."""
    return str(tqdm.format_sizeof(count, "B"))


def write_weight(weight: Weight, layer: int | None, source: SourceCheckpoint, model: Model,
                 mappings: list[Mapping], files: Sequence[TensorFile]) -> int:
    """Read one weight's sources in full and write every rank's part of it; returns the bytes written."""
    config, written = model.config, 0
    full = [source.tensor(part, layer) for part in weight.sources]
    for mapping, file in zip(mappings, files, strict=True):
        name = rank_name(model, weight, layer, mapping)
        if name is None:
            continue
        parts = [cut(tensor, part, source.kind, config, mapping)
                 for tensor, part in zip(full, weight.sources, strict=True)]
        tensor = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(getattr(torch, config.dtype))
        for stored, value in quantized(tensor, model.stored(name, weight, layer, mapping)).items():
            file.write(stored, value)
            written += value.nbytes
    return written


def rank_name(model: Model, weight: Weight, layer: int | None, mapping: Mapping) -> str | None:
    """The weight's name in a rank's file, or None when it is another pipeline stage's."""
    if layer is None:
        first, last = mapping.pp_rank == 0, mapping.pp_rank == mapping.pp_size - 1
        return weight.name if (first if weight in model.first_weights else last) else None
    layers = mapping.layers(model.config.num_hidden_layers)
    return model.layer_prefix(layer - layers.start) + weight.name if layer in layers else None


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


def copy_tokenizer(source: Path, target: Path, say: Callable[[str], None]) -> None:
    """Copy the tokenizer's files; Llama 1 and 2 keep theirs in the parent directory."""
    own = [source / name for name in TOKENIZER_FILES]
    if not any((source / name).is_file() for name in TOKENIZERS):
        own.append(source.resolve().parent / TOKENIZERS[0])
    found = [path for path in own if path.is_file()]
    for path in found:
        shutil.copyfile(path, target / path.name)
    if not end_ids(target) and (ends := end_ids(source)):  # in the source's config.json, which stays behind
        write_json(target / "generation_config.json", {"eos_token_id": sorted(ends)})
    if not any(path.name in TOKENIZERS for path in found):
        say(f"no tokenizer in {source}: token ids go in and out, or give run --tokenizer-dir")


def manifest(source: SourceCheckpoint, checkpoint: CheckpointConfig, files: list[SafetensorsFile],
             ) -> dict[str, object]:
    """What was written, so that a changed or torn file is found when it is loaded."""
    return {
        "tpllm": __version__, "source": {"kind": source.kind, "directory": str(source.directory.resolve())},
        "digest": DIGEST, "config": json_digest(checkpoint.to_json()),
        "ranks": {f.path.name: {"bytes": f.size, "fingerprint": fingerprint(f.digests), "tensors": f.digests}
                  for f in files},
    }
