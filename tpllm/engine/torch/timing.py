"""How long a GPU takes for what is captured in a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def graph_seconds(work: Callable[[], object], repeats: int, ready: Callable[[], object] = lambda: None) -> float:
    """Median of so many replays, each of which begins after `ready`; `work` must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
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
