"""Quantized weights on a GPU: each kernel against float64 on the dequantized matrix, engines against the reference.

Without a GPU the kernels run in Triton's interpreter, where Triton is installed.
"""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dequantized import dequantized_reference
from interpreted import DEVICE, GPU, INTERPRETED, need_kernels, run_interpreted
from makers import Shape, make_meta_dir
from test_gpu_kernels import group, rms_norm  # noqa: F401  a fixture
from torch import Tensor
from torch.nn.functional import silu

from tpllm.cli import main
from tpllm.distributed import World
from tpllm.engine.torch import communicator, exchange, rehearsal
from tpllm.quantization import quantized, stored
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

ALGOS = ["W8A16", "W4A16"]
# of ‖found - expected‖ / ‖expected‖; int4 sums carry a constant that is taken off at the end
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
# Rows, columns: short and several groups, widths that no tile divides, those of 7B at tp 4 and 1, and whole tiles.
SIZES = [(8, 33), (10, 128), (14, 300), (24, 1376), (6, 2752), (4, 11008), (16, 4096)]


def make(rows: int, columns: int, dtype: str, algo: str) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight's two tensors, and in float64 what they stand for."""
    weight = (torch.randn(rows, columns) / columns**0.5).to(getattr(torch, dtype))
    values, scale = quantized(weight, stored("x.weight", (rows, columns), dtype, algo)).values()
    whole = torch.zeros(rows, columns, dtype=torch.float64)
    for column in range(columns):  # as the layout is documented
        if algo == "W8A16":
            whole[:, column] = values[:, column] * scale.double()
        else:
            group, inner = divmod(column, 128)
            words = values[:, group * 16 + inner % 16].long() & 0xFFFFFFFF
            whole[:, column] = ((words >> (inner // 16 * 4)) % 16 - 8) * scale[:, group].double()
    assert (whole - weight.double()).norm() < 0.2 * weight.double().norm()
    return values.to(DEVICE), scale.to(DEVICE), whole


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def product(x: Tensor, whole: Tensor, norm: Tensor | None, residual: Tensor | None, swiglu: bool,
            rounded: bool) -> Tensor:
    """Of rows x in float64, with what is done before and after it; their products with `norm` may be rounded."""
    y = x.double()
    if norm is not None:
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        y = scale * (x * norm if rounded else y * norm.double())
    y = y @ whole.T
    if swiglu:
        first, second = y.chunk(2, dim=-1)
        y = silu(first) * second
    return y if residual is None else y + residual.double()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    need_kernels()
    from tpllm.engine.torch import kernels
    from tpllm.engine.torch.kernels import few, few_quantized, gemv_quantized, int4, norm, push

    if INTERPRETED:
        for module in (few, few_quantized, gemv_quantized, int4, norm, push):
            monkeypatch.setattr(module, "launches_early", lambda device: False)
    return kernels


@pytest.mark.gpu
@pytest.mark.parametrize(("algo", "tile"), [("W4A16", None), *(("W8A16", tile) for tile in [(4, 4), (16, 4), (4, 2)])])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_one_row(algo: str, dtype: str, tile: tuple[int, int] | None, kernels: Any,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED and algo == "W4A16" and dtype == "bfloat16":
        pytest.skip("the interpreter multiplies bits of bfloat16 as integers")
    if tile:
        monkeypatch.setattr(kernels.gemv_quantized, "TILES", {1 << 31: tile})
    torch.manual_seed(1)
    for rows, columns in SIZES:
        values, scale, whole = make(rows, columns, dtype, algo)
        x, norm = torch.randn(1, columns).to(getattr(torch, dtype)), (1 + torch.randn(columns) / 5).to(
            getattr(torch, dtype))  # fmt: skip
        for with_norm, with_residual, swiglu in [(False, False, False), (False, True, False), (True, False, False),
                                                 (True, False, True), (True, True, True)]:  # fmt: skip
            width = rows // 2 if swiglu else rows
            residual = torch.randn(1, width).to(x.dtype)
            found = kernels.gemv_quantized.gemv(
                x.to(DEVICE), values, scale, norm.to(DEVICE) if with_norm else None, 1e-5,
                residual.to(DEVICE) if with_residual else None, swiglu)
            y = product(x, whole, norm if with_norm else None, residual if with_residual else None, swiglu,
                        rounded=algo == "W4A16")
            assert found.shape == y.shape and found.dtype == x.dtype
            assert relative(found, y) < TOLERANCE[dtype], (rows, columns, with_norm, with_residual, swiglu)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (32, 8), (32, 4)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tiles_of_int4(dtype: str, tile: tuple[int, int], kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("the interpreter multiplies bits of bfloat16 as integers")
    for name in ("TILES", "FEW_TILES"):
        monkeypatch.setattr(kernels.int4, name, {1 << 31: tile})
    torch.manual_seed(3)
    for rows, columns, count in [(72, 2752, 1), (30, 300, 3), (40, 2064, 4)]:
        values, scale, whole = make(rows, columns, dtype, "W4A16")
        x, norm = (t.to(DEVICE, getattr(torch, dtype)) for t in (
            torch.randn(count, columns), 1 + torch.randn(columns) / 5))  # fmt: skip
        for swiglu in (False, True):
            residual = torch.randn(count, rows // (1 + swiglu)).to(x)
            found = kernels.int4.few_rows(x, values, scale, norm, 1e-5, residual, swiglu)
            y = product(x.cpu(), whole, norm.cpu(), residual.cpu(), swiglu, rounded=True)
            assert relative(found, y) < TOLERANCE[dtype]


def want(programs: int, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None for products in one piece, very many for as many parts as there may be."""
    for name in ("INT8", "INT4"):
        cuts = {rows: (programs, cut) for rows, (_, cut) in getattr(kernels.few_quantized, name).items()}
        monkeypatch.setattr(kernels.few_quantized, name, cuts)
    monkeypatch.setattr(kernels.few_quantized, "SWIGLU_PROGRAMS", programs)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [0, 1 << 30])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("algo", ALGOS)
def test_several_rows(algo: str, dtype: str, programs: int, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want(programs, kernels, monkeypatch)
    torch.manual_seed(2)
    for rows, columns in SIZES:
        values, scale, whole = make(rows, columns, dtype, algo)
        for count in (2, 7, 8, 16, 17, 33, 100, 128, 129, 200):
            if INTERPRETED and dtype == "bfloat16" and count <= 128:
                continue  # the interpreter multiplies bits of bfloat16 as integers
            x = torch.randn(count, columns).to(getattr(torch, dtype))
            exact = x.double() @ whole.T
            found = kernels.few.linear(x.to(DEVICE), values, scale)
            assert found.shape == (count, rows) and found.dtype == x.dtype
            assert relative(found, exact) < TOLERANCE[dtype], (rows, columns, count)
            if INTERPRETED and dtype == "bfloat16":
                continue
            found = kernels.few.linear_swiglu(x.to(DEVICE), values, scale)
            first, second = exact.chunk(2, dim=-1)
            assert found.shape == (count, rows // 2) and found.dtype == x.dtype
            assert relative(found, silu(first) * second) < TOLERANCE[dtype], (rows, columns, count)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cut", [(32, 1, 5, False), (64, 3, 2, False), (64, 2, 3, True)], ids=str)
@pytest.mark.parametrize("algo", ALGOS)
def test_whole_tiles_and_the_sum_and_norm_behind_them(algo: str, cut: tuple[int, int, int, bool], dtype: str,
                                                      kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("the interpreter multiplies bits of bfloat16 as integers")
    monkeypatch.setattr(kernels.few_quantized, "cut_for", lambda *_, **__: kernels.few_quantized.Cut(*cut))
    torch.manual_seed(4)
    for count in (3, 20, 40):
        values, scale, whole = make(128, 896, dtype, algo)
        x = torch.randn(count, 896).to(getattr(torch, dtype))
        residual, norm = torch.randn(count, 128).to(x), (1 + torch.randn(128) / 5).to(x)
        product = x.double() @ whole.T
        moved = [t.to(DEVICE) for t in (x, values, scale, residual, norm)]
        total, normed = kernels.few.linear_add_norm(*moved, 1e-5)
        expected = product + residual.double()
        assert relative(total, expected) < TOLERANCE[dtype]
        assert relative(normed, rms_norm(expected, norm.double())) < TOLERANCE[dtype]
        if cut[1] == 1:
            both = kernels.few_quantized.few(x.to(DEVICE), values, scale, kernels.few_quantized.Cut(*cut), swiglu=True)
            assert relative(both, silu(product[:, :64]) * product[:, 64:]) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("algo", ALGOS)
def test_several_rows_summed_over_ranks(algo: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pushes, in one piece and in parts, and as NCCL would; ranks are this one again and again."""
    monkeypatch.setattr(communicator, "PUSH_BYTES", 2 * 9 * 64)
    alone = rehearsal.Alone(1, 3, torch.device(DEVICE), 64, torch.float16, "push")
    alone.sum_all()
    torch.manual_seed(5)
    values, scale, whole = make(64, 1100, "float16", algo)
    for count, programs in [(9, 0), (9, 1 << 30), (1, 0), (3, 1 << 30), (12, 1 << 30)]:
        want(programs, kernels, monkeypatch)
        x, residual, norm = (torch.randn(shape).half() for shape in ((count, 1100), (count, 64), (64,)))
        moved = [t.to(DEVICE) for t in (x, values, scale, residual, norm)]
        found = alone.linear_all_reduce_add_norm(*moved, 1e-5)
        ranks = 3 if count <= 9 else 1
        expected = residual.double() + ranks * (x.double() @ whole.T)
        for made, exact in ((found[0], expected), (found[1], rms_norm(expected, norm.double()))):
            assert relative(made, exact) < 2 * TOLERANCE["float16"], (count, programs)


@pytest.mark.gpu
@pytest.mark.usefixtures("group", "kernels")
@pytest.mark.parametrize("algo", ALGOS)
def test_many_rows_summed_in_parts(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PART_ROWS", 4)
    alone: communicator.Communicator = object.__new__(communicator.Communicator)
    alone._exchanged = None
    torch.manual_seed(6)
    values, scale, whole = make(64, 300, "float32", algo)
    x, residual, norm = (torch.randn(shape) for shape in ((11, 300), (11, 64), (64,)))
    found = alone.linear_all_reduce_add_norm(*(t.to(DEVICE) for t in (x, values, scale, residual, norm)), 1e-5)
    expected = residual.double() + x.double() @ whole.T
    assert relative(found[0], expected) < TOLERANCE["float32"]
    assert relative(found[1], rms_norm(expected, norm.double())) < TOLERANCE["float32"]


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, 37, "-k", "row or tiles")


# Inner widths of 2.5 groups, 1 group and a short one, and with group-query attention.
SHAPES = {"mha": Shape(dim=256, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=160, ffn_hidden=320),
          "gqa": Shape(dim=512, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=161, ffn_hidden=736)}  # fmt: skip
ENGINES = [("eager", "mha", "float32", "int4"), ("eager", "gqa", "bfloat16", "int8"),
           ("inductor", "mha", "bfloat16", "int8"), ("inductor", "mha", "bfloat16", "int4"),
           ("inductor", "gqa", "float16", "int4"), ("inductor", "gqa", "float16", "int8"),
           ("inductor", "gqa", "float32", "int8")]  # fmt: skip
LOGITS = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 3e-2}


@cache
def engine(root: Path, backend: str, shape: str, dtype: str, precision: str) -> tuple[ModelRunner, Any]:
    """Built by the commands a user gives, and the reference with the weights that its own stand for."""
    directory = root / f"{backend}-{shape}-{dtype}-{precision}"
    meta, checkpoint, made = directory / "meta", directory / "checkpoint", directory / "engine"
    make_meta_dir(meta, SHAPES[shape], seed=6, dtype=getattr(torch, dtype))
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(checkpoint), "--use-weight-only",
                 "--weight-only-precision", precision]) == 0  # fmt: skip
    assert main(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(made), "--backend", backend,
                 "--device", "cuda", "--max-batch-size", "6", "--max-seq-len", "300"]) == 0  # fmt: skip
    return ModelRunner.from_dir(made, world=World()), dequantized_reference(meta, checkpoint, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-quantized")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device here")
@pytest.mark.parametrize("case", ENGINES, ids="-".join)
def test_logits_are_those_of_the_dequantized_weights(case: tuple[str, str, str, str], root: Path) -> None:
    """Prompts in one mixed step, then decode of one, of two to six and of all sequences."""
    import numpy as np

    from tpllm.engine.base import StepInput

    runner, reference = engine(root, *case)
    chance = random.Random(7)
    sequences = [[chance.randrange(160) for _ in range(length)] for length in (90, 41, 9, 130, 20, 63)]
    cached = [0] * len(sequences)
    found: list[list[Tensor]] = [[] for _ in sequences]

    def step(parts: list[tuple[int, int]]) -> None:
        """(sequence, number of new tokens) of each that takes part."""
        counts = [count for _, count in parts]
        tokens = [token for i, count in parts for token in sequences[i][cached[i]:cached[i] + count]]
        logits = runner.engine.step(StepInput(
            np.array(tokens, np.int32), np.cumsum([0, *counts], dtype=np.int32),
            np.array([300 * i for i, _ in parts], np.int32),
            np.array([cached[i] + count for i, count in parts], np.int32),
            np.arange(len(tokens), dtype=np.int32)))  # fmt: skip
        for (i, count), part in zip(parts, logits.split(counts), strict=True):
            found[i].append(part.cpu())
            cached[i] += count

    step([(i, len(ids) - 8) for i, ids in enumerate(sequences)])
    for size in (1, 1, 2, 3, 6, 6):
        step([(i, 1) for i in range(size)])
    for i, ids in enumerate(sequences):
        expected = reference.logits(ids[:cached[i]])
        assert relative(torch.cat(found[i]), expected.double()) < LOGITS[case[2]]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device here")
@pytest.mark.parametrize("case", [case for case in ENGINES if case[2] == "float32"], ids="-".join)
def test_greedy_answers_are_the_references(case: tuple[str, str, str, str], root: Path) -> None:
    runner, reference = engine(root, *case)
    chance = random.Random(8)
    prompts = [[chance.randrange(160) for _ in range(length)] for length in (5, 1, 30, 8, 100, 2, 7)]
    outputs = runner.generate(prompts, SamplingParams(max_output_len=12, ignore_eos=True))
    for ids, output in zip(prompts, outputs, strict=True):
        for token, (best, gap) in zip(output.outputs[0].token_ids, reference.greedy_with_gaps(ids, 12), strict=True):
            if gap < 1e-2:
                break  # a tie: from here on either is right
            assert token == best
