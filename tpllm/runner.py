"""Prompts → text: every rank steps its engine in lock-step, rank 0 schedules, samples and speaks."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tpllm.distributed import World
from tpllm.engine import find_backend
from tpllm.engine.base import Engine, EngineConfig, StepInput
from tpllm.errors import DataError, MismatchError, UsageError
from tpllm.mapping import Mapping
from tpllm.sampling import Sampler, SamplingParams
from tpllm.scheduler import Scheduler, Sequence
from tpllm.tokenizer import Detokenizer, Tokenizer, load_tokenizer

Prompt = str | AnySequence[int]
MAX_STEP_TOKENS = 2048


@dataclass(frozen=True)
class TokenEvent:
    """One generated token of prompt `index`; `text` is what it completes (None without a tokenizer)."""

    index: int
    token_id: int
    text: str | None
    finish_reason: str | None


@dataclass
class CompletionOutput:
    """One answer; `text` is None without a tokenizer, `finish_reason` is "stop" or "length"."""

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None


@dataclass
class GenerationOutput:
    """A prompt and its answers, in the form of `run --output-json`."""

    id: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Collector:
    """Iterates over token events and keeps `outputs`, the answers so far, in step with them."""

    def __init__(self, outputs: list[GenerationOutput], events: Iterator[TokenEvent]) -> None:
        self.outputs = outputs
        self._events = events

    def __iter__(self) -> Iterator[TokenEvent]:
        for event in self._events:
            output = self.outputs[event.index].outputs[0]
            output.token_ids.append(event.token_id)
            output.finish_reason = event.finish_reason
            if event.text is not None:
                output.text = (output.text or "") + event.text
            yield event


class ModelRunner:
    """Generates with one engine. All ranks call the same methods; rank 0 has the text."""

    def __init__(self, world: World, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.world, self.engine, self.tokenizer = world, engine, tokenizer

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
        ids, each = self.world.together(
            "prompts", lambda: self._prepare(prompts, params) if self.world.is_first else ([], []))
        outputs = [GenerationOutput(i, p if isinstance(p, str) else None, prompt_ids, [CompletionOutput()])
                   for i, (p, prompt_ids) in enumerate(zip(prompts, ids, strict=False))]
        return Collector(outputs, self._lead(ids, each) if self.world.is_first else self._follow())

    def _follow(self) -> Iterator[TokenEvent]:
        """The other ranks' side: run what rank 0 sends until it sends the end."""
        self.world.enter("generate")
        while (step := self.world.broadcast(None)) is not None:
            self.engine.step(step)
        yield from ()

    def _lead(self, ids: list[list[int]], params: list[SamplingParams]) -> Iterator[TokenEvent]:
        """Rank 0's side: send each step out, run it, sample, report; the last thing sent is the end.

        After SIGUSR1 it ends early: unfinished answers then have no `finish_reason`.
        """
        self.world.enter("generate")
        build = self.engine.config.build
        scheduler = Scheduler(self.engine.capacity, build.max_batch_size, MAX_STEP_TOKENS)
        answers = {}
        for index, (prompt, p) in enumerate(zip(ids, params, strict=True)):
            scheduler.add(Sequence(index, list(prompt), len(prompt) + p.max_output_len))
            answers[index] = Answer(p, prompt, self.tokenizer)
        try:
            while not self.world.draining and (work := scheduler.next_step()):
                step, finished = work
                logits = self.engine.step(self.world.broadcast(step))
                best = logits.argmax(-1).tolist()  # for all rows at once: on a GPU each question is a round trip
                for row, sequence in enumerate(finished):
                    event = answers[sequence.index].accept(sequence, logits[row], best[row])
                    if event.finish_reason:
                        scheduler.finish(sequence)
                    yield event
        finally:
            end: StepInput | None = None
            self.world.broadcast(end)

    def _prepare(self, prompts: AnySequence[Prompt], params: SamplingParams | AnySequence[SamplingParams] | None,
                 ) -> tuple[list[list[int]], list[SamplingParams]]:
        """Token ids and sampling of every prompt; refused when the engine has no room for one."""
        each = each_params(prompts, params)
        ids = [self._encode(prompt, i) for i, prompt in enumerate(prompts)]
        for i, (prompt_ids, p) in enumerate(zip(ids, each, strict=True)):
            check_lengths(i, len(prompt_ids), p.max_output_len, self.engine.config)
        return ids, each

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        vocab = self.engine.config.model.vocab_size
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("this model has no tokenizer: give --tokenizer-dir DIR, or token ids (.csv, .npy)")
            try:
                return self.tokenizer.encode(prompt)
            except (UnicodeError, RuntimeError, TypeError) as e:
                raise DataError(f"prompt {index} is not text that can be encoded: {e}") from None
        ids = [int(i) for i in prompt]
        if not ids:
            raise DataError(f"prompt {index} has no tokens")
        if bad := [i for i in ids if not 0 <= i < vocab]:
            raise DataError(f"prompt {index} has token id {bad[0]}; the vocabulary is 0 to {vocab - 1}")
        return ids


class Answer:
    """What is known of one request while it is generated."""

    def __init__(self, params: SamplingParams, prompt: list[int], tokenizer: Tokenizer | None) -> None:
        self._sampler = Sampler(params)
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        ends = tokenizer.end_ids if tokenizer else frozenset()
        self._ends = frozenset() if params.ignore_eos else ends if params.end_id is None else {params.end_id}

    def accept(self, sequence: Sequence, logits: Any, best: int | None = None) -> TokenEvent:
        """Sample the sequence's next token from `logits [vocab]` and append it; `best` is the largest, if known."""
        greedy = self._sampler.params.temperature == 0.0
        token = best if greedy and best is not None else self._sampler.choose(logits.cpu())
        sequence.tokens.append(token)
        stop, full = token in self._ends, len(sequence.tokens) == sequence.max_len
        text = None
        if self._detokenizer:
            text = self._detokenizer.push(token) if not stop else ""
            if stop or full:
                text += self._detokenizer.finish()
        return TokenEvent(sequence.index, token, text, "stop" if stop else "length" if full else None)


def each_params(prompts: AnySequence[Prompt],
                params: SamplingParams | AnySequence[SamplingParams] | None) -> list[SamplingParams]:
    """One SamplingParams a prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts and {len(params)} sampling parameters")
    return list(params)


def check_lengths(index: int, prompt: int, output: int, config: EngineConfig) -> None:
    """Refuse a prompt that the engine has no room for, naming what would make it fit."""
    build = config.build
    if prompt > build.max_input_len:
        raise DataError(f"prompt {index} has {prompt} tokens, the engine allows {build.max_input_len}; "
                        f"shorten it or build with --max-input-len {prompt}")
    if prompt + output > build.max_seq_len:
        room = build.max_seq_len - prompt
        lower = f"use --max-output-len {room} or less" if room > 0 else "shorten it"
        raise DataError(f"prompt {index} has {prompt} tokens and may grow by --max-output-len {output}, the engine "
                        f"allows {build.max_seq_len} in all; {lower}, or build with --max-seq-len {prompt + output}")


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
        raise UsageError(f"no tokenizer.model in {directory}")
    size = config.model.vocab_size
    if tokenizer and (tokenizer.vocab_size > size or (tokenizer.exact and tokenizer.vocab_size != size)):
        raise MismatchError(f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model {size}: it is "
                            "another model's, or torn")
    return tokenizer
