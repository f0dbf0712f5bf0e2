"""Weights in int8 and int4: every tensor by its definition, engines at tp 1 to 4, what is lost, and refusals."""

import importlib.util
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_jobs
from dequantized import dequantize, dequantized_reference, int4_numbers, read
from makers import Shape, make_meta_dir, random_ids
from safetensors.torch import save_file

from tpllm.cli import main
from tpllm.demo import MODEL_DIR

# At tp 4 an inner width of 160 and a context of 32 columns: a group and a short one, and a short one alone.
SHAPE = Shape(dim=128, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=96, ffn_hidden=640)
PRECISIONS, RANKS = ["int8", "int4"], [1, 2, 4]
NAMES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


def convert(source: Path, out: Path, *options: str) -> int:
    return main(["convert", "--meta-ckpt-dir", str(source), "--output-dir", str(out), *options])


def weight_only(precision: str) -> list[str]:
    return ["--use-weight-only", "--weight-only-precision", precision]


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_meta_dir(tmp_path_factory.mktemp("quantized") / "meta", SHAPE, shards=2, seed=3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tensor_is_what_the_definition_says(precision: str, ranks: int, dtype: str, meta: Path,
                                                  tmp_path: Path) -> None:
    """Against numpy, from the same rank's weights as they are without quantization."""
    split = ["--tp-size", str(ranks), "--dtype", dtype]
    assert convert(meta, tmp_path / "whole", *split) == 0
    assert convert(meta, tmp_path / "quantized", *split, *weight_only(precision)) == 0
    for rank in range(ranks):
        plain, made = (read(tmp_path / kind / f"rank{rank}.safetensors") for kind in ("whole", "quantized"))
        linear = {f"transformer.layers.{layer}.{name}" for layer in range(SHAPE.n_layers) for name in NAMES}
        scale_kind, largest = ("per_channel_scale", 127) if precision == "int8" else ("weights_scaling_factor", 7)
        assert made.keys() == plain.keys() | {f"{name}.{scale_kind}" for name in linear}
        for name in plain.keys() - {f"{name}.weight" for name in linear}:
            assert torch.equal(plain[name], made[name])
        for name in linear:
            check_tensor(plain[f"{name}.weight"], made, name, made[f"{name}.{scale_kind}"], largest)


def check_tensor(weight: torch.Tensor, made: dict[str, torch.Tensor], name: str, scale: torch.Tensor,
                 largest: int) -> None:
    """Round numbers as near as scales allow, scales as the largest number of a row or group asks."""
    rows, columns = weight.shape
    groups = math.ceil(columns / 128)
    w = np.zeros((rows, groups * 128))
    w[:, :columns] = weight.double().numpy()
    blocks = w.reshape(rows, groups, 128) if largest == 7 else w[:, None]
    expected = np.abs(blocks).max(-1) / largest
    found = scale.double().numpy().reshape(expected.shape)
    assert scale.dtype == (torch.float32 if largest == 127 else weight.dtype)
    np.testing.assert_allclose(found, expected, rtol=torch.finfo(scale.dtype).eps)
    numbers = (int4_numbers(made[f"{name}.weight"].numpy()).reshape(rows, -1) if largest == 7
               else made[f"{name}.weight"].numpy().astype(np.int64))  # fmt: skip
    assert abs(numbers).max() == largest and not numbers[:, columns:].any()
    error = np.abs(dequantize(made, name, columns) - w[:, :columns])
    step = np.repeat(found, 128, -1)[:, :columns] if largest == 7 else found
    # Half a step; a scale that was rounded down leaves the largest number of its group a little further.
    assert (error <= step * (0.5 + largest * torch.finfo(scale.dtype).eps + 1e-6)).all()


def run_engines(meta: Path, root: Path, ranks: int, backend: str, precisions: list[str]) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = []
    prompts = random_ids(SHAPE.vocab_size, 9, 2, 17, seed=ranks)
    (root / "prompts.csv").write_text("".join(",".join(map(str, ids)) + "\n" for ids in prompts))
    for precision in precisions:
        checkpoint, engine = root / precision, str(root / f"{precision}-engine")
        assert convert(meta, checkpoint, "--tp-size", str(ranks), *weight_only(precision)) == 0
        jobs += [{"tpllm": ["build", "--checkpoint-dir", str(checkpoint), "--output-dir", engine, "--backend", backend,
                            "--device", "cpu", "--max-batch-size", "3", "--max-seq-len", "32"]},
                 {"logits": engine, "prompts": prompts, "out": str(root / f"{precision}.pt")},
                 {"tpllm": ["run", "--engine-dir", engine, "--input-file", str(root / "prompts.csv"), "--ignore-eos",
                            "--max-output-len", "8", "--output-json", str(root / f"{precision}.json")]}]  # fmt: skip
    run_jobs(ranks, jobs, root, timeout=500)
    return {"root": root, "ranks": ranks, "prompts": prompts}


def check_engine(meta: Path, made: dict[str, Any], precision: str) -> None:
    root, prompts = made["root"], made["prompts"]
    reference = dequantized_reference(meta, root / precision, made["ranks"])
    answers = json.loads((root / f"{precision}.json").read_text())
    for ids, found, answer in zip(prompts, torch.load(root / f"{precision}.pt"), answers, strict=True):
        expected = reference.logits(ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        best = reference.greedy_with_gaps(ids, 8)
        decided = list(itertools.takewhile(lambda step: step[1] > 1e-3, best))
        assert answer["outputs"][0]["token_ids"][:len(decided)] == [token for token, _ in decided]
        assert len(decided) > 4


@pytest.mark.parametrize(("ranks", "precision"), [
    (1, "int8"), (1, "int4"), (4, "int4"), *(pytest.param(*case, marks=pytest.mark.full)
                                             for case in ((2, "int8"), (2, "int4"), (4, "int8"))),
])  # fmt: skip
def test_logits_and_tokens_are_those_of_the_dequantized_weights(ranks: int, precision: str, meta: Path,
                                                                tmp_path: Path) -> None:
    check_engine(meta, run_engines(meta, tmp_path, ranks, "eager", [precision]), precision)


@pytest.mark.full
def test_a_compiled_engine(tmp_path: Path) -> None:
    meta = make_meta_dir(tmp_path / "meta", replace(SHAPE, n_layers=1), seed=4)
    check_engine(meta, run_engines(meta, tmp_path, 1, "inductor", ["int4"]), "int4")


@pytest.mark.full
@pytest.mark.parametrize("ranks", RANKS)
def test_compiled_engines(ranks: int, meta: Path, tmp_path: Path) -> None:
    made = run_engines(meta, tmp_path, ranks, "inductor", PRECISIONS)
    for precision in PRECISIONS:
        check_engine(meta, made, precision)


def held_out_text() -> str:
    """Documents that the demo model was not trained on."""
    path = Path(__file__).parents[1] / "demo" / "corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    assert spec and spec.loader
    corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpus)
    return "\n".join(itertools.islice(corpus.documents(987654), 12))


def test_perplexity_of_the_demo_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(held_out_text(), encoding="utf-8")
    nats = {}
    for precision in ["none", *PRECISIONS]:
        checkpoint, engine, scores = (tmp_path / f"{precision}-{kind}" for kind in ("checkpoint", "engine", "scores"))
        options = [] if precision == "none" else weight_only(precision)
        assert convert(MODEL_DIR, checkpoint, "--dtype", "float32", *options) == 0
        assert main(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(engine), "--backend", "eager",
                     "--device", "cpu", "--max-input-len", "480", "--max-seq-len", "512"]) == 0  # fmt: skip
        assert main(["eval", "--task", "perplexity", "--data-dir", str(tmp_path / "text.txt"), "--engine-dir",
                     str(engine), "--output-json", str(scores)]) == 0  # fmt: skip
        found = json.loads(scores.read_text())["scores"]
        nats[precision] = next(score["value"] for score in found if "nats" in score["name"])
    assert 0 < nats["none"] < 1
    assert abs(math.exp(nats["int8"] - nats["none"]) - 1) <= 0.005
    assert abs(math.exp(nats["int4"] - nats["none"]) - 1) <= 0.05
    assert len({*nats.values()}) == 3  # three engines, not one three times


@pytest.mark.parametrize("precision", PRECISIONS)
def test_verify_against_the_source(precision: str, meta: Path, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    assert convert(meta, checkpoint, "--tp-size", "2", *weight_only(precision)) == 0
    assert main(["verify", str(checkpoint), "--against", str(meta)]) == 0
    # Of two ranks: the embedding, two norms, five matrices and their scales of two layers, the last norm, lm_head.
    assert f"all {2 * (1 + 2 * (2 + 10) + 2)} tensors are those of {meta}" in capsys.readouterr().out
    assert main(["inspect", str(checkpoint)]) == 0
    assert "mlp.proj.weight  I" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "checkpoint"), "--against", str(checkpoint)]) == 12
    assert "is quantized" in capsys.readouterr().err
    (checkpoint / "manifest.json").unlink()
    tensors = read(checkpoint / "rank1.safetensors")
    tensors["transformer.layers.1.mlp.proj.weight"][3, 5] += 1
    save_file(tensors, checkpoint / "rank1.safetensors")
    assert main(["verify", str(checkpoint)]) == 0  # nothing says what was written
    assert main(["verify", str(checkpoint), "--against", str(meta)]) == 12
    message = capsys.readouterr().err
    assert "transformer.layers.1.mlp.proj.weight" in message and "rank1" in message


def test_one_number_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_meta_dir(tmp_path / "meta", SHAPE)
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    state["layers.1.feed_forward.w2.weight"][7, 7] = math.nan
    torch.save(state, source / "consolidated.00.pth")
    assert convert(source, tmp_path / "out", *weight_only("int4")) == 12
    assert "mlp.proj.weight holds a number that is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_and_groups_of_zeros(tmp_path: Path) -> None:
    source = make_meta_dir(tmp_path / "meta", SHAPE)
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    state["layers.0.attention.wo.weight"][3] = 0.0
    state["layers.0.attention.wo.weight"][4] *= 1e-30  # which float16 has no scale for
    torch.save(state, source / "consolidated.00.pth")
    for precision in PRECISIONS:
        assert convert(source, tmp_path / precision, "--dtype", "float16", *weight_only(precision)) == 0
        tensors = read(tmp_path / precision / "rank0.safetensors")
        rows = dequantize(tensors, "transformer.layers.0.attention.dense", SHAPE.dim)
        assert not rows[3:5].any() and rows[5].any()


REFUSALS = {
    "unknown algorithm": ({"quant_algo": "W3A16"}, ["'W3A16' is not supported"]),
    "another layout": ({"layout": "interleaved"}, ["'W4A16' is not supported"]),
    "TensorRT-LLM's own": ({"layout": None}, ["'W4A16' is not supported", "convert the original weights"]),
    "another group": ({"group_size": 64}, ["'W4A16' is not supported"]),
    "no name": ({"quant_algo": False}, ["has unknown tensor(s)", "weights_scaling_factor"]),
    "quantized cache": ({"kv_cache_quant_algo": "INT8"}, ["kv_cache_quant_algo 'INT8'"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_other_quantization_is_refused_by_name(case: str, meta: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(meta, tmp_path / "c", *weight_only("int4")) == 0
    data = json.loads((tmp_path / "c" / "config.json").read_text())
    assert data["quantization"] == {"quant_algo": "W4A16", "kv_cache_quant_algo": None, "group_size": 128,
                                    "layout": "plain"}  # fmt: skip
    changes, words = REFUSALS[case]
    data["quantization"] |= changes
    (tmp_path / "c" / "config.json").write_text(json.dumps(data))
    (tmp_path / "c" / "manifest.json").unlink()
    assert main(["build", "--checkpoint-dir", str(tmp_path / "c"), "--output-dir", str(tmp_path / "e"), "--backend",
                 "eager"]) == 12  # fmt: skip
    message = capsys.readouterr().err
    assert all(word in message for word in words) and not (tmp_path / "e").exists()


def test_what_cannot_be_is_refused_before_anything_is_made(meta: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(meta, tmp_path / "a", "--weight-only-precision", "int4") == 2
    assert "--weight-only-precision int4 needs --use-weight-only" in capsys.readouterr().err
    assert main(["bench", "--engine-dir", str(tmp_path / "b"), "--weight-only-precision", "int8"]) == 2
    assert convert(meta, tmp_path / "c", "--use-weight-only") == 0  # int8, as TensorRT-LLM
    assert json.loads((tmp_path / "c" / "config.json").read_text())["quantization"]["quant_algo"] == "W8A16"
    for options in ([], ["--tp-size", "2"], weight_only("int4")):
        assert main(["convert", "--checkpoint-dir", str(tmp_path / "c"), "--output-dir", str(tmp_path / "d"),
                     *options]) == 12  # fmt: skip
        assert "W8A16" in (message := capsys.readouterr().err) and "convert the original weights" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize(("precision", "algo"), [("int8", "W8A16"), ("int4", "W4A16")])
def test_random_weights_are_measured(precision: str, algo: str, tmp_path: Path) -> None:
    assert main(["bench", "--engine-dir", str(tmp_path / "e"), "--model", "tiny", "--backend", "eager", "--device",
                 "cpu", "--dtype", "bfloat16", *weight_only(precision), "--batch-sizes", "1", "--input-len", "8",
                 "--output-len", "4", "--repeats", "1", "--output-file", str(tmp_path / "r.jsonl")]) == 0  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {record["quant_algo"] for record in records} == {algo}
    assert next(record for record in records if record["kind"] == "decode")["tokens_per_s"] > 0
