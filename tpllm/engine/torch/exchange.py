"""Sums over the ranks of a large product's parts, each of which is on its way while the next is computed.

Either through NCCL, or, where the ranks' GPUs reach each other's memory, by copy engines, which take no multiprocessor
from the product as NCCL's kernels do. Each rank then has a share of every part's rows: it gets the others' of these,
adds them up, norms them, and gives everyone the norm. Of the sum itself it has its own rows only.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from tpllm.engine.torch.private import symmetric_memory

PART_ROWS = 2048  # of a part, at least
MAX_PARTS = 8  # each has signals of its own, for which peers' memory has little room


def ranks_ahead(rank: int, ranks: int) -> list[int]:
    """The other ranks, the next one first."""
    return [(rank + i) % ranks for i in range(1, ranks)]


def in_parts(rows: int) -> bool:
    """Whether a product of so many rows is summed part by part."""
    return rows >= 2 * PART_ROWS


class Parts(Protocol):
    """All ranks call it with as many rows at the same time."""

    def linear_add_norm(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                        epsilon: float) -> torch.Tensor:
        """`residual [rows, width]` plus the ranks' sum of `x [rows, in]` times `weight [width, in]`, and its norm times
        `norm [width]`, stacked."""


class Split(NamedTuple):
    """How `rows` are split: in parts of `step`, the last may be shorter, each of which has a `share` for every rank."""

    rows: int
    step: int
    share: int

    @classmethod
    def of(cls, rows: int, ranks: int) -> Split:
        share = -(-rows // (min(rows // PART_ROWS, MAX_PARTS) * ranks))
        return cls(rows, share * ranks, share)

    def parts(self) -> list[slice]:
        return [slice(row, min(row + self.step, self.rows)) for row in range(0, self.rows, self.step)]

    def of_rank(self, part: slice, rank: int) -> slice:
        """A rank's rows of a part."""
        start = min(part.start + rank * self.share, part.stop)
        return slice(start, min(start + self.share, part.stop))

    def rank_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Whose each row is."""
        return rows % self.step // self.share


class Reduced:
    """Through NCCL, in place; all ranks have all of the sum."""

    def linear_add_norm(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                        epsilon: float) -> torch.Tensor:
        from tpllm.engine.torch.kernels.norm import add_norm

        products, out = torch.empty_like(residual), residual.new_empty((2, *residual.shape))
        sums = []
        parts = Split.of(x.shape[0], 1).parts()
        for part in parts:
            torch.mm(x[part], weight.t(), out=products[part])
            sums.append(dist.all_reduce(products[part], async_op=True))
        for part, done in zip(parts, sums, strict=True):
            done.wait()  # holds up the GPU's stream, not the host
            add_norm(products[part], residual[part], norm, epsilon, out[:, part])
        return out


class Exchanged:
    """By copy engines. Room is for steps of so many `rows`.

    What a rank writes into another's memory was read there before: it has the other's part of this product, which was
    made after all of the last one's had been read.
    """

    def __init__(self, rank: int, ranks: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank, self.ranks, self.rows = rank, ranks, rows
        # The others' addends, their norms.
        self._space, self._peers = symmetric_memory((2, self.room(rows, ranks), width), dtype, device)
        self._others = ranks_ahead(rank, ranks)
        self._theirs = {other: self._peers.buffer(other, self._space) for other in self._others}
        self._sending, self._summing, self._gathering = (torch.cuda.Stream(device, priority) for priority in (0, -1, 0))

    @staticmethod
    def room(rows: int, ranks: int) -> int:
        """Rows of memory for a step's, as shares are rounded up."""
        return rows + ranks * MAX_PARTS

    def linear_add_norm(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                        epsilon: float) -> torch.Tensor:
        products, out = torch.empty_like(residual), residual.new_empty((2, *residual.shape))
        split, main, made = Split.of(x.shape[0], self.ranks), torch.cuda.current_stream(), []
        parts = split.parts()
        for part in parts:
            torch.mm(x[part], weight.t(), out=products[part])
            made.append(main.record_event())
        with torch.cuda.stream(self._sending):
            for i, (part, done) in enumerate(zip(parts, made, strict=True)):
                self._sending.wait_event(done)
                self._send(products, split, part, i)
        with torch.cuda.stream(self._summing):
            for i, (part, done) in enumerate(zip(parts, made, strict=True)):
                self._summing.wait_event(done)
                self._sum(products, residual, norm, epsilon, out, split, part, (i, len(parts) + i))
        with torch.cuda.stream(self._gathering):
            self._gathering.wait_event(made[0])
            for i, part in enumerate(parts):
                self._gather(out[1], split, part, len(parts) + i)
        for stream in (self._sending, self._summing, self._gathering):
            main.wait_stream(stream)
        return out

    def _send(self, products: torch.Tensor, split: Split, part: slice, channel: int) -> None:
        """Everyone's share to them."""
        for other in self._others:
            share = products[split.of_rank(part, other)]
            place = part.start + self.rank * split.share
            self._theirs[other][0, place:place + share.shape[0]].copy_(share)
            self._peers.signal(other, channel)

    def _sum(self, products: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, epsilon: float,
             out: torch.Tensor, split: Split, part: slice, channels: tuple[int, int]) -> None:
        """This rank's share, and its norm to everyone."""
        from tpllm.engine.torch.kernels.norm import Shares, add_norm

        own = split.of_rank(part, self.rank)
        for other in self._others:
            self._peers.wait(other, channels[0])
        shares = Shares(self._space[0, part.start:part.start + split.step], self.rank, self.ranks, split.share)
        add_norm(products[own], residual[own], norm, epsilon, out[:, own], shares)
        for other in self._others:
            self._theirs[other][1, own].copy_(out[1, own])
            self._peers.signal(other, channels[1])

    def _gather(self, normed: torch.Tensor, split: Split, part: slice, channel: int) -> None:
        """The others' shares of the norm."""
        own = split.of_rank(part, self.rank)
        for other in self._others:
            self._peers.wait(other, channel)
        for rows in (slice(part.start, own.start), slice(own.stop, part.stop)):
            normed[rows].copy_(self._space[1, rows])
