"""Beam search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpllm.sampling import RowState

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hypothesis:
    tokens: list[int]
    score: float


class BeamSearch:
    def __init__(self, row: RowState, max_len: int) -> None:
        raise NotImplementedError

    def step(self, logits: torch.Tensor, tokens: list[list[int]]) -> list[tuple[int, int]]:
        raise NotImplementedError

    def best(self) -> list[Hypothesis]:
        raise NotImplementedError
