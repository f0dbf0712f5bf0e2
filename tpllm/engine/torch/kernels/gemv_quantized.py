"""`gemv` for quantized weights (`tpllm/quantization.py` has their layout), and products of several rows.

At 1 byte a weight arithmetic is nearly as slow as memory, so a program has several rows of the matrix, which share the
work on x, and few warps, which share the work at its end. Numbers are not converted: in a float's mantissa they are
numbers already, too large by a constant, which the sum of x mends once for all rows. `int4.py` has int4's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpllm.engine.torch.kernels import int4
from tpllm.engine.torch.kernels.gemv import (
    _finish,
    _fold,
    _gemv,
    _places,
    _weights,
    launches_early,
    tile_of,
    tile_options,
)
from tpllm.engine.torch.kernels.int4 import _pairs

WORDS = 4  # of each row in a program's tile, for each of its threads
# As in gemv.py.
TILES = {4096: (4, 4), 8192: (16, 4), 16384: (16, 2), 1 << 31: (4, 2)}
HALF_OF_BYTE = 0x47008000  # of the float32 2**15, and the sign of a byte in the middle of its mantissa
FEW_ROWS = 128  # of x, up to which weights become numbers inside of the product
FULL = 256  # programs of such a product that keep a GPU busy
MAX_SPLIT = 8


@triton.jit
def _four(x, place, K):
    """Four neighbouring values of a row for each of some words, in float32."""
    values = tl.load(x + place, mask=place < K, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, [values.shape[0] // 2, 2]))
    a, c = tl.split(tl.reshape(even, [even.shape[0] // 2, 2]))
    b, d = tl.split(tl.reshape(odd, [odd.shape[0] // 2, 2]))
    return a, b, c, d


@triton.jit
def _byte(words, top, i: tl.constexpr):
    """What byte i of each word stands for, plus 32,896: in the middle of a mantissa of 2**15, its sign turned."""
    bits = words << 8 if i == 0 else words >> (8 * i - 8)
    return ((bits & 0x0000FF00) ^ top).to(tl.float32, bitcast=True)


@triton.jit
def _sum_bytes(words, top, a, b, c, d, WORDS: tl.constexpr):
    """The sums of each thread's words' numbers times a row's, the constant in each number with them."""
    products = _byte(words, top, 0) * a[None, :]
    products += _byte(words, top, 1) * b[None, :]
    products += _byte(words, top, 2) * c[None, :]
    products += _byte(words, top, 3) * d[None, :]
    return _fold(products, WORDS)


@triton.jit
def _int8(x, w, scales, norm, residual, out, N, K: tl.constexpr, epsilon, top, NORM: tl.constexpr,
          RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, EARLY: tl.constexpr, WHOLE: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr):
    """Four numbers a word, `w` as int32 `[N, K / 4]`."""
    count: tl.constexpr = K // 4
    words, columns = tl.max_contiguous(tl.arange(0, BLOCK_K), 2), tl.arange(0, 4 * BLOCK_K)
    rows, pointers, pointers2 = _places(w, words, N, count, BLOCK_N)
    if EARLY:
        gdc_launch_dependents()
    tile = _weights(pointers, rows, words, N, count, WHOLE)
    tile2 = _weights(pointers2, rows, words, N, count, WHOLE) if SWIGLU else tile
    scale = tl.load(scales + rows, mask=rows < N, other=0.0).to(tl.float32)
    scale2 = tl.load(scales + N + rows, mask=rows < N, other=0.0).to(tl.float32) if SWIGLU else scale
    if EARLY:
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K // WORDS], tl.float32)
    left = tl.load(residual + rows, mask=rows < N, other=0.0) if RESIDUAL else 0.0
    acc2, squares, excess = acc, tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    for j in range(0, count, BLOCK_K):
        a, b, c, d = _four(x, 4 * j + columns, K)
        if NORM:
            squares += a * a + b * b + c * c + d * d
            e, f, g, h = _four(norm, 4 * j + columns, K)
            a, b, c, d = a * e, b * f, c * g, d * h
        excess += (a + b) + (c + d)
        acc += _sum_bytes(tile, top, a, b, c, d, WORDS)
        if SWIGLU:
            acc2 += _sum_bytes(tile2, top, a, b, c, d, WORDS)
        after = j + BLOCK_K
        if after < count:
            tile = _weights(pointers + after, rows, after + words, N, count, WHOLE)
            if SWIGLU:
                tile2 = _weights(pointers2 + after, rows, after + words, N, count, WHOLE)
    more = 32896.0 * tl.sum(tl.reshape(excess, [BLOCK_K // WORDS, WORDS]), 1)[None, :]
    result, gate = tl.sum(acc - more, 1) * scale, tl.sum(acc2 - more, 1) * scale2
    _finish(result, gate, tl.sum(squares, 0), left, out, rows, rows < N, K, epsilon, NORM, RESIDUAL, SWIGLU)


def gemv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor | None, epsilon: float,
         residual: torch.Tensor | None, swiglu: bool) -> torch.Tensor:
    """`[1, N]` as `gemv.gemv` has it, of the weight `[N, K]` or, with `swiglu`, `[2N, K]` that the two stand for."""
    if weight.dtype == torch.int32:
        return (int4.few_rows if x.dtype in int4.ONES else _in_steps)(x, weight, scale, norm, epsilon, residual, swiglu)
    size, columns = weight.shape[0] // 2 if swiglu else weight.shape[0], x.shape[1]
    out = torch.empty((1, size), dtype=x.dtype, device=x.device)
    early, tile = launches_early(x.device), tile_of(TILES, size, swiglu)
    grid = (triton.cdiv(size, tile.results),)
    inputs = (x, weight, scale, weight if norm is None else norm, out if residual is None else residual, out, size,
              columns, epsilon)
    options = {"NORM": norm is not None, "RESIDUAL": residual is not None, "SWIGLU": swiglu, "EARLY": early,
               "launch_pdl": early}
    if columns % 4 == 0 and x.dtype != torch.float32:
        block = 32 * tile.warps * WORDS
        _int8[grid](x, weight.view(torch.int32), *inputs[2:], HALF_OF_BYTE, **options, BLOCK_N=tile.results,
                    BLOCK_K=block, WORDS=WORDS, WHOLE=size % tile.results == 0 and columns % (4 * block) == 0,
                    num_warps=tile.warps)
    else:
        _gemv[grid](*inputs, out, out, SCALED=True, **options, **tile_options(size, columns, tile))
    return out


def _in_steps(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor | None, epsilon: float,
              residual: torch.Tensor | None, swiglu: bool) -> torch.Tensor:
    """`gemv` where nothing is made for a dtype, which then is one that nobody is in a hurry with."""
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, epsilon)
    product = linear(x, weight, scale)
    if swiglu:
        first, second = product.chunk(2, dim=-1)
        product = F.silu(first) * second
    return product if residual is None else product + residual


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


@triton.jit(do_not_specialize=["M"])
def _few_rows(x, w, scales, out, M, N, K, ones, INT4: tl.constexpr, TURNED: tl.constexpr, SPLIT: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MORE: tl.constexpr):
    """A group of 128 columns at a time, of each SPLIT of them one: sums of their own, `out [SPLIT, M, N]`.

    With TURNED the matrix is the tensor cores' left operand.
    """
    rows, lines = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, words, groups, split = tl.arange(0, 128), tl.arange(0, 16), tl.cdiv(K, 128), tl.program_id(1)
    weights, valid = w + lines.to(tl.int64)[:, None] * (groups * 16 if INT4 else K), (lines < N)[:, None]
    x_rows, inside = x + rows[:, None] * K, (rows < M)[:, None]
    row_place, line_place = _place(rows, lines, TURNED)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if TURNED else [BLOCK_M, BLOCK_N], tl.float32)
    for g in range(split, groups, SPLIT):
        place = (g * 128 + columns)[None, :]
        row = tl.load(x_rows + place, mask=inside & (place < K), other=0.0)
        if INT4:
            bits = _numbers(tl.load(weights + g * 16 + words[None, :], mask=valid, other=0), ones, BLOCK_N)
            part = _dot(row, bits.to(row.dtype, bitcast=True) - MORE, tl.zeros_like(acc), TURNED)
            acc += part * tl.load(scales + line_place * groups + g, mask=line_place < N, other=0.0).to(tl.float32)
        else:
            tile = tl.load(weights + place, mask=valid & (place < K), other=0).to(row.dtype)
            acc = _dot(row, tile, acc, TURNED)
    if not INT4:
        acc *= tl.load(scales + line_place, mask=line_place < N, other=0.0)
    tl.store(out + (split * M + row_place) * N + line_place, acc.to(out.dtype.element_ty),
             mask=(row_place < M) & (line_place < N))


@triton.jit
def _sum_parts(parts, out, COUNT, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
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


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[M, N]`: x `[M, K]` times the weight `[N, K]` that the two stand for.

    Of few rows it takes as long as reading the weights. For many, which computing bounds, and for float32, which tensor
    cores do not multiply, weights are written out first.
    """
    x, packed = x.contiguous(), weight.dtype == torch.int32
    (m, k), n = x.shape, weight.shape[0]
    if m > FEW_ROWS or x.dtype == torch.float32:
        whole = torch.empty((n, k), dtype=x.dtype, device=x.device)
        _dequantize[(n, triton.cdiv(k, 1024))](weight, scale, whole, k, INT4=packed, BLOCK=1024)
        return F.linear(x, whole)
    if packed and m <= int4.ROWS:
        return int4.few_rows(x, weight, scale)
    turned = packed or m > 32
    lines = 64 if turned or n >= 64 * FULL else 32
    split = splits_for(n, lines, k)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    ones, more = int4.ONES[x.dtype]
    _few_rows[(triton.cdiv(n, lines), split)](
        x, weight, scale, parts, m, n, k, ones, INT4=packed, TURNED=turned, SPLIT=split,
        BLOCK_M=max(16, triton.next_power_of_2(m)), BLOCK_N=lines, MORE=more, num_warps=4,
        num_stages=3 if turned else 5)
    if split > 1:
        _sum_parts[(triton.cdiv(m * n, 1024),)](parts, out, m * n, SPLIT=split, BLOCK=1024)
    return out


def splits_for(size: int, lines: int, columns: int) -> int:
    """Programs that share the columns of the same lines, so that there are enough of them; each has some groups."""
    return max(1, min(FULL * lines // size, MAX_SPLIT, columns // 512))
