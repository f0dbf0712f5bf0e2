"""What the machine could do at most, measured beside the engine, and a decode record's share of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpllm.launch.estimate import BYTES, weight_bytes

if TYPE_CHECKING:
    import torch

    from tpllm.distributed import World
    from tpllm.runner import ModelRunner

TIMES = 8  # what is measured is done before its end is waited for


@dataclass(frozen=True)
class Ceilings:
    """Of the slowest rank, while all others do the same: bytes/s that it reads and floating-point operations/s."""

    bandwidth: float
    flops: float


def measure_ceilings(runner: ModelRunner) -> Ceilings:
    """Collective; the matrices are of the model's dtype."""
    import torch

    from tpllm.engine.torch.private import linear  # the engines' own products

    build, world = runner.engine.config.build, runner.world
    cuda = build.device == "cuda"
    device, dtype = torch.device(build.device), getattr(torch, runner.engine.config.model.dtype)
    # Small beside what an engine leaves free, large beside any cache.
    many, side = ((1 << 27) if cuda else (1 << 26)), (4096 if cuda else 1024)
    x = torch.ones(many, device=device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found = Ceilings(best_rate(world, x.nbytes, lambda: x.sum()),
                     best_rate(world, 2 * side**3, lambda: linear(a, b, None)[0, 0]))
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # of which records speak; these arrays are not the engine's
    return found


def best_rate(world: World, amount: int, work: Callable[[], torch.Tensor]) -> float:
    """`amount` a second in the best of some runs of `work`, whose last number is waited for. Collective."""
    best = 0.0
    for _ in range(5):
        world.barrier()
        started = time.perf_counter()
        for _ in range(TIMES):
            last = work()
        last.item()
        best = max(best, TIMES * amount / (time.perf_counter() - started))
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


def parts_path() -> str | None:
    """Which way the sums of long steps of prompts go, where an engine makes them in parts."""
    from tpllm.engine.torch import collectives

    gpus = collectives.communicator()
    return gpus.parts_path if gpus is not None else None


def explain(record: dict[str, Any], runner: ModelRunner, ceilings: Ceilings) -> dict[str, Any]:
    """A `decode` record with where its time goes: bytes read as a share of the ceiling, and all-reduces. Collective."""
    config, world = runner.engine.config, runner.world
    model, batch = config.model, record["batch_size"]
    # TensorRT's all-reduces are layers of its own, which nothing outside of its engine can call.
    own = world.size > 1 and config.build.backend != "tensorrt"
    path, reduce = all_reduce_path(runner, batch) if own else ("", 0.0)
    if not world.is_first:
        return record
    step = record["ms_per_token"] / 1e3
    row = 2 * model.local(config.tp_size).num_kv_heads * model.head_size * BYTES[model.dtype]
    cache = batch * (record["input_len"] + record["output_len"] / 2) * model.num_hidden_layers * row
    share = 2 * model.num_hidden_layers * reduce / step
    read = weight_bytes(model.to_json(), config.tp_size) + cache
    return record | {
        "bandwidth_share": round(read / step / ceilings.bandwidth, 3),
        "bandwidth_gb_s": round(ceilings.bandwidth / 1e9, 1), "peak_tflops": round(ceilings.flops / 1e12, 4),
        "all_reduce": {"path": path, "us": round(reduce * 1e6, 1), "share": round(share, 3)} if reduce else None}
