"""Engines on a GPU against the float32 reference: mixed steps, graph replays, reused cache rows, repeats."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import makers
import numpy as np
import pytest
import torch
from makers import LLAMA31_GQA, Shape, make_meta_dir
from reference import Reference
from torch import Tensor

from tpllm.cli import main
from tpllm.distributed import World
from tpllm.engine.base import StepInput
from tpllm.engine.torch.graphs import Capture
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

HEAD64 = Shape(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=160)
HEAD128 = Shape(dim=512, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=160, rope_theta=500000.0, embedding_dim=0)
# Whose products of a few rows fill a GPU, as published models' do.
WIDE = Shape(dim=4096, n_layers=2, n_heads=32, n_kv_heads=32, vocab_size=160, ffn_hidden=11008)
GROUPS = Shape(dim=1024, n_layers=2, n_heads=8, n_kv_heads=1, vocab_size=161)
MAX_BATCH, MAX_SEQ = 6, 300
# of ‖found - expected‖ / ‖expected‖
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
ENGINES = [
    ("eager", HEAD64, "float32"), ("eager", HEAD64, "bfloat16"), ("eager", HEAD128, "float16"),
    ("eager", GROUPS, "bfloat16"), ("eager", LLAMA31_GQA, "float32"), ("eager", LLAMA31_GQA, "bfloat16"),
    ("inductor", HEAD128, "bfloat16"), ("inductor", HEAD64, "float32"), ("inductor", GROUPS, "float16"),
    ("inductor", WIDE, "bfloat16"),
]  # fmt: skip
IDS = [f"{backend}-{shape.dim}-{dtype}" for backend, shape, dtype in ENGINES]


@dataclass
class Loaded:
    runner: ModelRunner
    reference: Reference
    dtype: str

    def check(self, found: Tensor, ids: list[int]) -> None:
        """Logits after every token of a sequence."""
        expected = self.reference.logits(ids)
        error = ((found.cpu() - expected).norm() / expected.norm()).item()
        assert error < TOLERANCE[self.dtype], error


Load = Callable[[tuple[str, Shape, str]], Loaded]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Engines, each built by the commands a user gives, once."""
    @cache
    def get(case: tuple[str, Shape, str]) -> Loaded:
        backend, shape, dtype = case
        root = tmp_path_factory.mktemp("gpu")
        make_meta_dir(root / "meta", shape, seed=5, dtype=getattr(torch, dtype))
        assert main(["convert", "--meta-ckpt-dir", str(root / "meta"), "--output-dir", str(root / "checkpoint")]) == 0
        assert main(["build", "--checkpoint-dir", str(root / "checkpoint"), "--output-dir", str(root / "engine"),
                     "--backend", backend, "--device", "cuda", "--max-batch-size", str(MAX_BATCH), "--max-seq-len",
                     str(MAX_SEQ)]) == 0  # fmt: skip
        return Loaded(ModelRunner.from_dir(root / "engine", world=World()), Reference(root / "meta"), dtype)

    return get


@pytest.fixture(params=ENGINES, ids=IDS)
def loaded(request: pytest.FixtureRequest, load: Load) -> Loaded:
    return load(request.param)


Part = tuple[int, int, list[int]]


def step(loaded: Loaded, parts: list[Part], last: bool = False) -> list[Tensor]:
    """One step of (first cache row, tokens already there, new tokens) each; logits after every new token, or the last
    one's."""
    counts = [len(new) for _, _, new in parts]
    ends = np.cumsum([0, *counts], dtype=np.int32)
    logits = loaded.runner.engine.step(StepInput(
        tokens=np.array([token for _, _, new in parts for token in new], dtype=np.int32), query_start=ends,
        start=np.array([start for start, _, _ in parts], dtype=np.int32),
        length=np.array([cached + len(new) for _, cached, new in parts], dtype=np.int32),
        rows=ends[1:] - 1 if last else np.arange(ends[-1], dtype=np.int32)))  # fmt: skip
    return [part.clone() for part in logits.split([1] * len(counts) if last else counts)]


def random_ids(loaded: Loaded, *lengths: int, seed: int) -> list[list[int]]:
    return makers.random_ids(loaded.reference.params.vocab_size, *lengths, seed=seed)


def play(loaded: Loaded, sequences: list[list[int]], starts: list[int], seed: int, decode: float = 0.8) -> list[Tensor]:
    """All logits of sequences cut at random; most steps are decode steps of some of them, in random order."""
    chance = random.Random(seed)
    found: list[list[Tensor]] = [[] for _ in sequences]
    cached = [0] * len(sequences)
    while any(cached[i] < len(ids) for i, ids in enumerate(sequences)):
        members = [i for i, ids in enumerate(sequences) if cached[i] < len(ids) and chance.random() < 0.8]
        chance.shuffle(members)
        single = chance.random() < decode
        parts: list[Part] = []
        for i in members:
            size = 1 if single or chance.random() < 0.5 else chance.randint(2, 90)
            parts.append((starts[i], cached[i], sequences[i][cached[i]:cached[i] + size]))
        for i, part, logits in zip(members, parts, step(loaded, parts) if parts else [], strict=True):
            found[i].append(logits)
            cached[i] += len(part[2])
    return [torch.cat(parts) for parts in found]


def poison(loaded: Loaded) -> None:
    loaded.runner.engine._cache.fill_(float("nan"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(2))
def test_logits_of_random_cuts_in_a_poisoned_cache(seed: int, loaded: Loaded) -> None:
    """Prefill, chunks and decode of batches of changing size; runs lie side by side in no order."""
    poison(loaded)
    sequences = random_ids(loaded, 290, 70, 1, 133, 9, 65, seed=seed)
    starts = [900, 0, 1799, 71, 1700, 300]
    for ids, logits in zip(sequences, play(loaded, sequences, starts, seed), strict=True):
        loaded.check(logits, ids)


def test_rows_used_before_leave_no_trace_and_repeats_are_the_same_bits(loaded: Loaded) -> None:
    (short, other, long) = random_ids(loaded, 40, 33, 200, seed=9)
    poison(loaded)
    before = play(loaded, [short, other], [3, 50], 1)
    play(loaded, [long], [0], 2, decode=0.0)
    again = play(loaded, [short, other], [3, 50], 1)
    for first, second, ids in zip(before, again, (short, other), strict=True):
        assert torch.equal(first, second)
        loaded.check(second, ids)


@pytest.mark.parametrize("seed", range(2))
def test_steps_that_come_again(seed: int, loaded: Loaded) -> None:
    """Prompts cut at random beside decode, so that one step runs as compiled and the next from a graph."""
    poison(loaded)
    sequences = random_ids(loaded, 290, 200, 170, 250, 60, 33, seed=seed)
    starts, cached = [900, 0, 1400, 210, 1700, 500], [0] * 6
    expected = [loaded.reference.logits(ids) for ids in sequences]
    chance = random.Random(seed)
    while left := [i for i, ids in enumerate(sequences) if cached[i] < len(ids)]:
        takes = [(i, chance.choice((1, 1, 12, 25))) for i in chance.sample(left, chance.randint(1, len(left)))]
        parts = [(i, sequences[i][cached[i]:cached[i] + n]) for i, n in sorted(takes, key=lambda take: take[1])]
        logits = step(loaded, [(starts[i], cached[i], new) for i, new in parts], last=True)
        for (i, new), found in zip(parts, logits, strict=True):
            cached[i] += len(new)
            error = ((found[0].cpu() - expected[i][cached[i] - 1]).norm() / expected[i][cached[i] - 1].norm()).item()
            assert error < 2 * TOLERANCE[loaded.dtype], error


def test_only_the_wanted_rows(loaded: Loaded) -> None:
    (ids,) = random_ids(loaded, 12, seed=3)
    whole = torch.cat(step(loaded, [(0, 0, ids)]))
    for rows in ([11, 3, 3], []):
        arrays = [np.array(a, dtype=np.int32) for a in (ids, [0, 12], [0], [12], rows)]
        logits = loaded.runner.engine.step(StepInput(*arrays))
        assert logits.shape == (len(rows), loaded.reference.params.vocab_size)
        torch.testing.assert_close(logits, whole[rows], rtol=0, atol=0.05)


def test_graphs_share_the_memory_of_their_logits() -> None:
    size, capture = 32 << 20, Capture()
    given = torch.zeros(1024, size // 4096, device="cuda")
    before = torch.cuda.memory_reserved()
    graphs = [capture(lambda n=n: (given + n)[:, :5000]) for n in range(20)]  # type: ignore[misc]
    assert torch.cuda.memory_reserved() - before <= 4 * size
    given += 100
    for n in random.Random(0).sample(range(20), 20):
        graphs[n].logits.fill_(float("nan"))
        graphs[n].replay()
        assert graphs[n].logits.shape == (1024, 5000) and (graphs[n].logits == 100 + n).all()


def test_greedy_answers_are_the_references(load: Load) -> None:
    for case in ENGINES:
        if case[2] == "float32":
            loaded = load(case)
            prompts = random_ids(loaded, 5, 1, 30, 8, 100, 2, 7, 11, seed=4)
            outputs = loaded.runner.generate(prompts, SamplingParams(max_output_len=20, ignore_eos=True))
            for ids, output in zip(prompts, outputs, strict=True):
                expected = [token for token, _ in loaded.reference.greedy_with_gaps(ids, 20)]
                assert output.outputs[0].token_ids == expected
