"""Latency of an engine of a named shape, with random weights made in place or a checkpoint's."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tpllm.config import ModelConfig
from tpllm.distributed import World
from tpllm.engine import find_backend
from tpllm.engine.base import BuildConfig, EngineConfig, versions
from tpllm.errors import UsageError
from tpllm.files import output_dir, write_json
from tpllm.mapping import Mapping
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

# vocabulary, hidden, layers, heads, key/value heads, inner width, context, RoPE base
SHAPES = {
    "tiny": (1000, 512, 2, 4, 2, 1024, 2048, 1e4),
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


def build_random(directory: Path, model: ModelConfig, build: BuildConfig, world: World) -> float:
    """An engine for random weights in `directory`; the seconds it took. Collective."""
    backend = find_backend(build.backend)
    device = world.together("build", lambda: backend.choose_device(build.device, world))
    config = EngineConfig(model, replace(build, device=device), world.size, "", versions())
    started = time.perf_counter()
    opened = output_dir(directory) if world.is_first else None
    out = world.broadcast(opened.__enter__() if opened else None)
    assert out is not None
    backend.build(config, Mapping(world.size, world.rank), None, out, world, None)
    if opened:
        write_json(out / "config.json", config.to_json())
        opened.__exit__(None, None, None)
    world.barrier()
    return time.perf_counter() - started


def load_random(directory: Path, world: World) -> tuple[ModelRunner, float]:
    """The engine of `directory` with random weights, and the seconds until it could step. Collective."""
    started = time.perf_counter()
    config = EngineConfig.load(directory)
    world.require_size(config.tp_size, f"engine {directory}", "bench")
    mapping = Mapping(config.tp_size, world.rank)
    engine = world.together("load", lambda: find_backend(config.build.backend).load(
        directory, config, mapping, None, world))
    runner = ModelRunner(world, engine, None)
    runner.generate([[1]], SamplingParams(max_output_len=1, ignore_eos=True))
    return runner, time.perf_counter() - started


def generation_seconds(runner: ModelRunner, batch: int, input_len: int, output_len: int, repeats: int) -> float:
    """Median seconds from the prompts to the last token. Collective."""
    random = np.random.default_rng(batch)
    params = SamplingParams(max_output_len=output_len, ignore_eos=True)
    seconds = []
    for _ in range(repeats + 1):
        prompts = random.integers(0, runner.engine.config.model.vocab_size, (batch, input_len)).tolist()
        runner.world.barrier()
        started = time.perf_counter()
        runner.generate(prompts, params)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])  # the first is a warm-up


def measure(runner: ModelRunner, batch: int, input_len: int, output_len: int, repeats: int) -> dict[str, Any]:
    """One `decode` record: decode is what a full run takes longer than a run of one token. Collective."""
    first = generation_seconds(runner, batch, input_len, 1, repeats)
    whole = generation_seconds(runner, batch, input_len, output_len, repeats)
    per_token = (whole - first) / (output_len - 1)
    return {"kind": "decode", "batch_size": batch, "input_len": input_len, "output_len": output_len,
            "tokens_per_s": round(batch / per_token, 1), "ms_per_token": round(per_token * 1e3, 4),
            "ttft_ms": round(first * 1e3, 3), "repeats": repeats}
