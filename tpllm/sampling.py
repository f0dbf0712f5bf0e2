"""How the next token is chosen from one row of logits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from tpllm.errors import UsageError

if TYPE_CHECKING:
    import torch


FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "max_output_len": (int,), "temperature": (float, int), "top_k": (int,), "top_p": (float, int), "seed": (int,),
    "ignore_eos": (bool,), "end_id": (int, type(None)),
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
