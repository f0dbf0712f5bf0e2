"""Products of a few rows against float64, in one piece and in parts; without a GPU in Triton's interpreter."""

from itertools import product
from typing import Any

import pytest
import torch
from interpreted import DEVICE, GPU, INTERPRETED, need_kernels, run_interpreted
from test_gpu_kernels import rms_norm
from torch import Tensor
from torch.nn.functional import silu

# of ‖found - expected‖ / ‖expected‖; the interpreter multiplies matrices of bfloat16 as if they were integers
TOLERANCE = {torch.float16: 2e-3} | ({torch.bfloat16: 1e-2} if GPU else {})
SHAPES = [(2, 64, 384), (8, 192, 640), (17, 128, 896), (32, 64, 1408), (50, 128, 640)]  # rows, lines, columns
CUTS = [(1, 3), (1, 5), (2, 5), (3, 3), (2, 4, 64), (2, 8, 64)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    need_kernels()
    from tpllm.engine.torch.kernels import few, norm, push

    if INTERPRETED:
        for module in (few, norm, push):
            monkeypatch.setattr(module, "launches_early", lambda device: False)
        monkeypatch.setattr(few, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(few, "room", lambda device: 227 << 10)
    return few


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert ((found.cpu().double() - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


def made(rows: int, lines: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, columns).to(dtype), (torch.randn(lines, columns) / columns**0.5).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("shape", "cut"), [
    *product(SHAPES, CUTS), ((96, 64, 384), (2, 8, 64)), ((8, 64, 704), (2, 8, 64)), ((16, 96, 1280), (1, 8, 128, 32))])
def test_products_and_their_parts(shape: tuple[int, int, int], cut: tuple[int, ...], dtype: torch.dtype,
                                  few: Any) -> None:
    rows, lines, columns = shape
    x, weight = made(rows, lines, columns, dtype)
    found = few.few(x.to(DEVICE), weight.to(DEVICE), few.Cut(*cut))
    if cut[0] > 1:
        assert found.shape == (cut[0], rows, lines) and found.dtype == torch.float32
        found = found.sum(0)
    close(found, x.double() @ weight.double().T, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [2, 16, 31, 64])
def test_both_halves_at_once(rows: int, dtype: torch.dtype, few: Any) -> None:
    x, weight = made(rows, 192, 512, dtype)
    whole = x.double() @ weight.double().T
    expected = silu(whole[:, :96]) * whole[:, 96:]
    for cut in (few.Cut(1, 3), few.CUT_IN_HALF):
        close(few.few(x.to(DEVICE), weight.to(DEVICE), cut, swiglu=True), expected, dtype)
    close(few.linear_swiglu(x.to(DEVICE), weight.to(DEVICE)), expected, dtype)  # so few programs leave it to cuBLAS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rows_that_lie_apart(dtype: torch.dtype, few: Any) -> None:
    x, weight = made(5, 64, 256, dtype)
    wide = torch.full((5, 3 * 256), float("nan"), dtype=dtype)
    wide[:, :256] = x
    found = few.few(wide.to(DEVICE)[:, :256], weight.to(DEVICE), few.Cut(1, 3))
    close(found, x.double() @ weight.double().T, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_product_with_the_sum_and_norm_behind_it(parts: int, dtype: torch.dtype, few: Any,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "cut_for", lambda *_, **__: few.Cut(parts, 3) if parts else None)
    x, weight = made(6, 128, 384, dtype)
    residual, norm = torch.randn(6, 128).to(dtype), torch.randn(128).to(dtype)
    moved = [t.to(DEVICE) for t in (x, weight, residual, norm)]
    total, normed = few.linear_add_norm(*moved[:2], None, *moved[2:], 1e-5).unbind(0)
    expected = residual.double() + x.double() @ weight.double().T
    close(total, expected, dtype)
    close(normed, rms_norm(expected, norm.double()), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (2, 4)])
def test_parts_are_summed_before_they_are_sent(rank: int, ranks: int, few: Any) -> None:
    """To peers that send the same, round after round."""
    from tpllm.engine.torch.rehearsal import Alone

    torch.manual_seed(rank)
    width, dtype = 64, torch.float16
    alone = Alone(rank, ranks, torch.device(DEVICE), width, dtype, "push")
    for _ in range(4):
        parts, residual, norm = torch.randn(3, 5, width), torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
        found = alone.all_reduce_add_norm(*(t.to(DEVICE) for t in (parts, residual, norm)), 1e-5)
        expected = residual.double() + ranks * parts.double().sum(0)
        close(found[0], expected, dtype)
        close(found[1], rms_norm(expected, norm.double()), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "lines", "columns", "divisible", "cut"), [
    (8, 12288, 4096, False, (1, 4, 128)), (32, 6144, 4096, False, (1, 5, 128)),  # Llama-2-7B's, of a rank and of two
    (2, 22016, 4096, False, (1, 3, 128)), (4, 11008, 4096, False, (1, 4, 128)),
    (8, 4096, 11008, True, (2, 5, 128)), (8, 4096, 5504, True, (2, 5, 128)), (8, 4096, 4096, True, (2, 5, 128)),
    (8, 4096, 2048, True, (2, 5, 128)), (8, 4096, 1024, True, (2, 5, 128)), (33, 4096, 512, True, None),  # too short
    (8, 4096, 512, True, (1, 5, 128)),
    (8, 4096, 2752, True, (2, 8, 64)), (64, 4096, 2752, True, (2, 8, 64)), (65, 4096, 2752, True, (2, 8, 64)),
    (32, 3072, 4096, False, (1, 5, 128)), (33, 3072, 4096, False, None), (8, 2560, 8192, False, None),  # too few
    (8, 28672, 4096, False, (1, 4, 128)), (33, 32000, 4096, False, (1, 3, 128)), (33, 22016, 4096, False, (1, 4, 64)),
    (64, 12288, 4096, False, (1, 3, 128)), (64, 6144, 4096, False, (1, 5, 128)), (65, 4096, 4096, True, (2, 8, 64)),
    (16, 3840, 5120, False, (1, 8, 128, 32)), (17, 3840, 5120, False, None),
    (8, 3456, 5120, False, None),  # Llama-2-13B's, of one of four and of eight
    (97, 4096, 4096, True, None), (1, 12288, 4096, False, None), (65, 12288, 4096, False, None),
    (8, 12288, 4000, False, None), (8, 12280, 4096, False, None)])
def test_which_products_are_cut_and_how(rows: int, lines: int, columns: int, divisible: bool,
                                        cut: tuple[int, ...] | None, few: Any,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(few, "room", lambda device: 227 << 10)

    def empty(height: int) -> Tensor:
        return torch.empty(height, columns, dtype=torch.bfloat16, device="meta")

    assert few.cut_for(empty(rows), empty(lines), divisible) == (few.Cut(*cut) if cut else None)
    assert few.cut_for(empty(rows).float(), empty(lines).float(), divisible) is None
    monkeypatch.setattr(few, "room", lambda device: 48 << 10)
    assert few.cut_for(empty(rows), empty(lines), divisible) is None


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 74)
