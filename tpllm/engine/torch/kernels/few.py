"""Two to 96 rows times a matrix, as decode of a few sequences has them, at nearly the memory's speed.

Unlike in `gemv.py` no program lets the next kernel begin before it has its sums: those programs would take the first
room that they find, so that some multiprocessors had four of them, others one. Other products are cuBLAS's.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels import few_quantized
from tpllm.engine.torch.kernels.few_quantized import _swiglu_of_pairs
from tpllm.engine.torch.kernels.gemv import launches_early
from tpllm.engine.torch.kernels.norm import Shares, add_norm

LINES = 64  # of the matrix in a program's tile
# Of a GPU's multiprocessors have a program, or the product is cuBLAS's; of short sums of up to 32 rows fewer have.
FEWEST, FEWEST_OF_SHORT, SHORT = 0.6, 0.35, 4096
PARTS, SHORTEST = 2, 512  # of a sum whose programs were fewer, so many columns long at least


class Cut(NamedTuple):
    """How many programs share the columns of the same lines, how many tiles each asks for ahead, and their size."""

    parts: int
    stages: int
    columns: int = 128
    lines: int = LINES


# Of up to so many rows: the cut for programs that are one to a multiprocessor at most, two, three, and for more. Where
# not all have room at once, none is to be left over: up to 32 rows there is room for three at a time that ask for
# three tiles, or two that ask for four. As measured on an H200; nothing stands where cuBLAS is as fast.
CUTS = {32: (Cut(1, 5), Cut(1, 4), Cut(1, 3), Cut(1, 4)), 64: (Cut(1, 5), Cut(1, 3), Cut(1, 4, 64), Cut(1, 3))}
CUTS_IN_PARTS = {64: Cut(PARTS, 5), 96: Cut(PARTS, 8, 64)}
# Tiles half as high, of up to so many rows, where only these are programs enough: for so much of the GPU.
CUT_IN_HALF, HALVED, FEWEST_HALVES = Cut(1, 8, lines=LINES // 2), 16, 0.9


@triton.jit(do_not_specialize=["M"])
def _few(x, w, out, M, N, K: tl.constexpr, SWIGLU: tl.constexpr, EARLY: tl.constexpr, LINES: tl.constexpr,
         COLUMNS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr):
    """`[PARTS, M, N]`. With SwiGLU a program has eight lines of the first half, then eight of the second, and so on: a
    thread of a matrix product has lines l and l + 8, so both factors of its results."""
    column, row, line = tl.arange(0, COLUMNS)[None, :], tl.arange(0, ROWS)[:, None], tl.arange(0, LINES)
    first, part = tl.program_id(0), tl.program_id(1)
    RESULTS: tl.constexpr = LINES // 2 if SWIGLU else LINES
    within = (line // 16 * 8 + line % 8) * K + line // 8 % 2 * N * K if SWIGLU else line * K
    lines = w + first.to(tl.int64) * (RESULTS * K) + within
    begin, end = part * (K // COLUMNS) // PARTS, (part + 1) * (K // COLUMNS) // PARTS
    if EARLY:
        gdc_wait()
    inside, rows, pointers = row < M, x + row * K + column, lines[:, None] + column
    acc = tl.zeros([LINES, ROWS], tl.float32)
    for at in tl.range(begin, end, num_stages=STAGES):
        tile = tl.load(pointers + at * COLUMNS)
        taken = tl.load(rows + at * COLUMNS, mask=inside, other=0.0)
        acc = tl.dot(tile, tl.trans(taken), acc)
    if EARLY:
        gdc_launch_dependents()
    if SWIGLU:
        acc = _swiglu_of_pairs(acc, ROWS, LINES, True)
    place = (part * M + row) * N + first * RESULTS + tl.arange(0, RESULTS)[None, :]
    tl.store(out + place, tl.trans(acc).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _swiglu(x, out, M, N, PARTS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """Of `[PARTS, M, 2N]`."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
    half, gate = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        at = x + (part * M + row) * 2 * N + column
        half += tl.load(at, mask=column < N, other=0.0).to(tl.float32)
        gate += tl.load(at + N, mask=column < N, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    half = half.to(dtype).to(tl.float32)
    silu = (half / (1.0 + tl.exp(-half))).to(dtype)  # rounded as the model rounds it
    tl.store(out + row * N + column, silu * gate.to(dtype), mask=column < N)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def room(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's stubs lack this one
    return int(properties.shared_memory_per_block_optin)


def cut_for(x: torch.Tensor, weight: torch.Tensor, divisible: bool = False) -> Cut | None:
    """How the product of `x [M, K]` and `weight [N, K]` is cut, if this kernel is for it; with `divisible` in parts."""
    (rows, columns), lines = x.shape, weight.shape[0]
    if rows < 2 or x.dtype == torch.float32 or columns % 64 or lines % LINES:
        return None
    each = lines / LINES / multiprocessors(x.device)  # programs of a multiprocessor
    fewest, cut = FEWEST_OF_SHORT if rows <= 32 and columns <= SHORT else FEWEST, None
    if divisible and each < FEWEST and columns // PARTS >= SHORTEST:
        each *= PARTS
        cut = next((cut for most, cut in CUTS_IN_PARTS.items() if rows <= most), None)
    elif each < fewest and 2 * each >= FEWEST_HALVES and rows <= HALVED:
        each, cut = 2 * each, CUT_IN_HALF
    elif cuts := next((cuts for most, cuts in CUTS.items() if rows <= most), None):
        cut = cuts[min(math.ceil(each), len(cuts)) - 1]
    if cut and columns % cut.columns:  # tiles half as wide, and more of them ahead
        cut = cut._replace(stages=min(8, 2 * cut.stages), columns=64)
    return cut if cut and each >= fewest and shared(cut, rows) <= room(x.device) else None


def shared(cut: Cut, rows: int) -> int:
    """Bytes of shared memory that a program takes: its tiles of 16-bit floats."""
    return cut.stages * cut.columns * (cut.lines + tile_rows(rows)) * 2


def tile_rows(rows: int) -> int:
    """As tensor cores take them: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(rows)))


def few(x: torch.Tensor, weight: torch.Tensor, cut: Cut, swiglu: bool = False) -> torch.Tensor:
    """`[M, N]` of `x [M, K]` and `weight [N, K]`, of `[2N, K]` with `swiglu`; of several parts `[parts, M, N]`."""
    (rows, columns), size = x.shape, weight.shape[0] // (1 + swiglu)
    shape, dtype = ((rows, size), x.dtype) if cut.parts == 1 else ((cut.parts, rows, size), torch.float32)
    out, early = torch.empty(shape, dtype=dtype, device=x.device), launches_early(x.device)
    _few[(weight.shape[0] // cut.lines, cut.parts)](
        x.contiguous(), weight, out, rows, size, K=columns, SWIGLU=swiglu, EARLY=early, LINES=cut.lines,
        COLUMNS=cut.columns, ROWS=tile_rows(rows), PARTS=cut.parts, STAGES=cut.stages, num_warps=4, launch_pdl=early)
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None,
           divisible: bool = False) -> torch.Tensor:
    """`[M, N]` of `x [M, K]` and `weight [N, K]`; with `divisible` it may be the parts in float32, `[parts, M, N]`.

    With `scale` the weight is quantized.
    """
    if scale is not None:
        return few_quantized.linear(x, weight, scale, divisible)
    cut = cut_for(x, weight, divisible)
    return F.linear(x, weight) if cut is None else few(x, weight, cut)


def linear_swiglu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """`[M, N]` of `x [M, K]` and `weight [2N, K]`: silu(first half) * second half of the product."""
    if scale is not None:
        made = few_quantized.linear_swiglu(x, weight, scale)
    else:
        made = few(x, weight, cut, swiglu=True) if (cut := cut_for(x, weight)) else None
    if made is not None:
        return made
    product, rows, size = linear(x, weight, scale, divisible=True), x.shape[0], weight.shape[0] // 2
    out, early = torch.empty((rows, size), dtype=x.dtype, device=x.device), launches_early(x.device)
    _swiglu[(rows, triton.cdiv(size, 1024))](product, out, rows, size, PARTS=product.numel() // (2 * rows * size),
                                             EARLY=early, BLOCK=1024, launch_pdl=early)
    return out


def linear_add_norm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, residual: torch.Tensor,
                    norm: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`residual [M, N]` plus `x [M, K]` times `weight [N, K]`, and its norm times `norm [N]`, stacked."""
    product = linear(x, weight, scale, divisible=True)
    if product.dim() == 2:
        return add_norm(product, residual, norm, epsilon, early=True)
    shares = Shares(product.flatten(0, 1), 0, product.shape[0], x.shape[0])
    return add_norm(product[0], residual, norm, epsilon, shares=shares, early=True)
