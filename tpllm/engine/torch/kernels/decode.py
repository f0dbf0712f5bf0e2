"""Decode attention: rotation, cache store and attention of one new token a sequence in a single kernel.

A program handles one sequence, one key/value head with all query heads that share it, and one of `SPLITS` parts
of the sequence's cached rows; the last of them to finish merges the parts, always in the same order. Start and
length are read on the device, so that a captured launch serves every step of its batch size.

It begins when the product before it has its sums, and does not let the next one begin. To let it makes one sequence 1 %
faster but takes 5 % more power, of which many an H200 has none left, so that some steps take up to 9 % longer.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from tpllm.engine.torch.kernels.gemv import launches_early

BLOCK_N = 64
PROGRAMS, MAX_SPLITS = 128, 8  # beyond these, merging the parts costs more than it gains
TICKETS = 1 << 16


@triton.jit
def _load_half(base, offset, half: tl.constexpr, columns, mask, size: tl.constexpr):
    """Columns of the first (`half` 0) or second half of heads of `size`, in their own dtype."""
    inside = mask & (columns < size // 2)
    return tl.load(base + offset + half * (size // 2) + columns, mask=inside, other=0.0)


@triton.jit
def _rotate(a, b, cos, sin):
    """RoPE of the two halves in float32, rounded as the model rounds it."""
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    return (a32 * cos - b32 * sin).to(a.dtype), (b32 * cos + a32 * sin).to(a.dtype)


@triton.jit
def softmax(scores, largest, weight, scale):
    """One more block of scores: its weights, by how much those before it fade, the largest so far and the sum."""
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_largest[:, None])
    fade = tl.exp2(largest - new_largest)
    return p, fade[:, None], new_largest, weight * fade + tl.sum(p, 1)


@triton.jit
def _merge(acc_parts, m_parts, sum_parts, out, base, part0, h, SIZE: tl.constexpr, SPLITS: tl.constexpr,
           GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The output of a group of heads from the partial results of all splits, all heads at once: one after another,
    each would wait for the memory."""
    g, s = tl.arange(0, BLOCK_M), tl.arange(0, SPLITS)
    parts, in_group, in_half = (part0 + g)[None, :] * SPLITS + s[:, None], g < GROUP, h < SIZE // 2
    m = tl.load(m_parts + parts, mask=in_group[None, :], other=0.0, cache_modifier=".cg")
    total = tl.load(sum_parts + parts, mask=in_group[None, :], other=1.0, cache_modifier=".cg")
    rows, inside = parts[:, :, None] * SIZE + h[None, None, :], (in_group[:, None] & in_half[None, :])[None, :, :]
    first = tl.load(acc_parts + rows, mask=inside, other=0.0, cache_modifier=".cg")
    second = tl.load(acc_parts + rows + SIZE // 2, mask=inside, other=0.0, cache_modifier=".cg")
    weight = tl.exp2(m - tl.max(m, 0)[None, :])
    weight = (weight / tl.sum(weight * total, 0)[None, :])[:, :, None]
    to, mask = out + base + g[:, None] * SIZE + h[None, :], in_group[:, None] & in_half[None, :]
    tl.store(to, tl.sum(first * weight, 0).to(out.dtype.element_ty), mask=mask)
    tl.store(to + SIZE // 2, tl.sum(second * weight, 0).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _new_token(q1, q2, k, v, c, s, keys, values, b, head, split, row, h, k_stride, v_stride, scale,
               KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr):
    """Where a program's softmax starts: the first split has the new token and stores it, others have nothing."""
    in_half = (h < SIZE // 2)[None, :]
    m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc1, acc2 = tl.zeros([BLOCK_G, BLOCK_H], tl.float32), tl.zeros([BLOCK_G, BLOCK_H], tl.float32)
    if split == 0:
        # The new token's own key and value never pass through the cache: no other program may wait for them.
        k_row, v_row = b * k_stride + head * SIZE, b * v_stride + head * SIZE
        k1, k2 = _rotate(_load_half(k, k_row, 0, h[None, :], in_half, SIZE),
                         _load_half(k, k_row, 1, h[None, :], in_half, SIZE), c, s)
        v1, v2 = _load_half(v, v_row, 0, h[None, :], in_half, SIZE), _load_half(v, v_row, 1, h[None, :], in_half, SIZE)
        new = row * KV_HEADS * SIZE + head * SIZE + h[None, :]
        tl.store(keys + new, k1, mask=in_half)
        tl.store(keys + new + SIZE // 2, k2, mask=in_half)
        tl.store(values + new, v1, mask=in_half)
        tl.store(values + new + SIZE // 2, v2, mask=in_half)
        m = tl.sum(q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32), 1) * scale
        total += 1.0
        acc1 += v1.to(tl.float32)
        acc2 += v2.to(tl.float32)
    return m, total, acc1, acc2


@triton.jit
def _finish(m, total, acc1, acc2, out, acc_parts, m_parts, sum_parts, tickets, b, head, split, g, h,
            KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
            BLOCK_M: tl.constexpr):
    """Write the output, or this split's part of it; the last split merges."""
    in_group, in_half = (g < GROUP)[:, None], (h < SIZE // 2)[None, :]
    base = (b * KV_HEADS + head) * GROUP * SIZE
    if SPLITS == 1:
        to = out + base + g[:, None] * SIZE + h[None, :]
        tl.store(to, (acc1 / total[:, None]).to(out.dtype.element_ty), mask=in_group & in_half)
        tl.store(to + SIZE // 2, (acc2 / total[:, None]).to(out.dtype.element_ty), mask=in_group & in_half)
    else:
        part0 = (b * KV_HEADS + head) * GROUP
        part = (part0 + g) * SPLITS + split
        tl.store(m_parts + part, m, mask=g < GROUP)
        tl.store(sum_parts + part, total, mask=g < GROUP)
        to = acc_parts + part[:, None] * SIZE + h[None, :]
        tl.store(to, acc1, mask=in_group & in_half)
        tl.store(to + SIZE // 2, acc2, mask=in_group & in_half)
        tl.debug_barrier()  # all threads have stored before one of them takes the ticket
        if tl.atomic_add(tickets + b * KV_HEADS + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(tickets + b * KV_HEADS + head, 0)
            _merge(acc_parts, m_parts, sum_parts, out, base, part0, h, SIZE, SPLITS, GROUP, BLOCK_M)


@triton.jit
def _decode(q, k, v, cos, sin, keys, values, start, length, out, acc_parts, m_parts, sum_parts, tickets,
            q_stride, k_stride, v_stride, scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
            SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
            BLOCK_N: tl.constexpr, EARLY: tl.constexpr):
    head, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, h, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    in_group = (g < GROUP)[:, None]
    past = tl.load(length + b) - 1
    first_row = tl.load(start + b).to(tl.int64)
    c = tl.load(cos + b * (SIZE // 2) + h, mask=h < SIZE // 2, other=0.0)[None, :]
    s = tl.load(sin + b * (SIZE // 2) + h, mask=h < SIZE // 2, other=0.0)[None, :]
    if EARLY:
        gdc_wait()
    q_rows = b * q_stride + (head * GROUP + g)[:, None] * SIZE
    q1, q2 = _rotate(_load_half(q, q_rows, 0, h[None, :], in_group, SIZE),
                     _load_half(q, q_rows, 1, h[None, :], in_group, SIZE), c, s)
    m, total, acc1, acc2 = _new_token(q1, q2, k, v, c, s, keys, values, b, head, split, first_row + past, h,
                                      k_stride, v_stride, scale, KV_HEADS, SIZE, BLOCK_G, BLOCK_H)
    chunk = tl.cdiv(tl.cdiv(past, SPLITS), BLOCK_N) * BLOCK_N
    end = tl.minimum(past, (split + 1) * chunk)
    for at in range(split * chunk, end, BLOCK_N):
        inside = (at + n < end)[:, None]
        rows = (first_row + at + n)[:, None] * (KV_HEADS * SIZE) + head * SIZE
        k1 = _load_half(keys, rows, 0, h[None, :], inside, SIZE)
        k2 = _load_half(keys, rows, 1, h[None, :], inside, SIZE)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
        scores = tl.where((at + n < end)[None, :], scores, float("-inf"))
        p, fade, m, total = softmax(scores, m, total, scale)
        v1 = _load_half(values, rows, 0, h[None, :], inside, SIZE)
        v2 = _load_half(values, rows, 1, h[None, :], inside, SIZE)
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * fade, input_precision="ieee")
        acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * fade, input_precision="ieee")
    _finish(m, total, acc1, acc2, out, acc_parts, m_parts, sum_parts, tickets, b, head, split, g, h,
            KV_HEADS, GROUP, SIZE, SPLITS, BLOCK_M)


def score_scale(size: int) -> float:
    """What scores of heads of this size are multiplied by, as powers of two are faster than those of e."""
    return float(size**-0.5 * 1.4426950408889634)


def splits_for(programs: int) -> int:
    """Parts of a sequence, so that small batches fill the GPU too; a power of two."""
    wanted = min(MAX_SPLITS, PROGRAMS // max(programs, 1))
    return 1 << max(0, wanted.bit_length() - 1)


@cache
def tickets(device: torch.device) -> torch.Tensor:
    """Counters that are zero between launches; made once, outside of any graph."""
    return torch.zeros(TICKETS, dtype=torch.int32, device=device)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                     keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, length: torch.Tensor,
                     out: torch.Tensor | None = None) -> torch.Tensor:
    """`[T, heads, size]` from unrotated `q [T, heads, size]`, `k`, `v [T, kv_heads, size]`.

    `keys`, `values` `[capacity, kv_heads, size]` are one layer's cache; row `start + length - 1` of each sequence
    is written. `cos`, `sin` are `[T, size/2]` float32. The result is written to `out` where it is given.
    """
    heads, size = q.shape[1:]
    batch, kv_heads = length.shape[0], k.shape[1]
    group = heads // kv_heads
    assert batch * kv_heads <= TICKETS, "a batch of this size needs more tickets"
    splits, early = splits_for(batch * kv_heads), launches_early(q.device)
    out = torch.empty((batch, heads, size), dtype=q.dtype, device=q.device) if out is None else out
    acc = torch.empty((batch * heads * splits * size if splits > 1 else 1,), dtype=torch.float32, device=q.device)
    m, sums = (torch.empty((batch * heads * splits,), dtype=torch.float32, device=q.device) for _ in range(2))
    _decode[(kv_heads, splits, batch)](
        q, k, v, cos, sin, keys, values, start, length, out, acc, m, sums, tickets(q.device),
        q.stride(0), k.stride(0), v.stride(0), score_scale(size), KV_HEADS=kv_heads, GROUP=group, SIZE=size,
        SPLITS=splits, BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_M=triton.next_power_of_2(group),
        BLOCK_H=max(16, triton.next_power_of_2(size // 2)), BLOCK_N=BLOCK_N, EARLY=early, num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3, launch_pdl=early)
    return out
