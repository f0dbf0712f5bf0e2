"""Prompts → text: every rank steps its engine in lock-step, rank 0 schedules, samples and speaks."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm.answer import Answer, Branch, CompletionOutput, GenerationOutput, Job, Logprobs, TokenEvent
from tpllm.distributed import World
from tpllm.engine import find_backend
from tpllm.engine.base import Engine, EngineConfig, StepInput
from tpllm.errors import DataError, MismatchError, UsageError
from tpllm.mapping import Mapping
from tpllm.sampling import SamplingParams, choose, token_logprobs
from tpllm.scheduler import Scheduler
from tpllm.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

Prompt = str | AnySequence[int]
UNKNOWN = -1  # a token that the engine has and the host does not
LOOKAHEAD = 256  # jobs that may wait for room, so that long answers begin first; among 512 as good as all of them


class Collector:
    """Iterates over token events and keeps `outputs`, the answers so far, in step with them."""

    def __init__(self, outputs: list[GenerationOutput], events: Iterator[TokenEvent]) -> None:
        self.outputs = outputs
        self._events = events

    def __iter__(self) -> Iterator[TokenEvent]:
        for event in self._events:
            self.outputs[event.index] = event.answer
            yield event


class ModelRunner:
    """Generates with one engine. All ranks call the same methods; rank 0 has the text."""

    def __init__(self, world: World, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.world, self.engine, self.tokenizer = world, engine, tokenizer
        self.max_batch_size = engine.config.build.max_batch_size  # sequences at a time; the engine's bound or less

    @classmethod
    def from_dir(cls, engine_dir: str | Path, tokenizer_dir: str | Path | None = None,
                 checkpoint_dir: str | Path | None = None, world: World | None = None) -> ModelRunner:
        """Load this rank's engine; the launch must have as many ranks as the engine.

        The tokenizer is looked for in `tokenizer_dir`, else in the checkpoint; `checkpoint_dir` replaces the
        directory recorded when the engine was built. Raises a `TpllmError` on every rank if any cannot load.
        """
        world = world or World.start()
        directory = Path(engine_dir)
        config = world.together("load", lambda: EngineConfig.load(directory))
        checkpoint = find_checkpoint(config, directory, checkpoint_dir)

        def load() -> Engine:
            world.require_size(config.tp_size, f"engine {directory}", "run --engine-dir " + str(engine_dir))
            backend = find_backend(config.build.backend)
            return backend.load(directory, config, Mapping(config.tp_size, world.rank), checkpoint, world)

        engine = world.together("load", load)
        tokenizer = world.together("load", lambda: find_tokenizer(tokenizer_dir, checkpoint, config))
        return cls(world, engine, tokenizer)

    def generate(self, prompts: AnySequence[Prompt],
                 params: SamplingParams | AnySequence[SamplingParams] | None = None) -> list[GenerationOutput]:
        """Answers in the prompts' order on rank 0, which alone reads the arguments; none on the others."""
        collector = self.collector(prompts, params)
        for _ in collector:
            pass
        return collector.outputs

    def stream(self, prompts: AnySequence[Prompt],
               params: SamplingParams | AnySequence[SamplingParams] | None = None) -> Iterator[TokenEvent]:
        """Tokens as they are generated, of all prompts interleaved; on ranks other than 0 there are none."""
        return iter(self.collector(prompts, params))

    def collector(self, prompts: AnySequence[Prompt],
                  params: SamplingParams | AnySequence[SamplingParams] | None = None) -> Collector:
        """The events of `stream` as an iterable that also gathers them into outputs."""
        def prepare() -> list[Job]:
            each = each_params(prompts, params)
            return [self.prepare(i, prompt, p) for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))]

        jobs = self.world.together("prompts", lambda: prepare() if self.world.is_first else [])
        outputs = [GenerationOutput(job.index, job.prompt, job.ids, [CompletionOutput()]) for job in jobs]
        return Collector(outputs, self.serve(iter(jobs)))

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        """A request that this engine has room for; raises a `TpllmError` that says why it has none. Rank 0 only."""
        ids, vocab = self._encode(prompt, index), self.engine.config.model.vocab_size
        if not ids:
            raise DataError(f"prompt {index} has no tokens")
        if (params.stop_words or params.bad_words) and self.tokenizer is None:
            raise UsageError("--stop-words and --bad-words need a tokenizer, this model has none: give --tokenizer-dir")
        if beyond := [i for i in params.allowed_token_ids if i >= vocab]:
            raise DataError(f"prompt {index} allows token id {beyond[0]}; the vocabulary is 0 to {vocab - 1}")
        job = Job(index, prompt if isinstance(prompt, str) else None, ids, params)
        check_room(job, self.engine.config)
        return job

    def serve(self, source: Iterator[Job], drain_seconds: float = 0.0,
              lookahead: int = LOOKAHEAD) -> Iterator[TokenEvent]:
        """Answer rank 0's jobs, each as soon as there is room for it.

        When there may be room `source` is asked for up to `lookahead` jobs, of which those with the longest answers
        come first. One that ends is asked again as long as others run: it may say so that none has come yet.
        After SIGUSR1 it asks for no more, goes on for `drain_seconds` with what is running, and ends; unfinished
        answers then have no `finish_reason`. Collective; on other ranks there are no events.
        """
        self.world.enter("generate")
        return uncollected(self._lead(source, drain_seconds, lookahead) if self.world.is_first else self._follow())

    def _follow(self) -> Iterator[TokenEvent]:
        """The other ranks' side: run what rank 0 sends until it sends the end."""
        while (step := self.world.broadcast(None)) is not None:
            self.engine.step(step)
            if step.feeds:
                self.engine.feed(step.feeds, None)
        yield from ()

    def _lead(self, source: Iterator[Job], drain_seconds: float, lookahead: int) -> Iterator[TokenEvent]:
        """Rank 0's side: send each step out, run it, choose tokens, report; the last thing sent is the end."""
        world = self.world
        started = map(lambda job: Answer(job, self.tokenizer).branches, source)  # asked again after its end
        admitted = itertools.takewhile(lambda _: not world.draining, started)
        build = self.engine.config.build
        scheduler = Scheduler(self.engine.capacity, self.max_batch_size, build.step_tokens, build.step_rows, admitted,
                              self.engine.unit, lookahead, self.engine.singles)
        end: StepInput | None = None
        until = float("inf")
        flight: Flight | None = None
        try:
            while True:
                if world.draining:
                    scheduler.forget_waiting()
                    until = min(until, time.monotonic() + drain_seconds)
                    if time.monotonic() >= until:
                        break
                work = scheduler.next_step()
                if not work and not flight:
                    break
                before, flight = flight, None
                turn = Turn.take(*work, scheduler) if work else None
                if turn:
                    ahead = self.engine.ahead and turn.free
                    feeds = len(turn.drawing) if ahead else 0
                    logits = self.engine.step(world.broadcast(replace(turn.step, feeds=feeds)))
                    flight = turn.fly(logits, self.engine) if feeds else None
                if before:
                    yield from before.land(scheduler)
                if turn:
                    yield from turn.end(logits, scheduler, ahead)
            if flight:
                yield from flight.land(scheduler)
        finally:
            world.broadcast(end)

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        vocab = self.engine.config.model.vocab_size
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("this model has no tokenizer: give --tokenizer-dir DIR, or token ids (.csv, .npy)")
            try:
                return self.tokenizer.encode(prompt)
            except (ValueError, RuntimeError, TypeError) as e:  # whatever a tokenizer's library raises
                raise DataError(f"prompt {index} is not text that can be encoded: {e}") from None
        ids = [int(i) for i in prompt]
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise DataError(f"prompt {index} has token id {bad[0]}; the vocabulary is 0 to {vocab - 1}")
        return ids


def uncollected(events: Iterator[TokenEvent]) -> Iterator[TokenEvent]:
    """The same; meanwhile Python's collector passes over what is there already.

    Most of that is PyTorch's and stays; to look at it takes 0.1 s and more, in which all ranks wait.
    """
    gc.freeze()
    try:
        yield from events
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class Flight:
    """A step whose tokens are being computed while the next one is begun."""

    drawing: list[Branch]
    places: list[int]  # of the tokens among each branch's
    logits: torch.Tensor | None  # where log-probabilities are wanted
    tokens: Callable[[], list[int]]

    def land(self, scheduler: Scheduler[Branch]) -> Iterator[TokenEvent]:
        """Wait for the tokens and give them to the branches that still go on."""
        tokens = self.tokens()
        logprobs = chosen_logprobs(self.logits, tokens, self.drawing)
        for branch, place, token, found in zip(self.drawing, self.places, tokens, logprobs, strict=True):
            if not branch.ended:
                branch.tokens[place] = token
                if place == len(branch.tokens) - 1:
                    branch.fed = -1
                yield from branch.answer.accept(branch, token, found, scheduler)


@dataclass(frozen=True)
class Turn:
    """A step and what becomes of its logits."""

    step: StepInput
    parts: list[tuple[Branch, slice]]
    drawing: list[Branch]
    rows: list[int]  # of the logits, one a drawing branch
    beams: dict[Answer, dict[Branch, int]]

    @classmethod
    def take(cls, step: StepInput, parts: list[tuple[Branch, slice]], scheduler: Scheduler[Branch]) -> Turn:
        """Each complete sequence of the step gets its next token."""
        turn = cls(step, parts, [], [], {})
        for branch, place in parts:
            if branch.pending:
                continue
            if branch.answer.searches:
                turn.beams.setdefault(branch.answer, {})[branch] = place.stop - 1
                continue
            drawers = branch.answer.drawers(branch, scheduler)
            turn.drawing.extend(drawers)
            turn.rows.extend([place.stop - 1] * len(drawers))
        return turn

    @property
    def free(self) -> bool:
        """No choice of this step needs to know what was chosen before it."""
        return not self.beams and not any(branch.row.edits for branch in self.drawing)

    def fly(self, logits: torch.Tensor, engine: Engine) -> Flight:
        """Choose without waiting; the branches go on with tokens that are not known yet."""
        mine = self._mine(logits)
        tokens = engine.feed(len(self.drawing), choose(mine, [branch.row for branch in self.drawing]))
        asked = any(branch.row.params.logprobs is not None for branch in self.drawing)
        flight = Flight(self.drawing, [len(branch.tokens) for branch in self.drawing], mine if asked else None, tokens)
        for number, branch in enumerate(self.drawing):
            branch.fed = number
            branch.tokens.append(UNKNOWN)
        return flight

    def end(self, logits: torch.Tensor, scheduler: Scheduler[Branch], flown: bool) -> Iterator[TokenEvent]:
        """Score the prompts that ask for it; unless it has `flown`, choose and report what was chosen."""
        for branch, place in self.parts:
            branch.answer.score_prompt(branch, logits[place])
        if self.drawing and not flown:
            mine = self._mine(logits)
            tokens = choose(mine, [branch.row for branch in self.drawing]).tolist()
            logprobs = chosen_logprobs(mine, tokens, self.drawing)
            for branch, token, found in zip(self.drawing, tokens, logprobs, strict=True):
                if not branch.ended:  # by a token that the step before was still computing
                    branch.tokens.append(token)
                    yield from branch.answer.accept(branch, token, found, scheduler)
        for answer, of_beams in self.beams.items():
            yield from answer.search(logits, of_beams, scheduler)

    def _mine(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.rows == list(range(len(logits))) else logits[self.rows]


def chosen_logprobs(logits: torch.Tensor | None, tokens: list[int],
                    drawing: list[Branch]) -> list[Logprobs | None]:
    """The log-probabilities that each branch asks for, by its row of `logits` and the token chosen from it."""
    found: list[Logprobs | None] = [None] * len(drawing)
    if logits is None:
        return found
    for top in {branch.row.params.logprobs for branch in drawing} - {None}:
        asking = [i for i, branch in enumerate(drawing) if branch.row.params.logprobs == top]
        for i, one in zip(asking, token_logprobs(logits[asking], [tokens[i] for i in asking], top or 0), strict=True):
            found[i] = one
    return found


def each_params(prompts: AnySequence[Prompt],
                params: SamplingParams | AnySequence[SamplingParams] | None) -> list[SamplingParams]:
    """One SamplingParams a prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts and {len(params)} sampling parameters")
    return list(params)


def check_room(job: Job, config: EngineConfig) -> None:
    """Refuse a request that the engine has no room for, naming what would make it fit."""
    build, index, prompt, output = config.build, job.index, len(job.ids), job.params.max_output_len
    if prompt > build.max_input_len:
        raise DataError(f"prompt {index} has {prompt} tokens, the engine allows {build.max_input_len}; "
                        f"shorten it or build with --max-input-len {prompt}")
    if prompt + output > build.max_seq_len:
        room = build.max_seq_len - prompt
        lower = f"use --max-output-len {room} or less" if room > 0 else "shorten it"
        raise DataError(f"prompt {index} has {prompt} tokens and may grow by --max-output-len {output}, the engine "
                        f"allows {build.max_seq_len} in all; {lower}, or build with --max-seq-len {prompt + output}")
    if job.width > build.max_batch_size:
        raise DataError(f"prompt {index} asks for {job.width} sequences at once, the engine allows "
                        f"{build.max_batch_size}; build with --max-batch-size {job.width}")


def find_checkpoint(config: EngineConfig, engine_dir: Path, given: str | Path | None) -> Path:
    """Where the engine's weights are: as given, as recorded, or beside the engine if both were moved together."""
    if given is not None:
        return Path(given)
    recorded = Path(config.checkpoint_dir)
    beside = engine_dir.resolve().parent / recorded.name
    return recorded if recorded.is_dir() or not beside.is_dir() else beside


def find_tokenizer(given: str | Path | None, checkpoint: Path, config: EngineConfig) -> Tokenizer | None:
    """The tokenizer in `given` or the checkpoint; refused when its vocabulary is not the model's."""
    directory = Path(given) if given is not None else checkpoint
    tokenizer = load_tokenizer(directory)
    if tokenizer is None and given is not None:
        raise UsageError(f"no tokenizer.model or tokenizer.json in {directory}")
    size = config.model.vocab_size
    if tokenizer and (tokenizer.vocab_size > size or (tokenizer.exact and tokenizer.vocab_size != size)):
        raise MismatchError(f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model {size}: it is "
                            "another model's, or torn")
    return tokenizer
