"""Attention of prompts against float64; without a GPU in Triton's interpreter."""

import pytest
import torch
from interpreted import DEVICE, GPU, need_kernels, run_interpreted
from torch import Tensor

# of ‖found - expected‖ / ‖expected‖; the interpreter multiplies the bits of bfloat16 as integers
TOLERANCE = {torch.float16: 2e-3} | ({torch.bfloat16: 1e-2} if GPU else {})
NAN = float("nan")


def attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of the last tokens `q [new, heads, size]` of a sequence to all of it `[length, kv_heads, size]`."""
    q, keys, values = q.double(), keys.double(), values.double()
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, keys.repeat_interleave(group, 1)) / q.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(keys.shape[0] - q.shape[0] + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))


def arena(lengths: list[int], kv_heads: int, size: int, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor]:
    """Runs of rows in any order, with NaN between them; the last one ends where the arena does."""
    starts, rows = [0] * len(lengths), 0
    for i in torch.randperm(len(lengths)).tolist():
        starts[i] = rows + 3
        rows = starts[i] + lengths[i]
    keys, values = (torch.full((rows, kv_heads, size), NAN, dtype=dtype) for _ in range(2))
    for start, length in zip(starts, lengths, strict=True):
        for cache in (keys, values):
            cache[start:start + length] = torch.randn(length, kv_heads, size).to(dtype)
    return starts, keys, values


def check(new: list[int], lengths: list[int], singles: int, heads: int, kv_heads: int, size: int,
          dtype: torch.dtype) -> None:
    """Prompts of so many new tokens each, behind rows of single tokens."""
    need_kernels()
    from tpllm.engine.torch.kernels.prefill import prefill_attention

    torch.manual_seed(size)
    starts, keys, values = arena(lengths, kv_heads, size, dtype)
    bounds = torch.tensor([singles, *new]).cumsum(0).tolist()
    q = torch.randn(bounds[-1], heads, size).to(dtype)
    q[:singles] = NAN
    out = torch.full(q.shape, NAN, dtype=dtype, device=DEVICE)
    out[:singles] = 7.0
    places = [torch.tensor(a, dtype=torch.int32, device=DEVICE) for a in (bounds, starts, lengths)]
    prefill_attention(q.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), *places, out)
    found = out.cpu()
    assert (found[:singles] == 7.0).all()
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own, run = slice(bounds[i], bounds[i + 1]), slice(start, start + length)
        if new[i]:
            expected = attention(q[own], keys[run], values[run])
            assert ((found[own].double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype], i


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 64), (2, 1, 80), (1, 1, 96), (6, 2, 128),
                                                       (1, 1, 24), (1, 1, 256)])
def test_attention_of_prompts(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    """None, one and many new tokens, with and without earlier ones, at and beside the edges of blocks."""
    check([0, 1, 128, 1, 0, 37, 257, 64, 0], [0, 1, 128, 130, 40, 227, 257, 191, 0], 3, heads, kv_heads, size, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_many_prompts(dtype: torch.dtype) -> None:
    """More than are looked at together, and none before the first."""
    new = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    check(new, [n + 5 * (i % 3) for i, n in enumerate(new)], 0, 1, 1, 64, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_prompts_of_any_lengths(dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        new = torch.randint(0, 200, (3,)).tolist()
        check(new, [n + int(torch.randint(0, 150, ())) for n in new], 1, 2, 1, 64, dtype)


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 8)
