"""The true thing: engines built and run by TensorRT itself on GPUs, against the float32 reference."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import HERE, mpirun
from dequantized import dequantized_reference
from makers import LLAMA31_GQA, Shape, make_meta_dir, random_ids
from reference import Reference

from tpllm.cli import main
from tpllm.cli.inspect import COLLECTIVE, engine_facts

HEAD128 = Shape(dim=512, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=161, rope_theta=500000.0)
# of ‖found - expected‖ / ‖expected‖
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
LENGTHS = (44, 9, 23, 2, 31)


def lacking(ranks: int) -> str | None:
    """Why TensorRT cannot run here."""
    if importlib.util.find_spec("tensorrt") is None:
        return "no TensorRT: pip install 'tpllm[tensorrt]'"
    if torch.cuda.device_count() < ranks:
        return f"{torch.cuda.device_count()} GPU(s) here, {ranks} needed"
    return None


@pytest.mark.tensorrt
@pytest.mark.parametrize(("attention", "precision", "graphs"), [
    ("fused", "", 0), ("primitive", "", 0), ("fused", "", 1), ("fused", "int8", 0), ("fused", "int4", 1)])
@pytest.mark.parametrize(("shape", "dtype"), [(LLAMA31_GQA, "float32"), (HEAD128, "bfloat16"), (HEAD128, "float16")],
                         ids=["gqa-float32", "head128-bfloat16", "head128-float16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits(ranks: int, shape: Shape, dtype: str, attention: str, precision: str, graphs: int,
                tmp_path: Path) -> None:
    """Of prefill, decode and mixed steps, at every position; of quantized weights, those of what they stand for."""
    if reason := lacking(ranks):
        pytest.skip(reason)
    make_meta_dir(tmp_path / "meta", shape, seed=7, dtype=getattr(torch, dtype))
    quantize = ["--use-weight-only", "--weight-only-precision", precision] if precision else []
    assert main(["convert", "--meta-ckpt-dir", str(tmp_path / "meta"), "--output-dir", str(tmp_path / "checkpoint"),
                 "--tp-size", str(ranks), *quantize]) == 0
    build = ["build", "--checkpoint-dir", str(tmp_path / "checkpoint"), "--output-dir", str(tmp_path / "engine"),
             "--backend", "tensorrt", "--max-batch-size", "5", "--max-seq-len", "44", "--max-input-len", "30"]
    jobs = [{"tpllm": build, "env": {"TPLLM_TENSORRT_ATTENTION": attention}},
            {"env": {"TPLLM_TENSORRT_CUDA_GRAPHS": str(graphs)},
             "engine": str(tmp_path / "engine"), "out": str(tmp_path / "found.pt"), "prompts": [[1, 2, 3]],
             "sequences": random_ids(shape.vocab_size, *LENGTHS, seed=2)}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    mpirun(ranks, [str(HERE / "tensorrt_stub" / "program.py"), "-", str(tmp_path / "jobs.json")], 600,
           {"PYTHONPATH": f"{HERE}:{HERE.parent}"})
    found = torch.load(tmp_path / "found.pt", map_location="cpu")
    reference = (dequantized_reference(tmp_path / "meta", tmp_path / "checkpoint", ranks) if precision
                 else Reference(tmp_path / "meta"))
    for ids, logits in zip(random_ids(shape.vocab_size, *LENGTHS, seed=2), found["logits"], strict=True):
        expected = reference.logits(ids)
        assert float((logits - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    for rank in engine_facts(tmp_path / "engine")["ranks"]:
        named = [layer for layer in rank["layers"] if COLLECTIVE.search(f"{layer['name']} {layer['type']}")]
        assert rank["layers"] and bool(named) == (ranks > 1)
