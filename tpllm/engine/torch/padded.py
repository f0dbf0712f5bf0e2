"""Steps with prompts in CUDA graphs: each is padded to one of a few shapes, so that a graph of that shape serves it.

A step's kernels are many and some of them short: with several ranks the host launches them more slowly than the GPUs
answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tpllm.engine.base import StepInput
from tpllm.engine.torch.base import prompt_starts
from tpllm.engine.torch.graphs import Capture, Captured
from tpllm.engine.torch.memory import SPARE_ROWS
from tpllm.mapping import padded

Ints = NDArray[np.int32]
# Tokens, first tokens of prompts, first cache rows, lengths, rows of logits, places among fed tokens or -1.
Run = Callable[[Sequence[torch.Tensor]], torch.Tensor]
ALIGNMENT = 16  # in int32: compiled code takes its inputs to begin at multiples of 64 bytes
TOKENS = (16, 32, 64, *range(128, 1024, 128), *range(1024, 2049, SPARE_ROWS))
SINGLES = 64  # to a multiple of which sequences with one token are filled up; fewer beside few tokens
FEW_SINGLES, FEW_TOKENS = (8, 16, 32), 1024
SINGLES_AT_ONCE = 512  # beside which full steps have a graph from the start
MOST_GRAPHS = 96
# How many times a shape comes until it gets a graph, which takes the host as long as a few launches: of prompts alone,
# and beside sequences that decode, where the GPU may be as busy as the host.
SOON, OFTEN = 2, 4


def token_sizes(most: int) -> list[int]:
    """The numbers of tokens that steps of up to `most` are padded to."""
    sizes = (*TOKENS, *range(TOKENS[-1] + SPARE_ROWS, most, SPARE_ROWS))
    return [size for size in sizes if size < most] + [most]


class Shape(NamedTuple):
    """Sequences of one token, then `prompts` others, all of which have `tokens`; logits of `rows`."""

    singles: int
    prompts: int
    tokens: int
    rows: int

    @classmethod
    def sized(cls, singles: int, tokens: int, most_rows: int) -> Shape:
        prompts = max(2, min(tokens // 16, 128))
        return cls(singles, prompts, tokens, min(singles + prompts, most_rows))

    @classmethod
    def of(cls, step: StepInput, sizes: Sequence[int], most_rows: int) -> Shape | None:
        """The smallest that holds a step, if one does; `sizes` are of tokens."""
        prompts = len(prompt_starts(step)) - 1
        singles = len(step.start) - prompts
        few = FEW_SINGLES if len(step.tokens) <= FEW_TOKENS else ()
        filled = next((n for n in (0, *few) if n >= singles), padded(singles, SINGLES))
        needed = filled - singles + len(step.tokens)
        found = next((cls.sized(filled, size, most_rows) for size in sizes if size >= needed), None)
        if found is None or len(step.rows) > found.rows:
            return None
        return found if prompts + -(-(found.tokens - needed) // SPARE_ROWS) <= found.prompts else None

    def arrays(self, step: StepInput | None, spare: int) -> list[Ints]:
        """A step's, or of padding alone, whose keys and values get cache rows from `spare` on."""
        nothing = np.zeros(0, np.int32)
        step = step or StepInput(nothing, np.zeros(1, np.int32), nothing, nothing, nothing)
        begins = prompt_starts(step)
        prompts, singles = len(begins) - 1, len(step.start) - len(begins) + 1
        more, places = self.singles - singles, self.prompts - prompts
        end = more + len(step.tokens)
        # Prompts of padding, none longer than there are spare rows, the last ones without a token.
        ends = np.minimum(end + SPARE_ROWS * np.arange(1, places + 1), self.tokens)
        behind = self.tokens - end

        def around(values: Ints, between: int, last: Any) -> Ints:
            return np.concatenate([values[:singles], np.full(more, between), values[singles:], last])

        arrays = (around(step.tokens, 0, np.zeros(behind)), np.concatenate([begins + more, ends]),
                  around(step.start, spare, np.full(places, spare)), around(step.length, 1, np.diff(ends, prepend=end)),
                  np.concatenate([step.rows + more * (step.rows >= singles), np.zeros(self.rows - len(step.rows))]),
                  around(places_fed(step), -1, np.full(behind, -1)))
        return [array.astype(np.int32) for array in arrays]


def places_fed(step: StepInput) -> Ints:
    """`fed` of a step, also where the host knows all tokens."""
    return np.full(len(step.tokens), -1, np.int32) if step.fed is None else step.fed


def aligned(count: int) -> int:
    return padded(count, ALIGNMENT)


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


def pack_pinned(arrays: Sequence[Ints], device: torch.device) -> torch.Tensor:
    """`pack`'s array where a copy to `device` does not wait for the step before, as from pageable memory it would."""
    host = torch.from_numpy(pack(arrays))
    return host.pin_memory() if device.type == "cuda" else host


def send(arrays: Sequence[Ints], device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`pack`'s array on `device`, and its parts."""
    packed = pack_pinned(arrays, device).to(device, non_blocking=True)
    return packed, unpack(packed, [len(array) for array in arrays])


class Padded(NamedTuple):
    """Inputs on the GPU for steps of a shape, and the graph that reads them."""

    packed: torch.Tensor
    captured: Captured


class PaddedSteps:
    """Runs steps of up to `most` tokens, padding among them, and `rows` of logits.

    Padded also where no graph is made of them, so that the same step gives the same bits each time.
    """

    def __init__(self, run: Run, capture: Capture, device: torch.device, spare: int, most: int, rows: int) -> None:
        self._run, self._capture, self._device, self._spare, self._rows = run, capture, device, spare, rows
        self._sizes = token_sizes(most)
        self.singles = SINGLES if most > TOKENS[-1] else 1  # the engine's
        self._steps: dict[Shape, Padded] = {}
        self._came: Counter[Shape] = Counter()

    def make(self, longest: int, singles: int) -> None:
        """Graphs for prompts of up to `longest` tokens; where steps may be larger, for full ones with up to `singles`
        sequences of one token, too."""
        shapes = [(0, size) for last, size in zip((0, *self._sizes), self._sizes, strict=False)
                  if last < longest and size <= TOKENS[-1]]
        if self.singles > 1:
            shapes += [(n, self._sizes[-1]) for n in range(0, min(singles, SINGLES_AT_ONCE) + SINGLES, SINGLES)]
        ran: set[int] = set()
        # The largest first, so that the others find their memory already there.
        for shape in sorted((Shape.sized(*shape, self._rows) for shape in shapes), reverse=True,
                            key=lambda shape: (shape.tokens, shape.rows)):
            # Kernels load at their first call. Where those for so many tokens have, the rest needs fewer tokens.
            few = shape._replace(tokens=min(shape.tokens, TOKENS[-1])) if shape.tokens in ran else shape
            self._run(send(few.arrays(None, self._spare), self._device)[1])
            ran.add(shape.tokens)
            self._make(shape)

    def step(self, step: StepInput) -> torch.Tensor | None:
        """Float32 logits `[R, vocab]`; None where no shape holds such a step."""
        shape, wanted = Shape.of(step, self._sizes, self._rows), len(step.rows)
        if shape is None:
            return None
        arrays = shape.arrays(step, self._spare)
        if shape not in self._steps:
            self._came[shape] += 1
            if self._came[shape] < (OFTEN if shape.singles else SOON) or len(self._steps) >= MOST_GRAPHS:
                return self._run(send(arrays, self._device)[1])[:wanted]
            self._make(shape)
        packed, captured = self._steps[shape]
        packed.copy_(pack_pinned(arrays, self._device), non_blocking=True)
        captured.replay()
        return captured.logits[:wanted].clone()  # the graph's own are overwritten by the next step

    def _make(self, shape: Shape) -> None:
        packed, inputs = send(shape.arrays(None, self._spare), self._device)
        self._steps[shape] = Padded(packed, self._capture(partial(self._run, inputs)))
