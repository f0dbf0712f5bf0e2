"""TensorRT engines over 1, 2 and 4 ranks, run by a stand-in for TensorRT, against the independent reference."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HERE, mpirun
from dequantized import dequantized_reference
from makers import NAMED_SHAPES, Shape, make_meta_dir, random_ids
from reference import Reference
from tensorrt_stub import genuine

from tpllm.cli import main
from tpllm.cli.inspect import engine_facts, lines

pytestmark = pytest.mark.skipif(genuine.lacking() is not None, reason=str(genuine.lacking()))
MAX_BATCH, MAX_SEQ, MAX_INPUT = 5, 44, 30
# In groups of 128 columns the inner width at tp 1, 2 and 4 is 5, 2 1/2 and 1 1/4.
GROUPS = Shape(dim=128, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=96, ffn_hidden=640)
SHAPES = NAMED_SHAPES | {"groups": GROUPS}
HIDDEN = ("--use-parallel-embedding", "--embedding-sharding-dim", "1")


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str = "float32"
    convert: tuple[str, ...] = ()
    attention: str = "fused"
    quantized: str = ""
    graphs: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.shape, self.dtype, self.attention, self.quantized or "whole", *["graphs"] * self.graphs,
                         *(o.strip("-") for o in self.convert)])

    @property
    def embedding(self) -> str:
        return {0: "", 1: "vocab", 3: "hidden"}[len(self.convert)]


CASES = [
    Case("llama2_mha"), Case("llama31_gqa"), Case("llama31_gqa", attention="primitive"), Case("tied"),
    Case("odd_vocab"), Case("odd_vocab", convert=HIDDEN[:1]), Case("odd_vocab", convert=HIDDEN), Case("qkv_bias"),
    Case("llama31_gqa", "bfloat16"), Case("llama2_mha", "float16", attention="primitive"),
    Case("groups", quantized="int8"), Case("groups", quantized="int4"), Case("groups", "bfloat16", quantized="int8"),
    Case("groups", "float16", quantized="int4"), Case("tied", graphs=True),
]  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one mpirun does; the full suite has the cases that the short one leaves."""

    ranks: int
    cases: tuple[Case, ...]


SHORT = [Part(1, (CASES[0], *CASES[9:13])), Part(2, (CASES[2], *CASES[5:9], *CASES[10:12], *CASES[13:15])),
         Part(4, (CASES[1], CASES[5], CASES[8], *CASES[10:12]))]
FULL = [Part(part.ranks, tuple(case for case in CASES if case not in part.cases)) for part in SHORT]


def each_case(keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Every case of every part."""
    return pytest.mark.parametrize(("part", "case"), [
        pytest.param(part, case, id=f"{part.ranks}-{case.name}", marks=[pytest.mark.full] if part in FULL else [])
        for part in SHORT + FULL for case in part.cases if keep(case)])


class Runs:
    """Results of one rank count, computed in one mpirun."""

    def __init__(self, directory: Path, libraries: Path, part: Part) -> None:
        self.directory, self.ranks = directory, part.ranks
        jobs = [job for case in part.cases for job in self.jobs(case)]
        (directory / "jobs.json").write_text(json.dumps(jobs))
        program = str(HERE / "tensorrt_stub" / "program.py")
        mpirun(part.ranks, [program, str(libraries), str(directory / "jobs.json")], 300,
               {"PYTHONPATH": f"{HERE}:{HERE.parent}:{genuine.python_path()}"})

    def jobs(self, case: Case) -> list[dict[str, Any]]:
        work, shape = self.directory / case.name, SHAPES[case.shape]
        make_meta_dir(work / "meta", shape, seed=8 if case.quantized else 7, dtype=getattr(torch, case.dtype))
        model = ["--model-file", str(HERE / "qwen2_model.py")] if shape.qkv_bias else []
        quantize = ["--use-weight-only", "--weight-only-precision", case.quantized] if case.quantized else []
        assert main(["convert", "--meta-ckpt-dir", str(work / "meta"), "--output-dir", str(work / "checkpoint"),
                     "--tp-size", str(self.ranks), *case.convert, *quantize, *model]) == 0
        build = ["build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir", str(work / "engine"),
                 "--backend", "tensorrt", "--max-batch-size", str(MAX_BATCH), "--max-seq-len", str(MAX_SEQ),
                 "--max-input-len", str(MAX_INPUT), *model]
        return [{"tpllm": build, "env": {"TPLLM_TENSORRT_ATTENTION": case.attention}},
                {"engine": str(work / "engine"), "out": str(work / "found.pt"),
                 "env": {"TPLLM_TENSORRT_CUDA_GRAPHS": str(int(case.graphs))},
                 "sequences": random_ids(shape.vocab_size, 44, 9, 23, 2, 31, seed=2),
                 "prompts": random_ids(shape.vocab_size, 3, 30, 1, 12, 7, 20, 5, seed=2)}]

    def reference(self, case: Case) -> Reference:
        """On what quantized weights stand for, where they are."""
        work = self.directory / case.name
        return (dequantized_reference(work / "meta", work / "checkpoint", self.ranks) if case.quantized
                else Reference(work / "meta"))

    def found(self, case: Case) -> dict[str, Any]:
        result: dict[str, Any] = torch.load(self.directory / case.name / "found.pt")
        return result


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stubs")
    genuine.compile_stubs(directory)
    return directory


@pytest.fixture(scope="module")
def get_runs(tmp_path_factory: pytest.TempPathFactory, libraries: Path) -> Callable[[Part], Runs]:
    @cache
    def get(part: Part) -> Runs:
        return Runs(tmp_path_factory.mktemp(f"tp{part.ranks}"), libraries, part)

    return get


@each_case()
def test_logits_of_prefill_and_decode(get_runs: Callable[[Part], Runs], part: Part, case: Case) -> None:
    """Of ragged steps over slots that are not in order, at every position."""
    runs = get_runs(part)
    reference = runs.reference(case)
    sequences = random_ids(SHAPES[case.shape].vocab_size, 44, 9, 23, 2, 31, seed=2)
    for ids, logits in zip(sequences, runs.found(case)["logits"], strict=True):
        expected = reference.logits(ids)
        if case.dtype == "float32":
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        else:
            # Each product and each all-reduce rounds once.
            error = (logits - expected).square().mean().sqrt() / expected.std()
            assert float(error) < 6 * torch.finfo(getattr(torch, case.dtype)).eps


@each_case(lambda case: case.dtype == "float32")
def test_generated_tokens(get_runs: Callable[[Part], Runs], part: Part, case: Case) -> None:
    """Seven prompts through five slots, so that slots are used again."""
    runs = get_runs(part)
    reference = runs.reference(case)
    answers = runs.found(case)["answers"]
    for ids, tokens in zip(random_ids(SHAPES[case.shape].vocab_size, 3, 30, 1, 12, 7, 20, 5, seed=2), answers,
                           strict=True):
        expected = reference.greedy_with_gaps(ids, 8)
        assert min(gap for _, gap in expected) > 1e-3, "a tie: choose another seed"
        assert tokens == [token for token, _ in expected]


@each_case()
def test_collectives_are_in_the_network(get_runs: Callable[[Part], Runs], part: Part, case: Case) -> None:
    """Two all-reduces a layer, in one order on all ranks, and none on one rank."""
    runs = get_runs(part)
    ranks, layers = runs.found(case)["ranks"], SHAPES[case.shape].n_layers
    several = runs.ranks > 1
    assert len(ranks) == runs.ranks
    for rank in ranks:
        assert rank["collectives"] == ranks[0]["collectives"]
        reduces = [name for name in rank["collectives"] if "all_reduce" in name]
        assert len(reduces) == several * (2 * layers + (case.embedding == "vocab"))
        gathers = len(rank["collectives"]) - len(reduces)
        assert gathers == several * (1 + (case.embedding == "hidden"))
        assert rank["counted"] == {"all_reduce": len(reduces), "all_gather": gathers}
        assert rank["kinds"]["IKVCacheUpdateLayer"] == 2 * layers
        assert rank["kinds"].get("IDequantizeLayer", 0) == 5 * layers * bool(case.quantized)
        assert rank["kinds"].get("IAttention", 0) == (layers if case.attention == "fused" else 0)
        assert rank["tf32"] is False
        # Of five slots there are fifteen runs.
        assert 5 < rank["captures"] == ranks[0]["captures"] <= 15 if case.graphs else rank["captures"] == 0
        assert rank["made_for"].keys() == {"tensorrt", "gpu"} | ({"nccl"} if several else set())


@each_case()
def test_inspect_shows_the_plan(get_runs: Callable[[Part], Runs], part: Part, case: Case) -> None:
    """Its layers, and as many collectives as the network was given."""
    runs = get_runs(part)
    facts = engine_facts(runs.directory / case.name / "engine")
    for found, rank in zip(runs.found(case)["ranks"], facts["ranks"], strict=True):
        assert Counter(layer["type"] for layer in rank["layers"]) == found["kinds"]
        collectives = [layer["name"] for layer in rank["layers"] if layer["type"] == "IDistCollectiveLayer"]
        assert collectives == found["collectives"] and len(collectives) == sum(rank["collectives"].values())
    counts = facts["ranks"][0]["collectives"]
    text = lines(facts)
    assert text.count(f"  collectives in its graph: all_reduce {counts['all_reduce']}, all_gather "
                      f"{counts['all_gather']}") == runs.ranks
    assert any(line.endswith(f"engine inspector, {sum(counts.values())} of them named for collectives")
               for line in text)


@pytest.mark.parametrize("part", SHORT, ids=lambda part: str(part.ranks))
def test_one_rank_measures_and_the_others_use_its_timing_cache(get_runs: Callable[[Part], Runs], part: Part) -> None:
    measured = [rank["measured"] for rank in get_runs(part).found(part.cases[-1])["ranks"]]
    assert measured == [len(part.cases)] + [0] * (part.ranks - 1)


@pytest.mark.parametrize("part", SHORT, ids=lambda part: str(part.ranks))
def test_config_says_what_engines_were_made_with(get_runs: Callable[[Part], Runs], part: Part) -> None:
    runs = get_runs(part)
    config = json.loads((runs.directory / part.cases[0].name / "engine" / "config.json").read_text())
    assert config["weights"]["in_engine"] is True
    assert config["versions"]["gpu"] == "sm_90" and config["versions"]["tensorrt"].startswith("11.")
    assert ("nccl" in config["versions"]) == (runs.ranks > 1)
