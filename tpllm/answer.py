"""One request on rank 0: its sequences in the making, what each has said so far, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tpllm.beam import BeamSearch
from tpllm.errors import RankError
from tpllm.sampling import RowState, SamplingParams, bad_word_ids, token_logprobs
from tpllm.scheduler import Scheduler, Sequence
from tpllm.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    import torch

Logprobs = dict[int, float]  # token id → natural logarithm of its probability: the token's own first, then the best


@dataclass
class CompletionOutput:
    """One answer; `text` is None without a tokenizer, `finish_reason` is "stop" or "length" once it has ended."""

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    logprobs: list[Logprobs] | None = None  # of each token, if asked for
    score: float | None = None  # of a beam: sum of log-probabilities over length ** length_penalty


@dataclass
class GenerationOutput:
    """A prompt and its answers, in the form of `run --output-json`."""

    id: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None  # None for the first token: nothing comes before it

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; what was not asked for is left out."""
        data = asdict(self)
        for part in (data, *data["outputs"]):
            for name in ("logprobs", "prompt_logprobs", "score"):
                if name in part and part[name] is None:
                    del part[name]
        return data


@dataclass(frozen=True)
class TokenEvent:
    """One generated token of answer number `output` to prompt `index`; beams are told when all have ended."""

    index: int
    output: int
    token_id: int
    text: str | None  # what the token completes; None without a tokenizer
    finish_reason: str | None
    answer: GenerationOutput  # all that is known so far
    last: bool  # every answer to this prompt is complete


@dataclass(frozen=True)
class Job:
    """A request that is fit to run."""

    index: int
    prompt: str | None
    ids: list[int]
    params: SamplingParams

    @property
    def width(self) -> int:
        """Sequences that it keeps in the batch at once."""
        return max(self.params.num_beams, self.params.num_return_sequences)


class TextStream:
    """An answer's text as it comes, up to the first stop word; what may turn out to begin one is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop_words: AnySequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop_words = stop_words
        self._held = ""

    def push(self, token: int | None, ends: bool) -> tuple[str, bool]:
        """The text that `token` completes (None: a token without text), and whether a stop word ends the answer."""
        if token is not None:
            self._held += self._detokenizer.push(token)
        if ends:
            self._held += self._detokenizer.finish()
        found = [place for word in self._stop_words if (place := self._held.find(word)) >= 0]
        if found:
            return self._held[:min(found)], True
        held = 0 if ends else max((n for word in self._stop_words for n in range(1, len(word))
                                   if self._held.endswith(word[:n])), default=0)
        shown = len(self._held) - held
        piece, self._held = self._held[:shown], self._held[shown:]
        return piece, False


class Completion:
    """Collects the tokens of one answer, and tells which was its last."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None, end_ids: frozenset[int]) -> None:
        self.output = CompletionOutput(text="" if tokenizer else None,
                                       logprobs=None if job.params.logprobs is None else [])
        self._ends, self._most = end_ids, job.params.max_output_len
        self._text = TextStream(tokenizer, job.ids, job.params.stop_words) if tokenizer else None

    def push(self, token: int, logprobs: Logprobs | None = None) -> str | None:
        """Append a token; the text it completes. `output.finish_reason` tells whether it was the last."""
        output = self.output
        output.token_ids.append(token)
        if output.logprobs is not None and logprobs is not None:
            output.logprobs.append(logprobs)
        stop, full = token in self._ends, len(output.token_ids) == self._most
        piece = None
        if self._text:
            piece, found = self._text.push(None if stop else token, stop or full)
            stop = stop or found
            output.text = (output.text or "") + piece
        output.finish_reason = "stop" if stop else "length" if full else None
        return piece


class Branch(Sequence):
    """A sequence in the batch: one of an answer's samples, or one of its beams."""

    def __init__(self, answer: Answer, number: int) -> None:
        job = answer.job
        super().__init__(list(job.ids) if number == 0 else [], len(job.ids) + job.params.max_output_len,
                         every_row=number == 0 and job.params.prompt_logprobs is not None)
        self.answer, self.number = answer, number
        self.row = RowState.start(job.params, self.tokens, answer.end_ids, answer.bad_words, number)
        self.row.prompt_len = len(job.ids)  # which branches that are still to be forked do not have yet


class Answer:
    """A job in progress. Its branches are forked from the first one when the prompt is in the cache."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None) -> None:
        self.job = job
        ends = tokenizer.end_ids if tokenizer else frozenset()
        p = job.params
        self.end_ids = frozenset() if p.ignore_eos else ends if p.end_id is None else frozenset({p.end_id})
        self.bad_words = bad_word_ids(p.bad_words, tokenizer.encode) if tokenizer else ()
        self.branches = [Branch(self, number) for number in range(job.width)]
        self._completions = [Completion(job, tokenizer, self.end_ids) for _ in range(p.num_return_sequences)]
        self._search = BeamSearch(self.branches[0].row, self.branches[0].max_len) if p.num_beams > 1 else None
        self._beams = self.branches[:1]  # the search's live beams in its order
        self.output = GenerationOutput(job.index, job.prompt, job.ids, [c.output for c in self._completions])
        if p.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]

    @property
    def searches(self) -> bool:
        """Beams choose their tokens together."""
        return self._search is not None

    def score_prompt(self, branch: Branch, logits: torch.Tensor) -> None:
        """Take the log-probabilities of the prompt's next tokens from the logits of those just before them."""
        if not branch.every_row or self.output.prompt_logprobs is None:
            return
        first = branch.cached - len(logits) + 1
        tokens = self.job.ids[first:branch.cached + 1]
        top = self.job.params.prompt_logprobs or 0
        self.output.prompt_logprobs += token_logprobs(logits[:len(tokens)], tokens, top)
        branch.every_row = branch.pending > 0

    def drawers(self, branch: Branch, scheduler: Scheduler[Branch]) -> list[Branch]:
        """The branches whose next token comes from `branch`'s logits: all of them when the prompt has come in."""
        if len(branch.tokens) > len(self.job.ids) or len(self.branches) == 1:
            return [branch]
        scheduler.fork([(other, branch) for other in self.branches])
        return self.branches

    def accept(self, branch: Branch, token: int, logprobs: Logprobs | None, scheduler: Scheduler[Branch],
               ) -> list[TokenEvent]:
        """A branch's next token, its tokens' last, is known."""
        completion = self._completions[branch.number]
        text = completion.push(token, logprobs)
        if completion.output.finish_reason:
            scheduler.finish(branch)
        return [self._event(branch.number, text)]

    def search(self, logits: torch.Tensor, rows: dict[Branch, int], scheduler: Scheduler[Branch]) -> list[TokenEvent]:
        """The beams' next step, from each live beam's row of `logits`; events come when the search has ended."""
        assert self._search
        mine = logits[[rows[beam] for beam in self._beams]]
        children = self._search.step(mine, [beam.tokens for beam in self._beams])
        if children:
            parents = [self._beams[parent] for parent, _ in children]
            places = stay_in_place(parents, self.branches)
            scheduler.fork(list(zip(places, parents, strict=True)))
            for beam, (_, token) in zip(places, children, strict=True):
                beam.tokens.append(token)
            self._beams = places
            return []
        for branch in self.branches:
            scheduler.finish(branch)
        found = self._search.best()
        if not found:
            raise RankError(f"prompt {self.job.index}: beam search found nothing, the logits are not numbers")
        del self._completions[len(found):], self.output.outputs[len(found):]  # it may have run out of continuations
        events = []
        for number, (completion, hypothesis) in enumerate(zip(self._completions, found, strict=True)):
            completion.output.score = hypothesis.score
            events += [self._event(number, completion.push(token)) for token in hypothesis.tokens]
        return events

    def _event(self, number: int, text: str | None) -> TokenEvent:
        output = self._completions[number].output
        last = all(c.output.finish_reason for c in self._completions)
        return TokenEvent(self.job.index, number, output.token_ids[-1], text, output.finish_reason, self.output, last)


def stay_in_place(parents: list[Branch], branches: list[Branch]) -> list[Branch]:
    """The branch in which each child of `parents` goes on: its parent's for one child of each, then what is free."""
    free = list(branches)
    places: list[Branch | None] = []
    for parent in parents:
        places.append(parent if parent in free else None)
        if parent in free:
            free.remove(parent)
    return [place or free.pop(0) for place in places]
