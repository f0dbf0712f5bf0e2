"""Buffers that the ranks of a process group write into each other's memory.

An element says by itself that it has come: an empty place holds -0.0, which nobody sends. Three sets of places take
turns. A rank that writes into one has seen its peer begin the round before, in which that peer has done with the set
before that and empties it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SETS = 3


class Buffers(NamedTuple):
    """One rank's places `[SETS, ranks, rows, width]` and how often each row was used.

    Behind its own are the next ranks' places, around to the rank before it. What a rank sends to one so many ranks
    ahead is in places of that number there: kernels that only send need not know which rank they are.
    """

    places: tuple[torch.Tensor, ...]
    rounds: torch.Tensor  # int32 [rows]
    rank: int

    @property
    def rows(self) -> int:
        return self.places[0].shape[2]


def make_buffers(places: tuple[torch.Tensor, ...], rank: int) -> Buffers:
    """Of all ranks' symmetric memory, `rank`'s first; the caller lets the ranks meet before the first use."""
    own, *_ = places
    own.fill_(-0.0)
    return Buffers(places, torch.zeros(own.shape[2], dtype=torch.int32, device=own.device), rank)


@triton.jit
def send(values, at, inside, places, round, N, RANKS: tl.constexpr, ROWS: tl.constexpr):
    """Values into every peer's buffer, `at` elements behind where this rank's begin in a round."""
    bits: tl.constexpr = tl.int16 if values.dtype.primitive_bitwidth == 16 else tl.int32
    empty: tl.constexpr = -(1 << (values.dtype.primitive_bitwidth - 1))  # the sign alone
    sent = values.to(bits, bitcast=True)
    sent = tl.where(sent == empty, 0, sent)
    for ahead in tl.static_range(1, RANKS):
        there = places[ahead].to(tl.pointer_type(bits), bitcast=True)
        tl.store(there + (round % 3 * RANKS + ahead) * ROWS * N + at, sent, mask=inside, cache_modifier=".wt")
