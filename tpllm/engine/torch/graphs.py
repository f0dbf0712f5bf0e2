"""CUDA graphs: how one is made, and how long a GPU takes for it."""

from __future__ import annotations

import gc
import statistics
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")

alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def make_graph(work: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `work` launches, and what it returns. It must have run before: kernels load at their first call.

    Meanwhile no garbage is collected: among it may be memory of an earlier engine that peers reach, and to give that
    back is not allowed while a graph is made (PyTorch 2.11 ends the process).
    """
    graph, collected = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = work()
    finally:
        if collected:
            gc.enable()
    alive.add(graph)
    return graph, result


def end_graphs() -> None:
    """Of all engines that somebody still has; none of them can be used any more."""
    for graph in alive:
        graph.reset()


def graph_seconds(work: Callable[[], object], repeats: int, ready: Callable[[], object] = lambda: None) -> float:
    """Median of so many replays of what `make_graph` makes, each of them behind `ready` and another replay.

    Behind that one ranks that wait for each other are in step, and the next is launched before the GPU comes to it.
    """
    graph, _ = make_graph(work)
    seconds = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready()
        graph.replay()
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        seconds.append(float(began.elapsed_time(ended)) / 1e3)
    return statistics.median(seconds)


class Lent:
    """Where a tensor of float32 lies on a GPU, without keeping its memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "version": 3, "shape": tuple(tensor.shape), "typestr": "<f4", "data": (tensor.data_ptr(), False),
            "strides": tuple(4 * stride for stride in tensor.stride())}


class Captured(NamedTuple):
    """What runs a graph's kernels again, and where they leave their logits `[rows, vocab]` until another one runs."""

    replay: Callable[[], None]
    logits: torch.Tensor


class Capture:
    """Makes CUDA graphs that share their memory, as one runs after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Captured:
        graph, logits = make_graph(run, self._pool)
        # Nobody owns the logits: those of all graphs together would be gigabytes, so the next graph may use the place.
        return Captured(graph.replay, torch.as_tensor(Lent(logits), device=logits.device))
