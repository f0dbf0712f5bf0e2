"""A model of a decode step's time: bytes over bandwidth, or operations over their rate, and the all-reduces.

Its inputs are measured beside each point; with more ranks than were measured, what it gives is a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpllm.config import ModelConfig
from tpllm.launch.estimate import BYTES, weight_bytes
from tpllm.settings import seconds

Record = dict[str, Any]
WAITING = 10.0  # percent of the time; an idle host's own processes make less
PREDICTED = ((8, 1), (16, 1), (8, 2), (16, 2))  # (tp size, hosts)


@dataclass(frozen=True)
class Work:
    """What one rank reads (bytes) and computes (floating-point operations) in a step."""

    weight_bytes: float
    cache_bytes: float
    weight_flops: float
    cache_flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    @property
    def flops(self) -> float:
        return self.weight_flops + self.cache_flops


def step_work(sizes: Record, tp: int, batch: int, context: float) -> Work:
    """Of a step with `batch` new tokens, each attending to `context` others: what `tpllm bench` calls their middle."""
    layers, head = sizes["num_hidden_layers"], sizes["head_size"]
    local_kv = max(1, sizes["num_key_value_heads"] // tp)
    plain = {**sizes, "quantization": None}
    elements = weight_bytes(plain, tp) / BYTES[sizes["dtype"]]
    return Work(weight_bytes(sizes, tp), batch * context * layers * 2 * local_kv * head * BYTES[sizes["dtype"]],
                2 * batch * elements, 4 * batch * context * layers * head * sizes["num_attention_heads"] / tp)


def work_of(record: Record, tp: int | None = None) -> Work:
    """Of a decode or prefill record's step, or of the same with other ranks."""
    ranks = tp or record["tp_size"]
    if record["kind"] == "prefill":  # all tokens in one step: they attend to half of themselves, keys are read once
        length = record["input_len"]
        work = step_work(record["sizes"], ranks, length, length / 2)
        return Work(work.weight_bytes, work.cache_bytes / length, work.weight_flops, work.cache_flops)
    return step_work(record["sizes"], ranks, record["batch_size"], record["input_len"] + record["output_len"] / 2)


@dataclass(frozen=True)
class Parts:
    """Seconds of a step."""

    weights: float
    cache: float
    all_reduce: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.all_reduce


def expected(record: Record, tp: int | None = None, all_reduce: float | None = None) -> Parts:
    """A decode record's step by its own ceilings; `tp` ranks and `all_reduce` seconds for one in place of its own."""
    work, bandwidth = work_of(record, tp), record["bandwidth_gb_s"] * 1e9
    flops = record["peak_tflops"] * 1e12
    latency = (record["all_reduce"] or {"us": 0.0})["us"] * 1e-6 if all_reduce is None else all_reduce
    return Parts(max(work.weight_bytes / bandwidth, work.weight_flops / flops),
                 max(work.cache_bytes / bandwidth, work.cache_flops / flops),
                 2 * record["sizes"]["num_hidden_layers"] * latency)


def measured_parts(record: Record) -> tuple[Parts, float]:
    """A measured step's parts and the rest of it, in seconds; all-reduces measured, weights and cache derived.

    Where the ceilings say more than was measured, weights and cache share what the all-reduces leave.
    """
    step, parts = record["ms_per_token"] / 1e3, expected(record)
    reduce = min(parts.all_reduce, step)
    derived = parts.weights + parts.cache
    scale = min(1.0, (step - reduce) / derived)
    return (Parts(parts.weights * scale, parts.cache * scale, reduce), max(0.0, step - reduce - derived * scale))


def is_crowded(record: Record) -> bool:
    """Ranks on a CPU took turns on its cores: their all-reduces were waited for, not only made."""
    return record["topology"] is None and record["ranks_per_host"] * record["threads_per_rank"] > record[
        "cores_per_host"]


def is_disturbed(record: Record) -> bool:
    """Ranks on a CPU that each had a core waited for it all the same: others were at work."""
    return record["topology"] is None and not is_crowded(record) and (record.get("cpu_pressure") or 0) > WAITING


def latency_by_ranks(points: Sequence[tuple[int, float]]) -> Callable[[float], float]:
    """Seconds of an all-reduce as a function of the ranks, from measured (ranks, seconds).

    A straight line over log2 of the ranks, never below the longest measured; of a single point, the same for all; of
    none, what a site assumes (TPLLM_ALLREDUCE_US).
    """
    if not points:
        assumed = seconds("TPLLM_ALLREDUCE_US") * 1e-6
        return lambda ranks: assumed if ranks > 1 else 0.0
    slope, base = (np.polyfit([math.log2(tp) for tp, _ in points], [t for _, t in points], 1)
                   if len({tp for tp, _ in points}) > 1 else (0.0, points[0][1]))
    longest = max(t for _, t in points)
    return lambda ranks: max(longest, float(base + slope * math.log2(ranks))) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Prediction:
    """A step that was not measured, in seconds: the model's time alone, and with what the measured step took beyond
    the model's; or why there can be none."""

    tp_size: int
    hosts: int
    record: Record  # whose ceilings it takes
    model: float = 0.0
    with_rest: float = 0.0
    problem: str | None = None


def predictions(records: Sequence[Record]) -> list[Prediction]:
    """For more ranks than were measured, from decode records of one batch size and lengths.

    Ceilings and the rest are those of the record with the most ranks that had cores of their own.
    """
    calm = [record for record in records if not is_crowded(record)] or list(records)
    base = max(calm, key=lambda record: int(record["tp_size"]))
    latency = latency_by_ranks([(record["tp_size"], record["all_reduce"]["us"] * 1e-6)
                                for record in calm if record["all_reduce"]])
    rest = max(0.0, base["ms_per_token"] / 1e3 - expected(base).total)
    model = ModelConfig.from_json({"architecture": "", "max_position_embeddings": 1, **base["sizes"],
                                   "quantization": None})
    found = []
    for tp, hosts in PREDICTED:
        if any(record["tp_size"] == tp and record["hosts"] == hosts for record in records):
            continue
        if problem := model.tp_problem(tp):
            found.append(Prediction(tp, hosts, base, problem=problem))
            continue
        between = seconds("TPLLM_ALLREDUCE_US") * 1e-6 if hosts > 1 else 0.0
        total = expected(base, tp, latency(tp / hosts) + between).total
        found.append(Prediction(tp, hosts, base, total, total + rest))
    return found
