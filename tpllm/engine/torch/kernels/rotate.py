"""Rotation of a step's queries and keys and the store of keys and values in the cache, in one kernel; its angles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_HEADS = 8


@triton.jit
def _rotate_store(q, k, v, cos, sin, keys, values, slots, out, q_stride, k_stride, v_stride,
                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_H: tl.constexpr):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_blocks: tl.constexpr = (HEADS + BLOCK_R - 1) // BLOCK_R
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_R - 1) // BLOCK_R
    r, h = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_H)[None, :]
    in_half = h < SIZE // 2
    slot = tl.load(slots + token).to(tl.int64)
    c = tl.load(cos + token * (SIZE // 2) + h, mask=in_half, other=0.0)
    s = tl.load(sin + token * (SIZE // 2) + h, mask=in_half, other=0.0)
    if block < q_blocks:
        head = block * BLOCK_R + r
        source = q + token * q_stride + head * SIZE + h
        to = out + token * HEADS * SIZE + head * SIZE + h
        mask = in_half & (head < HEADS)
    elif block < q_blocks + kv_blocks:
        head = (block - q_blocks) * BLOCK_R + r
        source = k + token * k_stride + head * SIZE + h
        to = keys + slot * KV_HEADS * SIZE + head * SIZE + h
        mask = in_half & (head < KV_HEADS)
    else:
        head = (block - q_blocks - kv_blocks) * BLOCK_R + r
        source = v + token * v_stride + head * SIZE + h
        to = values + slot * KV_HEADS * SIZE + head * SIZE + h
        mask = in_half & (head < KV_HEADS)
        c, s = tl.full(c.shape, 1.0, tl.float32), tl.zeros(s.shape, tl.float32)  # values are not rotated
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(to + SIZE // 2, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotation(positions, frequencies, out, T, HALF: tl.constexpr, BLOCK: tl.constexpr):
    t, h = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = h < HALF
    angles = tl.load(positions + t).to(tl.float32) * tl.load(frequencies + h, mask=inside, other=0.0)
    tl.store(out + t * HALF + h, tl.cos(angles), mask=inside)
    tl.store(out + (T + t) * HALF + h, tl.sin(angles), mask=inside)


def rotation(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines and sines `[2, T, size/2]` of whole `positions [T]` times `frequencies [size/2]`, all float32."""
    count, half = positions.shape[0], frequencies.shape[0]
    out = torch.empty((2, count, half), dtype=torch.float32, device=positions.device)
    _rotation[(count,)](positions, frequencies, out, count, HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1)
    return out


def rotate_and_store(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                     keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rotated `q [T, heads, size]`; rotated `k` and `v` `[T, kv_heads, size]` go to cache rows `slots [T]`."""
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    blocks = triton.cdiv(heads, BLOCK_HEADS) + 2 * triton.cdiv(kv_heads, BLOCK_HEADS)
    _rotate_store[(tokens, blocks)](
        q, k, v, cos, sin, keys, values, slots, out, q.stride(0), k.stride(0), v.stride(0), HEADS=heads,
        KV_HEADS=kv_heads, SIZE=size, BLOCK_R=BLOCK_HEADS, BLOCK_H=triton.next_power_of_2(size // 2), num_warps=4)
    return out
