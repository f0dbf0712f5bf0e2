"""Beam search: the `num_beams` best continuations of one request, as transformers' `generate` finds them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpllm.sampling import RowState, allow, process


@dataclass
class Hypothesis:
    """A continuation that has ended."""

    tokens: list[int]  # generated, with the end token if there is one
    score: float  # sum of log-probabilities / length ** length_penalty
    finish_reason: str  # "stop" at an end token, "length" at the greatest length


class BeamSearch:
    """The search of one request, which the caller drives: `step` until nothing lives, then `best`.

    `max_len` is the greatest length of prompt and answer together.
    """

    def __init__(self, row: RowState, max_len: int) -> None:
        self._row, self._max_len = row, max_len
        self._scores = [0.0]  # sums of log-probabilities of the live beams, best first
        self._ended: list[Hypothesis] = []  # best first, at most num_beams

    def step(self, logits: Tensor, tokens: list[list[int]]) -> list[tuple[int, int]]:
        """The next live beams, best first, as (parent beam, token); none when the search has ended.

        `logits` `[k, vocab]` and `tokens` (prompt and generated, equally long) belong to the live beams: k is 1 after
        the prompt, then num_beams. Where there are fewer continuations than beams, copies of the best that can win
        nothing fill up.
        """
        p = self._row.params
        length = len(tokens[0]) + 1 - self._row.prompt_len
        live: list[tuple[float, int, int]] = []
        for rank, (score, parent, token) in enumerate(self._candidates(logits, tokens)):
            stop = token in self._row.end_ids
            if not stop and length < self._max_len - self._row.prompt_len:
                live.append((score, parent, token))
            elif rank < p.num_beams:
                answer = [*tokens[parent][self._row.prompt_len:], token]
                self._ended.append(Hypothesis(answer, score / length**p.length_penalty, "stop" if stop else "length"))
        self._ended = sorted(self._ended, key=lambda h: -h.score)[:p.num_beams]
        if not live or self._is_decided(live[0][0], length):
            return []
        live = live[:p.num_beams] + [(float("-inf"), *live[0][1:])] * (p.num_beams - len(live))
        self._scores = [score for score, _, _ in live]
        return [(parent, token) for _, parent, token in live]

    def best(self) -> list[Hypothesis]:
        """The `num_return_sequences` best, best first; fewer if the search ran out of continuations."""
        return self._ended[:self._row.params.num_return_sequences]

    def _candidates(self, logits: Tensor, tokens: list[list[int]]) -> list[tuple[float, int, int]]:
        """(score, parent, token) of the best continuations, best first: enough for num_beams that do not end."""
        raw = logits.log_softmax(-1)
        before = torch.tensor(self._scores, device=logits.device)[:, None]
        rows = [replace(self._row, tokens=t) for t in tokens]
        # Bans that leave no token at all give way, as in `choose`.
        for edit in (process, allow) if self._row.edits else (allow,):
            total = (edit(raw, rows) + before).flatten()
            best = total.topk(min(max(2, 1 + len(self._row.end_ids)) * self._row.params.num_beams, len(total)))
            # One question to the device for both.
            pairs = torch.stack([best.values.double(), best.indices.double()], -1).tolist()
            if found := [(score, *divmod(int(i), logits.shape[-1])) for score, i in pairs if score > float("-inf")]:
                return found
        return []

    def _is_decided(self, best_live: float, length: int) -> bool:
        """Whether no live beam can or may still enter the answers, by transformers' rules of `early_stopping`."""
        p = self._row.params
        if len(self._ended) < p.num_beams:
            return False
        if p.early_stopping is True:
            return True
        # Scores only sink, but a length penalty divides them by more as the answer grows.
        far = p.early_stopping == "never" and p.length_penalty > 0
        reachable = self._max_len - self._row.prompt_len if far else length
        return bool(best_live / reachable**p.length_penalty <= self._ended[-1].score)
