"""How next tokens are chosen: one request's settings, and the choice for all rows of a step at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tpllm.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a field's annotation allows, and its name in messages; lists of these are tuples here.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"), "float": ((float, int), "a number"), "bool": ((bool,), "true or false"),
    "int | None": ((int, type(None)), "a whole number"), "bool | str": ((bool, str), "true, false or never"),
    "str": ((str,), "text"),
}
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_output_len": (lambda v: v >= 1, "starts at 1"),
    "temperature": (lambda v: v == 0 or 1e-6 <= v <= 1e6, "is 0 (greedy), or lies between 1e-6 and 1e6"),
    "top_k": (lambda v: v >= 0, "starts at 0 (off)"),
    "top_p": (lambda v: 0 < v <= 1, "lies above 0 and up to 1 (off)"),
    "min_p": (lambda v: 0 <= v <= 1, "lies between 0 (off) and 1"),
    "repetition_penalty": (lambda v: 0 < v <= 1e6, "lies above 0 and up to 1e6; 1 is off"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "lies between -2 and 2; 0 is off"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "lies between -2 and 2; 0 is off"),
    "no_repeat_ngram_size": (lambda v: v >= 0, "starts at 0 (off)"),
    "min_length": (lambda v: v >= 0, "starts at 0 (off)"),
    "seed": (lambda v: 0 <= v < 2**64, "lies between 0 and 2**64 - 1"),
    "stop_words": (lambda v: all(map(is_word, v)), "must be words of one or more characters"),
    "bad_words": (lambda v: all(map(is_word, v)), "must be words of one or more characters"),
    "allowed_token_ids": (lambda v: all(i >= 0 for i in v), "must be token ids, which start at 0"),
    "logprobs": (lambda v: v is None or v >= 0, "starts at 0 (the chosen token's alone)"),
    "prompt_logprobs": (lambda v: v is None or v >= 0, "starts at 0 (the prompt's tokens alone)"),
    "num_return_sequences": (lambda v: v >= 1, "starts at 1"),
    "num_beams": (lambda v: v >= 1, "starts at 1 (no beam search)"),
    "length_penalty": (lambda v: -10 <= v <= 10, "lies between -10 and 10"),
    "early_stopping": (lambda v: v in (True, False, "never"), "must be true, false or never"),
    "end_id": (lambda v: v is None or v >= 0, "must be a token id, which starts at 0"),
}


def is_word(word: str) -> bool:
    """Whether there is something to look for, and a tokenizer can encode it: half a surrogate pair it cannot."""
    return word != "" and word == word.encode(errors="ignore").decode()


def is_kind(value: Any, kind: str) -> bool:
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and all(is_kind(v, kind[6:9]) for v in value)
    kinds = KINDS[kind][0]
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; field names are the command line's options.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` alone decides what is drawn,
    whatever else is in the batch. `min_length` counts generated tokens. `presence_penalty` and `frequency_penalty`
    look at generated tokens only, `repetition_penalty` and `no_repeat_ngram_size` at the prompt too. `logprobs` N
    asks for the chosen token's log-probability and the N best. `num_beams` above 1 is beam search, whose
    `early_stopping` is transformers' (False, True or "never"). `end_id` overrides the tokenizer's end tokens.
    Raises UsageError where a value or a combination makes no sense.
    """

    max_output_len: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    seed: int = 0
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    ignore_eos: bool = False
    end_id: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind, option = getattr(self, field.name), str(field.type), "--" + field.name.replace("_", "-")
            if isinstance(value, list):  # from JSON or the command line
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if not is_kind(value, kind):
                words = f"a list, each {KINDS[kind[6:9]][1]}" if kind.startswith("tuple") else KINDS[kind][1]
                raise UsageError(f"{option} is {value!r}; it must be {words}")
            holds, words = LIMITS.get(field.name, (lambda v: True, ""))
            if not holds(value):
                raise UsageError(f"{option} is {value!r}; it {words}")
        self._check_together()

    def _check_together(self) -> None:
        beams, n = self.num_beams, self.num_return_sequences
        drawn = self.temperature > 0
        if not drawn and (self.top_k or self.top_p < 1.0 or self.min_p):
            raise UsageError("--top-k, --top-p and --min-p choose among random draws: give --temperature too, "
                             "for example 1.0")
        if beams > 1 and drawn:
            raise UsageError(f"--num-beams {beams} draws nothing: leave out --temperature {self.temperature}")
        if beams > 1 and (self.logprobs is not None or self.stop_words):
            raise UsageError(f"--logprobs and --stop-words go without beam search: leave out --num-beams {beams}")
        if beams == 1 and (self.length_penalty != 1.0 or self.early_stopping):
            raise UsageError("--length-penalty and --early-stopping steer beam search: give --num-beams too")
        if beams > 1 and n > beams:
            raise UsageError(f"--num-return-sequences {n} is more than --num-beams {beams} can find")
        if beams == 1 and n > 1 and not drawn:
            raise UsageError(f"--num-return-sequences {n} would be {n} times the same: give --temperature or "
                             f"--num-beams {n}")
        if self.min_length > self.max_output_len:
            raise UsageError(f"--min-length {self.min_length} is above --max-output-len {self.max_output_len}")


@dataclass
class RowState:
    """What choosing a row's next token needs to know."""

    params: SamplingParams
    tokens: list[int]  # prompt and generated so far: the sequence's own list, which grows
    prompt_len: int
    end_ids: frozenset[int]
    bad_words: tuple[tuple[int, ...], ...]  # as token ids
    sample: int  # its number among the answers to the request

    @classmethod
    def start(cls, params: SamplingParams, tokens: list[int], end_ids: frozenset[int] = frozenset(),
              bad_words: tuple[tuple[int, ...], ...] = (), sample: int = 0) -> RowState:
        """The state after the prompt `tokens`."""
        return cls(params, tokens, len(tokens), end_ids, bad_words, sample)

    @cached_property
    def generator(self) -> torch.Generator:
        """Of this row's draws; made when the first one comes, as that takes as long as a small step."""
        import torch

        return torch.Generator().manual_seed((self.params.seed + self.sample) % 2**64)

    @cached_property
    def edits(self) -> bool:
        """Whether `process` may change this row."""
        p = self.params
        return bool(p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty or p.no_repeat_ngram_size
                    or p.min_length or self.bad_words or p.allowed_token_ids)


def bad_word_ids(words: Iterable[str], encode: Callable[[str], list[int]]) -> tuple[tuple[int, ...], ...]:
    """The ways a tokenizer writes words: alone, and after other text with and without a space between.

    `encode` puts the beginning-of-text token first.
    """
    head = encode("\n")  # after it a sentencepiece tokenizer adds no space of its own
    found = set()
    for word in words:
        found.add(tuple(encode(word)[1:]))
        for ids in (encode("\n" + word), encode("\n " + word)):
            if ids[:len(head)] == head:
                found.add(tuple(ids[len(head):]))
    return tuple(sorted(found - {()}))


def choose(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """The next token `[rows]` of every row from float32 logits `[rows, vocab]`, which are left as they are.

    Filters in transformers' order and meaning. A row's choice depends on nothing but its own logits and state.
    Bans that leave no token at all give way; only `allowed_token_ids` hold then.
    """
    import torch

    if edited := [i for i, row in enumerate(rows) if row.edits]:
        which = torch.tensor(edited, device=logits.device)
        raw, states = logits[which], [rows[i] for i in edited]
        new, rest = process(raw, states), allow(raw, states)
        logits = logits.index_copy(0, which, torch.where((new > float("-inf")).any(-1, keepdim=True), new, rest))
    best = logits.argmax(-1)
    if drawn := [i for i, row in enumerate(rows) if row.params.temperature > 0]:
        which = torch.tensor(drawn, device=logits.device)
        best[which] = draw(logits[which], [rows[i] for i in drawn])
    return best


def process(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Scores `[rows, vocab]` after everything that comes before the filters of random draws."""
    import torch

    result = scores.clone()
    flat, params = result.view(-1), [row.params for row in rows]
    seen = places(scores, [set(row.tokens) if row.params.repetition_penalty != 1.0 else () for row in rows])
    old = flat[seen]
    penalty = torch.tensor([p.repetition_penalty for p in params], device=seen.device)[seen // scores.shape[-1]]
    flat[seen] = torch.where(old < 0, old * penalty, old / penalty)
    counts = [Counter(row.tokens[row.prompt_len:] if row.params.presence_penalty or row.params.frequency_penalty
                      else ()) for row in rows]  # fmt: skip
    penalties = [-p.presence_penalty - p.frequency_penalty * n
                 for p, count in zip(params, counts, strict=True) for n in count.values()]
    flat.index_add_(0, places(scores, counts), torch.tensor(penalties, dtype=torch.float32, device=seen.device))
    flat[places(scores, [banned(row) for row in rows])] = float("-inf")
    return allow(result, rows)


def banned(row: RowState) -> set[int]:
    """The token ids that may not come next."""
    tokens, n = row.tokens, row.params.no_repeat_ngram_size
    found: set[int] = set()
    if n:
        tail = tokens[len(tokens) + 1 - n:]
        found |= {tokens[i + n - 1] for i in range(len(tokens) + 1 - n) if tokens[i:i + n - 1] == tail}
    for *start, last in row.bad_words:
        # An end token alone is no bad word, as in transformers: the text could not end.
        if tokens[len(tokens) - len(start):] == start and (start or last not in row.end_ids):
            found.add(last)
    if len(tokens) - row.prompt_len < row.params.min_length:
        found |= row.end_ids
    return found


def allow(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Scores `[rows, vocab]` of nothing but `allowed_token_ids` in the rows that have some."""
    import torch

    allowed = places(scores, [row.params.allowed_token_ids for row in rows])
    kept = torch.full_like(scores, float("-inf"))
    kept.view(-1)[allowed] = scores.flatten()[allowed]
    limited = torch.tensor([[bool(row.params.allowed_token_ids)] for row in rows], device=scores.device)
    return torch.where(limited, kept, scores)


def places(scores: Tensor, ids: Iterable[Iterable[int]]) -> Tensor:
    """Where each row's token ids are in flattened scores; those outside of the vocabulary cannot come anyway."""
    import torch

    vocab = scores.shape[-1]
    return torch.tensor([number * vocab + i for number, row in enumerate(ids) for i in row if i < vocab],
                        dtype=torch.long, device=scores.device)


def warp(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Scores `[rows, vocab]` after temperature, top-k, top-p and min-p; -inf where a token is filtered out."""
    import torch

    params, vocab = [row.params for row in rows], scores.shape[-1]
    settings = torch.tensor([
        (p.temperature, min(p.top_k, vocab) or vocab, 1 - p.top_p, p.min_p) for p in params],
        dtype=torch.float64).to(scores.device)
    temperature, top_k, cut, min_p = settings.split(1, dim=-1)
    scores = scores / temperature.float()
    if widest := max(p.top_k if p.top_k < vocab else 0 for p in params):
        # Equal scores at the edge all stay.
        edge = scores.topk(widest).values.gather(-1, top_k.long().clamp(max=widest) - 1)
        scores = scores.masked_fill((scores < edge) & (top_k < vocab), float("-inf"))
    if nucleus := [i for i, p in enumerate(params) if p.top_p < 1.0]:
        which = torch.tensor(nucleus, device=scores.device)
        ordered, ids = scores[which].sort(dim=-1, stable=True)
        # Summed in float64, so that the order in which a device adds does not decide.
        removed = ordered.softmax(-1).cumsum(-1, dtype=torch.float64).float() <= cut[which].float()
        removed[:, -1] = False
        removed = torch.empty_like(removed).scatter(-1, ids, removed)  # back in the vocabulary's order
        scores[which] = scores[which].masked_fill(removed, float("-inf"))
    if any(p.min_p for p in params):
        likely = scores.softmax(-1)
        scores = scores.masked_fill(likely < min_p.float() * likely.amax(-1, keepdim=True), float("-inf"))
    return scores


def draw(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """A token of every row `[rows]`, drawn with the row's own generator from what `warp` leaves."""
    import torch

    reached = warp(scores, rows).softmax(-1).cumsum(-1, dtype=torch.float64)
    uniform = 1 - torch.cat([torch.rand(1, 1, dtype=torch.float64, generator=row.generator) for row in rows])
    # Above 0 and up to 1: the first token that reaches it is one that was left. (Not a number is never reached.)
    place = torch.searchsorted(reached, uniform.to(scores.device) * reached[:, -1:])
    return place.clamp_(max=scores.shape[-1] - 1)[:, 0]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
    """Log-probabilities in the model's own distribution, from float32 logits `[rows, vocab]`: each row's token
    first, then its `top` best."""
    import torch

    everything = logits.log_softmax(-1)
    own = torch.tensor([tokens], device=logits.device).T
    best = everything.topk(min(top, logits.shape[-1]))
    ids = torch.cat([own, best.indices], -1).tolist()
    values = torch.cat([everything.gather(-1, own), best.values], -1).tolist()
    return [dict(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]
