"""Attention of prompts, whole or in chunks, packed one after the other, over the cache arena.

A program handles one query head and a block of one prompt's new tokens. All places are read on the device, and the
grid depends on shapes alone, so that a captured launch serves every step with as many rows and prompts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpllm.engine.torch.kernels.decode import score_scale, softmax

# By the head size, padded: rows of queries and, in a step of the loop, of keys; warps; blocks of keys and values in
# shared memory. Several programs fit on a multiprocessor: one multiplies while another has its softmax or waits for
# memory. Up to 128 the fastest of nine on an H200.
TILES = {64: (64, 64, 4, 3), 128: (64, 32, 4, 3), 256: (128, 32, 8, 2)}
PROMPTS = 128  # looked at together


@triton.jit
def _prompt_of(block, query_start, origin, P, BLOCK_M: tl.constexpr, PROMPTS: tl.constexpr):
    """The last prompt whose blocks begin at or before `block`, where each may have one block too many.

    All are compared at once: every step of a binary search would wait for memory.
    """
    count = 0
    for at in range(0, P, PROMPTS):
        i = at + tl.arange(0, PROMPTS)
        first = (tl.load(query_start + i, mask=i < P, other=0) - origin) // BLOCK_M + i
        count += tl.sum(((i < P) & (first <= block)).to(tl.int32), 0)
    return count - 1


@triton.jit
def _inside(rows, columns, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mask of a block from that of its rows; the columns need one too unless the head size fills it."""
    return rows if BLOCK_D == SIZE else rows & (columns < SIZE)


# Prompts and where they begin differ from step to step; none may have a kernel of its own.
@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["query_start", "start", "length"])
def _prefill(q, keys, values, query_start, start, length, out, P, scale,
             HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PROMPTS: tl.constexpr):
    head = tl.program_id(0)
    # The last blocks of a prompt see the most keys, so they start first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    origin = tl.load(query_start)
    prompt = _prompt_of(block, query_start, origin, P, BLOCK_M, PROMPTS)
    begin = tl.load(query_start + prompt)
    new = tl.load(query_start + prompt + 1) - begin
    row = (block - (begin - origin) // BLOCK_M - prompt) * BLOCK_M
    if row >= new:
        return
    total, first = tl.load(length + prompt), tl.load(start + prompt)
    m, n, d = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    rows = (begin + row).to(tl.int64) * (HEADS * SIZE) + head * SIZE
    own = _inside(row + m < new, d, SIZE, BLOCK_D)
    queries = tl.load(q + rows + m * (HEADS * SIZE) + d, mask=own, other=0.0)
    position = total - new + row  # of the first query in its prompt
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(total, position + BLOCK_M)
    run = first.to(tl.int64) * (KV_HEADS * SIZE) + head // (HEADS // KV_HEADS) * SIZE
    keys += run
    values += run
    tile = n[:, None] * (KV_HEADS * SIZE) + d
    for at in range(0, end, BLOCK_N):
        # Behind the end there may be NaN, which times a weight of zero is NaN.
        mask = _inside((at + n < total)[:, None], d, SIZE, BLOCK_D)
        k = tl.load(keys + tile, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(k))
        # Not in a loop of its own, which would have to fill its pipeline anew.
        if at + BLOCK_N > position + 1:
            scores = tl.where((at + n)[None, :] <= position + m, scores, float("-inf"))
        p, fade, largest, weight = softmax(scores, largest, weight, scale)
        v = tl.load(values + tile, mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade)
        keys += BLOCK_N * KV_HEADS * SIZE
        values += BLOCK_N * KV_HEADS * SIZE
    tl.store(out + rows + m * (HEADS * SIZE) + d, (acc / weight[:, None]).to(out.dtype.element_ty), mask=own)


def prefill_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, query_start: torch.Tensor,
                      start: torch.Tensor, length: torch.Tensor, out: torch.Tensor) -> None:
    """Causal attention of packed, rotated queries `q [T, heads, size]` to runs of rows of one layer's cache.

    `keys`, `values` are `[capacity, kv_heads, size]`, of float16 or bfloat16. Prompt i has the rows `query_start[i] …
    query_start[i + 1]` of `q` and `out`, none or more, and the cache's rows `start[i] … start[i] + length[i]`, of
    which the last ones are its new tokens'. `query_start [P+1]` ends with T; rows before its first are left alone.
    """
    tokens, heads, size = q.shape
    prompts, padded = query_start.shape[0] - 1, max(64, triton.next_power_of_2(size))
    block_m, block_n, warps, stages = TILES[padded]
    # A prompt's last block may have few rows: no more than one block a prompt is lost.
    _prefill[(heads, triton.cdiv(tokens, block_m) + prompts)](
        q, keys, values, query_start, start, length, out, prompts, score_scale(size), HEADS=heads,
        KV_HEADS=keys.shape[1], SIZE=size, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=padded, PROMPTS=PROMPTS,
        num_warps=warps, num_stages=stages)
