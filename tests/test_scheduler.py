"""The scheduler against a simulated engine that remembers which token lies in which row of the cache."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpllm.engine.base import StepInput
from tpllm.scheduler import Arena, Scheduler, Sequence


@dataclass(frozen=True)
class Job:
    """A request: its prompt's length, how far it may grow, and how much it really generates."""

    prompt: int
    allowed: int
    generated: int

    @property
    def max_len(self) -> int:
        return self.prompt + self.allowed


@dataclass(frozen=True)
class Load:
    """Requests and the limits of the engine that serves them."""

    jobs: list[Job]
    capacity: int
    max_batch_size: int
    max_step_tokens: int


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    allowed = draw(st.integers(1, 8))
    return Job(draw(st.integers(1, 30)), allowed, draw(st.integers(1, allowed)))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    requests = draw(st.lists(jobs(), min_size=1, max_size=12))
    longest = max(job.max_len for job in requests)
    return Load(requests, draw(st.integers(longest, 3 * longest)), draw(st.integers(1, 6)), draw(st.integers(1, 40)))


class Engine:
    """Keeps the cache as (sequence, position) per row; a step must fit what the cache already holds."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.cache: list[tuple[int, int] | None] = [None] * load.capacity
        self.fed: dict[int, list[int]] = {index: [] for index in range(len(load.jobs))}

    def step(self, step: StepInput, running: list[Sequence]) -> None:
        arrays = (step.tokens, step.query_start, step.start, step.length, step.rows)
        assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays)
        count, batch = len(step.tokens), len(step.start)
        assert 1 <= count <= self.load.max_step_tokens
        assert 1 <= batch <= len(running) <= self.load.max_batch_size
        assert len(step.query_start) == batch + 1 and len(step.length) == batch
        assert step.query_start[0] == 0 and step.query_start[-1] == count
        by_start = {sequence.start: sequence for sequence in running}
        assert len(by_start) == len(running)
        for i in range(batch):
            low, high = int(step.query_start[i]), int(step.query_start[i + 1])
            assert low < high, "a sequence without tokens takes no part in a step"
            self.feed(by_start[int(step.start[i])], step.tokens[low:high].tolist(), int(step.length[i]))

    def feed(self, sequence: Sequence, tokens: list[int], length: int) -> None:
        """New tokens of one sequence go into its own rows, right after those that are there."""
        position = length - len(tokens)
        assert position == len(self.fed[sequence.index]) and length <= sequence.max_len
        rows = range(sequence.start, sequence.start + length)
        assert 0 <= rows.start and rows.stop <= self.load.capacity
        for token in tokens:
            self.cache[sequence.start + position] = (sequence.index, position)
            assert token == sequence.tokens[position] == value(sequence.index, position)
            position += 1
        self.fed[sequence.index] += tokens
        # Attention reads the whole run: nobody else may have written into it.
        assert [self.cache[row] for row in rows] == [(sequence.index, p) for p in range(length)]


def value(index: int, position: int) -> int:
    """The token at a place, which no other place has."""
    return 1000 * index + position


def check_runs(running: list[Sequence], capacity: int) -> None:
    runs = sorted((s.start, s.start + s.max_len) for s in running)
    assert all(0 <= start < stop <= capacity for start, stop in runs)
    assert all(before[1] <= after[0] for before, after in pairwise(runs))


def serve(load: Load) -> tuple[list[int], int]:
    """Runs a load to its end; the order in which sequences finished, and the number of steps."""
    scheduler, engine = Scheduler(load.capacity, load.max_batch_size, load.max_step_tokens), Engine(load)
    for index, job in enumerate(load.jobs):
        scheduler.add(Sequence(index, [value(index, p) for p in range(job.prompt)], job.max_len))
    ended: list[int] = []
    admitted: list[int] = []
    steps = 0
    most = sum(job.prompt + job.generated for job in load.jobs)  # every step feeds at least one token
    while work := scheduler.next_step():
        steps += 1
        assert steps <= most, "steps without progress"
        step, finished = work
        check_runs(scheduler.running, load.capacity)
        admitted += [s.index for s in scheduler.running if s.index not in admitted]
        engine.step(step, scheduler.running)
        # One row of logits for each sequence that is now complete, at its last token.
        assert [step.tokens[row] for row in step.rows] == [s.tokens[-1] for s in finished]
        assert all(s.pending == 0 for s in finished) and len({s.index for s in finished}) == len(finished)
        complete = [s for s in scheduler.running if s.pending == 0]
        assert {s.index for s in complete} == {s.index for s in finished}
        for sequence in finished:
            job = load.jobs[sequence.index]
            sequence.tokens.append(value(sequence.index, len(sequence.tokens)))
            if len(sequence.tokens) == job.prompt + job.generated:
                scheduler.finish(sequence)
                ended.append(sequence.index)
    assert admitted == list(range(len(load.jobs))), "admitted in the order they came"
    assert not scheduler.running and not scheduler.waiting
    for index, job in enumerate(load.jobs):
        # All but the last token, which nothing comes after, was fed exactly once and in order.
        assert engine.fed[index] == [value(index, p) for p in range(job.prompt + job.generated - 1)]
    return ended, steps


@given(load=loads())
@example(load=Load([Job(30, 8, 8)] * 6, capacity=38, max_batch_size=6, max_step_tokens=1))
@example(load=Load([Job(1, 8, 8)] * 6, capacity=54, max_batch_size=6, max_step_tokens=3))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_token_is_fed_once_in_order_and_everything_ends(load: Load) -> None:
    ended, _ = serve(load)
    assert sorted(ended) == list(range(len(load.jobs)))


@given(load=loads())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_with_room_for_all_a_step_gives_every_decoding_sequence_a_token(load: Load) -> None:
    """No prefill holds up decode: once its prompt is in, a sequence ends after as many steps as it has tokens."""
    roomy = Load(load.jobs, sum(job.max_len for job in load.jobs), len(load.jobs),
                 max(load.max_step_tokens, len(load.jobs) + 1))
    scheduler = Scheduler(roomy.capacity, roomy.max_batch_size, roomy.max_step_tokens)
    for index, job in enumerate(roomy.jobs):
        scheduler.add(Sequence(index, [0] * job.prompt, job.max_len))
    decoding: set[int] = set()
    while work := scheduler.next_step():
        _, finished = work
        assert decoding <= {s.index for s in finished}
        for sequence in finished:
            decoding.add(sequence.index)
            sequence.tokens.append(0)
            job = roomy.jobs[sequence.index]
            if len(sequence.tokens) == job.prompt + job.generated:
                scheduler.finish(sequence)
                decoding.discard(sequence.index)


def test_short_requests_do_not_wait_for_the_end_of_a_batch() -> None:
    # Two places: as one short request ends the next begins, while the long one goes on.
    load = Load([Job(2, 20, 20), Job(2, 3, 3), Job(2, 3, 3), Job(2, 3, 3)], capacity=100, max_batch_size=2,
                max_step_tokens=64)  # fmt: skip
    ended, steps = serve(load)
    assert ended == [1, 2, 3, 0] and steps == 20


def test_a_long_prompt_comes_in_chunks_of_the_step_size() -> None:
    scheduler = Scheduler(100, 2, 16)
    scheduler.add(Sequence(0, list(range(40)), 41))
    sizes = []
    for _ in range(3):
        work = scheduler.next_step()
        assert work is not None
        step, finished = work
        sizes.append((len(step.tokens), int(step.length[0]), len(finished), step.rows.tolist()))
    assert sizes == [(16, 16, 0, []), (16, 32, 0, []), (8, 40, 1, [7])]


def test_decode_goes_on_while_a_long_prompt_before_it_comes_in() -> None:
    """The long prompt was admitted first and would take the whole of every step."""
    scheduler = Scheduler(100, 2, 8)
    scheduler.add(Sequence(0, list(range(40)), 41))
    scheduler.add(Sequence(1, [7], 10))
    for _ in range(5):
        work = scheduler.next_step()
        assert work is not None
        step, finished = work
        assert [s.index for s in finished] == [1] and len(step.tokens) == 8
        finished[0].tokens.append(7)


def test_nothing_to_do_is_none() -> None:
    assert Scheduler(10, 2, 4).next_step() is None


@given(data=st.data(), capacity=st.integers(1, 60))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_arena_gives_out_free_rows_first_fit(data: st.DataObject, capacity: int) -> None:
    arena, rows = Arena(capacity), [0] * capacity
    taken: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        if taken and data.draw(st.booleans()):
            start = data.draw(st.sampled_from(sorted(taken)))
            arena.give_back(start)
            length = taken.pop(start)
            rows[start:start + length] = [0] * length
        else:
            length = data.draw(st.integers(1, capacity))
            fits = [i for i in range(capacity - length + 1) if not any(rows[i:i + length])]
            start_or_none = arena.take(length)
            assert start_or_none == (fits[0] if fits else None)
            if start_or_none is not None:
                taken[start_or_none] = length
                rows[start_or_none:start_or_none + length] = [1] * length


@pytest.mark.parametrize("length", [11, 1000])
def test_arena_refuses_what_it_can_never_hold(length: int) -> None:
    assert Arena(10).take(length) is None
