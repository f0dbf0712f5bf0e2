"""An engine on a GPU: decode steps and short prompts replay CUDA graphs of a few sizes; others run as compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpllm.engine.base import Engine, EngineConfig, StepInput
from tpllm.engine.torch.attention import has_prompt_kernel
from tpllm.engine.torch.base import Step, copy_rows, make_cache, prompt_starts
from tpllm.engine.torch.collectives import communicator
from tpllm.engine.torch.graphs import make_graph
from tpllm.engine.torch.memory import SPARE_ROWS

Ints = NDArray[np.int32]
ALIGNMENT = 16  # in int32: compiled code takes its inputs to begin at multiples of 64 bytes
# Where cuBLAS has tiles that fit: on an H200 products of 432 rows take 9 to 32 % less time than those of 448.
SIZES_OF_TILES = (160, 176, 208, 256, 304, 368, 432)
PROMPT_SIZES = (16, 32, 64, *range(128, 1024, 128), *range(1024, 2049, SPARE_ROWS))


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that get a graph, the last one `largest`; a batch is padded to the next of them."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 160, 32), *SIZES_OF_TILES, *range(512, largest, 64)]
    return [size for size in sizes if size < largest] + [largest]


def prompt_sizes(longest: int) -> list[int]:
    """The numbers of tokens that get a graph, up to one that holds `longest`; a prompt is padded to the next of them.

    For more tokens than the last, computing takes longer than launching the kernels.
    """
    return [size for before, size in zip((0, *PROMPT_SIZES), PROMPT_SIZES, strict=False) if before < longest]


def aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def pack(arrays: Sequence[Ints]) -> Ints:
    """All of them in one array, each at a multiple of `ALIGNMENT`."""
    parts = [np.zeros(aligned(len(array)), np.int32) for array in arrays]
    for part, array in zip(parts, arrays, strict=True):
        part[:len(array)] = array
    return np.concatenate(parts)


def unpack(packed: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The parts of a tensor that `pack` has made."""
    ends = accumulate(map(aligned, lengths))
    return [packed[end - aligned(length):][:length] for end, length in zip(ends, lengths, strict=True)]


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
        run()
        torch.cuda.synchronize()
        graph, logits = make_graph(run, self._pool)
        # Nobody owns the logits: those of all graphs together would be gigabytes, so the next graph may use the place.
        return Captured(graph.replay, torch.as_tensor(Lent(logits), device=logits.device))


class CudaEngine(Engine):
    """`mixed` takes `StepProgram.forward`'s arguments, `one` those of `DecodeProgram.forward`."""

    unit = 1
    ahead = True

    def __init__(self, config: EngineConfig, mixed: Step, one: Step, device: torch.device, rows: int) -> None:
        self.config = config
        build = config.build
        self.capacity = rows
        # The rows behind the arena's last are where padding puts its keys and values.
        self._cache = make_cache(config, device, self.capacity + SPARE_ROWS)
        self._mixed, self._one = mixed, one
        self._sizes = batch_sizes(build.max_batch_size)
        # Tokens, their places in `_fed` or -1, first cache rows, lengths.
        self._inputs = torch.zeros((4, aligned(build.max_batch_size)), dtype=torch.int32, device=device)
        self._fed = torch.zeros(aligned(build.max_batch_size), dtype=torch.int32, device=device)
        self._each = torch.arange(build.max_batch_size, dtype=torch.int32, device=device)
        self._no_prompts = torch.tensor([build.max_batch_size], dtype=torch.int32, device=device)
        capture = Capture()
        with torch.inference_mode():
            # The largest first, so that the others find their memory already there. Without a kernel of their own
            # prompts are not captured: the host looks at their places then.
            longest = min(build.max_input_len, build.step_tokens)
            prompts = prompt_sizes(longest) if has_prompt_kernel(self._cache) else []
            self._prompts = {size: self._prompt(size, capture) for size in reversed(prompts)}
            self._graphs = {size: self._decode(size, capture) for size in reversed(self._sizes)}

    def _decode(self, size: int, capture: Capture) -> Captured:
        nothing = np.zeros(0, np.int32)
        self._put(nothing, None, nothing, nothing, size)
        given, fed, start, length = (line[:size] for line in self._inputs)

        def run() -> torch.Tensor:
            tokens = self._known(given, fed)
            if size == 1:
                return self._one(tokens, start, length, self._cache)
            return self._mixed(tokens, self._no_prompts, start, length, self._each[:size], self._cache)

        return capture(run)

    def _prompt(self, size: int, capture: Capture) -> tuple[torch.Tensor, Captured]:
        """The inputs of a graph for one prompt of up to `size` tokens, and the graph."""
        count = max(0, size - SPARE_ROWS)  # what does not fit into the spare rows runs in the arena, still empty
        arrays = self._one_sequence(np.zeros(count, np.int32), 0, count, 0, size)
        packed = torch.from_numpy(pack(arrays)).to(self._cache.device)
        inputs = unpack(packed, [len(array) for array in arrays])
        return packed, capture(lambda: self._mixed(*inputs, self._cache))

    def _one_sequence(self, tokens: Ints, start: int, length: int, row: int, size: int) -> list[Ints]:
        """`StepProgram.forward`'s arrays of a sequence, and a second one in the spare rows that makes up `size`."""
        count = len(tokens)
        padding = np.zeros(size - count, np.int32)
        return [np.concatenate([tokens, padding]), *(np.array(numbers, np.int32) for numbers in (
            [0, count, size], [start, self.capacity], [length, size - count], [row]))]

    def _known(self, tokens: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        """`tokens` with those in place that only the device knows."""
        return torch.where(fed >= 0, self._fed[fed.clamp(min=0)], tokens)

    def _put(self, tokens: Ints, fed: Ints | None, start: Ints, length: Ints, size: int) -> None:
        """The graph's inputs, padded to `size` sequences of one token in a spare row."""
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
        batch, count = len(step.start), len(step.tokens)
        if count != batch:
            size = min((size for size in self._prompts if size >= count), default=None)
            if size and batch == 1 and len(step.rows) <= 1 and step.fed is None:
                return self._prompt_step(step, size)
            return self._mixed_step(step)
        size = next(size for size in self._sizes if size >= batch)
        self._put(step.tokens, step.fed, step.start, step.length, size)
        captured = self._graphs[size]
        captured.replay()
        if len(step.rows) == batch and (step.rows == np.arange(batch)).all():
            return captured.logits[:batch].clone()  # the graph's own are overwritten by the next step
        return captured.logits[torch.from_numpy(step.rows).to(captured.logits.device)]

    def _prompt_step(self, step: StepInput, size: int) -> torch.Tensor:
        packed, captured = self._prompts[size]
        row = int(step.rows[0]) if len(step.rows) else 0
        arrays = self._one_sequence(step.tokens, int(step.start[0]), int(step.length[0]), row, size)
        packed.copy_(torch.from_numpy(pack(arrays)), non_blocking=True)
        captured.replay()
        return captured.logits[:len(step.rows)].clone()

    def _mixed_step(self, step: StepInput) -> torch.Tensor:
        # Compiled code is not made for no rows at all.
        rows = step.rows if len(step.rows) else np.zeros(1, np.int32)
        fed = step.fed if step.fed is not None else np.zeros(0, np.int32)
        arrays = (step.tokens, prompt_starts(step), step.start, step.length, rows, fed)
        host = torch.from_numpy(pack(arrays))
        # From pageable memory so large a copy would wait for the step before.
        host = host.pin_memory() if self._cache.is_cuda else host
        packed = host.to(self._cache.device, non_blocking=True)
        *inputs, unknown = unpack(packed, [len(array) for array in arrays])
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
