"""What an engine for GPUs does around its graphs: padding, spare rows, tokens that only the device knows.

Its programs compute on the CPU here, and a graph is a function that is called again.
"""

import contextlib
import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from built import Built
from makers import LLAMA31_GQA, make_meta_dir, random_ids
from reference import Reference
from torch import Tensor

from tpllm.checkpoint.rank import RankCheckpoint
from tpllm.config import ModelConfig
from tpllm.devices import Device
from tpllm.engine.base import BuildConfig, EngineConfig, StepInput
from tpllm.engine.torch import cuda, device, inductor, memory, padded, program
from tpllm.engine.torch.base import export_decode, export_step, prompt_starts
from tpllm.engine.torch.cuda_ops import CudaOps
from tpllm.engine.torch.graphs import Captured, end_graphs, make_graph
from tpllm.engine.torch.merge import survey
from tpllm.engine.torch.program import StepProgram, TorchOps
from tpllm.mapping import Mapping
from tpllm.models import find_model

MAX_SEQ, ROWS = 96, 300
SPARE_ROWS = 24  # less than much of the padding takes
CPU = torch.device("cpu")


class Recalled:
    """In the place of `Capture`; counts how often each graph ran."""

    def __init__(self) -> None:
        self.runs: dict[int, int] = {}

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        logits = run()
        number = len(self.runs)
        self.runs[number] = 0

        def replay() -> None:
            self.runs[number] += 1
            logits.copy_(run())

        return Captured(replay, logits)


class Made:
    """An engine, its graphs' counts, and the reference of the same weights."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        built = Built(directory)
        make_meta_dir(built.meta, LLAMA31_GQA)
        built.run("--dtype", "float32", max_seq=MAX_SEQ, max_input=MAX_SEQ - 1)
        self.reference, self.capture = Reference(built.meta), Recalled()
        patch.setattr(cuda, "Capture", lambda: self.capture)
        patch.setattr(cuda, "has_prompt_kernel", lambda _: True)
        for module in (cuda, padded):
            patch.setattr(module, "SPARE_ROWS", SPARE_ROWS)
        config = built.config
        model = find_model(config.model.architecture)(config.model)
        program = StepProgram(model, Mapping(1), CPU, TorchOps)
        program.load(RankCheckpoint(built.checkpoint, model, Mapping(1)).load()[0])
        self.mixed_steps = 0

        def mixed(*arrays: Tensor) -> Tensor:
            self.mixed_steps += 1
            return program(*arrays)

        def one(tokens: Tensor, start: Tensor, length: Tensor, cache: Tensor) -> Tensor:
            zero = torch.zeros(1, dtype=torch.int32)
            return program(tokens, torch.tensor([1], dtype=torch.int32), start, length, zero, cache)

        self.engine = cuda.CudaEngine(config, mixed, one, CPU, ROWS)
        self.engine._cache.fill_(float("nan"))  # what nobody wrote must not be read

    def step(self, tokens: list[int], ends: list[int], start: list[int], length: list[int], rows: list[int],
             fed: list[int] | None = None) -> Tensor:
        arrays = [np.array(array, np.int32) for array in (tokens, ends, start, length, rows)]
        given = None if fed is None else np.array(fed, np.int32)
        return self.engine.step(StepInput(*arrays, fed=given))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(tmp_path, monkeypatch)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_prompts_of_every_length_and_the_steps_after_them(made: Made) -> None:
    """A prompt alone is a graph's from the first one on, whatever lies beside it."""
    for number, length in enumerate((2, 15, 16, 17, 33, 64, 90)):
        ids, other = random_ids(LLAMA31_GQA.vocab_size, length + 1, 5, seed=number)
        made.step(other, [0, 5], [length + 1], [5], [4])  # the rows right behind it
        replays, before = sum(made.capture.runs.values()), made.mixed_steps
        close(made.step(ids[:-1], [0, length], [0], [length], [length - 1]), made.reference.logits(ids)[[length - 1]])
        assert (sum(made.capture.runs.values()), made.mixed_steps) == (replays + 1, before + 1)
        close(made.step(ids[-1:], [0, 1], [0], [length + 1], [0]), made.reference.logits(ids)[[length]])
        close(made.step([3], [0, 1], [length + 1], [6], [0]), made.reference.logits([*other, 3])[[5]])


def test_parts_of_a_prompt(made: Made) -> None:
    """One of which nothing is wanted, then the rest."""
    (ids,) = random_ids(LLAMA31_GQA.vocab_size, 80, seed=3)
    assert made.step(ids[:50], [0, 50], [7], [50], []).shape == (0, LLAMA31_GQA.vocab_size)
    close(made.step(ids[50:], [0, 30], [7], [80], [29]), made.reference.logits(ids)[[79]])
    assert sum(made.capture.runs.values()) == 2


def test_steps_whose_shape_comes_often_get_a_graph(made: Made) -> None:
    """Prompts beside each other and beside sequences of one token; none of which every logit is wanted."""
    sequences = random_ids(LLAMA31_GQA.vocab_size, 20, 9, 33, seed=4)
    expected = [made.reference.logits(ids) for ids in sequences]
    a, b, c = sequences
    for time in range(padded.OFTEN + 2):
        made.step(c[:32], [0, 32], [100], [32], [])
        before = sum(made.capture.runs.values())
        found = made.step([c[32], *a, *b], [0, 1, 21, 30], [100, 40, 0], [33, 20, 9], [0, 20, 29])
        close(found, torch.stack([expected[2][32], expected[0][19], expected[1][8]]))
        assert sum(made.capture.runs.values()) - before == (time >= padded.OFTEN - 1)
    for _ in range(2):
        before = sum(made.capture.runs.values())
        close(made.step(a, [0, 20], [40], [20], list(range(20))), expected[0])
        assert sum(made.capture.runs.values()) == before


@pytest.mark.parametrize("seed", range(3))
def test_sequences_cut_at_random(seed: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into steps of any shape, with few graphs, so that steps of all three kinds follow each other."""
    monkeypatch.setattr(padded, "MOST_GRAPHS", len(made.capture.runs) + 4)
    chance = random.Random(seed)
    sequences = random_ids(LLAMA31_GQA.vocab_size, 90, 40, 7, 60, 25, seed=seed)
    starts, cached = [0, 220, 92, 100, 165], [0] * 5
    expected = [made.reference.logits(ids) for ids in sequences]
    while left := [i for i, ids in enumerate(sequences) if cached[i] < len(ids)]:
        takes = [(i, chance.choice((1, 1, 2, 17, 30))) for i in chance.sample(left, chance.randint(1, len(left)))]
        parts = sorted(((i, min(n, len(sequences[i]) - cached[i])) for i, n in takes), key=lambda part: part[1] > 1)
        ends = [0, *accumulate(n for _, n in parts)]
        logits = made.step([token for i, n in parts for token in sequences[i][cached[i]:cached[i] + n]], ends,
                           [starts[i] for i, _ in parts], [cached[i] + n for i, n in parts], [n - 1 for n in ends[1:]])
        for (i, n), row in zip(parts, logits, strict=True):
            cached[i] += n
            close(row, expected[i][cached[i] - 1])
    assert made.mixed_steps > sum(made.capture.runs.values()) > 0


def test_decode_of_padded_batches_in_any_order(made: Made) -> None:
    sequences = random_ids(LLAMA31_GQA.vocab_size, 12, 30, 21, seed=5)
    starts = [200, 0, 100]
    for ids, start in zip(sequences, starts, strict=True):
        made.step(ids[:-2], [0, len(ids) - 2], [start], [len(ids) - 2], [])
    for left, members in ((2, [2, 0]), (2, [1]), (1, [1, 2, 0])):
        logits = made.step([sequences[i][-left] for i in members], list(range(len(members) + 1)),
                           [starts[i] for i in members], [len(sequences[i]) - left + 1 for i in members],
                           list(range(len(members))))
        for i, row in zip(members, logits, strict=True):
            close(row, made.reference.logits(sequences[i])[-left])


def test_tokens_that_only_the_device_knows(made: Made) -> None:
    """Of a decode step, and beside a prompt."""
    a, b = random_ids(LLAMA31_GQA.vocab_size, 8, 6, seed=6)
    made.step(a[:6], [0, 6], [0], [6], [5])
    made.engine._fed[:3] = torch.tensor([1, a[6], a[7]], dtype=torch.int32)
    close(made.step([0], [0, 1], [0], [7], [0], fed=[1]), made.reference.logits(a)[[6]])
    found = made.step([0, *b], [0, 1, 7], [0, 50], [8, 6], [0, 6], fed=[2, -1, -1, -1, -1, -1, -1])
    close(found, torch.stack([made.reference.logits(a)[7], made.reference.logits(b)[5]]))


@pytest.mark.parametrize("most", [1, 16, 100, 1000, 2048, 5000, 8192])
def test_steps_of_every_size_have_a_shape_little_larger(most: int) -> None:
    """Full ones too, of which schedulers leave out what padding takes, and padding has places."""
    sizes = padded.token_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    chance = random.Random(most)
    for singles in (0, 1, 7, 33, 65, 500):
        full = most + -singles // padded.SINGLES * padded.SINGLES + singles
        for total in {full, *(chance.randint(singles + 2, full) for _ in range(20) if full > singles + 2)}:
            if total < singles + 2:
                continue
            ends = np.array([*range(singles + 1), total], np.int32)
            step = StepInput(np.zeros(total, np.int32), ends, np.zeros(singles + 1, np.int32), np.diff(ends), ends[1:])
            shape = padded.Shape.of(step, sizes, 10_000)
            assert shape and 0 <= shape.singles - singles < padded.SINGLES
            assert shape.tokens - (total + shape.singles - singles) <= memory.SPARE_ROWS


@pytest.mark.parametrize("seed", range(20))
def test_padding_moves_no_token_to_another_place(seed: int) -> None:
    """Each token's position and cache row are what they are without it; padding's rows are the spare ones."""
    chance, spare = random.Random(seed), 10_000
    lengths = [1] * chance.randint(0, 70) + [chance.randint(2, 150) for _ in range(chance.randint(1, 9))]
    cached = [chance.randint(0, 50) for _ in lengths]
    ends = np.array([0, *accumulate(lengths)], np.int32)
    start, after = (np.array(numbers, np.int32) for numbers in zip(
        *((200 * i, there + new) for i, (there, new) in enumerate(zip(cached, lengths, strict=True))), strict=True))
    step = StepInput(np.arange(ends[-1], dtype=np.int32), ends, start, after, ends[1:] - 1)
    shape = padded.Shape.of(step, padded.token_sizes(2048), 10_000)
    assert shape
    tokens, query_start, first, length, rows, fed = map(torch.from_numpy, shape.arrays(step, spare))
    assert [len(array) for array in (tokens, query_start, first, length, rows, fed)] == [
        shape.tokens, shape.prompts + 1, *[shape.singles + shape.prompts] * 2, shape.rows, shape.tokens]
    places = program.token_places(shape.tokens, query_start, first, length)
    wanted = program.token_places(len(step.tokens), *(
        torch.from_numpy(array) for array in (prompt_starts(step), step.start, step.length)))
    singles = lengths.count(1)
    own = torch.tensor([*range(singles), *range(shape.singles, shape.singles + len(step.tokens) - singles)])
    assert tokens[own].tolist() == step.tokens.tolist() and (fed == -1).all()
    assert tokens[rows[:len(step.rows)].long()].tolist() == step.tokens[step.rows].tolist()
    for place, want in zip(places, wanted, strict=True):
        assert place[own].tolist() == want.tolist()
    others = torch.ones(shape.tokens, dtype=torch.bool)
    others[own] = False
    assert ((places[1][others] >= spare) & (places[1][others] < spare + memory.SPARE_ROWS)).all()


def test_batches_of_every_size_have_a_graph_little_larger() -> None:
    for largest in range(1, 1100):
        sizes = cuda.batch_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
        assert all(after - before <= 80 for before, after in pairwise(sizes))


@pytest.mark.parametrize("lengths", [[1], [16, 0, 17], [3, 40, 2, 1]])
def test_arrays_in_one(lengths: list[int]) -> None:
    arrays = [np.arange(length, dtype=np.int32) + 100 * i for i, length in enumerate(lengths)]
    packed = torch.from_numpy(padded.pack(arrays))
    for part, array in zip(padded.unpack(packed, lengths), arrays, strict=True):
        assert part.tolist() == array.tolist() and part.storage_offset() % padded.ALIGNMENT == 0


def test_an_engine_goes_with_its_last_reference(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has most of a GPU's memory, and NCCL waits for its graphs; graphs do not hold what they were made of."""
    monkeypatch.setattr(cuda, "Capture", lambda: lambda run: Captured(int, run()))
    engine = cuda.CudaEngine(made.engine.config, made.engine._mixed, made.engine._one, CPU, ROWS)
    ends = np.array([0, 5, 12], np.int32)
    for _ in range(3):
        engine.step(StepInput(np.arange(12, dtype=np.int32), ends, ends[:2], np.diff(ends), ends[1:] - 1))
    cache, engine_there = weakref.ref(engine._cache), weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert engine_there() is None and cache() is None
    finally:
        gc.enable()


class Graph:
    """In the place of PyTorch's."""

    ended = False

    def reset(self) -> None:
        self.ended = True


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_a_graph_is_made(enabled: bool) -> None:
    """Also where making it fails, and whatever the caller had set."""
    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError("no graph")

    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        assert make_graph(lambda: gc.isenabled())[1] is False
        assert gc.isenabled() is enabled
        with pytest.raises(RuntimeError, match="no graph"):
            make_graph(fail)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.usefixtures("no_gpu")
def test_graphs_end_that_somebody_still_has() -> None:
    """NCCL would wait for them at a program's end."""
    kept, gone = (make_graph(lambda: None)[0] for _ in range(2))
    forgotten = weakref.ref(gone)
    del gone
    assert forgotten() is None
    end_graphs()
    assert isinstance(kept, Graph) and kept.ended


LAYERS = 3
ONE_RANK = {"rotation": 1, "rotate_and_attend": LAYERS}
RANKS = ONE_RANK | {"linear_all_reduce_add_norm": 2 * LAYERS, "all_gather": 1}
PRODUCTS = {"linear": LAYERS + 1, "linear_swiglu": LAYERS}


@pytest.mark.parametrize(("tp_size", "export", "quant", "kernels"), [
    (1, export_step, None, ONE_RANK | PRODUCTS | {"linear_add_norm": 2 * LAYERS}),
    (1, export_step, "W4A16", ONE_RANK | PRODUCTS | {"linear_add_norm": 2 * LAYERS}),
    (1, export_decode, None, ONE_RANK | {"gemv": 4 * LAYERS + 1}),
    (1, export_decode, "W4A16", ONE_RANK | {"gemv_quantized": 4 * LAYERS, "gemv": 1}),
    # Each rank may have only some rows of the last sum but one, of which the last layer wants a few.
    (4, export_step, None, RANKS | PRODUCTS | {"select_summed_rows": 1}),
    (4, export_step, "W8A16", RANKS | PRODUCTS | {"select_summed_rows": 1}),
    (4, export_decode, None, RANKS | {"gemv": 2 * LAYERS + 1}),
])  # fmt: skip
def test_graphs_for_gpus_are_of_the_kernels_meant_for_them(
        tp_size: int, export: Any, quant: str | None, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported on a CPU, which is all that a graph needs."""
    monkeypatch.setattr(CudaOps, "_streams", False)
    shape = ModelConfig("LlamaForCausalLM", "bfloat16", 96, 64, LAYERS, 8, 4, 8, 128, 1e-5, 1e4, 256, quant_algo=quant)
    model = find_model(shape.architecture)(shape)
    monkeypatch.setattr(program, "Survey", lambda: survey(model))  # what it takes for GPUs only
    config = EngineConfig(shape, BuildConfig("inductor", "cuda", 8, 32, 64), tp_size, "", {})
    options = {"single": False} if export is export_step else {}
    graph = export(StepProgram(model, Mapping(tp_size, tp_size - 1), CPU, CudaOps), config, **options).graph
    operators = Counter(str(node.target).split(".")[1] for node in graph.nodes
                        if str(node.target).startswith("tpllm.") or node.target is torch.ops.aten.linear.default)
    assert operators == kernels


def test_a_gpu_that_takes_one_process_is_built_for_in_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvidia-smi -c EXCLUSIVE_PROCESS`; without it the second graph and the kernels are others' work."""
    shape = ModelConfig("LlamaForCausalLM", "bfloat16", 96, 64, 2, 8, 4, 8, 128, 1e-5, 1e4, 256)
    config = EngineConfig(shape, BuildConfig("inductor", "cuda", 8, 32, 64), 1, "", {})
    begun: list[str] = []

    class Elsewhere:
        def __init__(self, work: Any, *arguments: Any) -> None:
            begun.append(work.__name__)

        def __enter__(self) -> Any:
            return SimpleNamespace(result=lambda: {"kernels": b"k"})

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(inductor, "Aside", Elsewhere)
    monkeypatch.setattr(inductor, "make_package", lambda *_: b"graph")
    gpus = [Device(0, "X", "GPU-0", 1, ()), Device(1, "X", "GPU-1", 1, (), exclusive=True)]
    monkeypatch.setattr(device, "inventory", lambda: gpus)
    made = []
    for index in range(2):
        rest = inductor.Rest(config, Mapping(1, 0), None, torch.device("cuda", index), "g++")
        with contextlib.ExitStack() as stack:
            made.append(rest.made(stack))
    assert made == [{"one.pt2": b"graph", "kernels": b"k"}, {"one.pt2": b"graph"}] and begun == ["make_kernels"]
    program: Any = SimpleNamespace(device=torch.device("cuda", 1), parameters=list)
    assert not inductor.has_room_twice(program, 1)
