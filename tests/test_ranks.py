"""Engines over 1, 2, 4 and 8 ranks against transformers and the independent reference."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HERE, mpirun, run_jobs
from makers import (
    NAMED_SHAPES,
    make_meta_dir,
    save_hf_dir,
    transformers_greedy,
    transformers_logits,
    transformers_model,
)
from reference import Reference

from tpllm.checkpoint.rank import CheckpointConfig
from tpllm.cli import main
from tpllm.demo import DEMO_PROMPTS, MODEL_DIR
from tpllm.engine.base import EngineConfig, read_engine
from tpllm.mapping import Mapping

RANK_COUNTS = (1, 2, 4, 8)
ANSWER = 120  # tokens at most
EOS = 2  # of the demo model's tokenizer
TIE = 1e-3  # two best logits closer than this are a tie: either token is right


@dataclass(frozen=True)
class Case:
    """A random model: its shape, its source's shards, and how it is converted and built."""

    shape: str
    shards: int
    backend: str = "eager"
    convert: tuple[str, ...] = ()
    source: str = "meta"

    @property
    def name(self) -> str:
        return "-".join([self.source, self.shape, str(self.shards), self.backend,
                         *(o.strip("-") for o in self.convert)])


CASES = [
    Case("llama2_mha", 1),
    Case("llama2_mha", 4),
    Case("llama31_gqa", 8),
    Case("tied", 2),
    Case("odd_vocab", 1),
    Case("odd_vocab", 1, convert=("--use-parallel-embedding",)),
    Case("llama2_mha", 2, convert=("--use-parallel-embedding", "--embedding-sharding-dim", "1")),
    Case("qkv_bias", 2),
    Case("llama31_gqa", 1, source="hf"),
    Case("tied", 1, source="hf"),
]
# Compiling takes its time: in the short suite one model, in the full suite all.
COMPILED, COMPILED_RANKS = [Case("llama31_gqa", 8, "inductor")], (2, 4)
COMPILED_FULL = [Case(c.shape, c.shards, "inductor", c.convert) for c in CASES
                 if c.shape != "llama31_gqa" and c.source == "meta"]


def prompts_for(vocab: int) -> list[list[int]]:
    """Ragged prompts; the longest shows Llama 3.1's RoPE scaling, which short ones hardly do."""
    rng = random.Random(1)
    return [[rng.randrange(vocab) for _ in range(n)] for n in (3, 150, 17, 64)]


def model_option(case: Case) -> list[str]:
    return ["--model-file", str(HERE / "qwen2_model.py")] if case.shape == "qkv_bias" else []


class Runs:
    """Results of one rank count, computed in one mpirun at first use."""

    def __init__(self, directory: Path, ranks: int, cases: list[Case], demo: bool) -> None:
        self.directory, self.ranks = directory, ranks
        jobs: list[dict[str, Any]] = []
        for case in cases:
            jobs += self.logits_jobs(case)
        if demo:
            jobs += self.demo_jobs()
        self.printed = run_jobs(ranks, jobs, directory, timeout=1500)

    def logits_jobs(self, case: Case) -> list[dict[str, Any]]:
        work = self.directory / case.name
        meta = make_meta_dir(work / "meta", NAMED_SHAPES[case.shape], shards=case.shards)
        source = ["--meta-ckpt-dir", str(meta)]
        if case.source == "hf":
            source = ["--hf-model-dir", str(save_hf_dir(meta, work / "hf", max_shard_size="60KB"))]
        convert = ["convert", *source, "--output-dir", str(work / "checkpoint"), "--tp-size", str(self.ranks),
                   *case.convert, *model_option(case)]
        assert main(convert) == 0
        vocab = NAMED_SHAPES[case.shape].vocab_size
        return [
            {"tpllm": ["build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir", str(work / "engine"),
                       "--backend", case.backend, "--max-seq-len", "256", *model_option(case)]},
            {"logits": str(work / "engine"), "prompts": prompts_for(vocab), "out": str(work / "logits.pt")},
        ]

    def demo_jobs(self) -> list[dict[str, Any]]:
        checkpoint = self.directory / "demo-checkpoint"
        assert main(["convert", "--meta-ckpt-dir", str(MODEL_DIR), "--output-dir", str(checkpoint),
                     "--dtype", "float32", "--tp-size", str(self.ranks)]) == 0
        prompts = self.directory / "prompts.txt"
        prompts.write_text("".join(p.text + "\n" for p in DEMO_PROMPTS), encoding="utf-8")
        jobs: list[dict[str, Any]] = []
        for backend in ("eager", "inductor"):
            engine = str(self.directory / f"demo-{backend}")
            jobs.append({"tpllm": ["build", "--checkpoint-dir", str(checkpoint), "--output-dir", engine, "--backend",
                                   backend, "--max-batch-size", "3"]})
            jobs.append({"tpllm": ["run", "--engine-dir", engine, "--input-file", str(prompts),
                                   "--max-output-len", str(ANSWER), "--output-json", engine + ".json"]})
        return jobs


@pytest.fixture(scope="module", params=RANK_COUNTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    ranks = request.param
    cases = CASES + (COMPILED if ranks in COMPILED_RANKS else [])
    yield Runs(tmp_path_factory.mktemp(f"tp{ranks}"), ranks, cases, demo=True)


@pytest.fixture(scope="module", params=RANK_COUNTS)
def compiled_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    ranks = request.param
    yield Runs(tmp_path_factory.mktemp(f"compiled-tp{ranks}"), ranks, COMPILED_FULL, demo=False)


def check_case(runs: Runs, case: Case) -> None:
    """Within 1e-4 of the reference at every position, in float32, and the right collectives in the graph."""
    work = runs.directory / case.name
    reference = Reference(work / "meta")
    for prompt, logits in zip(prompts_for(NAMED_SHAPES[case.shape].vocab_size), torch.load(work / "logits.pt"),
                              strict=True):
        assert logits.shape == (len(prompt), NAMED_SHAPES[case.shape].vocab_size)
        torch.testing.assert_close(logits, reference.logits(prompt), rtol=0, atol=1e-4)
    embedding = {0: "", 1: "vocab", 3: "hidden"}[len(case.convert)]
    check_collectives(work / "engine", NAMED_SHAPES[case.shape].n_layers, embedding)


def check_collectives(engine: Path, layers: int, parallel_embedding: str) -> None:
    """Every rank's graph: two all-reduces a layer, one more for an embedding split by vocabulary; none on one rank."""
    config = EngineConfig.load(engine)
    for rank in range(config.tp_size):
        meta, _ = read_engine(engine, config, Mapping(config.tp_size, rank))
        several = config.tp_size > 1
        assert meta.collectives == {
            "all_reduce": several * (2 * layers + (parallel_embedding == "vocab")),
            "all_gather": several * (1 + (parallel_embedding == "hidden")),
        }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_of_every_position(runs: Runs, case: Case) -> None:
    check_case(runs, case)


@pytest.mark.parametrize("runs", COMPILED_RANKS, indirect=True)
@pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.name)
def test_logits_of_every_position_compiled(runs: Runs, case: Case) -> None:
    check_case(runs, case)


@pytest.mark.full
@pytest.mark.parametrize("case", COMPILED_FULL, ids=lambda c: c.name)
def test_logits_of_every_position_all_compiled(compiled_runs: Runs, case: Case) -> None:
    check_case(compiled_runs, case)


def test_custom_model_equals_transformers(runs: Runs) -> None:
    """Qwen2, defined in one file of at most 80 lines outside the package."""
    assert len((HERE / "qwen2_model.py").read_text(encoding="utf-8").splitlines()) <= 80
    work = runs.directory / Case("qkv_bias", 2).name
    model = transformers_model(work / "meta")
    for prompt, logits in zip(prompts_for(96), torch.load(work / "logits.pt"), strict=True):
        torch.testing.assert_close(logits, transformers_logits(model, prompt), rtol=0, atol=1e-4)
    assert CheckpointConfig.load(work / "checkpoint").model.architecture == "Qwen2ForCausalLM"


@pytest.fixture(scope="module")
def demo_oracle() -> dict[str, list[tuple[int, float]]]:
    """Per demo prompt the reference's greedy tokens and gaps, after checking them against transformers."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
    reference, model = Reference(MODEL_DIR), transformers_model(MODEL_DIR)
    oracle = {}
    for prompt in DEMO_PROMPTS:
        ids = [1, *tokenizer.encode(prompt.text)]
        found = reference.greedy_with_gaps(ids, ANSWER)
        tokens = [token for token, _ in found]
        end = tokens.index(EOS) + 1 if EOS in tokens else ANSWER
        oracle[prompt.text] = found[:end]
        assert tokens[:end] == transformers_greedy(model, ids, ANSWER, eos_ids=(EOS,))
        assert min(gap for _, gap in oracle[prompt.text]) > TIE, "a tie in the demo prompts: choose another prompt"
    return oracle


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_demo_tokens_are_those_of_transformers(runs: Runs, demo_oracle: dict[str, list[tuple[int, float]]],
                                               backend: str) -> None:
    """Float32, greedy, at every number of ranks, eight ragged prompts through an engine of batch size 3."""
    answers = json.loads((runs.directory / f"demo-{backend}.json").read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in answers] == list(demo_oracle)
    for answer in answers:
        assert answer["outputs"][0]["token_ids"] == [token for token, _ in demo_oracle[answer["prompt"]]]
    check_collectives(runs.directory / f"demo-{backend}", 4, "")


def test_ranks_of_one_host_compile_once(runs: Runs) -> None:
    """Equal graphs give equal compiled code: every rank's engine holds the same library."""
    engine = runs.directory / "demo-inductor"
    config = EngineConfig.load(engine)
    members = [read_engine(engine, config, Mapping(config.tp_size, rank))[1] for rank in range(config.tp_size)]
    assert all(other == members[0] for other in members[1:])


@pytest.mark.parametrize("runs", [1, 2], indirect=True)
def test_a_compiled_engine_loads_in_two_seconds(runs: Runs, tmp_path: Path) -> None:
    """To its first token in a fresh process, weights checked, nothing compiled; importing torch is not counted."""
    script = tmp_path / "load.py"
    script.write_text(
        "import json, sys, time\nimport torch, tpllm.runner\nfrom tpllm.distributed import World\n"
        "from tpllm import ModelRunner, SamplingParams\nworld = World.start()\nstart = time.perf_counter()\n"
        "runner = ModelRunner.from_dir(sys.argv[1], world=world)\n"
        "runner.generate(['The day after Monday is'], SamplingParams(max_output_len=1))\n"
        "took = time.perf_counter() - start\n"
        "compiler = [m for m in sys.modules if m.startswith(('torch._inductor', 'sympy'))]\n"
        "if world.is_first: print(json.dumps([took, compiler]))\n", encoding="utf-8")
    printed = mpirun(runs.ranks, [str(script), str(runs.directory / "demo-inductor")]).stdout
    seconds, compiler_modules = json.loads(printed.splitlines()[-1])
    assert seconds < 2.0
    assert compiler_modules == []
