"""An engine on a GPU: steps replay CUDA graphs of a few sizes; those that none serves run as compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from tpllm.engine.base import Engine, EngineConfig, StepInput
from tpllm.engine.torch.attention import has_prompt_kernel
from tpllm.engine.torch.base import Step, copy_rows, make_cache, prompt_starts
from tpllm.engine.torch.collectives import communicator
from tpllm.engine.torch.graphs import Capture, Captured
from tpllm.engine.torch.memory import SPARE_ROWS
from tpllm.engine.torch.padded import Ints, PaddedSteps, aligned, places_fed, send

LAUNCHING = 2048  # tokens of a step that launch on one GPU as fast as they are computed
# Where cuBLAS has tiles that fit: on an H200 products of 432 rows take 9 to 32 % less time than those of 448.
SIZES_OF_TILES = (160, 176, 208, 256, 304, 368, 432)


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that get a graph, the last one `largest`; a batch is padded to the next of them."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 160, 32), *SIZES_OF_TILES, *range(512, largest, 64)]
    return [size for size in sizes if size < largest] + [largest]


def known_tokens(given: torch.Tensor, tokens: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
    """`tokens` with those in place that only the device knows, at their places in `given`."""
    return torch.where(fed >= 0, given[fed.clamp(min=0)], tokens)


def run_prompts(mixed: Step, known: Step, cache: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A step of `StepProgram.forward`'s arrays and, of tokens that only the device knows, their places."""
    tokens, *places, fed = inputs
    return mixed(known(tokens, fed), *places, cache)


class CudaEngine(Engine):
    """`mixed` takes `StepProgram.forward`'s arguments, `one` those of `DecodeProgram.forward`."""

    unit = singles = 1
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
        # Not this engine's methods: what holds these would hold it, and its memory, until the collector comes.
        self._known = partial(known_tokens, self._fed)
        self._prompts = partial(run_prompts, mixed, self._known, self._cache)
        capture = Capture()
        self._padded = None
        with torch.inference_mode():
            # Without a kernel of their own prompts are not captured: the host looks at their places then.
            if has_prompt_kernel(self._cache):
                most = build.step_tokens if config.tp_size > 1 else min(build.step_tokens, LAUNCHING)
                self._padded = PaddedSteps(self._prompts, capture, device, rows, most, build.step_rows)
                self._padded.make(min(build.max_input_len, most), build.max_batch_size)
                self.singles = self._padded.singles
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

        run()
        return capture(run)

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
            logits = self._padded.step(step) if self._padded else None
            return self._mixed_step(step) if logits is None else logits
        size = next(size for size in self._sizes if size >= batch)
        self._put(step.tokens, step.fed, step.start, step.length, size)
        captured = self._graphs[size]
        captured.replay()
        if len(step.rows) == batch and (step.rows == np.arange(batch)).all():
            return captured.logits[:batch].clone()  # the graph's own are overwritten by the next step
        return captured.logits[torch.from_numpy(step.rows).to(captured.logits.device)]

    def _mixed_step(self, step: StepInput) -> torch.Tensor:
        # Compiled code is not made for no rows at all.
        rows = step.rows if len(step.rows) else np.zeros(1, np.int32)
        arrays = (step.tokens, prompt_starts(step), step.start, step.length, rows, places_fed(step))
        return self._prompts(send(arrays, self._cache.device)[1])[:len(step.rows)]

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
