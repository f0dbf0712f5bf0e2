"""The scheduler against a simulated engine that remembers which token lies in which row of the cache."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpllm.engine.base import StepInput
from tpllm.scheduler import Arena, Scheduler, Sequence

ROWS = 2048  # of logits in a step


class Numbered(Sequence):
    """A sequence that knows whose it is; `branch` counts those of one request."""

    def __init__(self, index: int, tokens: list[int], max_len: int, branch: int = 0) -> None:
        super().__init__(tokens, max_len)
        self.index, self.branch = index, branch


def scheduler_of(limits: tuple[int, int, int], *groups: list[Numbered]) -> Scheduler[Numbered]:
    return Scheduler(*limits, ROWS, iter(groups))


@dataclass(frozen=True)
class Job:
    """A request: its prompt's length, how far it may grow, how much it really generates, in how many branches."""

    prompt: int
    allowed: int
    generated: int
    width: int = 1

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
    lookahead: int = 1
    singles: int = 1

    @property
    def order(self) -> list[int]:
        """Requests as they are to be admitted: of each `lookahead` of them the longest answers first."""
        numbers, ahead = range(len(self.jobs)), self.lookahead
        return [i for first in numbers[::ahead] for i in sorted(
            numbers[first:first + ahead], key=lambda i: self.jobs[i].allowed, reverse=True)]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    allowed = draw(st.integers(1, 8))
    return Job(draw(st.integers(1, 30)), allowed, draw(st.integers(1, allowed)), draw(st.sampled_from([1, 1, 1, 2, 3])))


@st.composite
def loads(draw: st.DrawFn) -> Load:
    requests = draw(st.lists(jobs(), min_size=1, max_size=12))
    longest = max(job.max_len * job.width for job in requests)
    batch = draw(st.integers(max(job.width for job in requests), 6))
    return Load(requests, draw(st.integers(longest, 3 * longest)), batch, draw(st.integers(1, 40)),
                draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([1, 1, 4])))


class Engine:
    """Keeps the cache as the token in each row; a step must fit what the cache already holds."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.cache: list[int | None] = [None] * load.capacity
        self.fed: dict[tuple[int, int], list[int]] = {}

    def step(self, step: StepInput, running: list[Numbered]) -> None:
        arrays = (step.tokens, step.query_start, step.start, step.length, step.rows)
        assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays)
        count, batch = len(step.tokens), len(step.start)
        assert 1 <= count <= self.load.max_step_tokens
        longer = np.diff(step.query_start) > 1
        alone = int(longer.argmax()) if longer.any() else batch
        if longer.any() and self.load.max_step_tokens - alone >= 2 * self.load.singles:
            assert count + -alone % self.load.singles <= self.load.max_step_tokens
        assert 1 <= batch <= len(running) <= self.load.max_batch_size
        assert len(step.query_start) == batch + 1 and len(step.length) == batch
        assert step.query_start[0] == 0 and step.query_start[-1] == count
        assert step.copies is not None and step.copies.dtype == np.int32 and step.copies.shape[1:] == (3,)
        moved = [(target, self.cache[source:source + rows]) for source, target, rows in step.copies.tolist()]
        for target, tokens in moved:
            self.cache[target:target + len(tokens)] = tokens
        by_start = {sequence.start: sequence for sequence in running}
        assert len(by_start) == len(running)
        for i in range(batch):
            low, high = int(step.query_start[i]), int(step.query_start[i + 1])
            assert low < high, "a sequence without tokens takes no part in a step"
            self.feed(by_start[int(step.start[i])], step.tokens[low:high].tolist(), int(step.length[i]))

    def feed(self, sequence: Numbered, tokens: list[int], length: int) -> None:
        """New tokens of one sequence go into its own rows, right after those that are there."""
        position = length - len(tokens)
        rows = range(sequence.start, sequence.start + length)
        assert length <= sequence.max_len and 0 <= rows.start and rows.stop <= self.load.capacity
        for token in tokens:
            self.cache[sequence.start + position] = token
            position += 1
        self.fed.setdefault((sequence.index, sequence.branch), []).extend(tokens)
        # Attention reads the whole run: nobody else may have written into it, and nothing may be missing.
        assert [self.cache[row] for row in rows] == sequence.tokens[:length]


def value(index: int, position: int, branch: int = 0) -> int:
    """The token at a place, which no other place has."""
    return 10_000 * index + 100 * position + branch


def branches(index: int, job: Job) -> list[Numbered]:
    prompt = [value(index, p) for p in range(job.prompt)]
    return [Numbered(index, prompt if n == 0 else [], job.max_len, n) for n in range(job.width)]


def check_runs(running: list[Numbered], capacity: int) -> None:
    runs = sorted((s.start, s.start + s.max_len) for s in running)
    assert all(0 <= start < stop <= capacity for start, stop in runs)
    assert all(before[1] <= after[0] for before, after in pairwise(runs))


def serve(load: Load) -> tuple[list[int], int]:
    """Runs a load to its end; the order in which sequences finished, and the number of steps."""
    asked: list[int] = []

    def source() -> Iterator[list[Numbered]]:
        for index, job in enumerate(load.jobs):
            asked.append(index)
            yield branches(index, job)

    scheduler = Scheduler(load.capacity, load.max_batch_size, load.max_step_tokens, ROWS, source(),
                          lookahead=load.lookahead, singles=load.singles)
    engine = Engine(load)
    ended: list[int] = []
    admitted: list[int] = []
    steps = 0
    most = sum(job.prompt + job.generated * job.width for job in load.jobs)  # every step feeds at least one token
    while work := scheduler.next_step():
        steps += 1
        assert steps <= most, "steps without progress"
        step, parts = work
        check_runs(scheduler.running, load.capacity)
        admitted += [i for i in dict.fromkeys(s.index for s in scheduler.running) if i not in admitted]
        assert len(asked) <= len(admitted) + load.lookahead, "no more is asked for than may have room or wait for it"
        engine.step(step, scheduler.running)
        finished = [s for s, _ in parts]
        # One row of logits for each sequence that is now complete, at its last token.
        assert [place for _, place in parts] == [slice(i, i + 1) for i in range(len(step.rows))]
        assert [step.tokens[row] for row in step.rows] == [s.tokens[-1] for s in finished]
        assert all(s.pending == 0 for s in finished) and len({s.start for s in finished}) == len(finished)
        complete = [s for s in scheduler.running if s.pending == 0 and s.tokens]
        assert {s.start for s in complete} == {s.start for s in finished}
        for first in [s for s in finished if len(s.tokens) == load.jobs[s.index].prompt]:
            siblings = [s for s in scheduler.running if s.index == first.index]
            scheduler.fork([(sibling, first) for sibling in siblings])
            finished += [s for s in siblings if s is not first]
        for sequence in finished:
            job = load.jobs[sequence.index]
            sequence.tokens.append(value(sequence.index, len(sequence.tokens), sequence.branch))
            if len(sequence.tokens) == job.prompt + job.generated:
                scheduler.finish(sequence)
                ended.append(sequence.index)
    assert admitted == load.order and asked == list(range(len(load.jobs)))
    assert not scheduler.running
    for index, job in enumerate(load.jobs):
        for branch in range(job.width):
            # All but the last token, which nothing comes after, was fed exactly once and in order; the prompt once.
            prompt = [value(index, p) for p in range(job.prompt)] if branch == 0 else []
            new = [value(index, job.prompt + p, branch) for p in range(job.generated - 1)]
            assert engine.fed.get((index, branch), []) == prompt + new
    return ended, steps


@given(load=loads())
@example(load=Load([Job(30, 8, 8)] * 6, capacity=38, max_batch_size=6, max_step_tokens=1))
@example(load=Load([Job(1, 8, 8)] * 6, capacity=54, max_batch_size=6, max_step_tokens=3))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_token_is_fed_once_in_order_and_everything_ends(load: Load) -> None:
    ended, _ = serve(load)
    assert sorted(ended) == sorted(i for i, job in enumerate(load.jobs) for _ in range(job.width))


@given(load=loads())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_with_room_for_all_a_step_gives_every_decoding_sequence_a_token(load: Load) -> None:
    """No prefill holds up decode: once its prompt is in, a sequence ends after as many steps as it has tokens."""
    roomy = Load(load.jobs, sum(job.max_len for job in load.jobs), len(load.jobs),
                 max(load.max_step_tokens, len(load.jobs) + 1))
    groups = [[Numbered(index, [0] * job.prompt, job.max_len)] for index, job in enumerate(roomy.jobs)]
    scheduler = scheduler_of((roomy.capacity, roomy.max_batch_size, roomy.max_step_tokens), *groups)
    decoding: set[int] = set()
    while work := scheduler.next_step():
        finished = [s for s, _ in work[1]]
        assert decoding <= {s.index for s in finished}
        for sequence in finished:
            decoding.add(sequence.index)
            sequence.tokens.append(0)
            job = roomy.jobs[sequence.index]
            if len(sequence.tokens) == job.prompt + job.generated:
                scheduler.finish(sequence)
                decoding.discard(sequence.index)


def test_a_thousand_requests_through_a_small_arena() -> None:
    """None lost, none twice, none starved: each is admitted in its turn, whatever its size."""
    chance = random.Random(1)
    many = [Job(chance.randint(1, 120), allowed := chance.randint(1, 40), chance.randint(1, allowed),
                chance.choice([1] * 9 + [3])) for _ in range(1000)]
    for lookahead in (1, 100):
        ended, _ = serve(Load(many, 600, 12, 64, lookahead, singles=8))
        assert sorted(ended) == sorted(i for i, job in enumerate(many) for _ in range(job.width))


def test_a_look_ahead_shortens_the_end() -> None:
    """Few are left alone at the end when long answers begin first; and the batch is as full."""
    chance = random.Random(2)
    many = [Job(4, allowed := chance.randint(1, 60), allowed) for _ in range(64)]
    in_order, longest_first = (serve(Load(many, 10_000, 8, 64, lookahead))[1] for lookahead in (1, 64))
    assert longest_first < 0.95 * in_order


def test_what_waits_is_forgotten() -> None:
    groups = [[Numbered(i, [1, 2], 4)] for i in range(9)]
    scheduler = Scheduler(100, 2, 64, ROWS, iter(groups), lookahead=5)
    assert scheduler.next_step() and [s.index for s in scheduler.running] == [0, 1]
    scheduler.forget_waiting()
    for sequence in list(scheduler.running):
        scheduler.finish(sequence)
    assert scheduler.next_step() and [s.index for s in scheduler.running] == [5, 6]


def test_short_requests_do_not_wait_for_the_end_of_a_batch() -> None:
    # Two places: as one short request ends the next begins, while the long one goes on.
    load = Load([Job(2, 20, 20), Job(2, 3, 3), Job(2, 3, 3), Job(2, 3, 3)], capacity=100, max_batch_size=2,
                max_step_tokens=64)  # fmt: skip
    ended, steps = serve(load)
    assert ended == [1, 2, 3, 0] and steps == 20


def test_a_long_prompt_comes_in_chunks_of_the_step_size() -> None:
    scheduler = scheduler_of((100, 2, 16), [Numbered(0, list(range(40)), 41)])
    sizes = []
    for _ in range(3):
        work = scheduler.next_step()
        assert work is not None
        step, finished = work
        sizes.append((len(step.tokens), int(step.length[0]), len(finished), step.rows.tolist()))
    assert sizes == [(16, 16, 0, []), (16, 32, 0, []), (8, 40, 1, [7])]


def test_decode_goes_on_while_a_long_prompt_before_it_comes_in() -> None:
    """The long prompt was admitted first and would take the whole of every step."""
    scheduler = scheduler_of((100, 2, 8), [Numbered(0, list(range(40)), 41)], [Numbered(1, [7], 10)])
    for _ in range(5):
        work = scheduler.next_step()
        assert work is not None
        step, finished = work
        assert [s.index for s, _ in finished] == [1] and len(step.tokens) == 8
        finished[0][0].tokens.append(7)


def test_a_sequence_that_wants_every_row_gets_them_chunk_by_chunk() -> None:
    sequence = Numbered(0, list(range(20)), 21)
    sequence.every_row = True
    scheduler = scheduler_of((100, 2, 8), [sequence])
    seen = []
    for _ in range(3):
        work = scheduler.next_step()
        assert work is not None
        seen += work[0].tokens[work[0].rows].tolist()
        assert work[1] == [(sequence, slice(0, len(work[0].rows)))]
    assert seen == list(range(20))


def test_forks_of_one_step_read_before_any_of_them_writes() -> None:
    """Two beams that change places."""
    load = Load([Job(3, 4, 4, 2)], capacity=14, max_batch_size=2, max_step_tokens=8)
    engine, (a, b) = Engine(load), branches(0, load.jobs[0])
    scheduler = scheduler_of((14, 2, 8), [a, b])

    def step() -> None:
        work = scheduler.next_step()
        assert work is not None
        engine.step(work[0], scheduler.running)

    step()
    scheduler.fork([(a, a), (b, a)])
    a.tokens.append(1001)
    b.tokens.append(1002)
    step()
    scheduler.fork([(a, b), (b, a)])
    assert a.tokens[3:] == [1002] and b.tokens[3:] == [1001]
    a.tokens.append(1003)
    b.tokens.append(1004)
    step()  # the engine compares its rows with the tokens


def test_nothing_to_do_is_none() -> None:
    assert scheduler_of((10, 2, 4)).next_step() is None


def test_arena_gives_out_whole_units() -> None:
    """Where an engine has slots, every run is one, or several side by side."""
    arena = Arena(40, unit=10)
    assert [arena.take(length) for length in (10, 1, 11, 1)] == [0, 10, 20, None]
    arena.give_back(10)
    assert [arena.take(length) for length in (11, 7)] == [None, 10]


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


def test_sequences_that_want_all_logits_come_in_smaller_parts() -> None:
    """Beside one that does not; each step holds as many rows of logits as are foreseen, and all are fed."""
    whole, plain = (Numbered(i, [0] * 5000, 5001) for i in (0, 1))
    whole.every_row = True
    scheduler = scheduler_of((20000, 4, 8192), [whole], [plain])
    found = []
    while not whole.cached == plain.cached == 5000:
        work = scheduler.next_step()
        assert work is not None
        found.append((len(work[0].tokens), len(work[0].rows)))
    chunk = ROWS - 1  # one for the other sequence
    assert found == [(chunk + 5000, ROWS), (chunk, chunk), (5000 - 2 * chunk, 5000 - 2 * chunk)]


@given(wishes=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12),
       spare=st.integers(0, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_step_gives_more_rows_of_logits_than_are_foreseen(wishes: list[tuple[int, bool]], spare: int) -> None:
    """Whatever is mixed: every step goes on, and all sequences come to their ends."""
    most = len(wishes) + spare
    sequences = [Numbered(i, [0] * length, length + 2) for i, (length, _) in enumerate(wishes)]
    for sequence, (_, every_row) in zip(sequences, wishes, strict=True):
        sequence.every_row = every_row
    scheduler = Scheduler(1000, len(wishes), 64, most, iter([[sequence] for sequence in sequences]))
    while any(sequence.pending for sequence in sequences):
        work = scheduler.next_step()
        assert work is not None
        assert 0 < len(work[0].tokens) <= 64 and len(work[0].rows) <= most
