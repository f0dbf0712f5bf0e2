"""One row times a matrix, at the memory's speed: normalization before, SwiGLU and residual after, in the same kernel.

The kernels of a step follow each other by programmatic dependent launch where the GPU has it: each begins, and
reads its first weights, while the one before it still runs, and waits for it only to read what it wrote.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels.peers import Buffers, send

NUMBERS = 8  # of each row in a program's tile, for each of its threads
# Rows of which products have weights in registers before the kernel in front has ended: one here, two in int4.py.
LOADS_EARLY = 2


class Tile(NamedTuple):
    """Of a program: its results, each a row of the matrix or, with SwiGLU, two, and its warps."""

    results: int
    warps: int

    @classmethod
    def of(cls, rows: int, warps: int, swiglu: bool) -> Tile:
        """Of so many rows of the matrix."""
        return cls(rows // (1 + swiglu), warps)


@triton.jit
def _places(w, columns, N, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's rows of the matrix, where its tile begins, and for SwiGLU the one in the second half of the rows.

    K is a constant, so that a thread's addresses are one and its distances from it: the registers hold weights instead.
    """
    first, lines = tl.program_id(0) * BLOCK_N, tl.arange(0, BLOCK_N)
    within = lines[:, None] * K + columns[None, :]
    return first + lines, w + first.to(tl.int64) * K + within, w + (N + first).to(tl.int64) * K + within


@triton.jit
def _weights(pointers, rows, columns, N, K, WHOLE: tl.constexpr):
    """A tile of the matrix, zeros beyond its edges, if it has any; nobody reads it again in this step."""
    if WHOLE:
        return tl.load(pointers, eviction_policy="evict_first")
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _fold(products, NUMBERS: tl.constexpr):
    """For each of a tile's rows and each thread the sum of its own products, so many neighbouring ones."""
    return tl.sum(tl.reshape(products, [products.shape[0], products.shape[1] // NUMBERS, NUMBERS]), 2)


@triton.jit
def _finish(result, gate, squares, left, out, place, mask, K, epsilon, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
            SWIGLU: tl.constexpr):
    """Store sums, of which `gate` are those of SwiGLU's second half, plus the residual's `left`; what was stored."""
    scale = tl.rsqrt(squares / K + epsilon) if NORM else 1.0
    result *= scale
    if SWIGLU:
        result = result / (1.0 + tl.exp(-result)) * (gate * scale)
    if RESIDUAL:
        result += left.to(tl.float32)
    result = result.to(out.dtype.element_ty)
    tl.store(out + place, result, mask=mask)
    return result


@triton.jit
def _gemv(x, w, scales, norm, residual, out, N, K: tl.constexpr, epsilon, places, rounds, SCALED: tl.constexpr,
          NORM: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr,
          WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUMBERS: tl.constexpr,
          RANKS: tl.constexpr = 1, ROWS: tl.constexpr = 1):
    """With SCALED each row of the matrix stands for itself times its scale; with RANKS the peers get the result too;
    with LATE the next kernel may begin when the sums are made."""
    columns = tl.arange(0, BLOCK_K)
    rows, pointers, other = _places(w, columns, N, K, BLOCK_N)
    if EARLY and not LATE:
        gdc_launch_dependents()
    tile = _weights(pointers, rows, columns, N, K, WHOLE)
    tile2 = _weights(other, rows, columns, N, K, WHOLE) if SWIGLU else tile
    scale = tl.load(scales + rows, mask=rows < N, other=0.0) if SCALED else 1.0
    scale2 = tl.load(scales + N + rows, mask=rows < N, other=0.0) if SCALED and SWIGLU else scale
    if EARLY:
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K // NUMBERS], tl.float32)
    acc2, squares = acc, tl.zeros([BLOCK_K], tl.float32)
    left = tl.load(residual + rows, mask=rows < N, other=0.0) if RESIDUAL else 0.0
    round = tl.load(rounds) if RANKS > 1 else 0
    next = tl.load(x + columns, mask=columns < K, other=0.0)
    for k in range(0, K, BLOCK_K):
        row, after = next.to(tl.float32), k + BLOCK_K
        next = tl.load(x + after + columns, mask=after + columns < K, other=0.0)
        if NORM:
            squares += row * row
            row *= tl.load(norm + k + columns, mask=k + columns < K, other=0.0).to(tl.float32)
        acc += _fold(tile.to(tl.float32) * row[None, :], NUMBERS)
        if SWIGLU:
            acc2 += _fold(tile2.to(tl.float32) * row[None, :], NUMBERS)
        if after < K:
            tile = _weights(pointers + after, rows, after + columns, N, K, WHOLE)
            if SWIGLU:
                tile2 = _weights(other + after, rows, after + columns, N, K, WHOLE)
    if EARLY and LATE:
        gdc_launch_dependents()
    result, gate = tl.sum(acc, 1), tl.sum(acc2, 1)
    if SCALED:
        result *= scale
        gate *= scale2
    result = _finish(result, gate, tl.sum(squares, 0), left, out, rows, rows < N, K, epsilon, NORM, RESIDUAL, SWIGLU)
    if RANKS > 1:
        send(result, rows, rows < N, places, round, N, RANKS, ROWS)


@cache
def launches_early(device: torch.device) -> bool:
    """Whether the GPU can start a kernel before the one in front of it has ended (Hopper and later)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def before_attention(residual: torch.Tensor | None, swiglu: bool) -> bool:
    """Whether attention may follow a product, whose programs would take the room of the product's last ones."""
    return residual is None and not swiglu


def tile_for(lines: int, columns: int, swiglu: bool) -> Tile:
    """Of a matrix: what is fastest among a layer's kernels on an H200 (`launch/measure_layer.py --tiles`)."""
    if columns > 3072 and columns % 2048 == 1024:  # as 13B's 5,120: eight warps take 2,048 at a time
        rows, warps = 4 if lines > 14336 else 8, 4
    elif swiglu or lines > 8192:
        rows, warps = 4 if columns < 8192 else 2, 8
    elif columns <= 3072:
        rows, warps = 2 if columns <= 1024 else 4, 4
    else:
        rows, warps = 8 if columns % 2048 else 2, 8
    return Tile.of(rows, warps, swiglu)


def tile_options(size: int, columns: int, tile: Tile) -> dict[str, Any]:
    """What `_gemv` is compiled for beside what it does."""
    # Of all but the shortest rows so few threads that each has something to load while it multiplies.
    steps = 1 if columns <= 1024 else 2
    warps = min(tile.warps, max(1, triton.next_power_of_2(columns // (steps * 32 * NUMBERS))))
    block = 32 * warps * NUMBERS
    return {"WHOLE": size % tile.results == 0 and columns % block == 0, "BLOCK_N": tile.results, "BLOCK_K": block,
            "NUMBERS": NUMBERS, "num_warps": warps}


def gemv(x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None, epsilon: float,
         residual: torch.Tensor | None, swiglu: bool, peers: Buffers | None = None) -> torch.Tensor:
    """`[1, N]`: x or, with `norm [K]`, its root-mean-square norm, times `weight [N, K]`, plus `residual [1, N]`.

    With `swiglu` the weight is `[2N, K]` and the result silu(first half) * second half. With `peers` it is also sent to
    their buffers, where `push_all_reduce_add_norm` must look for it next.
    """
    lines, columns = weight.shape
    size = lines // (1 + swiglu)
    out = torch.empty((1, size), dtype=x.dtype, device=x.device)
    early, tile = launches_early(x.device), tile_for(lines, columns, swiglu)
    ranks = {} if peers is None else {"RANKS": len(peers.places), "ROWS": peers.rows}
    theirs = ((out,), out) if peers is None else (peers.places, peers.rounds)
    _gemv[(triton.cdiv(size, tile.results),)](
        x, weight, weight, weight if norm is None else norm, out if residual is None else residual, out, size,
        columns, epsilon, *theirs, SCALED=False, NORM=norm is not None, RESIDUAL=residual is not None,
        SWIGLU=swiglu, EARLY=early, LATE=peers is None and before_attention(residual, swiglu), launch_pdl=early,
        **tile_options(size, columns, tile), **ranks)
    return out
