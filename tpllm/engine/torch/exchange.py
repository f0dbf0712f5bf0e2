"""Sums over the ranks of a large product's parts, each of which is on its way while the next is computed."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from tpllm.engine.torch.private import symmetric_memory

SETS = 2  # of places, by turns: when a rank fills one again, the other has used what was in it


class Parts(Protocol):
    """All ranks call the same methods in the same order: `begin`, `send` of each part, `received` of each, `end`."""

    def begin(self) -> None: ...

    def send(self, part: torch.Tensor, row: int) -> None:
        """Of this rank, the rows from `row` on, once the work is done that makes them; it must stay until `end`."""

    def received(self, part: torch.Tensor, row: int) -> torch.Tensor | None:
        """What is to be added to the part, or nothing: it is the sum. What is launched from now on waits for it."""

    def end(self) -> None: ...


class Reduced:
    """Through NCCL, in place."""

    def begin(self) -> None:
        self._sums: dict[int, dist.Work] = {}

    def send(self, part: torch.Tensor, row: int) -> None:
        work = dist.all_reduce(part, async_op=True)
        assert work is not None
        self._sums[row] = work

    def received(self, part: torch.Tensor, row: int) -> None:
        self._sums[row].wait()  # holds up the stream, not the host

    def end(self) -> None:
        self._sums.clear()


class Exchanged:
    """Two ranks that reach each other's memory: a copy engine writes each one's part into the other's.

    It takes no multiprocessor from the product, which NCCL's kernels do.
    """

    def __init__(self, rank: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._places, self._peers = symmetric_memory((SETS, rows, width), dtype, device)
        self._other = 1 - rank
        self._theirs = self._peers.buffer(self._other, self._places)
        self._stream = torch.cuda.Stream(device)
        self._turn = 0

    def begin(self) -> None:
        self._turn = (self._turn + 1) % SETS
        self._channels: dict[int, int] = {}

    def send(self, part: torch.Tensor, row: int) -> None:
        channel = self._channels[row] = len(self._channels)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._theirs[self._turn, row:row + part.shape[0]].copy_(part)
            self._peers.signal(self._other, channel)

    def received(self, part: torch.Tensor, row: int) -> torch.Tensor:
        self._peers.wait(self._other, self._channels[row])
        return self._places[self._turn, row:row + part.shape[0]]

    def end(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
