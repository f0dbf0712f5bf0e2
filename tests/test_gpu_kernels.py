"""Each kernel of a step against what it stands for, in float64; without a GPU in Triton's interpreter."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interpreted import DEVICE, GPU, INTERPRETED, need_kernels, run_interpreted
from torch import Tensor
from torch.nn.functional import silu

from tpllm.engine.torch import communicator, exchange

# of ‖found - expected‖ / ‖expected‖
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All modules of kernels that need no second GPU."""
    need_kernels()
    from tpllm.engine.torch.kernels import decode, gemv, norm, peers, push, rotate

    if INTERPRETED:
        for module in (decode, gemv, push):
            monkeypatch.setattr(module, "launches_early", lambda device: False)
    return SimpleNamespace(decode=decode, gemv=gemv, norm=norm, peers=peers, push=push, rotate=rotate)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape and found.dtype == dtype
    assert ((found.cpu().double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tile", [(8, 8), (8, 4), (4, 4), (4, 8), (2, 8)])
@pytest.mark.parametrize(("rows", "columns"), [(7, 33), (12, 1024), (6, 2752), (8, 4096)])
def test_products_of_one_row(rows: int, columns: int, tile: tuple[int, int], dtype: torch.dtype, kernels: Any,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.gemv, "tile_for", lambda lines, columns, swiglu: kernels.gemv.Tile.of(*tile, swiglu))
    torch.manual_seed(rows)
    x, weight, norm = (torch.randn(shape).to(dtype) for shape in ((1, columns), (2 * rows, columns), (columns,)))
    weight /= columns**0.5
    for with_norm, with_residual, swiglu in [(False, False, False), (True, False, False), (False, True, False),
                                             (True, True, True)]:  # fmt: skip
        width = rows if swiglu else 2 * rows
        residual = torch.randn(1, width).to(dtype)
        expected = (rms_norm(x.double(), norm.double()) if with_norm else x.double()) @ weight.double().T
        if swiglu:
            expected = silu(expected[:, :width]) * expected[:, width:]
        found = kernels.gemv.gemv(x.to(DEVICE), weight.to(DEVICE), norm.to(DEVICE) if with_norm else None, 1e-5,
                                  residual.to(DEVICE) if with_residual else None, swiglu)
        close(found, expected + residual.double() if with_residual else expected, dtype)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [8, 11, 17])
def test_a_product_that_is_summed_in_parts(rows: int, kernels: Any, group: None,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PART_ROWS", 4)
    alone: communicator.Communicator = object.__new__(communicator.Communicator)
    alone._exchanged = None
    torch.manual_seed(rows)
    x, weight, residual, norm = (torch.randn(shape) for shape in ((rows, 48), (64, 48), (rows, 64), (64,)))
    moved = [t.to(DEVICE) for t in (x, weight, residual, norm)]
    found = alone.linear_all_reduce_add_norm(*moved[:2], None, *moved[2:], 1e-5)
    expected = residual.double() + x.double() @ weight.double().T
    close(found[0], expected, torch.float32)
    close(found[1], rms_norm(expected, norm.double()), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [64, 768, 1000])
def test_residual_and_norm(width: int, dtype: torch.dtype, kernels: Any) -> None:
    torch.manual_seed(width)
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((5, width), (5, width), (width,)))
    on_device = [t.to(DEVICE) for t in (x, residual, weight)]
    total, normed = kernels.norm.add_norm(*on_device, 1e-5).unbind(0)
    close(total, x.double() + residual.double(), dtype)
    close(normed, rms_norm(x.double() + residual.double(), weight.double()), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", range(3))
def test_residual_and_norm_of_shares(rank: int, kernels: Any) -> None:
    torch.manual_seed(rank)
    shares, residual, weight = (torch.randn(shape) for shape in ((3, 6, 48), (4, 48), (48,)))
    others = shares.clone()
    others[rank] = float("nan")  # nobody writes there
    out = torch.empty(2, 9, 48, device=DEVICE)
    x, residual_there, weight_there = (t.to(DEVICE) for t in (shares[rank, :4], residual, weight))
    kernels.norm.add_norm(x, residual_there, weight_there, 1e-5, out[:, 2:6],
                          kernels.norm.Shares(others.view(-1, 48).to(DEVICE), rank, 3, 6))
    expected = shares[:, :4].double().sum(0) + residual.double()
    close(out[0, 2:6], expected, torch.float32)
    close(out[1, 2:6], rms_norm(expected, weight.double()), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (2, 4)])
def test_sums_with_what_peers_have_sent(rank: int, ranks: int, dtype: torch.dtype, kernels: Any) -> None:
    """One rank's side of four rounds, in which the others were earlier."""
    torch.manual_seed(rank)
    rows, room, width, others = 3, 5, 96, [other for other in range(ranks) if other != rank]
    parts = [torch.full((kernels.peers.SETS, ranks, room, width), -0.0, dtype=dtype, device=DEVICE)
             for _ in range(ranks)]
    buffers = kernels.peers.make_buffers((*parts[rank:], *parts[:rank]), rank)
    behind = [(rank - other) % ranks for other in others]
    for number in range(4):
        addends, residual, weight = (torch.randn(shape).to(dtype)
                                     for shape in ((ranks, rows, width), (rows, width), (width,)))
        addends[:, 0, :7] = -0.0  # what an empty place holds
        now, before = (parts[rank][(number + turn) % 3, :, :rows] for turn in (0, 2))
        now[behind] = addends[others].to(DEVICE).abs() * addends[others].to(DEVICE).sign()
        x, expected = addends[rank].to(DEVICE), addends.double().sum(0)
        if number == 2:
            close(kernels.push.push_all_reduce(x, buffers), expected, dtype)
        else:
            found = kernels.push.push_all_reduce_add_norm(x, residual.to(DEVICE), weight.to(DEVICE), 1e-5, buffers)
            close(found[0], expected + residual.double(), dtype)
            close(found[1], rms_norm(expected + residual.double(), weight.double()), dtype)
        for other in others:
            sent = parts[other][number % 3, (other - rank) % ranks, :rows]
            assert torch.equal(sent, x) and not (sent.signbit() & (sent == 0)).any()
        assert ((before[behind] == 0) & before[behind].signbit()).all(), "not emptied for the round after the next"
    assert buffers.rounds.tolist() == [4] * rows + [0] * (room - rows)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (2, 4)])
def test_sums_of_a_rank_alone(rank: int, ranks: int, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends the others comes to it from each of them, also where a product has sent it; round after round."""
    from tpllm.engine.torch import communicator, rehearsal

    torch.manual_seed(rank)
    rows, width, inner = 3, 64, 48
    monkeypatch.setattr(communicator, "PUSH_BYTES", 4 * rows * width)
    alone = rehearsal.Alone(rank, ranks, torch.device(DEVICE), width, torch.float32, "push")
    alone.sum_all()
    for count in (rows, 1, 1, 1, rows, 1, rows, 1):
        x, residual, weight, norm = (torch.randn(shape) for shape in ((count, inner), (count, width), (width, inner),
                                                                      (width,)))
        moved = [t.to(DEVICE) for t in (x, weight, residual, norm)]
        found = alone.linear_all_reduce_add_norm(*moved[:2], None, *moved[2:], 1e-5)
        expected = residual.double() + ranks * (x.double() @ weight.double().T)
        close(found[0], expected, torch.float32)
        close(found[1], rms_norm(expected, norm.double()), torch.float32)
        last = alone._buffers.places[0][(int(alone._buffers.rounds[0]) - 2) % 3, :, 0]
        assert ((last == 0) & last.signbit()).all(), "not emptied for the round after the next"
    assert alone._buffers.rounds.tolist() == [12, 7, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "size"),
                         [(1, 2, 2, 64), (1, 6, 1, 32), (3, 8, 2, 128), (40, 4, 4, 32)])
def test_attention_of_single_tokens(batch: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype,
                                    kernels: Any) -> None:
    """In an arena of NaN, of which it writes the new tokens' rows; in one part and in several, which merge."""
    torch.manual_seed(batch)
    lengths = [130, 1, 2, 65, 64][:batch] + torch.randint(1, 150, (max(0, batch - 5),)).tolist()
    assert kernels.decode.splits_for(40 * 4) == 1 < kernels.decode.splits_for(3 * 2)
    starts = [160 * place + 3 for place in torch.randperm(batch).tolist()]
    keys, values = (torch.full((160 * batch, kv_heads, size), float("nan")).to(dtype) for _ in range(2))
    for start, length in zip(starts, lengths, strict=True):
        for arena in (keys, values):
            arena[start:start + length - 1] = torch.randn(length - 1, kv_heads, size).to(dtype)
    whole = torch.randn(batch, heads + 2 * kv_heads, size).to(dtype)
    q, k, v = whole.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(batch, size // 2) * 6
    ints = [torch.tensor(a, dtype=torch.int32, device=DEVICE) for a in (starts, lengths)]
    on_device = [t.to(DEVICE) for t in (angles.cos(), angles.sin(), keys, values)]
    out = torch.full((batch, heads, size), float("nan"), dtype=dtype, device=DEVICE)
    found = kernels.decode.decode_attention(*whole.to(DEVICE).split([heads, kv_heads, kv_heads], dim=1), *on_device,
                                            *ints, out)
    assert found is out
    turned_q, turned_k = rotated(q, angles.double()), rotated(k, angles.double())
    expected = torch.zeros(batch, heads, size, dtype=torch.float64)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        past = slice(start, start + length - 1)
        all_k = torch.cat([keys[past].double(), turned_k[i:i + 1]])
        all_v = torch.cat([values[past].double(), v[i:i + 1].double()])
        for head in range(heads):
            own = head // (heads // kv_heads)
            expected[i, head] = (all_k[:, own] @ turned_q[i, head] / size**0.5).softmax(0) @ all_v[:, own]
        close(on_device[2][start + length - 1], turned_k[i], dtype)
        close(on_device[3][start + length - 1], v[i].double(), dtype)
    close(found, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [16, 32, 48, 64])
def test_angles(half: int, kernels: Any) -> None:
    """Of positions far beyond those for which a rough sine would do."""
    positions = torch.tensor([0, 1, 7, 4095, 8191, 131071])
    frequencies = 1e4 ** -(torch.arange(half) / half)
    found = kernels.rotate.rotation(positions.to(DEVICE), frequencies.to(DEVICE)).cpu()
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
    found = kernels.rotate.rotate_and_store(*parts, angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE),
                                            keys, values, slots.to(DEVICE))
    torch.testing.assert_close(found.cpu().double(), rotated(q, angles), rtol=0, atol=1e-5)
    others = torch.ones(capacity, dtype=torch.bool).index_fill(0, slots, False)
    for arena, expected in ((keys.cpu(), rotated(k, angles)), (values.cpu(), v.double())):
        torch.testing.assert_close(arena[slots].double(), expected, rtol=0, atol=1e-5)
        assert (arena[others] == 7.0).all()


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 73)
