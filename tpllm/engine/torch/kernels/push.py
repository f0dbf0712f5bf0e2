"""All-reduce of a few rows over peer memory, with the residual and the norm that follow it, in one kernel.

Every rank writes its rows straight into each peer's buffer (`peers.py`) and waits until theirs have come into its own,
so one trip over the links is all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels.gemv import LOADS_EARLY, launches_early
from tpllm.engine.torch.kernels.norm import store_sum_and_norm
from tpllm.engine.torch.kernels.peers import Buffers, send


@triton.jit(do_not_specialize=["rank"])
def _push(x, residual, norm, total, normed, places, rounds, rank, N, epsilon, PARTS: tl.constexpr,
          RANKS: tl.constexpr, SOURCES: tl.constexpr, ROWS: tl.constexpr, SEND: tl.constexpr, ADD: tl.constexpr,
          EARLY: tl.constexpr, LETS: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = total.dtype.element_ty
    bits: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    empty: tl.constexpr = -(1 << (dtype.primitive_bitwidth - 1))  # the sign alone
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < N
    if LETS:
        gdc_launch_dependents()
    weight = tl.load(norm + columns, mask=inside, other=0.0) if ADD else 0.0
    if EARLY:
        gdc_wait()
    round, at = tl.load(rounds + row), row.to(tl.int64) * N + columns
    mine = tl.load(x + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        mine += tl.load(x + part * tl.num_programs(0) * N + at, mask=inside, other=0.0)
    mine = mine.to(dtype)
    left = tl.load(residual + at, mask=inside, other=0.0) if ADD else 0.0  # here: peers are waited for next
    if SEND:  # else the kernel before has
        send(mine, row * N + columns, inside, places, round, N, RANKS, ROWS)
    sources, turn = tl.arange(0, SOURCES)[:, None], RANKS * ROWS * N
    theirs = inside[None, :] & (sources < RANKS) & (sources != rank)
    place = places[0].to(tl.pointer_type(bits), bitcast=True) + (
        ((rank + RANKS - sources) % RANKS * ROWS + row) * N + columns[None, :])
    got = tl.load(place + round % 3 * turn, mask=theirs, other=0, volatile=True)
    while tl.max((got == empty).to(tl.int32)) > 0:
        got = tl.load(place + round % 3 * turn, mask=theirs, other=0, volatile=True)
    tl.store(place + (round + 2) % 3 * turn, tl.full([SOURCES, BLOCK], empty, bits), mask=theirs)  # of the last round
    addends = tl.where(sources == rank, mine[None, :], got.to(dtype, bitcast=True))
    acc = tl.sum(addends.to(tl.float32), 0)  # in the same order on every rank, so the same bits
    tl.store(rounds + row, round + 1)
    result = acc.to(dtype)
    if ADD:
        store_sum_and_norm(result, left, weight, total, normed, at, inside, N, epsilon)
    else:
        tl.store(total + at, result, mask=inside)


def push_all_reduce(x: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """The sum over the ranks of `x [rows, width]`, for as many rows as the buffers have; collective."""
    out = torch.empty_like(x)
    _launch(x, buffers, x, x, out, out, 0.0, add=False)
    return out


def push_all_reduce_add_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, epsilon: float,
                             buffers: Buffers, sent: bool = False) -> torch.Tensor:
    """`residual` plus the sum over the ranks of `x`, and its root-mean-square norm times `norm [width]`, stacked.

    With `sent` every rank's `x` is already on its way to the others (`gemv`). Where `x` is `[parts, rows, width]` a
    rank's addend is the sum of these.
    """
    out = residual.new_empty((2, *residual.shape))
    _launch(x, buffers, residual, norm, out[0], out[1], epsilon, add=True, send=not sent)
    return out


def _launch(x: torch.Tensor, buffers: Buffers, residual: torch.Tensor, norm: torch.Tensor, total: torch.Tensor,
            normed: torch.Tensor, epsilon: float, add: bool, send: bool = True) -> None:
    *_, rows, width = x.shape
    early = launches_early(x.device)
    block = triton.next_power_of_2(width)
    ranks = len(buffers.places)
    _push[(rows,)](
        x, residual, norm, total, normed, buffers.places, buffers.rounds, buffers.rank, width, epsilon,
        PARTS=x.numel() // (rows * width), RANKS=ranks, SOURCES=triton.next_power_of_2(ranks), ROWS=buffers.rows,
        SEND=send, ADD=add, EARLY=early, LETS=early and rows <= LOADS_EARLY, BLOCK=block,
        num_warps=max(4, min(32, block // 256)), launch_pdl=early)
