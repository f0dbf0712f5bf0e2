"""Source weights → one file a rank: each tensor is joined, cut and written before the next is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from tpllm import __version__
from tpllm.checkpoint.journal import Journal
from tpllm.checkpoint.rank import MANIFEST, CheckpointConfig, fingerprint, rank_file
from tpllm.checkpoint.safetensors_file import SafetensorsFile
from tpllm.checkpoint.source import SourceCheckpoint, cut, source_weights
from tpllm.config import ModelConfig
from tpllm.distributed import World
from tpllm.errors import DataError, PreflightError, UsageError
from tpllm.files import DIGEST, json_digest, output_dir, require_space, source_key, write_json
from tpllm.launched import memory_limit
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.quantization import Spec, quantized, working_bytes
from tpllm.sharding import Weight, full_shape
from tpllm.tokenizer import end_ids

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
# Beside them, what says how they are used: added tokens, control tokens, the chat's form, what ends an answer.
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
                   "chat_template.jinja", "chat_template.json")


Shape = tuple[torch.dtype, tuple[int, ...]]
Layered = tuple[Weight, int | None]  # a weight and its layer


class TensorFile(Protocol):
    """What takes a rank's tensors: its file, or who compares them with one."""

    def holds(self, name: str) -> bool: ...

    def write(self, name: str, tensor: torch.Tensor) -> None: ...


Place = tuple[Mapping, TensorFile, dict[str, Spec]]


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


def convert(source: SourceCheckpoint, out: Path, options: ConvertOptions, world: World) -> CheckpointConfig:
    """Write `source` as a checkpoint directory; collective, the ranks share the weights.

    Memory: for each worker of each rank a weight in full (for attention.qkv its three sources) and its slice for one
    rank. The result is the same whatever the number of workers and ranks, and however often a killed conversion was
    begun again.
    """
    def say(text: str) -> None:
        world.say(f"convert: {text}")

    config = world.together("convert", lambda: target_config(source.config, options))
    checkpoint = CheckpointConfig(config, options.tp_size, options.pp_size)
    model, mappings = source.model(config), Mapping.all_ranks(options.tp_size, options.pp_size)
    weights = source_weights(model)
    shapes = [{name: (getattr(torch, dtype), shape) for name, (dtype, shape) in model.rank_tensors(m).items()}
              for m in mappings]
    world.together("convert", lambda: require_room(source, model, shapes, out, options.workers, world, say))
    for note in source.notes:
        say(note)
    key = source_key(source.directory, [__version__, source.kind, json.dumps(checkpoint.to_json()), repr(weights)])
    with ExitStack() as stack:
        # Rank 0 owns the directory: it makes the partial one, all write into it, and its rename is the end.
        made = world.together("convert", lambda: stack.enter_context(output_dir(out, key)) if world.is_first else None)
        partial = world.broadcast(made)
        assert partial is not None
        files = world.together("convert", lambda: open_files(stack, partial, mappings, shapes, world, say))
        world.together("write", lambda: write_weights(share(weights, config, world), source, model, mappings, files,
                                                      options.workers, world.is_first))
        written = map(ChainMap, *world.allgather([file.digests for file in files]))  # of each file, by all ranks
        digests = [{name: found[name] for name in shape} for shape, found in zip(shapes, written, strict=True)]
        if world.is_first:
            Journal.remove(partial)
            copy_tokenizer(source.directory, partial, say)
            write_json(partial / "config.json", checkpoint.to_json())
            write_json(partial / MANIFEST, manifest(source, checkpoint, files, digests))
    world.barrier()
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


def require_room(source: SourceCheckpoint, model: Model, shapes: list[dict[str, Shape]], out: Path,
                 workers: int, world: World, say: Callable[[str], None]) -> None:
    """Say what converting takes, and refuse it where the disk, the host, its cgroup or Slurm gives less."""
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it starts at 1")
    parts = [dtype.itemsize * torch.Size(shape).numel() for rank in shapes for dtype, shape in rank.values()]
    if world.is_first:
        require_space(out, sum(parts))
    held = getattr(torch, source.config.dtype).itemsize
    item = getattr(torch, model.config.dtype).itemsize
    largest = held * max(elements(weight, source.config) for weight, _ in source_weights(model)) + max(
        working_bytes(*spec, item) for rank in shapes for spec in rank.values())
    on_host = workers * world.local_size
    available, why = memory_limit()
    if on_host * largest > available:
        fits = available // largest // world.local_size
        remedy = f"type --workers {fits}" if fits else "use a host with more"
        raise PreflightError(f"converting with {on_host} worker(s) takes up to {size(on_host * largest)} of memory, "
                             f"there is {size(available)} ({why}); {remedy}")
    say(f"takes up to {size(on_host * largest)} of memory for {on_host} worker(s), and {size(sum(parts))} of disk")


def elements(weight: Weight, config: ModelConfig) -> int:
    """Of all of a weight's sources in full."""
    return sum(torch.Size(full_shape(part, config)).numel() for part in weight.sources)


def share(weights: list[Layered], config: ModelConfig, world: World) -> list[Layered]:
    """The weights that this rank writes, as many bytes on each rank as can be."""
    by_size = sorted(range(len(weights)), key=lambda i: -elements(weights[i][0], config))
    return [weights[i] for i in sorted(by_size[world.rank::world.size])]


def open_files(stack: ExitStack, partial: Path, mappings: list[Mapping], shapes: list[dict[str, Shape]],
               world: World, say: Callable[[str], None]) -> list[SafetensorsFile]:
    """Every rank's file, of which this process writes some tensors; rank 0 allocates them, `stack` closes them."""
    try:
        journal = Journal(partial, world.rank)
        files = [stack.enter_context(closing(SafetensorsFile(partial / rank_file(mapping.rank), tensors, journal)))
                 for mapping, tensors in zip(mappings, shapes, strict=True)]
    except OSError as e:
        raise PreflightError(f"{e.filename} on {world.host}: {e.strerror}; the ranks need one directory that all of "
                             "them can write to") from None
    if journal.claims:
        say(f"goes on in {partial}, where {len(journal.claims)} of {sum(map(len, shapes))} tensors are")
    for file in files if world.is_first else ():
        file.allocate()
    return files


def write_weights(weights: list[Layered], source: SourceCheckpoint, model: Model, mappings: list[Mapping],
                  files: list[SafetensorsFile], workers: int, show: bool) -> None:
    """Write these weights by so many threads, and have the files on the disk then."""
    places = [destinations(weight, layer, model, mappings, files) for weight, layer in weights]
    by_rank = dict(zip(mappings, files, strict=True))
    sizes = [sum(by_rank[mapping].nbytes(name) for mapping, _, specs in each for name in specs) for each in places]
    with (tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="convert", disable=None if show else True) as bar,
          ThreadPoolExecutor(workers) as pool):
        jobs = [pool.submit(write_weight, weight, layer, source, model.config, each)
                for (weight, layer), each in zip(weights, places, strict=True)]
        try:
            for job, count in zip(jobs, sizes, strict=True):  # in order, so that of several errors one is reported
                job.result()
                bar.update(count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for file in files:
        file.sync()


def size(count: int) -> str:
    """Of bytes, to read."""
    return str(tqdm.format_sizeof(count, "B"))


def destinations(weight: Weight, layer: int | None, model: Model, mappings: list[Mapping],
            files: Sequence[TensorFile]) -> list[Place]:
    """Where a weight goes: the ranks that hold it, their files and what holds it there."""
    return [(mapping, file, model.stored(name, weight, layer, mapping))
            for mapping, file in zip(mappings, files, strict=True)
            if (name := rank_name(model, weight, layer, mapping)) is not None]


def write_weight(weight: Weight, layer: int | None, source: SourceCheckpoint, config: ModelConfig,
                 places: list[Place]) -> None:
    """Write every rank's part that is not there yet, reading the weight's sources in full."""
    # Each must be asked: what a file holds counts as written from then on.
    missing = [place for place in places if not all([place[1].holds(name) for name in place[2]])]
    full = [source.tensor(part, layer) for part in weight.sources] if missing else []
    for mapping, file, specs in missing:
        parts = [cut(tensor, part, source.kind, config, mapping)
                 for tensor, part in zip(full, weight.sources, strict=True)]
        tensor = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(getattr(torch, config.dtype))
        for name, value in quantized(tensor, specs).items():
            file.write(name, value)


def rank_name(model: Model, weight: Weight, layer: int | None, mapping: Mapping) -> str | None:
    """The weight's name in a rank's file, or None when it is another pipeline stage's."""
    if layer is None:
        first, last = mapping.pp_rank == 0, mapping.pp_rank == mapping.pp_size - 1
        return weight.name if (first if weight in model.first_weights else last) else None
    layers = mapping.layers(model.config.num_hidden_layers)
    return model.layer_prefix(layer - layers.start) + weight.name if layer in layers else None


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
             digests: list[dict[str, str]]) -> dict[str, object]:
    """What was written, so that a changed or torn file is found when it is loaded."""
    return {
        "tpllm": __version__, "source": {"kind": source.kind, "directory": str(source.directory.resolve())},
        "digest": DIGEST, "config": json_digest(checkpoint.to_json()),
        "ranks": {file.path.name: {"bytes": file.size, "fingerprint": fingerprint(found), "tensors": found}
                  for file, found in zip(files, digests, strict=True)},
    }
