"""Latency and throughput of an engine, of a checkpoint or of a named shape with random weights made in place."""

from __future__ import annotations

import os
import platform
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence as AnySequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tpllm.config import ModelConfig
from tpllm.distributed import World
from tpllm.engine import find_backend
from tpllm.engine.base import BuildConfig, EngineConfig, versions
from tpllm.errors import UsageError
from tpllm.launch.estimate import BYTES, weight_bytes
from tpllm.mapping import Mapping
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

# vocabulary, hidden, layers, heads, key/value heads, inner width, context, RoPE base
SHAPES = {
    "tiny": (1000, 512, 2, 4, 2, 1024, 2048, 1e4),
    "llama-134m": (32000, 768, 12, 12, 12, 2048, 2048, 1e4),
    "llama-2-7b": (32000, 4096, 32, 32, 32, 11008, 4096, 1e4),
    "llama-2-13b": (32000, 5120, 40, 40, 40, 13824, 4096, 1e4),
    "llama-2-70b": (32000, 8192, 80, 64, 8, 28672, 4096, 1e4),
    "llama-3-8b": (128256, 4096, 32, 32, 8, 14336, 8192, 5e5),
}


def named_config(name: str, dtype: str) -> ModelConfig:
    """The published shape of that name."""
    if name not in SHAPES:
        raise UsageError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    vocab, hidden, layers, heads, kv_heads, inner, context, base = SHAPES[name]
    return ModelConfig("LlamaForCausalLM", dtype, int(vocab), int(hidden), int(layers), int(heads), int(kv_heads),
                       int(hidden) // int(heads), int(inner), 1e-5, base, int(context))


def random_engine(name: str, dtype: str, quant_algo: str | None, limits: BuildConfig, world: World) -> EngineConfig:
    """What an engine of a published shape is built from."""
    return EngineConfig(replace(named_config(name, dtype), quant_algo=quant_algo), limits, world.size, "", versions())


def load(directory: Path, world: World) -> tuple[ModelRunner, str, float]:
    """The engine of `directory`, what its weights are, and the seconds to its first token. Collective."""
    started = time.perf_counter()
    config = world.together("load", lambda: EngineConfig.load(directory))
    if config.checkpoint_dir:
        runner, weights = ModelRunner.from_dir(directory, world=world), config.checkpoint_dir
    else:
        runner, weights = load_random(directory, config, world), "random"
    runner.generate([[1]], SamplingParams(max_output_len=1, ignore_eos=True))
    return runner, weights, time.perf_counter() - started


def load_random(directory: Path, config: EngineConfig, world: World) -> ModelRunner:
    """An engine that was built without a checkpoint, with random weights. Collective."""
    world.together("load", lambda: world.require_size(config.tp_size, f"engine {directory}", "bench"))
    backend, mapping = find_backend(config.build.backend), Mapping(config.tp_size, world.rank)
    engine = world.together("load", lambda: backend.load(directory, config, mapping, None, world))
    return ModelRunner(world, engine, None)


def random_prompts(runner: ModelRunner, lengths: AnySequence[int], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, runner.engine.config.model.vocab_size, length).tolist() for length in lengths]


def event_times(runner: ModelRunner, prompts: list[list[int]], outputs: AnySequence[int]) -> list[tuple[float, int]]:
    """(seconds since the start, prompt) of each generated token; none on ranks other than 0. Collective."""
    params = [SamplingParams(max_output_len=length, ignore_eos=True) for length in outputs]
    runner.world.barrier()
    started = time.perf_counter()
    return [(time.perf_counter() - started, event.index) for event in runner.stream(prompts, params)]


def decode(runner: ModelRunner, batch: int, input_len: int, output_len: int, repeats: int) -> dict[str, Any]:
    """One `decode` record: medians of `repeats` runs after a warm-up. Collective.

    Time to the first token is that of the last sequence to get one; what comes after it counts as decode. The
    percentiles are of the times between two tokens of a sequence, over all repeats.
    """
    firsts, rates, gaps = [], [], []
    for repeat in range(repeats + 1):
        times = event_times(runner, random_prompts(runner, [input_len] * batch, repeat), [output_len] * batch)
        if repeat == 0 or not times:
            continue
        of_each = [[t for t, i in times if i == index] for index in range(batch)]
        first = max(each[0] for each in of_each)
        firsts.append(first)
        rates.append(sum(t > first for t, _ in times) / (times[-1][0] - first))
        gaps += [after - before for each in of_each for before, after in pairwise(each) if before >= first]
    record = {"kind": "decode", "batch_size": batch, "input_len": input_len, "output_len": output_len,
              "repeats": repeats}
    if not firsts:
        return record
    rate = statistics.median(rates)
    p50, p90, p99 = (round(float(np.percentile(gaps, p)) * 1e3, 4) for p in (50, 90, 99))
    return record | {
        "tokens_per_s": round(rate, 1), "ms_per_token": round(batch / rate * 1e3, 4), "ms_per_token_p50": p50,
        "ms_per_token_p90": p90, "ms_per_token_p99": p99, "ttft_ms": round(statistics.median(firsts) * 1e3, 3),
        "spread": [round(min(rates), 1), round(max(rates), 1)]}


def throughput(runner: ModelRunner, count: int, input_len: int, output_len: int, mixed: bool,
               concurrency: int) -> dict[str, Any]:
    """One `throughput` or `mixed` record: `count` requests, all there from the start. Collective.

    With `mixed` the lengths are drawn evenly from 32 to `input_len` and from 16 to `output_len` tokens.
    """
    random = np.random.default_rng(0)
    inputs = random.integers(min(32, input_len), input_len + 1, count).tolist() if mixed else [input_len] * count
    outputs = random.integers(min(16, output_len), output_len + 1, count).tolist() if mixed else [output_len] * count
    runner.max_batch_size = concurrency
    some = inputs[:concurrency]
    event_times(runner, random_prompts(runner, some, 1), [2] * len(some))  # a warm-up
    times = event_times(runner, random_prompts(runner, inputs), outputs)
    record = {"kind": "mixed" if mixed else "throughput", "num_requests": count, "concurrency": concurrency,
              "input_len": input_len, "output_len": output_len, "batch_size": concurrency, "repeats": 1}
    if not times:
        return record
    return record | {"tokens_per_s": round(sum(outputs) / times[-1][0], 1), "seconds": round(times[-1][0], 3),
                     "input_tokens": sum(inputs), "output_tokens": sum(outputs)}


def memory_bandwidth(world: World, device: str) -> float:
    """Bytes/s at which one rank reads a large array while the others do the same: the slowest rank's. Collective."""
    import torch

    # Small beside what an engine leaves free, large beside any cache.
    x, reads = torch.ones((1 << 27) if device == "cuda" else (1 << 26), device=device), 8
    best = 0.0
    for _ in range(5):
        world.barrier()
        started = time.perf_counter()
        for _ in range(reads):
            total = x.sum()
        total.item()
        best = max(best, reads * x.nbytes / (time.perf_counter() - started))
    return min(world.allgather(best))


def all_reduce_path(runner: ModelRunner, batch: int) -> tuple[str, float]:
    """Which way the engine's all-reduces go at the model's message size, and the median seconds of one. Collective."""
    import torch

    from tpllm.engine.torch import collectives

    if (gpus := collectives.communicator()) is not None:
        path = gpus.path(batch)
        return path.path, path.us / 1e6
    model = runner.engine.config.model
    x = torch.ones(batch, model.hidden_size, dtype=getattr(torch, model.dtype))
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        collectives.all_reduce(x)
        seconds.append(time.perf_counter() - started)
    return "mpi", statistics.median(seconds[20:])


def explain(record: dict[str, Any], runner: ModelRunner, bandwidth: float) -> dict[str, Any]:
    """A `decode` record with where its time goes: bytes read as a share of the ceiling, and all-reduces. Collective."""
    config, world = runner.engine.config, runner.world
    model, batch = config.model, record["batch_size"]
    path, reduce = all_reduce_path(runner, batch) if world.size > 1 else ("", 0.0)
    if not world.is_first:
        return record
    step = record["ms_per_token"] / 1e3
    row = 2 * model.local(config.tp_size).num_kv_heads * model.head_size * BYTES[model.dtype]
    cache = batch * (record["input_len"] + record["output_len"] / 2) * model.num_hidden_layers * row
    share = 2 * model.num_hidden_layers * reduce / step
    return record | {
        "bandwidth_share": round((weight_bytes(model.to_json(), config.tp_size) + cache) / step / bandwidth, 3),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "all_reduce": {"path": path, "us": round(reduce * 1e6, 1), "share": round(share, 3)} if reduce else None}


def circumstances(runner: ModelRunner, model: str, weights: str) -> dict[str, Any]:
    """What every record says of how it came about. Collective."""
    import torch

    config, world = runner.engine.config, runner.world
    cuda = config.build.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"model": model, "weights": weights, "tp_size": config.tp_size, "dtype": config.model.dtype,
            "quant_algo": config.model.quant_algo, "backend": config.build.backend,
            "max_batch_size": config.build.max_batch_size,
            "device": torch.cuda.get_device_name() if cuda else processor_name(),
            "peak_memory_bytes": max(world.allgather(peak)), "hosts": len(set(world.allgather(world.host))),
            "versions": config.versions, "commit": commit(), "command": shlex.join(["tpllm", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def processor_name() -> str:
    """Of the CPU, with the number of cores that this process may use."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str | None:
    """Of the checkout that this package lies in; None outside of one."""
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
                          capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.strip() or None if done else None
