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
    """One rank's places `[SETS, ranks, rows, width]`, where all ranks' are, and how often each row was used."""

    places: torch.Tensor  # keeps the memory alive
    addresses: torch.Tensor  # int64 [ranks]
    rounds: torch.Tensor  # int32 [rows]
    rank: int

    @property
    def rows(self) -> int:
        return self.places.shape[2]


def make_buffers(places: torch.Tensor, addresses: list[int], rank: int) -> Buffers:
    """Of a rank's `places`, symmetric memory; the caller lets the ranks meet before the first use."""
    places.fill_(-0.0)
    device = places.device
    return Buffers(places, torch.tensor(addresses, dtype=torch.int64, device=device),
                   torch.zeros(places.shape[2], dtype=torch.int32, device=device), rank)


@triton.jit
def send(values, at, inside, addresses, round, N, rank, RANKS: tl.constexpr, ROWS: tl.constexpr):
    """Values into every peer's buffer, `at` elements behind where this rank's begin in a round.

    Its rank is no constant here and elsewhere, so that all ranks have the same kernels.
    """
    bits: tl.constexpr = tl.int16 if values.dtype.primitive_bitwidth == 16 else tl.int32
    empty: tl.constexpr = -(1 << (values.dtype.primitive_bitwidth - 1))  # the sign alone
    sent = values.to(bits, bitcast=True)
    sent = tl.where(sent == empty, 0, sent)
    for peer in tl.static_range(RANKS):
        if peer != rank:
            there = tl.load(addresses + peer).to(tl.pointer_type(bits))
            tl.store(there + (round % 3 * RANKS + rank) * ROWS * N + at, sent, mask=inside, cache_modifier=".wt")
