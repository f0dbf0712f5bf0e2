"""Attention over the cache arena as operators: they read only the valid part of each sequence.

The arena is `[layers, 2, capacity, kv_heads/tp, head_size]`; a sequence owns a run of rows of its third
dimension. One operator for prefill, chunks of prompts and decode keeps one graph valid for any mix of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tpllm.engine.torch.collectives import library

library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, int layer, Tensor slots, Tensor query_start, "
    "Tensor start, Tensor length) -> Tensor"
)
library.define(
    "rotate_and_attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache, int layer, "
    "Tensor slots, Tensor query_start, Tensor start, Tensor length) -> Tensor"
)

# One operator, or the compiler would make cosines and sines again in each layer.
library.define("rotation(Tensor positions, Tensor frequencies) -> Tensor")


@torch.library.impl(library, "rotation", "CUDA")
def _rotation(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    from tpllm.engine.torch.kernels.rotate import rotation

    return rotation(positions, frequencies)


@torch.library.register_fake("tpllm::rotation", lib=library)
def _(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    return frequencies.new_empty((2, positions.shape[0], frequencies.shape[0]))


@torch.library.impl(library, "attend", "CPU")
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, layer: int,
            slots: torch.Tensor, query_start: torch.Tensor, start: torch.Tensor,
            length: torch.Tensor) -> torch.Tensor:
    keys, values = cache[layer]
    keys[slots], values[slots] = k, v
    return _attend_each(q, keys, values, query_start, start, length)


@torch.library.impl(library, "rotate_and_attend", "CUDA")
def _rotate_and_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                       cache: torch.Tensor, layer: int, slots: torch.Tensor, query_start: torch.Tensor,
                       start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    # Triton is there on machines with GPUs only.
    from tpllm.engine.torch.kernels.decode import decode_attention
    from tpllm.engine.torch.kernels.prefill import prefill_attention
    from tpllm.engine.torch.kernels.rotate import rotate_and_store

    keys, values = cache[layer]
    singles = single_tokens(query_start, length)
    if singles == q.shape[0]:
        return decode_attention(q, k, v, cos, sin, keys, values, start, length)
    rotated = rotate_and_store(q, k, v, cos, sin, keys, values, slots)
    if not has_prompt_kernel(q):
        return _attend_each(rotated, keys, values, query_start, start, length)
    out = torch.empty_like(rotated)
    prefill_attention(rotated, keys, values, query_start, start[singles:], length[singles:], out)
    if singles:
        decode_attention(q[:singles], k[:singles], v[:singles], cos, sin, keys, values, start[:singles],
                         length[:singles], out[:singles])
    return out


def has_prompt_kernel(q: torch.Tensor) -> bool:
    """Whether prompts' attention `[…, size]` is one kernel on CUDA, without a look at their places by the host."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def single_tokens(query_start: torch.Tensor, length: torch.Tensor) -> int:
    """How many sequences have one token each and stand before those of `query_start`; known from the shapes alone."""
    return length.shape[0] - query_start.shape[0] + 1


def _attend_each(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, query_start: torch.Tensor,
                 start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """One sequence after the other; the host must know their places."""
    out = torch.empty_like(q)
    bounds = [*range(single_tokens(query_start, length)), *query_start.tolist()]
    for i, (first, total) in enumerate(zip(start.tolist(), length.tolist(), strict=False)):
        part = slice(bounds[i], bounds[i + 1])
        run = slice(first, first + total)
        out[part] = _attend_one(q[part], keys[run], values[run])
    return out


def _attend_one(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The last `len(q)` tokens of one sequence against all of it."""
    new, total = q.shape[0], keys.shape[0]
    mask = None
    if 1 < new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    context = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=mask,
        is_causal=new > 1 and new == total, enable_gqa=q.shape[1] != keys.shape[1])
    return context[0].transpose(0, 1)


@torch.library.register_fake("tpllm::attend", lib=library)
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, layer: int, slots: torch.Tensor,
      query_start: torch.Tensor, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


@torch.library.register_fake("tpllm::rotate_and_attend", lib=library)
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor,
      layer: int, slots: torch.Tensor, query_start: torch.Tensor, start: torch.Tensor,
      length: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, layer: int,
           slots: torch.Tensor, query_start: torch.Tensor, start: torch.Tensor,
           length: torch.Tensor) -> torch.Tensor:
    """Store `k`, `v` `[T, kv_heads/tp, head_size]` at arena rows `slots [T]`, then attend causally.

    `q` and the result are `[T, heads/tp, head_size]`; sequence i has the arena rows `start[i] … start[i] + length[i]`,
    its new tokens included. Query rows: one for each of the first sequences; of the last ones those that begin at
    `query_start [P+1]`, which ends with T.
    """
    result: torch.Tensor = torch.ops.tpllm.attend(q, k, v, cache, layer, slots, query_start, start, length)
    return result


def rotate_and_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                      cache: torch.Tensor, layer: int, slots: torch.Tensor, query_start: torch.Tensor,
                      start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """`attend` on CUDA, of `q` and `k` that are still to be rotated by `cos`, `sin` `[T, head_size/2]`."""
    result: torch.Tensor = torch.ops.tpllm.rotate_and_attend(
        q, k, v, cos, sin, cache, layer, slots, query_start, start, length)
    return result


def rotation(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[T, head_size/2]` of `positions [T]` times `frequencies [head_size/2]`, on CUDA."""
    cos, sin = torch.ops.tpllm.rotation(positions, frequencies).unbind(0)
    return cos, sin
