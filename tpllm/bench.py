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
from collections import deque
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tpllm.answer import Job, TokenEvent
from tpllm.ceilings import parts_path
from tpllm.config import ModelConfig
from tpllm.distributed import World
from tpllm.engine import find_backend
from tpllm.engine.base import BuildConfig, EngineConfig, versions
from tpllm.errors import UsageError
from tpllm.mapping import Mapping
from tpllm.nvml import clocks, joules, topology
from tpllm.runlog import date
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
    model = replace(named_config(name, dtype), quant_algo=quant_algo)
    if problem := model.tp_problem(world.size):
        raise UsageError(f"{name} cannot be split over {world.size} ranks: {problem}; it can over "
                         f"{', '.join(map(str, model.valid_tp_sizes(16)))}")
    return EngineConfig(model, limits, world.size, "", versions())


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
    runner.world.barrier()
    started = time.perf_counter()
    events = runner.stream(prompts, [fixed_length(length) for length in outputs])
    return [(time.perf_counter() - started, event.index) for event in events]


def fixed_length(tokens: int) -> SamplingParams:
    return SamplingParams(max_output_len=tokens, ignore_eos=True)


class Arrivals:
    """Jobs that come at their times in seconds; an iterator that ends where none has come while others run.

    It is asked again then, so that those that run need not wait; when none runs it waits for the next.
    """

    def __init__(self, jobs: list[Job], times: AnySequence[float]) -> None:
        self._waiting = deque(zip(times, jobs, strict=True))
        self._running = 0
        self._started = time.perf_counter()

    def __iter__(self) -> Arrivals:
        return self

    def __next__(self) -> Job:
        if not self._waiting or (self._running and self._waiting[0][0] > self.now()):
            raise StopIteration
        arrival, job = self._waiting.popleft()
        time.sleep(max(0.0, arrival - self.now()))
        self._running += 1
        return job

    @property
    def left(self) -> int:
        """Jobs that are still to come."""
        return len(self._waiting)

    def now(self) -> float:
        return time.perf_counter() - self._started

    def take(self, event: TokenEvent) -> tuple[float, int]:
        """(seconds since the start, prompt) of a token."""
        self._running -= event.last
        return self.now(), event.index


def arriving_times(runner: ModelRunner, prompts: list[list[int]], outputs: AnySequence[int],
                   arrivals: AnySequence[float]) -> list[tuple[float, int]]:
    """As `event_times`, but for requests that come one by one. Collective."""
    each = list(zip(prompts, outputs, arrivals, strict=True)) if runner.world.is_first else []
    jobs = [runner.prepare(i, prompt, fixed_length(length)) for i, (prompt, length, _) in enumerate(each)]
    runner.world.barrier()
    source, found = Arrivals(jobs, [arrival for _, _, arrival in each]), []
    while runner.world.broadcast(source.left):
        found += [source.take(event) for event in runner.serve(source, lookahead=1)]
    return found


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which `count` requests come, `rate` a second on the average; the first at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(at) for at in gaps.cumsum() - gaps[0]]


def of_each(times: list[tuple[float, int]]) -> dict[int, list[float]]:
    """The times of each request's tokens."""
    found: dict[int, list[float]] = {}
    for t, index in times:
        found.setdefault(index, []).append(t)
    return found


def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"{name}_p{p}": round(float(np.percentile(seconds, p)) * 1e3, 4) for p in (50, 90, 99) if seconds}


def decode(runner: ModelRunner, batch: int, input_len: int, output_len: int, repeats: int) -> dict[str, Any]:
    """One `decode` record: medians of `repeats` runs after a warm-up. Collective.

    Time to the first token is that of the last sequence to get one; what comes after it counts as decode. The
    percentiles are of the times between two tokens of a sequence, over all repeats. Energy is that of whole runs.
    """
    firsts, rates, gaps, before = [], [], [], None
    for repeat in range(repeats + 1):
        times = event_times(runner, random_prompts(runner, [input_len] * batch, repeat), [output_len] * batch)
        if repeat == 0:
            before = joules(runner.world)
        if repeat == 0 or not times:
            continue
        each = of_each(times).values()
        first = max(tokens[0] for tokens in each)
        firsts.append(first)
        rates.append(sum(t > first for t, _ in times) / (times[-1][0] - first))
        gaps += [b - a for tokens in each for a, b in pairwise(tokens) if a >= first]
    energy = used_since(before, runner.world, repeats * batch * output_len)
    record = {"kind": "decode", "batch_size": batch, "input_len": input_len, "output_len": output_len,
              "repeats": repeats, "joules_per_token": energy}
    if not firsts:
        return record
    rate = statistics.median(rates)
    return record | percentiles("ms_per_token", gaps) | {
        "tokens_per_s": round(rate, 1), "ms_per_token": round(batch / rate * 1e3, 4),
        "ttft_ms": round(statistics.median(firsts) * 1e3, 3), "spread": [round(min(rates), 1), round(max(rates), 1)]}


def used_since(before: float | None, world: World, tokens: int) -> float | None:
    """Joules a token since the ranks' GPUs had used `before`; None where they do not tell. Collective."""
    after = joules(world)
    return None if before is None or after is None else round((after - before) / tokens, 4)


def prefill(runner: ModelRunner, length: int, repeats: int) -> dict[str, Any]:
    """One `prefill` record: tokens of one prompt over the time to its first answer, medians. Collective."""
    seconds = [times[-1][0] for repeat in range(repeats + 1)
               if (times := event_times(runner, random_prompts(runner, [length], repeat), [1]))][1:]
    record = {"kind": "prefill", "batch_size": 1, "input_len": length, "output_len": 1, "repeats": repeats}
    if not seconds:
        return record
    middle = statistics.median(seconds)
    return record | {"tokens_per_s": round(length / middle, 1), "ttft_ms": round(middle * 1e3, 3),
                     "seconds": round(middle, 4),
                     "spread": [round(length / max(seconds), 1), round(length / min(seconds), 1)]}


@dataclass(frozen=True)
class Load:
    """Requests of a throughput case: `rate` a second on the average, or all from the start; lengths in tokens.

    With `mixed` the lengths are drawn evenly from 32 to `input_len` and from 16 to `output_len`.
    """

    count: int
    input_len: int
    output_len: int
    mixed: bool = False
    rate: float | None = None
    seed: int = 0

    def lengths(self) -> tuple[list[int], list[int]]:
        """Of the prompts and of the answers."""
        if not self.mixed:
            return [self.input_len] * self.count, [self.output_len] * self.count
        random = np.random.default_rng(self.seed)
        inputs = random.integers(min(32, self.input_len), self.input_len + 1, self.count).tolist()
        return inputs, random.integers(min(16, self.output_len), self.output_len + 1, self.count).tolist()


def throughput(runner: ModelRunner, load: Load, concurrency: int) -> dict[str, Any]:
    """One `throughput` or `mixed` record; times to the first token count from a request's arrival. Collective."""
    inputs, outputs = load.lengths()
    runner.max_batch_size = concurrency
    some = inputs[:concurrency]
    event_times(runner, random_prompts(runner, some, 1), [2] * len(some))  # a warm-up
    before, prompts = joules(runner.world), random_prompts(runner, inputs, load.seed)
    arrivals = poisson(load.count, load.rate, load.seed) if load.rate else [0.0] * load.count
    times = (arriving_times(runner, prompts, outputs, arrivals) if load.rate
             else event_times(runner, prompts, outputs))
    record = {"kind": "mixed" if load.mixed else "throughput", "num_requests": load.count, "concurrency": concurrency,
              "input_len": load.input_len, "output_len": load.output_len, "batch_size": concurrency, "repeats": 1,
              "request_rate": load.rate, "seed": load.seed,
              "joules_per_token": used_since(before, runner.world, sum(outputs))}
    if not times:
        return record
    each, seconds = of_each(times), times[-1][0]
    firsts = percentiles("ttft_ms", [tokens[0] - arrivals[index] for index, tokens in each.items()])
    gaps = percentiles("ms_per_token", [b - a for tokens in each.values() for a, b in pairwise(tokens)])
    return record | firsts | gaps | {
        "ttft_ms": firsts["ttft_ms_p50"], "tokens_per_s": round(sum(outputs) / seconds, 1),
        "requests_per_s": round(load.count / seconds, 3), "seconds": round(seconds, 3),
        "input_tokens": sum(inputs), "output_tokens": sum(outputs)}


def greedy(runner: ModelRunner, count: int, input_len: int, output_len: int) -> dict[str, Any]:
    """One `tokens` record: the greedy answers to `count` prompts that are the same for every number of ranks, and by
    how much the best logit exceeded the second at each token. Collective."""
    prompts = random_prompts(runner, [input_len] * count, seed=7)
    outputs = runner.generate(prompts, SamplingParams(max_output_len=output_len, ignore_eos=True, logprobs=2))
    record = {"kind": "tokens", "batch_size": count, "input_len": input_len, "output_len": output_len}
    answers = [output.outputs[0] for output in outputs]
    best = [[sorted(found.values())[-2:] for found in answer.logprobs or []] for answer in answers]
    return record | {"token_ids": [answer.token_ids for answer in answers],
                     "logit_gaps": [[round(pair[-1] - pair[0], 6) for pair in pairs] for pairs in best]}


# What a record says of the model, in the names of its config.json.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size",
         "intermediate_size", "dtype", "quantization")


def circumstances(runner: ModelRunner, model: str, weights: str) -> dict[str, Any]:
    """What every record says of how it came about. Collective."""
    import torch

    config, world = runner.engine.config, runner.world
    cuda, sizes = config.build.device == "cuda", config.model.to_json()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"model": model, "weights": weights, "tp_size": config.tp_size, "dtype": config.model.dtype,
            "quant_algo": config.model.quant_algo, "backend": config.build.backend,
            "max_batch_size": config.build.max_batch_size,
            "device": torch.cuda.get_device_name() if cuda else processor_name(),
            "sizes": {name: sizes[name] for name in SIZES if name in sizes},
            "peak_memory_bytes": max(world.allgather(peak)), "hosts": len(set(world.allgather(world.host))),
            "ranks_per_host": max(world.allgather(world.local_size)), "threads_per_rank": torch.get_num_threads(),
            "cores_per_host": len(os.sched_getaffinity(0)), "cpu_pressure": cpu_pressure(),
            "clocks": clocks(world), "topology": topology(world), "sums_in_parts": parts_path(),
            "versions": config.versions, "commit": commit(), "command": shlex.join(["tpllm", *sys.argv[1:]]),
            "date": date()}


def processor_name() -> str:
    """Of the CPU, with the number of cores that this process may use."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def cpu_pressure() -> float | None:
    """Percent of the last ten seconds in which a process of this host waited for a core; None if it is not told."""
    try:
        found = re.search(r"some avg10=([0-9.]+)", Path("/proc/pressure/cpu").read_text(encoding="ascii"))
    except OSError:
        return None
    return float(found[1]) if found else None


def commit() -> str | None:
    """Of the checkout that this package lies in; None outside of one."""
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
                          capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.strip() or None if done else None
