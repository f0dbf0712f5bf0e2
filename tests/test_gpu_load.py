"""Engines on GPUs bring their kernels along: a load, and what it then generates, compiles nothing."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import run_jobs
from makers import Shape, make_meta_dir
from test_gpu import GROUPS, HEAD64, HEAD128, WIDE
from test_gpu_ranks import NO_MULTICAST, RANKS, SHARE

from tpllm.cli import main
from tpllm.engine.base import engine_file
from tpllm.engine.torch.kernel_files import FOLDER

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RANKS, reason="no CUDA device here")]


@dataclass(frozen=True)
class Case:
    ranks: int
    shape: Shape
    dtype: str
    quantized: str | None = None


CASES = [Case(1, HEAD128, "bfloat16"), Case(1, HEAD64, "float32"), Case(1, GROUPS, "float16", "int4"),
         Case(1, WIDE, "bfloat16", "int8"), *(Case(ranks, WIDE, "bfloat16") for ranks in RANKS)]  # fmt: skip


def keys(triton: Path) -> set[str]:
    return {path.parent.name for path in triton.glob("*/*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.ranks}-{case.dtype}-{case.quantized}")
def test_a_load_compiles_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NO_MULTICAST.items():
        monkeypatch.setenv(name, value)
    make_meta_dir(tmp_path / "meta", case.shape, seed=5, dtype=getattr(torch, case.dtype))
    convert = ["convert", "--meta-ckpt-dir", str(tmp_path / "meta"), "--tp-size", str(case.ranks), "--output-dir",
               str(tmp_path / "checkpoint")]
    if case.quantized:
        convert += ["--use-weight-only", "--weight-only-precision", case.quantized]
    assert main(convert) == 0
    engine, share = tmp_path / "engine", SHARE if case.ranks > 1 else []
    build = ["build", "--checkpoint-dir", str(tmp_path / "checkpoint"), "--output-dir", str(engine), "--device",
             "cuda", "--max-batch-size", "6", "--max-seq-len", "300"]
    for directory in ("build", "run"):
        (tmp_path / directory).mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton of the build"))
    run_jobs(case.ranks, [*share, {"tpllm": build}], tmp_path / "build", 300)
    with zipfile.ZipFile(engine / engine_file(case.ranks - 1)) as archive:
        brought = {name.split("/")[1] for name in archive.namelist() if name.startswith(FOLDER)}
    assert brought
    ids = tmp_path / "ids.csv"
    ids.write_text("".join(",".join(str(3 + i % 90) for i in range(n)) + "\n" for n in (1, 2, 5, 40, 150, 33, 7)))
    triton = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton))
    monkeypatch.setenv("CC", "false")  # by which Triton would compile what launches a kernel
    run = ["run", "--engine-dir", str(engine), "--input-file", str(ids), "--ignore-eos", "--max-output-len", "20"]
    run_jobs(case.ranks, [*share, {"tpllm": run}], tmp_path / "run", 300)
    assert keys(triton) == brought
