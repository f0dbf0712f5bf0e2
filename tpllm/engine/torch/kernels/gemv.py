"""One row times a matrix, at the memory's speed: normalization before, SwiGLU and residual after, in the same kernel.

The kernels of a step follow each other by programmatic dependent launch where the GPU has it: each begins, and
reads its first weights, while the one before it still runs, and waits for it only to read what it wrote.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels.peers import Buffers, send

FEW_PROGRAMS = 4096  # below these each has more warps: enough loads must be under way
NUMBERS = 8  # of each row in a program's tile, for each of its threads


class Tile(NamedTuple):
    """Of a program: its results, each a row of the matrix or, with SwiGLU, two, and its warps."""

    results: int
    warps: int


@triton.jit
def _weights(pointers, rows, columns, N, K):
    """A tile of the matrix, zeros beyond its edges; nobody reads it again in this step."""
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _finish(result, gate, squares, residual, out, place, mask, K, epsilon, NORM: tl.constexpr,
            RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr):
    """Store sums, of which `gate` are those of SwiGLU's second half; what was stored."""
    scale = tl.rsqrt(squares / K + epsilon) if NORM else 1.0
    result *= scale
    if SWIGLU:
        result = result / (1.0 + tl.exp(-result)) * (gate * scale)
    if RESIDUAL:
        result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    result = result.to(out.dtype.element_ty)
    tl.store(out + place, result, mask=mask)
    return result


@triton.jit
def _gemv(x, w, scales, norm, residual, out, N, K, epsilon, addresses, rounds, SCALED: tl.constexpr,
          NORM: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, EARLY: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr = 0, RANKS: tl.constexpr = 1,
          ROWS: tl.constexpr = 1):
    """With SCALED each row of the matrix stands for itself times its scale; with RANKS the peers get the result too."""
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    pointers = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    other = pointers + N.to(tl.int64) * K  # SwiGLU: the second half of the rows
    if EARLY:
        gdc_launch_dependents()
    tile = _weights(pointers, rows, columns, N, K)
    tile2 = _weights(other, rows, columns, N, K) if SWIGLU else tile
    scale = tl.load(scales + rows, mask=rows < N, other=0.0) if SCALED else 1.0
    scale2 = tl.load(scales + N + rows, mask=rows < N, other=0.0) if SCALED and SWIGLU else scale
    if EARLY:
        gdc_wait()
    acc, acc2 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + columns < K
        row = tl.load(x + k + columns, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += row * row
            row *= tl.load(norm + k + columns, mask=inside, other=0.0).to(tl.float32)
        acc += tile.to(tl.float32) * row[None, :]
        tile = _weights(pointers + k + BLOCK_K, rows, k + BLOCK_K + columns, N, K)
        if SWIGLU:
            acc2 += tile2.to(tl.float32) * row[None, :]
            tile2 = _weights(other + k + BLOCK_K, rows, k + BLOCK_K + columns, N, K)
    result, gate = tl.sum(acc, 1), tl.sum(acc2, 1)
    if SCALED:
        result *= scale
        gate *= scale2
    result = _finish(result, gate, tl.sum(squares, 0), residual, out, rows, rows < N, K, epsilon, NORM, RESIDUAL,
                     SWIGLU)
    if RANKS > 1:
        send(result, rows, rows < N, addresses, tl.load(rounds), N, RANK, RANKS, ROWS)


@cache
def launches_early(device: torch.device) -> bool:
    """Whether the GPU can start a kernel before the one in front of it has ended (Hopper and later)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def tile_of(size: int, swiglu: bool) -> Tile:
    """What is fastest for so many results on an H200 (`launch/sweep_products.py`)."""
    results = 1 if swiglu else 2
    return Tile(results, 4 if triton.cdiv(size, results) < FEW_PROGRAMS else 2)


def gemv(x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None, epsilon: float,
         residual: torch.Tensor | None, swiglu: bool, peers: Buffers | None = None) -> torch.Tensor:
    """`[1, N]`: x or, with `norm [K]`, its root-mean-square norm, times `weight [N, K]`, plus `residual [1, N]`.

    With `swiglu` the weight is `[2N, K]` and the result silu(first half) * second half. With `peers` it is also sent to
    their buffers, where `push_all_reduce_add_norm` must look for it next.
    """
    size = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = torch.empty((1, size), dtype=x.dtype, device=x.device)
    early, (results, warps) = launches_early(x.device), tile_of(size, swiglu)
    ranks = {} if peers is None else {"RANK": peers.rank, "RANKS": len(peers.addresses), "ROWS": peers.rows}
    theirs = (out, out) if peers is None else (peers.addresses, peers.rounds)
    _gemv[(triton.cdiv(size, results),)](
        x, weight, weight, weight if norm is None else norm, out if residual is None else residual, out, size,
        weight.shape[1], epsilon, *theirs, SCALED=False, NORM=norm is not None, RESIDUAL=residual is not None,
        SWIGLU=swiglu, EARLY=early, BLOCK_N=results, BLOCK_K=32 * warps * NUMBERS, num_warps=warps, launch_pdl=early,
        **ranks)
    return out
