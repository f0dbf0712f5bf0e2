"""An engine on a GPU: decode steps replay CUDA graphs, one for each of a few batch sizes; others run as compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpllm.engine.base import Engine, EngineConfig, StepInput
from tpllm.engine.torch.base import Step, copy_rows, make_cache
from tpllm.engine.torch.collectives import communicator

Ints = NDArray[np.int32]
ALIGNMENT = 16  # in int32: compiled code takes its inputs to begin at multiples of 64 bytes


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that get a graph, the last one `largest`; a batch is padded to the next of them."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, largest, 64)]
    return [size for size in sizes if size < largest] + [largest]


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class Captured(NamedTuple):
    """A graph of a decode step and where it leaves its logits `[batch size, vocab]`."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class CudaEngine(Engine):
    """`mixed` takes `StepProgram.forward`'s arguments, `one` those of `DecodeProgram.forward`."""

    unit = 1
    ahead = True

    def __init__(self, config: EngineConfig, mixed: Step, one: Step, device: torch.device, rows: int) -> None:
        self.config = config
        build = config.build
        self.capacity = rows
        # The row behind the arena's last is where padding puts its keys and values.
        self._cache = make_cache(config, device, self.capacity + 1)
        self._mixed, self._one = mixed, one
        self._sizes = batch_sizes(build.max_batch_size)
        # Tokens, their places in `_fed` or -1, first cache rows, lengths.
        self._inputs = torch.zeros((4, aligned(build.max_batch_size)), dtype=torch.int32, device=device)
        self._fed = torch.zeros(aligned(build.max_batch_size), dtype=torch.int32, device=device)
        self._each = torch.arange(build.max_batch_size + 1, dtype=torch.int32, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode():
            # The largest first, so that the others find their memory already there.
            self._graphs = {size: self._capture(size) for size in reversed(self._sizes)}

    def _capture(self, size: int) -> Captured:
        nothing = np.zeros(0, np.int32)
        self._put(nothing, None, nothing, nothing, size)
        given, fed, start, length = (line[:size] for line in self._inputs)
        each = self._each[:size + 1]  # query starts, and which rows are wanted

        def run() -> torch.Tensor:
            tokens = self._known(given, fed)
            if size == 1:
                return self._one(tokens, start, length, self._cache)
            return self._mixed(tokens, each, start, length, each[:size], self._cache)

        run()  # kernels load at their first call, which must not be inside of a capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()
        return Captured(graph, logits)

    def _known(self, tokens: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        """`tokens` with those in place that only the device knows."""
        return torch.where(fed >= 0, self._fed[fed.clamp(min=0)], tokens)

    def _put(self, tokens: Ints, fed: Ints | None, start: Ints, length: Ints, size: int) -> None:
        """The graph's inputs, padded to `size` sequences of one token in the spare row."""
        host = np.empty(tuple(self._inputs.shape), np.int32)
        host[:, :size] = np.array([[0], [-1], [self.capacity], [1]], np.int32)
        for line, values in zip(host, (tokens, fed, start, length), strict=True):
            if values is not None:
                line[:len(values)] = values
        # From pageable memory a copy returns when the data is taken over, so `host` may go.
        self._inputs.copy_(torch.from_numpy(host), non_blocking=True)

    @torch.inference_mode()
    def step(self, step: StepInput) -> torch.Tensor:
        """Float32 logits `[R, vocab]` on the GPU; nothing here waits for it."""
        copy_rows(self._cache, step)
        batch = len(step.start)
        if len(step.tokens) != batch:
            return self._mixed_step(step)
        size = next(size for size in self._sizes if size >= batch)
        self._put(step.tokens, step.fed, step.start, step.length, size)
        captured = self._graphs[size]
        captured.graph.replay()
        if len(step.rows) == batch and (step.rows == np.arange(batch)).all():
            return captured.logits[:batch].clone()  # the graph's own are overwritten by the next step
        return captured.logits[torch.from_numpy(step.rows).to(captured.logits.device)]

    def _mixed_step(self, step: StepInput) -> torch.Tensor:
        # Compiled code is not made for no rows at all.
        rows = step.rows if len(step.rows) else np.zeros(1, np.int32)
        fed = step.fed if step.fed is not None else np.zeros(0, np.int32)
        arrays = (step.tokens, step.query_start, step.start, step.length, rows, fed)
        ends = np.cumsum([aligned(len(a)) for a in arrays])
        host = np.empty(ends[-1], np.int32)
        for array, end in zip(arrays, ends, strict=True):
            first = end - aligned(len(array))
            host[first:first + len(array)] = array
        packed = torch.from_numpy(host).to(self._cache.device, non_blocking=True)
        inputs = [packed[end - aligned(len(a)):][:len(a)] for a, end in zip(arrays, ends.tolist(), strict=True)]
        *inputs, unknown = inputs
        if len(fed):
            inputs[0] = self._known(inputs[0], unknown)
        return self._mixed(*inputs, self._cache)[:len(step.rows)]

    @torch.inference_mode()
    def feed(self, count: int, tokens: torch.Tensor | None) -> Callable[[], list[int]]:
        """Keep the tokens for the next step, on every rank those of rank 0."""
        if tokens is not None:
            self._fed[:count] = tokens
        if (gpus := communicator()) is not None:
            gpus.broadcast(self._fed[:count])
        host = torch.empty(count, dtype=torch.int32, pin_memory=True)
        host.copy_(self._fed[:count], non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def known() -> list[int]:
            done.synchronize()
            return [int(token) for token in host.tolist()]

        return known
