"""Which sequences take part in the next step, and where in the cache arena each one lives (rank 0 only)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tpllm.engine.base import StepInput


class Arena:
    """Rows of the KV cache, given out in contiguous runs, first fit."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._runs: list[tuple[int, int]] = []  # (start, stop) in use, sorted

    def take(self, length: int) -> int | None:
        """First row of a free run of `length` rows, or None when there is none now."""
        start = 0
        for i, (used_start, used_stop) in enumerate(self._runs):
            if used_start - start >= length:
                self._runs.insert(i, (start, start + length))
                return start
            start = used_stop
        if self.capacity - start < length:
            return None
        self._runs.append((start, start + length))
        return start

    def give_back(self, start: int) -> None:
        """Free the run that begins at `start`."""
        self._runs = [run for run in self._runs if run[0] != start]


@dataclass
class Sequence:
    """One request on its way: its tokens so far and how many of them are in the cache."""

    index: int
    tokens: list[int]  # the prompt, then what was generated
    max_len: int  # tokens it may grow to; as many cache rows are its own
    start: int = -1
    cached: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached


@dataclass
class Scheduler:
    """Admits sequences in order as soon as a run of cache rows is free.

    A step holds at most `max_step_tokens`, those that need one token first: long prompts come in chunks while
    others go on generating.
    """

    capacity: int
    max_batch_size: int
    max_step_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._arena = Arena(self.capacity)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def next_step(self) -> tuple[StepInput, list[Sequence]] | None:
        """The next step and the sequences that get a token from it, in the order of its logits' rows."""
        self._admit()
        if not self.running:
            return None
        budget = self.max_step_tokens
        parts: list[tuple[Sequence, int]] = []
        # Sequences that only need one token come first: prefill must not hold up decode.
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            take = min(sequence.pending, budget)
            if take:
                parts.append((sequence, take))
                budget -= take
        step = pack(parts)
        finished = [s for s, take in parts if take == s.pending]
        for sequence, take in parts:
            sequence.cached += take
        return step, finished

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended: its rows are free again."""
        self._arena.give_back(sequence.start)
        self.running.remove(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch_size:
            start = self._arena.take(self.waiting[0].max_len)
            if start is None:
                return
            sequence = self.waiting.popleft()
            sequence.start = start
            self.running.append(sequence)


def pack(parts: list[tuple[Sequence, int]]) -> StepInput:
    """One step of the next `take` uncached tokens of each sequence; logits where that completes the sequence."""
    def tokens() -> Iterator[int]:
        for sequence, take in parts:
            yield from sequence.tokens[sequence.cached:sequence.cached + take]

    ends = np.cumsum([take for _, take in parts], dtype=np.int32)
    complete = [take == s.pending for s, take in parts]
    return StepInput(
        tokens=np.fromiter(tokens(), dtype=np.int32),
        query_start=np.concatenate([np.zeros(1, np.int32), ends]),
        start=np.array([s.start for s, _ in parts], dtype=np.int32),
        length=np.array([s.cached + take for s, take in parts], dtype=np.int32),
        rows=ends[np.array(complete)] - np.int32(1),
    )
