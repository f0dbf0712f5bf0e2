"""How the next token is chosen from one row of logits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from tpllm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "max_output_len": (int,), "temperature": (float, int), "top_k": (int,), "top_p": (float, int), "seed": (int,),
    "ignore_eos": (bool,), "end_id": (int, type(None)), "stop_words": (tuple,), "bad_words": (tuple,),
    "allowed_token_ids": (tuple,), "logprobs": (int, type(None)), "prompt_logprobs": (int, type(None)),
    "num_return_sequences": (int,), "num_beams": (int,),
}


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; field names are the command line's options.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off. `seed` alone decides what is drawn, whatever
    else is in the batch. `end_id` overrides the tokenizer's end tokens.
    """

    max_output_len: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    end_id: int | None = None
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    num_return_sequences: int = 1
    num_beams: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), FIELD_TYPES[field.name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
                raise UsageError(f"--{field.name.replace('_', '-')} is {value!r}; it must be {names}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed is {self.seed}; it lies between 0 and 2**64 - 1")
        if self.max_output_len < 1:
            raise UsageError(f"--max-output-len is {self.max_output_len}; it starts at 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature is {self.temperature}; it starts at 0 (greedy)")
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}; it starts at 0 (off)")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"--top-p is {self.top_p}; it lies above 0 and up to 1 (off)")
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            raise UsageError("--top-k and --top-p choose among random draws: give --temperature too, for example 1.0")


@dataclass
class RowState:
    params: SamplingParams
    tokens: list[int]
    prompt_len: int
    end_ids: frozenset[int]
    bad_words: tuple[tuple[int, ...], ...]
    generator: torch.Generator


def row_state(params: SamplingParams, tokens: list[int], prompt_len: int, end_ids: frozenset[int],
              bad_words: tuple[tuple[int, ...], ...], number: int) -> RowState:
    import torch

    return RowState(params, tokens, prompt_len, end_ids, bad_words, torch.Generator().manual_seed(params.seed + number))


def choose(logits: torch.Tensor, rows: list[RowState]) -> list[int]:
    best: list[int] = logits.argmax(-1).tolist()
    return [choose_one(line.cpu(), row) if row.params.temperature or row.params.allowed_token_ids else token
            for line, row, token in zip(logits, rows, best, strict=True)]


def choose_one(logits: torch.Tensor, row: RowState) -> int:
    import torch

    p = row.params
    if p.allowed_token_ids:
        mask = torch.ones_like(logits, dtype=torch.bool)
        mask[list(p.allowed_token_ids)] = False
        logits = logits.masked_fill(mask, float("-inf"))
    if p.temperature == 0.0:
        return int(logits.argmax())
    logits = logits / p.temperature
    if 0 < p.top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(p.top_k).values[-1], float("-inf"))
    if p.top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, index[before >= p.top_p], float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=row.generator))


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
    result = []
    for line, token in zip(logits.log_softmax(-1).cpu(), tokens, strict=True):
        best = line.topk(top) if top else None
        found = {token: float(line[token])}
        if best is not None:
            found |= dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        result.append(found)
    return result


class Sampler:
    """One request's choice of tokens, with its own random numbers."""

    def __init__(self, params: SamplingParams) -> None:
        import torch

        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """A token id from float32 logits `[vocab]`; filters in Hugging Face's order: temperature, top-k, top-p."""
        import torch

        p = self.params
        if p.temperature == 0.0:
            return int(logits.argmax())
        logits = logits / p.temperature
        if 0 < p.top_k < logits.shape[0]:
            logits = logits.masked_fill(logits < logits.topk(p.top_k).values[-1], float("-inf"))
        if p.top_p < 1.0:
            # The smallest set of most likely tokens that reaches top_p stays; at least one does.
            ordered, index = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.index_fill(0, index[before >= p.top_p], float("-inf"))
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))
