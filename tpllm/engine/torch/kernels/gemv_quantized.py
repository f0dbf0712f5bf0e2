"""`gemv` for quantized weights (`tpllm/quantization.py` has their layout).

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
from tpllm.engine.torch.kernels.few_quantized import dequantized
from tpllm.engine.torch.kernels.gemv import (
    _finish,
    _fold,
    _gemv,
    _places,
    _weights,
    before_attention,
    launches_early,
    tile_options,
)

WORDS = 4  # of each row in a program's tile, for each of its threads
# As in gemv.py.
TILES = {4096: (4, 4), 8192: (16, 4), 16384: (16, 2), 1 << 31: (4, 2)}
HALF_OF_BYTE = 0x47008000  # of the float32 2**15, and the sign of a byte in the middle of its mantissa


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
          RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr, EARLY: tl.constexpr, LATE: tl.constexpr, WHOLE: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr):
    """Four numbers a word, `w` as int32 `[N, K / 4]`."""
    count: tl.constexpr = K // 4
    words, columns = tl.max_contiguous(tl.arange(0, BLOCK_K), 2), tl.arange(0, 4 * BLOCK_K)
    rows, pointers, pointers2 = _places(w, words, N, count, BLOCK_N)
    if EARLY and not LATE:
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
    if EARLY and LATE:
        gdc_launch_dependents()
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
    early, tile = launches_early(x.device), int4.tile_of(TILES, size, swiglu)
    grid = (triton.cdiv(size, tile.results),)
    inputs = (x, weight, scale, weight if norm is None else norm, out if residual is None else residual, out, size,
              columns, epsilon)
    options = {"NORM": norm is not None, "RESIDUAL": residual is not None, "SWIGLU": swiglu, "EARLY": early,
               "LATE": before_attention(residual, swiglu), "launch_pdl": early}
    if columns % 4 == 0 and x.dtype != torch.float32:
        block = 32 * tile.warps * WORDS
        _int8[grid](x, weight.view(torch.int32), *inputs[2:], HALF_OF_BYTE, **options, BLOCK_N=tile.results,
                    BLOCK_K=block, WORDS=WORDS, WHOLE=size % tile.results == 0 and columns % (4 * block) == 0,
                    num_warps=tile.warps)
    else:
        _gemv[grid](*inputs, (out,), out, SCALED=True, **options, **tile_options(size, columns, tile))
    return out


def _in_steps(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, norm: torch.Tensor | None, epsilon: float,
              residual: torch.Tensor | None, swiglu: bool) -> torch.Tensor:
    """`gemv` where nothing is made for a dtype, which then is one that nobody is in a hurry with."""
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, epsilon)
    product = F.linear(x, dequantized(weight, scale, x.shape[1], x.dtype))
    if swiglu:
        first, second = product.chunk(2, dim=-1)
        product = F.silu(first) * second
    return product if residual is None else product + residual
