"""Angles, rotation and the store of keys and values on a GPU; without one the kernels run in Triton's interpreter."""

from typing import Any

import pytest
import torch
from interpreted import DEVICE, need_kernels, run_interpreted
from torch import Tensor


@pytest.fixture
def kernels() -> Any:
    need_kernels()
    from tpllm.engine.torch.kernels import rotate

    return rotate


@pytest.mark.gpu
@pytest.mark.parametrize("half", [16, 32, 48, 64])
def test_angles(half: int, kernels: Any) -> None:
    """Of positions far beyond those for which a rough sine would do."""
    positions = torch.tensor([0, 1, 7, 4095, 8191, 131071])
    frequencies = 1e4 ** -(torch.arange(half) / half)
    found = kernels.rotation(positions.to(DEVICE), frequencies.to(DEVICE)).cpu()
    angles = (positions[:, None].float() * frequencies).double()
    torch.testing.assert_close(found.double(), torch.stack([angles.cos(), angles.sin()]), rtol=0, atol=1e-6)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """The two halves of each head as the parts of complex numbers, turned."""
    a, b = x.double().chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (16, 16, 128), (3, 1, 96)])
def test_rotation_and_store(heads: int, kv_heads: int, size: int, kernels: Any) -> None:
    torch.manual_seed(size)
    count, capacity = 9, 40
    # Parts of one product's result, as the model splits it.
    q, k, v = torch.randn(count, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(count, size // 2).double() * 6
    slots = torch.randperm(capacity)[:count]
    keys, values = (torch.full((capacity, kv_heads, size), 7.0, device=DEVICE) for _ in range(2))
    whole = torch.cat([q, k, v], dim=1).to(DEVICE)
    parts = whole.split([heads, kv_heads, kv_heads], dim=1)
    found = kernels.rotate_and_store(*parts, angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE), keys,
                                     values, slots.to(DEVICE))
    torch.testing.assert_close(found.cpu().double(), rotated(q, angles), rtol=0, atol=1e-5)
    others = torch.ones(capacity, dtype=torch.bool).index_fill(0, slots, False)
    for arena, expected in ((keys.cpu(), rotated(k, angles)), (values.cpu(), v.double())):
        torch.testing.assert_close(arena[slots].double(), expected, rtol=0, atol=1e-5)
        assert (arena[others] == 7.0).all()


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 7)
