"""CUDA graphs: how one is made, and how long a GPU takes for it."""

from __future__ import annotations

import gc
import statistics
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

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
    """Median of so many replays of what `make_graph` makes, each of which begins after `ready`."""
    graph, _ = make_graph(work)
    seconds = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready()
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        seconds.append(float(began.elapsed_time(ended)) / 1e3)
    return statistics.median(seconds)
