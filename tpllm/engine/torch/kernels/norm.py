"""Residual and root-mean-square norm of many rows in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def store_sum_and_norm(row, residual, norm, total, normed, at, columns, inside, N, epsilon):
    """A row, to which the residual is added, and its norm; rounded as the model rounds each."""
    dtype: tl.constexpr = total.dtype.element_ty
    result = (row.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    h = result.to(tl.float32)
    scaled = (h * tl.rsqrt(tl.sum(h * h, 0) / N + epsilon)).to(dtype)
    tl.store(normed + at, scaled * tl.load(norm + columns, mask=inside, other=0.0), mask=inside)
    tl.store(total + at, result, mask=inside)


@triton.jit
def _add_norm(x, other, residual, norm, total, normed, N, epsilon, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    at = tl.program_id(0).to(tl.int64) * N + columns
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if OTHER:
        row += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    store_sum_and_norm(row, residual, norm, total, normed, at, columns, inside, N, epsilon)


def add_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, epsilon: float,
             out: torch.Tensor | None = None, other: torch.Tensor | None = None) -> torch.Tensor:
    """`x + residual [rows, width]` and its norm times `norm [width]`, stacked; in `out` where it is given.

    With `other [rows, width]` that of `x + other`, the same for `other + x`.
    """
    out = x.new_empty((2, *x.shape)) if out is None else out
    total, normed = out.unbind(0)
    block = triton.next_power_of_2(x.shape[1])
    _add_norm[(x.shape[0],)](
        x, x if other is None else other, residual, norm, total, normed, x.shape[1], epsilon, OTHER=other is not None,
        BLOCK=block, num_warps=max(4, min(16, block // 512)))
    return out
