"""One rank's engine in this process against the reference: logits, cache, files that do not fit, and generation."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built import MAX_BATCH, MAX_INPUT, MAX_SEQ, Build, Built, random_ids
from makers import LLAMA2_MHA, LLAMA31_GQA, NAMED_SHAPES, make_meta_dir
from torch import Tensor

from tpllm.checkpoint.rank import RankCheckpoint
from tpllm.cli import main
from tpllm.demo import MODEL_DIR
from tpllm.distributed import World
from tpllm.engine.base import EngineConfig, RankEngine, StepInput, engine_file, read_engine, versions, write_engine
from tpllm.engine.torch.base import prompt_starts
from tpllm.engine.torch.eager import EagerBackend
from tpllm.engine.torch.program import token_places
from tpllm.errors import TpllmError
from tpllm.mapping import Mapping
from tpllm.models import find_model
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

EMBEDDINGS = [("--use-parallel-embedding", "--embedding-sharding-dim", dim) for dim in ("0", "1")]


Part = tuple[int, int, list[int]]


def step(built: Built, parts: list[Part]) -> list[Tensor]:
    """One step of (first cache row, tokens already there, new tokens) each; logits after every new token."""
    counts = [len(new) for _, _, new in parts]
    ends = np.cumsum([0, *counts], dtype=np.int32)
    logits = built.runner.engine.step(StepInput(
        tokens=np.array([token for _, _, new in parts for token in new], dtype=np.int32), query_start=ends,
        start=np.array([start for start, _, _ in parts], dtype=np.int32),
        length=np.array([cached + len(new) for _, cached, new in parts], dtype=np.int32),
        rows=np.arange(ends[-1], dtype=np.int32)))  # fmt: skip
    assert logits.dtype == torch.float32 and logits.shape == (sum(counts), built.config.model.vocab_size)
    return list(logits.split(counts))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# Logits


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_logits_of_a_whole_prompt(name: str, build: Build) -> None:
    built = build(NAMED_SHAPES[name])
    for ids in random_ids(built, 1, 2, 17, 32):
        (logits,) = step(built, [(0, 0, ids)])
        assert_close(logits, built.reference.logits(ids))


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 7, 6], [1, 18, 1], [19, 1], [2, 1, 16, 1]], ids=str)
@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_logits_of_a_prompt_in_chunks(name: str, chunks: list[int], build: Build) -> None:
    built = build(NAMED_SHAPES[name])
    (ids,) = random_ids(built, sum(chunks))
    found, cached = [], 0
    for size in chunks:
        found += step(built, [(5, cached, ids[cached:cached + size])])
        cached += size
    assert_close(torch.cat(found), built.reference.logits(ids))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_logits_of_ragged_batches_mixed_with_decode(name: str, seed: int, build: Build) -> None:
    """Three sequences, each cut at random, with random members in every step and in random order."""
    built, chance = build(NAMED_SHAPES[name]), random.Random(seed)
    sequences = random_ids(built, 32, 19, 26, seed=seed)
    starts = [64, 0, 19]  # runs side by side, the first one not in the order of the sequences
    found: list[list[Tensor]] = [[] for _ in sequences]
    cached = [0, 0, 0]
    while any(cached[i] < len(ids) for i, ids in enumerate(sequences)):
        members = [i for i, ids in enumerate(sequences) if cached[i] < len(ids) and chance.random() < 0.8]
        chance.shuffle(members)
        parts: list[Part] = []
        for i in members:
            size = chance.choice([1, 1, chance.randint(1, 9)])
            parts.append((starts[i], cached[i], sequences[i][cached[i]:cached[i] + size]))
        if parts:
            for i, part, logits in zip(members, parts, step(built, parts), strict=True):
                found[i].append(logits)
                cached[i] += len(part[2])
    for ids, logits in zip(sequences, found, strict=True):
        assert_close(torch.cat(logits), built.reference.logits(ids))


def test_only_the_wanted_rows_are_computed(build: Build) -> None:
    built = build(LLAMA31_GQA)
    (ids,) = random_ids(built, 12)
    arrays = [np.array(a, dtype=np.int32) for a in (ids, [0, 12], [0], [12], [11, 3, 3])]
    logits = built.runner.engine.step(StepInput(*arrays))
    assert_close(logits, built.reference.logits(ids)[[11, 3, 3]])


def test_a_step_without_wanted_rows_still_fills_the_cache(build: Build) -> None:
    built = build(LLAMA31_GQA)
    (ids,) = random_ids(built, 12)
    arrays = [np.array(a, dtype=np.int32) for a in (ids[:11], [0, 11], [0], [11], [])]
    assert built.runner.engine.step(StepInput(*arrays)).shape == (0, LLAMA31_GQA.vocab_size)
    assert_close(step(built, [(0, 11, ids[11:])])[0], built.reference.logits(ids)[11:])


def test_copied_rows_are_read_before_any_is_written(build: Build) -> None:
    """Two sequences change places in the arena and go on there; a third one is a copy of the first's beginning."""
    built = build(LLAMA31_GQA)
    a, b = random_ids(built, 12, 12)
    step(built, [(0, 0, a[:8]), (16, 0, b[:8])])
    arrays = [np.array(x, dtype=np.int32) for x in (
        [*a[8:], *b[8:], a[5]], [0, 4, 8, 9], [16, 0, 40], [12, 12, 6], range(9), [[0, 16, 8], [16, 0, 8], [0, 40, 5]])]
    logits = built.runner.engine.step(StepInput(*arrays))
    assert_close(logits[:4], built.reference.logits(a)[8:])
    assert_close(logits[4:8], built.reference.logits(b)[8:])
    assert_close(logits[8:], built.reference.logits(a)[5:6])


def test_rows_that_were_used_before_leave_no_trace(build: Build) -> None:
    built = build(LLAMA31_GQA)
    long, short = random_ids(built, 32, 9)
    before = step(built, [(3, 0, short)])[0]
    step(built, [(0, 0, long)])
    again = torch.cat([*step(built, [(3, 0, short[:4])]), *step(built, [(3, 4, short[4:])])])
    assert_close(again, before)
    assert_close(again, built.reference.logits(short))


def test_rows_that_were_never_written_are_never_read(build: Build) -> None:
    built = build(LLAMA2_MHA)
    cache = built.runner.engine._cache  # type: ignore[attr-defined]
    cache.fill_(float("nan"))
    first, second = random_ids(built, 10, 6)
    parts = step(built, [(7, 0, first), (40, 0, second)])
    parts += step(built, [(40, 6, [1]), (7, 10, [2])])
    cache.zero_()
    assert_close(torch.cat([parts[0], parts[3]]), built.reference.logits([*first, 2]))
    assert_close(torch.cat([parts[1], parts[2]]), built.reference.logits([*second, 1]))


@pytest.mark.parametrize("options", EMBEDDINGS, ids=["vocabulary", "hidden"])
def test_parallel_embedding_on_one_rank_changes_nothing(options: tuple[str, ...], build: Build) -> None:
    built = build(NAMED_SHAPES["odd_vocab"], *options)
    assert built.config.model.use_parallel_embedding
    (ids,) = random_ids(built, 20)
    assert_close(step(built, [(0, 0, ids)])[0], built.reference.logits(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_engines_are_close(dtype: torch.dtype, build: Build) -> None:
    built = build(LLAMA31_GQA, dtype=dtype)
    assert f"torch.{built.config.model.dtype}" == str(dtype)
    (ids,) = random_ids(built, 24)
    expected = built.reference.logits(ids)
    logits = torch.cat([*step(built, [(0, 0, ids[:20])]), *step(built, [(0, 20, ids[20:])])])
    # Both have the same rounded weights; each product loses about one unit in the last place of the sum.
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert float(error) < 4 * torch.finfo(dtype).eps


def test_every_packed_token_has_its_position_and_its_row() -> None:
    ints = [torch.tensor(a, dtype=torch.int32) for a in ([0, 3, 4, 5], [100, 7, 0], [5000, 4321, 1])]
    positions, slots = token_places(5, *ints)
    assert positions.tolist() == [4997, 4998, 4999, 4320, 0]
    assert slots.tolist() == [5097, 5098, 5099, 4327, 0]
    assert positions.dtype == slots.dtype == torch.int64


@pytest.mark.parametrize("counts", [[3, 1, 1], [1, 1, 3], [1, 2, 1, 4], [1, 1], [1], [5], [1, 1, 2]])
def test_packed_tokens_have_their_places_behind_any_number_of_single_ones(counts: list[int]) -> None:
    """Wherever the sequences of one token stand."""
    ends = np.cumsum([0, *counts], dtype=np.int32)
    start, length = [100 * i + 7 for i in range(len(counts))], [50 * i + count for i, count in enumerate(counts)]
    ints = [np.array(a, np.int32) for a in (start, length)]
    step = StepInput(np.zeros(ends[-1], np.int32), ends, *ints, np.zeros(0, np.int32))
    positions, slots = token_places(int(ends[-1]), *map(torch.from_numpy, (prompt_starts(step), *ints)))
    expected = [(length[i] - count + j, start[i] + length[i] - count + j)
                for i, count in enumerate(counts) for j in range(count)]
    assert list(zip(positions.tolist(), slots.tolist(), strict=True)) == expected
    assert positions.dtype == slots.dtype == torch.int64


def test_sequences_of_one_token_are_told_by_their_number() -> None:
    for counts, starts in (([3, 1], [0, 3, 4]), ([1, 1, 3, 1], [2, 5, 6]), ([1, 1], [2]), ([2], [0, 2])):
        ends = np.cumsum([0, *counts], dtype=np.int32)
        assert prompt_starts(StepInput(*[np.zeros(0, np.int32), ends] + [np.zeros(0, np.int32)] * 3)).tolist() == starts


# Graphs of several ranks, as far as one process can see them


@pytest.mark.parametrize(("options", "reduces", "gathers"), [((), 0, 1), (EMBEDDINGS[0], 1, 1), (EMBEDDINGS[1], 0, 2)])
def test_a_rank_of_two_reduces_twice_a_layer_and_gathers_its_logits(
        options: tuple[str, ...], reduces: int, gathers: int, tmp_path: Path) -> None:
    meta, checkpoint = make_meta_dir(tmp_path / "meta", LLAMA31_GQA), tmp_path / "checkpoint"
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(checkpoint), "--tp-size", "2",
                 *options]) == 0  # fmt: skip
    config = engine_of_two(checkpoint, tmp_path)
    found, _ = read_engine(tmp_path, config, Mapping(2, 1))
    assert found.collectives == {"all_reduce": 2 * LLAMA31_GQA.n_layers + reduces, "all_gather": gathers}


def engine_of_two(checkpoint: Path, out: Path) -> EngineConfig:
    """Rank 1's engine of two, made without a launcher."""
    from tpllm.checkpoint.rank import CheckpointConfig
    from tpllm.engine.base import BuildConfig

    build = BuildConfig("eager", "cpu", MAX_BATCH, MAX_INPUT, MAX_SEQ)
    config = EngineConfig(CheckpointConfig.load(checkpoint).model, build, 2, str(checkpoint), versions())
    EagerBackend().build(config, Mapping(2, 1), checkpoint, out, World(), None)
    return config


# Files that do not fit


@pytest.fixture
def copy(build: Build, tmp_path: Path) -> Built:
    """A copy of an engine and its checkpoint, to be damaged."""
    original, built = build(LLAMA2_MHA), Built(tmp_path)
    shutil.copytree(original.checkpoint, built.checkpoint)
    shutil.copytree(original.engine, built.engine)
    edit_json(built.engine / "config.json", lambda data: data["weights"].update(checkpoint_dir=str(built.checkpoint)))
    assert built.runner.generate([[1, 2]], SamplingParams(max_output_len=2))
    return built


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def refusal(built: Built, code: int, **options: Any) -> str:
    with pytest.raises(TpllmError) as caught:
        ModelRunner.from_dir(built.engine, world=World(), **options)
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 30, 200, -1, -30])
def test_a_torn_engine_is_named(length: int, copy: Built) -> None:
    path = copy.engine / engine_file(0)
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(copy, 12)
    for words in (str(path), f"{path.stat().st_size} bytes", "torn", "tpllm build"):
        assert words in message


def test_every_flipped_bit_of_an_engine_is_found_or_harmless(copy: Built) -> None:
    path, config = copy.engine / engine_file(0), copy.config
    good, data = read_engine(copy.engine, config, Mapping(1)), path.read_bytes()
    unrefused = []
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            path.write_bytes(broken)
            try:
                if read_engine(copy.engine, config, Mapping(1)) != good:
                    unrefused.append((position, bit, "read as something else"))
            except TpllmError as e:
                assert str(path) in str(e)
            except Exception as e:
                unrefused.append((position, bit, f"{type(e).__name__}: {e}"))
    assert not unrefused


def test_an_engine_file_that_is_not_there_is_named(copy: Built) -> None:
    (copy.engine / engine_file(0)).unlink()
    message = refusal(copy, 12)
    assert engine_file(0) in message and "tpllm build" in message


def test_an_engine_written_is_the_engine_read(copy: Built) -> None:
    config = copy.config
    meta = RankEngine(0, 1, "eager", config.digest(), "f" * 32, {"all_reduce": 4, "all_gather": 1})
    members = {"model.py": b"x = 1\n", "step.pt2": bytes(range(256)) * 100, "empty": b""}
    write_engine(copy.engine / engine_file(0), meta, members)
    assert read_engine(copy.engine, config, Mapping(1)) == (meta, members)


@pytest.mark.parametrize("change", [{"rank": 1}, {"tp_size": 2}, {"backend": "inductor"}], ids=str)
def test_the_engine_of_another_rank_is_refused(change: dict[str, Any], copy: Built) -> None:
    meta, members = read_engine(copy.engine, copy.config, Mapping(1))
    write_engine(copy.engine / engine_file(0), replace(meta, **change), members)
    message = refusal(copy, 11)
    wrong = replace(meta, **change)
    assert f"built as rank {wrong.rank} of {wrong.tp_size} by {wrong.backend}" in message
    assert "rank 0 of 1 by eager is needed" in message and engine_file(0) in message


@pytest.mark.parametrize(("relies_on", "words"), [
    ({}, ["operators", "tpllm 0.", "build it again: mpirun -n 1 tpllm build"]),
    ({"operators": "tpllm::gone(Tensor x) -> Tensor"}, ["operators", "tpllm 0.", "build it again"]),
    ({"operators": "", "cpu-features": "avx9000 avx"}, ["avx9000, which", "build it on this machine: mpirun"]),
], ids=["before any were written down", "one that is gone", "instructions"])  # fmt: skip
def test_code_that_cannot_run_here_is_refused(relies_on: dict[str, str], words: list[str], copy: Built) -> None:
    meta, _ = read_engine(copy.engine, copy.config, Mapping(1))
    edit_json(copy.engine / "config.json", lambda data: data["build_config"].update(backend="inductor"))
    write_engine(copy.engine / engine_file(0), replace(meta, backend="inductor", config_digest=copy.config.digest()),
                 {name: text.encode() for name, text in relies_on.items()})
    message = refusal(copy, 11)
    assert engine_file(0) in message and all(word in message for word in words), message


def test_an_engine_with_random_weights_is_built_again_by_bench(copy: Built) -> None:
    edit_json(copy.engine / "config.json", lambda data: data["weights"].update(checkpoint_dir=""))
    (copy.engine / engine_file(0)).unlink()
    with pytest.raises(TpllmError, match=r"build it again: remove its directory, then mpirun -n 1 tpllm bench"):
        read_engine(copy.engine, copy.config, Mapping(1))


def test_ranks_renamed_are_refused(tmp_path: Path) -> None:
    meta, checkpoint = make_meta_dir(tmp_path / "meta", LLAMA2_MHA), tmp_path / "checkpoint"
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(checkpoint), "--tp-size", "2"]) == 0
    config = engine_of_two(checkpoint, tmp_path)
    read_engine(tmp_path, config, Mapping(2, 1))
    (tmp_path / engine_file(1)).rename(tmp_path / engine_file(0))
    with pytest.raises(TpllmError, match=r"built as rank 1 of 2 .*rank 0 of 2"):
        read_engine(tmp_path, config, Mapping(2, 0))


def test_a_launch_of_another_size_is_told_what_to_type(copy: Built) -> None:
    edit_json(copy.engine / "config.json", lambda data: data["pretrained_config"]["mapping"].update(tp_size=4))
    message = refusal(copy, 11)
    assert "4 rank(s), this launch has 1" in message and "mpirun -n 4 tpllm run" in message


@pytest.mark.parametrize("section, key, value", [
    ("build_config", "max_seq_len", 64), ("build_config", "max_batch_size", 5), ("versions", "torch", "1.0"),
    ("pretrained_config", "rotary_base", 1.0), ("pretrained_config", "norm_epsilon", 0.1),
])  # fmt: skip
def test_a_changed_config_json_is_refused(section: str, key: str, value: Any, copy: Built) -> None:
    edit_json(copy.engine / "config.json", lambda data: data[section].update({key: value}))
    message = refusal(copy, 11)
    assert "does not belong to the config.json beside it" in message and engine_file(0) in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pretrained_config": {}}',
                                  '{"pretrained_config": [], "build_config": {}}'])  # fmt: skip
def test_a_config_json_that_is_none_is_refused(text: str, copy: Built) -> None:
    (copy.engine / "config.json").write_text(text)
    assert "config.json" in refusal(copy, 12)


@pytest.mark.parametrize(("path", "value"), [
    ("versions", []), ("versions", {}), ("weights.checkpoint_dir", None), ("weights.checkpoint_dir", 3),
    ("build_config.backend", ["eager"]), ("build_config.max_seq_len", "32"), ("pretrained_config.mapping.tp_size", "1"),
    ("pretrained_config.mapping", None),
])  # fmt: skip
def test_a_config_json_with_a_value_of_another_kind_is_refused(path: str, value: Any, copy: Built) -> None:
    def change(data: Any) -> None:
        *where, last = path.split(".")
        for name in where:
            data = data[name]
        data[last] = value

    edit_json(copy.engine / "config.json", change)
    assert "config.json is not an engine's" in refusal(copy, 12)


def test_an_unknown_backend_lists_the_known_ones(copy: Built) -> None:
    edit_json(copy.engine / "config.json", lambda data: data["build_config"].update(backend="magic"))
    message = refusal(copy, 2)
    assert "'magic'" in message and "eager" in message and "inductor" in message


def test_no_engine_directory(tmp_path: Path) -> None:
    assert str(tmp_path / "engine") in refusal(Built(tmp_path), 2)
    (tmp_path / "engine").mkdir()
    assert "config.json" in refusal(Built(tmp_path), 12)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_byte_of_the_weights_is_found(where: str, manifest: bool, copy: Built) -> None:
    path = copy.checkpoint / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    start = data_start(path)
    data[{"first": start, "middle": (start + len(data)) // 2, "last": len(data) - 1}[where]] ^= 1
    path.write_bytes(data)
    if not manifest:
        (copy.checkpoint / "manifest.json").unlink()  # then the engine's own fingerprint still knows
    message = refusal(copy, 12 if manifest else 11)
    assert str(path) in message and ("manifest.json" in message) == manifest


def test_every_flipped_bit_of_the_weights_header_is_found_or_harmless(copy: Built) -> None:
    path, config = copy.checkpoint / "rank0.safetensors", copy.config
    data, model = path.read_bytes(), find_model(config.model.architecture)(config.model)
    good = RankCheckpoint(copy.checkpoint, model, Mapping(1)).load()[1]
    unrefused = []
    for position in range(0, data_start(path), 3):
        broken = bytearray(data)
        broken[position] ^= 1 << (position // 3 % 8)
        path.write_bytes(broken)
        try:
            if RankCheckpoint(copy.checkpoint, model, Mapping(1)).load()[1] != good:
                unrefused.append((position, "read as something else"))
        except TpllmError as e:
            assert str(path) in str(e) or path.name in str(e)
        except Exception as e:
            unrefused.append((position, f"{type(e).__name__}: {e}"))
    assert not unrefused


@pytest.mark.parametrize("length", [0, 7, 100, -1, -5000])
def test_torn_weights_are_named(length: int, copy: Built) -> None:
    path = copy.checkpoint / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert path.name in refusal(copy, 12)


def test_other_weights_than_the_engines_are_refused(copy: Built, tmp_path: Path) -> None:
    shutil.rmtree(copy.checkpoint)
    meta = make_meta_dir(tmp_path / "other", LLAMA2_MHA, seed=6)
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(copy.checkpoint)]) == 0
    message = refusal(copy, 11)
    assert "rank0.safetensors" in message and "checkpoint changed" in message and "tpllm build" in message


def test_weights_that_are_gone_are_named(copy: Built) -> None:
    shutil.rmtree(copy.checkpoint)
    message = refusal(copy, 12)
    assert str(copy.checkpoint) in message and "rank0.safetensors" in message


def test_moved_weights_are_found_where_they_are_said_to_be(copy: Built, tmp_path: Path) -> None:
    moved = copy.checkpoint.rename(tmp_path / "moved")
    assert ModelRunner.from_dir(copy.engine, checkpoint_dir=moved, world=World())


def test_engine_and_weights_moved_together_are_found(copy: Built, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    copy.engine = copy.engine.rename(tmp_path / "new" / "engine")
    copy.checkpoint.rename(tmp_path / "new" / "checkpoint")
    assert ModelRunner.from_dir(copy.engine, world=World())


def test_a_tokenizer_of_another_model_is_refused(copy: Built) -> None:
    message = refusal(copy, 11, tokenizer_dir=MODEL_DIR)
    assert str(MODEL_DIR) in message and "another model" in message and str(LLAMA2_MHA.vocab_size) in message


def test_a_tokenizer_directory_without_one_is_refused(copy: Built, tmp_path: Path) -> None:
    assert f"no tokenizer.model or tokenizer.json in {tmp_path}" in refusal(copy, 2, tokenizer_dir=tmp_path)
