"""Residual and root-mean-square norm of many rows in one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels.gemv import LOADS_EARLY, launches_early


@triton.jit
def store_sum_and_norm(row, residual, norm, total, normed, at, inside, N, epsilon):
    """A row, to which the residual's is added, and its norm times `norm`'s; rounded as the model rounds each."""
    dtype: tl.constexpr = total.dtype.element_ty
    result = (row.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    h = result.to(tl.float32)
    scaled = (h * tl.rsqrt(tl.sum(h * h, 0) / N + epsilon)).to(dtype)
    tl.store(normed + at, scaled * norm, mask=inside)
    tl.store(total + at, result, mask=inside)


class Shares(NamedTuple):
    """The other ranks' addends, or a product's other parts: each one's begin at row `step * rank` of `rows`."""

    rows: torch.Tensor
    rank: int
    ranks: int
    step: int


@triton.jit(do_not_specialize=["own", "STEP"])
def _add_norm(x, others, residual, norm, total, normed, own, N, STEP, epsilon, RANKS: tl.constexpr,
              EARLY: tl.constexpr, LETS: tl.constexpr, BLOCK: tl.constexpr):
    columns, line = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    inside = columns < N
    at = line * N + columns
    if LETS:
        gdc_launch_dependents()
    weight = tl.load(norm + columns, mask=inside, other=0.0)
    if EARLY:
        gdc_wait()
    left = tl.load(residual + at, mask=inside, other=0.0)
    row = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        addend = x + at if rank == own else others + (rank * STEP + line) * N + columns
        row += tl.load(addend, mask=inside, other=0.0).to(tl.float32)
    store_sum_and_norm(row, left, weight, total, normed, at, inside, N, epsilon)


def add_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, epsilon: float,
             out: torch.Tensor | None = None, shares: Shares | None = None, early: bool = False) -> torch.Tensor:
    """`x + residual [rows, width]` and its norm times `norm [width]`, stacked; in `out` where it is given.

    With `shares` x is one of several addends, which may be of another dtype. With `early` it is launched before the
    kernel in front has ended, and waits for that.
    """
    out = residual.new_empty((2, *residual.shape)) if out is None else out
    others, rank, ranks, step = shares or (x, 0, 1, 0)
    block, early = triton.next_power_of_2(x.shape[1]), early and launches_early(x.device)
    _add_norm[(x.shape[0],)](
        x, others, residual, norm, *out.unbind(0), rank, x.shape[1], step, epsilon, RANKS=ranks, EARLY=early,
        LETS=early and x.shape[0] <= LOADS_EARLY, BLOCK=block, num_warps=max(4, min(16, block // 512)),
        launch_pdl=early)
    return out
