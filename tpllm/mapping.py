"""Who a rank is among the tensor- and pipeline-parallel ranks, and division that refuses to be uneven."""

from __future__ import annotations

from dataclasses import dataclass


def divide(total: int, parts: int, what: str) -> int:
    """`total / parts`, refused with both values when it is not whole."""
    if total % parts:
        raise ValueError(f"{what} ({total}) cannot be divided evenly by {parts}")
    return total // parts


def padded(size: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `size` (TensorRT-LLM's pad_vocab_size)."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Mapping:
    """Position of one rank; tensor parallelism varies fastest, as in TensorRT-LLM's `mapping.py`."""

    tp_size: int
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.tp_rank < self.tp_size and 0 <= self.pp_rank < self.pp_size):
            raise ValueError(f"no such rank: {self}")

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @classmethod
    def all_ranks(cls, tp_size: int, pp_size: int = 1) -> list[Mapping]:
        """Every rank's mapping in rank order."""
        return [cls(tp_size, t, pp_size, p) for p in range(pp_size) for t in range(tp_size)]

    def layers(self, num_layers: int) -> range:
        """Global numbers of this stage's layers; the first `num_layers % pp_size` stages hold one more."""
        base, extra = divmod(num_layers, self.pp_size)
        start = self.pp_rank * base + min(self.pp_rank, extra)
        return range(start, start + base + (self.pp_rank < extra))
