"""Which sequences take part in the next step, and where in the cache arena each one lives (rank 0 only)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np

from tpllm.engine.base import StepInput
from tpllm.mapping import padded


class Arena:
    """Rows of the KV cache, given out in contiguous runs of whole `unit`s, first fit."""

    def __init__(self, capacity: int, unit: int = 1) -> None:
        self.capacity, self.unit = capacity, unit
        self._runs: list[tuple[int, int]] = []  # (start, stop) in use, sorted

    def take(self, length: int) -> int | None:
        """First row of a free run of at least `length` rows, or None when there is none now."""
        start, length = 0, padded(length, self.unit)
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


@dataclass(eq=False)
class Sequence:
    """A run of tokens on its way: those so far and how many of them are in the cache."""

    tokens: list[int]  # the prompt, then what was generated; none yet in one that will be forked from another
    max_len: int  # tokens it may grow to; as many cache rows are its own
    every_row: bool = False  # logits are wanted for each of its tokens
    start: int = -1
    cached: int = 0
    fed: int = -1  # the last token is not known yet: its place among those of the step before
    ended: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.cached


S = TypeVar("S", bound=Sequence)
Work = tuple[StepInput, list[tuple[S, slice]]]


class Scheduler(Generic[S]):
    """Admits groups of sequences, each as soon as cache rows for all of it are free.

    `source` is asked for up to `lookahead` groups when there may be room and none waits. Of these the ones that may get
    the longest answers come first, so that few are left to run alone at the end; nobody waits for those behind them.

    A step holds at most `max_step_tokens`, those that need one token first: long prompts come in chunks while others go
    on generating. It gives at most `max_step_rows` of logits, as they take more room than tokens do and a sequence may
    want every token's: no fewer than `max_batch_size`. `unit` and `singles` are the engine's.
    """

    def __init__(self, capacity: int, max_batch_size: int, max_step_tokens: int, max_step_rows: int,
                 source: Iterator[list[S]], unit: int = 1, lookahead: int = 1, singles: int = 1) -> None:
        self.max_batch_size, self.max_step_tokens, self.max_step_rows = max_batch_size, max_step_tokens, max_step_rows
        self.running: list[S] = []
        self._source, self._lookahead, self._singles = source, lookahead, singles
        self._waiting: deque[list[S]] = deque()  # for room
        self._arena = Arena(capacity, unit)
        self._copies: list[tuple[int, int, int]] = []

    def next_step(self) -> Work[S] | None:
        """The next step, and the sequences that get logits from it with each one's rows of them."""
        self._admit()
        if not self.running:
            return None
        budget, rows = self.max_step_tokens, self.max_step_rows - sum(not s.every_row for s in self.running)
        parts: list[tuple[S, int]] = []
        # Sequences that only need one token come first: prefill must not hold up decode.
        longer = False
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            if sequence.pending > 1 and not longer:
                longer, padding = True, -len(parts) % self._singles
                budget -= padding if budget >= 2 * self._singles else 0
            take = min(sequence.pending, budget, rows if sequence.every_row else budget)
            if take and len(sequence.tokens) < sequence.max_len:  # of a full one only the last token is to be known
                parts.append((sequence, take))
                budget -= take
                rows -= take if sequence.every_row else 0
        if not parts:
            return None
        step, counts = pack(parts, self._copies)
        self._copies = []
        for sequence, take in parts:
            sequence.cached += take
        ends = np.cumsum(counts).tolist()
        return step, [(s, slice(end - n, end)) for (s, _), n, end in zip(parts, counts, ends, strict=True) if n]

    def fork(self, pairs: list[tuple[S, S]]) -> None:
        """Each first of a pair goes on from where the second one is now; all pairs at once."""
        states = [(list(source.tokens), source.cached) for _, source in pairs]
        for (target, source), (tokens, cached) in zip(pairs, states, strict=True):
            if target is not source:
                target.tokens[:], target.cached = tokens, cached
                self._copies.append((source.start, target.start, cached))

    def finish(self, sequence: S) -> None:
        """A sequence has ended: its rows are free again, for steps after those that have begun."""
        sequence.ended = True
        self._arena.give_back(sequence.start)
        self.running.remove(sequence)

    def forget_waiting(self) -> None:
        """What came from the source and has no rows yet gets none."""
        self._waiting.clear()

    def _admit(self) -> None:
        ended = False
        while len(self.running) < self.max_batch_size:
            if not self._waiting and not ended:
                came = list(islice(self._source, self._lookahead))
                ended = len(came) < self._lookahead
                self._waiting.extend(sorted(came, key=longest_answer, reverse=True))
            if not self._waiting or not self._place(self._waiting[0]):
                return
            self.running += self._waiting.popleft()

    def _place(self, group: list[S]) -> bool:
        """Give every sequence of a group its rows, or none of them any."""
        if len(self.running) + len(group) > self.max_batch_size:
            return False
        starts: list[int] = []
        for sequence in group:
            start = self._arena.take(sequence.max_len)
            if start is None:
                for taken in starts:
                    self._arena.give_back(taken)
                return False
            starts.append(start)
        for sequence, start in zip(group, starts, strict=True):
            sequence.start = start
        return True


def longest_answer(group: list[S]) -> int:
    """Tokens that its sequences may get; those that will be forked from the first have none of their own yet."""
    return group[0].max_len - len(group[0].tokens)


def pack(parts: list[tuple[S, int]], copies: list[tuple[int, int, int]]) -> tuple[StepInput, list[int]]:
    """One step of the next `take` uncached tokens of each sequence, and how many rows of logits each gets of it."""
    def tokens() -> Iterator[int]:
        for sequence, take in parts:
            yield from sequence.tokens[sequence.cached:sequence.cached + take]

    ends = np.cumsum([take for _, take in parts], dtype=np.int32)
    fed = None
    if any(s.fed >= 0 for s, _ in parts):
        fed = np.full(ends[-1], -1, np.int32)
        fed[ends - 1] = [s.fed for s, _ in parts]
    counts = [take if s.every_row else int(take == s.pending) for s, take in parts]
    rows = [np.arange(end - count, end, dtype=np.int32) for end, count in zip(ends.tolist(), counts, strict=True)]
    return StepInput(
        tokens=np.fromiter(tokens(), dtype=np.int32),
        query_start=np.concatenate([np.zeros(1, np.int32), ends]),
        start=np.array([s.start for s, _ in parts], dtype=np.int32),
        length=np.array([s.cached + take for s, take in parts], dtype=np.int32),
        rows=np.concatenate(rows), copies=np.array(copies, dtype=np.int32).reshape(-1, 3), fed=fed), counts
