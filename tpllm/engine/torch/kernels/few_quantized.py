"""Several rows times a matrix of quantized weights (`tpllm/quantization.py` has their layout), by tensor cores.

Weights become numbers inside of the product. Kernels follow each other as in `few.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels import int4
from tpllm.engine.torch.kernels.gemv import launches_early
from tpllm.engine.torch.kernels.int4 import _pairs

MOST_ROWS = 128  # for more, weights are written out first
SHORTEST = 512  # columns of a part, at least


class Cut(NamedTuple):
    """How programs share a product: lines of the matrix in each, how many have the same ones, tiles asked for ahead.

    If turned, the matrix is the tensor cores' left operand.
    """

    lines: int
    parts: int
    stages: int
    turned: bool
    warps: int = 4


# For products of up to some rows: programs wanted, many as to make numbers takes one longer than to load them, and the
# cut with the most parts. As measured on an H200 (`launch/sweep_products.py`, `launch/measure_layer.py`).
INT8 = {8: (320, Cut(64, 4, 5, True)), 32: (512, Cut(64, 8, 4, False)), MOST_ROWS: (512, Cut(64, 4, 3, True))}
INT4 = {8: (768, Cut(64, 8, 3, True)), 16: (768, Cut(64, 8, 3, True, 2)), 32: (512, Cut(64, 8, 3, True)),
        MOST_ROWS: (512, Cut(128, 4, 3, True, 8))}
SWIGLU_PROGRAMS = 512  # wanted at most, as of several parts another kernel makes it


@triton.jit
def _dot(row, tile, acc, TURNED: tl.constexpr):
    if TURNED:
        return tl.dot(tile, tl.trans(row), acc)
    else:
        return tl.dot(row, tl.trans(tile), acc)


@triton.jit
def _place(rows, lines, TURNED: tl.constexpr):
    """Indices of the result as `_dot` has it: rows of x and of the matrix."""
    if TURNED:
        return rows[None, :], lines[:, None]
    else:
        return rows[:, None], lines[None, :]


@triton.jit
def _numbers(words, ones, LINES: tl.constexpr):
    """Int4 words `[lines, 16]` as the bits of 16-bit floats `[lines, 128]`, too large by a constant."""
    low = tl.join(_pairs(words, ones, 0), _pairs(words, ones, 1))
    high = tl.join(_pairs(words, ones, 2), _pairs(words, ones, 3))
    bits = tl.join(low, high)  # [lines, words, halves of a word, pairs' lower and higher bit]
    return tl.reshape(tl.permute(bits, (0, 2, 4, 3, 1)), (LINES, 128))


@triton.jit
def _swiglu_of_pairs(acc, ROWS: tl.constexpr, LINES: tl.constexpr, TURNED: tl.constexpr):
    """Of eight lines of the first half, then eight of the second, and so on: `[lines / 2, rows]` if turned, else
    `[rows, lines / 2]`."""
    if TURNED:
        pairs = tl.permute(tl.reshape(acc, (LINES // 16, 2, 8, ROWS)), (0, 2, 3, 1))
    else:
        pairs = tl.permute(tl.reshape(acc, (ROWS, LINES // 16, 2, 8)), (0, 1, 3, 2))
    half, gate = tl.split(pairs)
    result = half / (1.0 + tl.exp(-half)) * gate
    return tl.reshape(result, (LINES // 2, ROWS) if TURNED else (ROWS, LINES // 2))


@triton.jit(do_not_specialize=["M"])
def _few(x, w, scales, out, M, N, K, ones, INT4: tl.constexpr, TURNED: tl.constexpr, SWIGLU: tl.constexpr,
         EARLY: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
         STAGES: tl.constexpr, MORE: tl.constexpr):
    """`[PARTS, M, N]`, a group of 128 columns at a time. With SwiGLU lines lie as in `few.py`'s."""
    RESULTS: tl.constexpr = LINES // 2 if SWIGLU else LINES
    WIDTH: tl.constexpr = 16 if INT4 else 128  # of a group, as it is stored
    rows, line, part = tl.arange(0, ROWS), tl.arange(0, LINES), tl.program_id(1)
    start = tl.program_id(0) * RESULTS
    result = start + (line // 16 * 8 + line % 8 if SWIGLU else line)
    lines = result + (line // 8 % 2 * N if SWIGLU else 0)
    groups = tl.cdiv(K, 128)
    begin, end = part * groups // PARTS, (part + 1) * groups // PARTS
    inside, valid, columns, stored = (rows < M)[:, None], (result < N)[:, None], tl.arange(0, 128), tl.arange(0, WIDTH)
    weights, x_rows = w + lines.to(tl.int64)[:, None] * (groups * 16 if INT4 else K), x + rows[:, None] * K
    if EARLY:
        gdc_wait()
    _, factor_line = _place(rows, lines, TURNED)
    acc = tl.zeros([LINES, ROWS] if TURNED else [ROWS, LINES], tl.float32)
    for g in tl.range(begin, end, num_stages=STAGES):
        place, at = (g * 128 + columns)[None, :], (g * WIDTH + stored)[None, :]
        row = tl.load(x_rows + place, mask=inside if WHOLE else inside & (place < K), other=0.0)
        if WHOLE:
            tile = tl.load(weights + at)
        else:
            tile = tl.load(weights + at, mask=valid if INT4 else valid & (place < K), other=0)
        if INT4:
            numbers = _numbers(tile, ones, LINES).to(row.dtype, bitcast=True) - MORE
            product = _dot(row, numbers, tl.zeros_like(acc), TURNED)
            acc += product * tl.load(scales + factor_line * groups + g, mask=_place(rows, result, TURNED)[1] < N,
                                     other=0.0).to(tl.float32)
        else:
            acc = _dot(row, tile.to(row.dtype), acc, TURNED)
    if EARLY:
        gdc_launch_dependents()
    if not INT4:
        acc *= tl.load(scales + factor_line, mask=_place(rows, result, TURNED)[1] < N, other=0.0)
    if SWIGLU:
        acc = _swiglu_of_pairs(acc, ROWS, LINES, TURNED)
    row_place, line_place = _place(rows, start + tl.arange(0, RESULTS), TURNED)
    tl.store(out + (part * M + row_place) * N + line_place, acc.to(out.dtype.element_ty),
             mask=(row_place < M) & (line_place < N))


@triton.jit
def _sum_parts(parts, out, COUNT, PARTS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * COUNT + at, mask=at < COUNT, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < COUNT)


@triton.jit
def _dequantize(w, scales, out, K, INT4: tl.constexpr, BLOCK: tl.constexpr):
    line, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    groups = tl.cdiv(K, 128)
    if INT4:
        words = tl.load(w + line * groups * 16 + columns // 128 * 16 + columns % 16, mask=columns < K, other=0)
        numbers = ((words >> (columns % 128 // 16 * 4)) & 15) - 8
        scale = tl.load(scales + line * groups + columns // 128, mask=columns < K, other=0.0)
    else:
        numbers = tl.load(w + line * K + columns, mask=columns < K, other=0)
        scale = tl.load(scales + line)
    value = numbers.to(tl.float32) * scale.to(tl.float32)
    tl.store(out + line * K + columns, value.to(out.dtype.element_ty), mask=columns < K)


def dequantized(weight: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[N, columns]` that the two stand for, written out."""
    out = torch.empty((weight.shape[0], columns), dtype=dtype, device=weight.device)
    _dequantize[(len(out), triton.cdiv(columns, 1024))](
        weight, scale, out, columns, INT4=weight.dtype == torch.int32, BLOCK=1024)
    return out


def sum_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[M, N]` of `[parts, M, N]`."""
    out, early = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device), launches_early(parts.device)
    _sum_parts[(triton.cdiv(out.numel(), 512),)](
        parts, out, out.numel(), PARTS=parts.shape[0], EARLY=early, BLOCK=512, launch_pdl=early)
    return out


def cut_for(x: torch.Tensor, weight: torch.Tensor, swiglu: bool = False) -> Cut | None:
    """How their product is cut; None where weights are better written out.

    That is for many rows, which computing bounds, and for float32, which tensor cores do not multiply.
    """
    (rows, columns), size, packed = x.shape, weight.shape[0], weight.dtype == torch.int32
    if rows > MOST_ROWS or x.dtype == torch.float32:
        return None
    programs, cut = next(found for most, found in (INT4 if packed else INT8).items() if rows <= most)
    wanted = min(programs, SWIGLU_PROGRAMS) if swiglu else programs
    return cut._replace(parts=max(1, min(wanted * cut.lines // size, cut.parts, columns // SHORTEST)))


def few(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, cut: Cut, swiglu: bool = False) -> torch.Tensor:
    """`[M, N]`, of several parts `[parts, M, N]` in float32: `few.few` of the weight that the two stand for."""
    (rows, columns), size, packed = x.shape, weight.shape[0] // (1 + swiglu), weight.dtype == torch.int32
    shape, dtype = ((rows, size), x.dtype) if cut.parts == 1 else ((cut.parts, rows, size), torch.float32)
    out, early = torch.empty(shape, dtype=dtype, device=x.device), launches_early(x.device)
    ones, more = int4.ONES[x.dtype]
    whole = columns % 128 == 0 and weight.shape[0] % cut.lines == 0
    _few[(triton.cdiv(weight.shape[0], cut.lines), cut.parts)](
        x.contiguous(), weight, scale, out, rows, size, columns, ones, INT4=packed, TURNED=cut.turned, SWIGLU=swiglu,
        EARLY=early, WHOLE=whole, LINES=cut.lines, ROWS=max(8 if cut.turned else 16, triton.next_power_of_2(rows)),
        PARTS=cut.parts, STAGES=cut.stages, MORE=more, num_warps=cut.warps, launch_pdl=early)
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, divisible: bool = False) -> torch.Tensor:
    """`[M, N]`: x `[M, K]` times the weight `[N, K]` that the two stand for; with `divisible` as of `few.linear`."""
    if (cut := cut_for(x, weight)) is None:
        return F.linear(x, dequantized(weight, scale, x.shape[1], x.dtype))
    if _by_warps(x, weight):
        return int4.few_rows(x.contiguous(), weight, scale)
    product = few(x, weight, scale, cut)
    return product if cut.parts == 1 or divisible else sum_parts(product, x.dtype)


def linear_swiglu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """`[M, N]` of the weight `[2N, K]`: silu(first half) * second half, if a kernel makes it at once."""
    if (cut := cut_for(x, weight, swiglu=True)) is None:
        return None
    if _by_warps(x, weight):
        return int4.few_rows(x.contiguous(), weight, scale, swiglu=True)
    return few(x, weight, scale, cut, swiglu=True) if cut.parts == 1 else None


def _by_warps(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `int4.few_rows` is for this product, and faster."""
    return weight.dtype == torch.int32 and x.shape[0] <= (2 if weight.shape[0] <= 4096 else int4.ROWS)
