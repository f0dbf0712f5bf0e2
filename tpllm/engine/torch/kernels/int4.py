"""A few rows times a matrix of int4 weights (`tpllm/quantization.py` has their layout), by tensor cores.

At four bits a weight arithmetic takes longer than memory, so little is done for each: two numbers of a word become two
16-bit floats by one shift and one logical operation, in the lowest bits of a float, in which they are numbers already,
too large by a constant. Tensor cores take any order of columns as long as both operands have the same. In the one here
each thread's words, as it loads them, give just its part of the operand: nothing of it moves between threads.

Each warp of a program takes a group of columns at a time; the warps' sums meet at the end. (Of several groups a warp
Triton 3.6 makes wrong products.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels.gemv import LOADS_EARLY, Tile, _finish, before_attention, launches_early

ROWS = 4  # of x, at most
# As in gemv.py, of one row of x.
TILES = {4096: (16, 16), 8192: (32, 16), 16384: (32, 8), 1 << 31: (32, 4)}
FEW_TILES = TILES | {1 << 31: (64, 4)}  # of more rows
# The bits of 128 or 1,024, whose last four are free, in both halves of a word; by how much numbers are then too large.
ONES = {torch.bfloat16: (0x43004300, 136.0), torch.float16: (0x64006400, 1032.0)}


@triton.jit
def _pairs(words, ones, i: tl.constexpr):
    """Numbers i and i + 4 of each word as the bits of two floats. As a constant `ones` would take an operation more."""
    both = ((words >> (4 * i)) & 0x000F000F) | ones
    return tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))


@triton.jit
def _matrix(words, ones, dtype: tl.constexpr, WARPS: tl.constexpr, EIGHTS: tl.constexpr):
    """Words `[8, warps, eights, 16]` as floats `[warps, 8 * eights, 128]`.

    Bits of a column's number in a group: one that says which half of a word, two for the number in the half, four for
    the word. Those of its place in the operand: the two, word 0, word 3, word 2, word 1, the half.
    """
    low = tl.join(_pairs(words, ones, 0), _pairs(words, ones, 1))
    high = tl.join(_pairs(words, ones, 2), _pairs(words, ones, 3))
    bits = tl.reshape(tl.join(low, high), (8, WARPS, EIGHTS, 4, 2, 2, 2, 2, 2))
    bits = tl.permute(bits, (1, 2, 0, 8, 7, 5, 3, 4, 6))
    return tl.reshape(bits, (WARPS, 8 * EIGHTS, 128)).to(dtype, bitcast=True)


@triton.jit
def _columns(values, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """Values `[warps, rows, 128]` as `[warps, 128, rows]`, in the order of `_matrix`."""
    values = tl.reshape(values, (WARPS, ROWS, 2, 4, 4, 2, 2))
    values = tl.permute(values, (0, 3, 6, 4, 5, 2, 1))
    return tl.reshape(values, (WARPS, 128, ROWS))


@triton.jit
def _words(pointers, valid, group, groups, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers, eviction_policy="evict_first")
    mask = valid[:, None, :, None] & (group < groups)[None, :, None, None]
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _row_of(i, j, N, EIGHTS: tl.constexpr, SWIGLU: tl.constexpr):
    """Row i of a program's eight j: which of its results it is for, and how many rows behind the first it is."""
    if SWIGLU:
        half: tl.constexpr = EIGHTS // 2
        return j % half * 8 + i, j % half * 8 + i + j // half * N
    else:
        return j * 8 + i, j * 8 + i


@triton.jit(do_not_specialize=["M"])
def _int4(x, w, scales, norm, residual, out, M, N, K: tl.constexpr, epsilon, ones, NORM: tl.constexpr,
          RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, EARLY: tl.constexpr, LETS: tl.constexpr, LATE: tl.constexpr,
          WHOLE: tl.constexpr, ROWS: tl.constexpr, EIGHTS: tl.constexpr, WARPS: tl.constexpr, MORE: tl.constexpr):
    """`gemv.gemv` of M rows."""
    groups, warps, rows = tl.cdiv(K, 128), tl.arange(0, WARPS), tl.arange(0, ROWS)
    start = tl.program_id(0) * (8 * EIGHTS // (1 + SWIGLU))
    result, line = _row_of(tl.arange(0, 8)[:, None], tl.arange(0, EIGHTS)[None, :], N, EIGHTS, SWIGLU)
    valid, behind = start + result < N, (warps * 16)[None, :, None, None] + tl.arange(0, 16)[None, None, None, :]
    pointers = w + start.to(tl.int64) * (groups * 16) + (line[:, None, :, None] * (groups * 16) + behind)
    at = tl.arange(0, 8 * EIGHTS)
    flat_result, flat_line = _row_of(at % 8, at // 8, N, EIGHTS, SWIGLU)
    factors = scales + start.to(tl.int64) * groups + (flat_line[None, :] * groups + warps[:, None])
    flat_result += start
    present = (flat_result < N)[None, :]
    columns = (warps * 128)[:, None, None] + tl.arange(0, 128)[None, None, :]
    inputs, inside = x + rows[None, :, None] * K + columns, (rows < M)[None, :, None]
    if LETS and not LATE:
        gdc_launch_dependents()
    words = _words(pointers, valid, warps, groups, WHOLE)
    factor = tl.load(factors, mask=present & (warps < groups)[:, None], other=0.0)
    of = start + tl.arange(0, 4 * EIGHTS) if SWIGLU else flat_result
    place, mask = rows[None, :] * N + of[:, None], (of < N)[:, None] & (rows < M)[None, :]
    if EARLY:
        gdc_wait()
    left = tl.load(residual + place, mask=mask, other=0.0) if RESIDUAL else 0.0
    # One step ahead, too: behind the arithmetic on it, or the compiler would spread it over threads before that.
    value = tl.load(inputs, mask=inside & (columns < K), other=0.0)
    weight = tl.load(norm + columns, mask=columns < K, other=0.0) if NORM else value
    acc = tl.zeros([WARPS, 8 * EIGHTS, ROWS], tl.float32)
    squares = tl.zeros([WARPS, ROWS, 128], tl.float32)
    for g in range(0, groups, WARPS):
        if NORM:
            squares += value.to(tl.float32) * value.to(tl.float32)
            value = (value.to(tl.float32) * weight.to(tl.float32)).to(x.dtype.element_ty)
        excess = tl.sum(value.to(tl.float32), 2) * MORE
        part = tl.dot(_matrix(words, ones, x.dtype.element_ty, WARPS, EIGHTS), _columns(value, WARPS, ROWS))
        acc += (part - excess[:, None, :]) * factor.to(tl.float32)[:, :, None]
        after = g + WARPS
        if after < groups:
            words = _words(pointers + after * 16, valid, after + warps, groups, WHOLE)
            factor = tl.load(factors + after, mask=present & (after + warps < groups)[:, None], other=0.0)
            value = tl.load(inputs + after * 128, mask=inside & (after * 128 + columns < K), other=0.0)
            if NORM:
                weight = tl.load(norm + after * 128 + columns, mask=after * 128 + columns < K, other=0.0)
    if LETS and LATE:
        gdc_launch_dependents()
    sums, total = tl.sum(acc, 0), tl.sum(tl.sum(squares, 2), 0)[None, :]
    if SWIGLU:
        first, gate = tl.split(tl.permute(tl.reshape(sums, (2, 4 * EIGHTS, ROWS)), (1, 2, 0)))
    else:
        first, gate = sums, sums
    _finish(first, gate, total, left, out, place, mask, K, epsilon, NORM, RESIDUAL, SWIGLU)


def tile_of(tiles: dict[int, tuple[int, int]], size: int, swiglu: bool) -> Tile:
    """What is fastest for so many results on an H200 (`launch/sweep_products.py`), of a quantized kernel's `TILES`."""
    return Tile.of(*next(tile for most, tile in tiles.items() if size * (1 + swiglu) <= most), swiglu)


def few_rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor | None = None,
             epsilon: float = 0.0, residual: torch.Tensor | None = None, swiglu: bool = False) -> torch.Tensor:
    """`[M, N]` from up to `ROWS` rows x `[M, K]` of 16-bit floats, as `gemv.gemv` has it for one.

    But for the product with `norm`, which is rounded to these floats, sums are made of exact products in float32.
    """
    (count, columns), size = x.shape, weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = torch.empty((count, size), dtype=x.dtype, device=x.device)
    early, (ones, more) = launches_early(x.device), ONES[x.dtype]
    results, warps = tile_of(TILES if count == 1 else FEW_TILES, size, swiglu)
    warps = warps if count <= 2 else min(warps, 8)
    whole = size % results == 0 and triton.cdiv(columns, 128) % warps == 0
    _int4[(triton.cdiv(size, results),)](
        x, weight, scale, weight if norm is None else norm, out if residual is None else residual, out, count, size,
        columns, epsilon, ones, NORM=norm is not None, RESIDUAL=residual is not None, SWIGLU=swiglu, EARLY=early,
        LETS=early and count <= LOADS_EARLY, LATE=before_attention(residual, swiglu), WHOLE=whole,
        ROWS=triton.next_power_of_2(count), EIGHTS=results * (1 + swiglu) // 8, WARPS=warps, MORE=more,
        num_warps=warps, launch_pdl=early)
    return out
