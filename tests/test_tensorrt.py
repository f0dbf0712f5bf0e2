"""One rank's TensorRT engine in this process, run by a stand-in for TensorRT: steps and refusals."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_stub
import torch
from built import random_ids
from dequantized import dequantized_reference
from makers import LLAMA31_GQA, make_meta_dir
from reference import Reference
from tensorrt_stub import genuine
from test_house import loaded

from tpllm.cli import main
from tpllm.distributed import World
from tpllm.engine import find_backend
from tpllm.engine.base import EngineConfig, StepInput, read_engine, write_engine
from tpllm.errors import TpllmError
from tpllm.mapping import Mapping
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

NEEDS_BINDINGS = pytest.mark.skipif(genuine.lacking() is not None, reason=str(genuine.lacking()))
MAX_BATCH, MAX_SEQ = 4, 40
OURS = "tpllm.engine.tensorrt"


class Made:
    """A checkpoint and its engine."""

    def __init__(self, root: Path) -> None:
        self.meta, self.checkpoint, self.engine = root / "meta", root / "checkpoint", root / "engine"
        make_meta_dir(self.meta, LLAMA31_GQA, seed=5)
        assert main(["convert", "--meta-ckpt-dir", str(self.meta), "--output-dir", str(self.checkpoint)]) == 0
        assert main(self.build_command(self.engine)) == 0
        self.runner, self.reference = ModelRunner.from_dir(self.engine, world=World()), Reference(self.meta)

    def build_command(self, out: Path, *options: str) -> list[str]:
        return ["build", "--checkpoint-dir", str(self.checkpoint), "--output-dir", str(out), "--backend", "tensorrt",
                "--max-batch-size", str(MAX_BATCH), "--max-seq-len", str(MAX_SEQ), *options]

    @property
    def config(self) -> EngineConfig:
        return EngineConfig.load(self.engine)

    def step(self, *arrays: Any, copies: Any = None) -> torch.Tensor:
        """Of tokens, query_start, slots, length and rows."""
        tokens, query_start, slots, length, rows = (np.array(a, np.int32) for a in arrays)
        return self.runner.engine.step(StepInput(tokens, query_start, slots * MAX_SEQ, length, rows, copies))


@pytest.fixture(scope="module")
def made(trt: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("tensorrt"))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


# Steps


@NEEDS_BINDINGS
def test_only_the_wanted_rows_are_computed(made: Made) -> None:
    a, b = random_ids(made, 12, 7)  # type: ignore[arg-type]
    logits = made.step([*a, *b], [0, 12, 19], [2, 0], [12, 7], [18, 3, 11, 3])
    assert logits.dtype == torch.float32 and logits.shape == (4, LLAMA31_GQA.vocab_size)
    expected = torch.cat([made.reference.logits(a), made.reference.logits(b)])
    assert_close(logits, expected[[18, 3, 11, 3]])


@NEEDS_BINDINGS
def test_a_step_without_wanted_rows_still_fills_the_cache(made: Made) -> None:
    (ids,) = random_ids(made, 12)  # type: ignore[arg-type]
    assert made.step(ids[:11], [0, 11], [1], [11], []).shape == (0, LLAMA31_GQA.vocab_size)
    assert_close(made.step(ids[11:], [0, 1], [1], [12], [0]), made.reference.logits(ids)[11:])


@NEEDS_BINDINGS
def test_decode_leaves_slots_between_its_own_alone(made: Made) -> None:
    """Full to the last row, so that there is no room in a slot for what should not be written."""
    sequences = random_ids(made, MAX_SEQ, MAX_SEQ, MAX_SEQ)  # type: ignore[arg-type]
    ends = [0, MAX_SEQ - 2, 2 * MAX_SEQ - 4, 3 * MAX_SEQ - 6]
    made.step([t for ids in sequences for t in ids[:-2]], ends, [0, 1, 3], [MAX_SEQ - 2] * 3, [0])
    steps = [([0, 2], MAX_SEQ - 1), ([1], MAX_SEQ - 1), ([2, 0], MAX_SEQ), ([1], MAX_SEQ)]
    for members, length in steps:
        logits = made.step([sequences[i][length - 1] for i in members], range(len(members) + 1),
                           [[0, 1, 3][i] for i in members], [length] * len(members), range(len(members)))
        for i, row in zip(members, logits, strict=True):
            assert_close(row, made.reference.logits(sequences[i])[length - 1])


@NEEDS_BINDINGS
def test_copied_rows_are_read_before_any_is_written(made: Made) -> None:
    """Two sequences change slots and go on there; a third one is a copy of the first's beginning."""
    a, b = random_ids(made, 12, 12)  # type: ignore[arg-type]
    made.step([*a[:8], *b[:8]], [0, 8, 16], [0, 1], [8, 8], [])
    copies = np.array([[0, MAX_SEQ, 8], [MAX_SEQ, 0, 8], [0, 3 * MAX_SEQ, 5]], np.int32)
    logits = made.step([*a[8:], *b[8:], a[5]], [0, 4, 8, 9], [1, 0, 3], [12, 12, 6], range(9), copies=copies)
    assert_close(logits[:4], made.reference.logits(a)[8:])
    assert_close(logits[4:8], made.reference.logits(b)[8:])
    assert_close(logits[8:], made.reference.logits(a)[5:6])


@NEEDS_BINDINGS
def test_decode_of_each_run_of_slots_is_captured_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference's logits each time, for slots between too; prefill and what exceeds the limit are not."""
    from tensorrt_stub.runtime import CAPTURES

    monkeypatch.setenv("TPLLM_TENSORRT_CUDA_GRAPHS", "1")
    monkeypatch.setattr(f"{OURS}.runtime.MAX_GRAPHS", 3)
    CAPTURES.clear()
    monkeypatch.setattr(made, "runner", load(made))
    sequences = dict(zip((3, 1, 0), random_ids(made, 30, 30, 30), strict=True))  # type: ignore[arg-type]
    cached = dict.fromkeys(sequences, 10)
    made.step([t for ids in sequences.values() for t in ids[:10]], [0, 10, 20, 30], [3, 1, 0], [10] * 3, [])
    assert not CAPTURES

    captures = []
    for slots in ([3, 1], [1], [3], [1, 3], [1], [3, 1], [0], [0], [3]):
        for slot in slots:
            cached[slot] += 1
        logits = made.step([sequences[slot][cached[slot] - 1] for slot in slots], range(len(slots) + 1), slots,
                           [cached[slot] for slot in slots], range(len(slots)))
        captures.append(len(CAPTURES))
        for slot, row in zip(slots, logits, strict=True):
            assert_close(row, made.reference.logits(sequences[slot])[cached[slot] - 1])
    assert captures == [1, 2, 3, 3, 3, 3, 3, 3, 3]


@NEEDS_BINDINGS
def test_without_the_setting_there_are_no_graphs(made: Made, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    from tensorrt_stub.runtime import CAPTURES

    CAPTURES.clear()
    runner = load(made)
    assert runner.generate([[1, 2]], SamplingParams(max_output_len=4)) and not CAPTURES
    assert len(runner.engine._engine._contexts) == 2  # type: ignore[attr-defined]
    monkeypatch.setenv("TPLLM_TENSORRT_CUDA_GRAPHS", "yes")
    assert "TPLLM_TENSORRT_CUDA_GRAPHS is 'yes'; it can be 0 or 1" in refusal(2, lambda: load(made))


@NEEDS_BINDINGS
def test_inspect_shows_layers_where_tensorrt_is_not(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """What the engine inspector said when the engine was built."""
    assert not loaded(f"from tpllm.cli import main\nassert main(['inspect', {str(made.engine)!r}]) == 0") & {
        "torch", "tensorrt", "tensorrt_bindings"}
    assert main(["inspect", str(made.engine)]) == 0
    printed = capsys.readouterr().out
    assert "    transformer.layers.1.mlp.fc/matmul  IMatrixMultiplyLayer\n" in printed
    assert "layers by TensorRT's engine inspector, 0 of them named for collectives" in printed


@NEEDS_BINDINGS
def test_a_plan_that_cannot_be_read_back_is_no_engine(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tensorrt_stub.runtime.read_plan", lambda data: None)
    assert main(made.build_command(tmp_path / "out")) == 20
    assert "TensorRT refused the plan of " in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# Refusals


def refusal(code: int, work: Callable[[], object]) -> str:
    with pytest.raises(TpllmError) as caught:
        work()
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)


@pytest.fixture
def without_tensorrt() -> Iterator[None]:
    before = {name: module for name, module in sys.modules.items() if name == "tensorrt" or name.startswith(OURS)}
    tensorrt_stub.remove()
    yield
    sys.modules.update(before)


@pytest.mark.parametrize(("found", "sentence"), [
    (None, "needs TensorRT 11.2 or newer, which cannot be imported here"),
    (SimpleNamespace(__version__="11.1.0.106"), "needs TensorRT 11.2 or newer, this is 11.1.0.106"),
    (SimpleNamespace(__version__="10.16.1"), "needs TensorRT 11.2 or newer, this is 10.16.1"),
])  # fmt: skip
def test_tensorrt_is_missing_or_too_old(found: Any, sentence: str, without_tensorrt: None, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read or written."""
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    find_backend("tensorrt")
    monkeypatch.setattr(f"{OURS}.backend.assign", lambda world: "")
    make_meta_dir(tmp_path / "meta", LLAMA31_GQA)
    assert main(["convert", "--meta-ckpt-dir", str(tmp_path / "meta"), "--output-dir", str(tmp_path / "ckpt")]) == 0
    argv = ["build", "--checkpoint-dir", str(tmp_path / "ckpt"), "--output-dir", str(tmp_path / "out"), "--backend",
            "tensorrt"]
    assert main(argv) == 10
    error = capsys.readouterr().err
    assert sentence in error and "pip install 'tpllm[tensorrt]'" in error and "Traceback" not in error
    assert not list(tmp_path.glob("out*"))
    assert main([*argv, "--device", "cpu"]) == 2
    assert "--backend inductor" in capsys.readouterr().err


@NEEDS_BINDINGS
@pytest.mark.parametrize("recorder", [True, False])
def test_what_tensorrt_complains_about_becomes_one_sentence(
        recorder: bool, made: Made, trt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Through the error recorder, or through the logger alone; with the layer's name, and no engine left behind."""
    if not recorder:
        monkeypatch.setattr(f"{OURS}.plan.ErrorRecorder", lambda logger: None)
        monkeypatch.setattr("tensorrt_stub.signatures.check_property", lambda *a: None)
    monkeypatch.setattr(trt.Builder, "fails", "[optimizer.cpp::computeCosts::4051] Error Code 10: Internal Error ("
                        "Could not find any implementation for node transformer.layers.1.mlp.fc/matmul.)")
    assert main(made.build_command(tmp_path / "out")) == 20
    error = capsys.readouterr().err
    assert error.strip().endswith("TensorRT refused to build the network: Could not find any implementation for node "
                                  "transformer.layers.1.mlp.fc/matmul")
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(trt.Builder, "fails", "Error Code 2: OutOfMemory (Requested size was 4096 bytes.)")
    assert main(made.build_command(tmp_path / "out")) == 22


@NEEDS_BINDINGS
def test_cuda_does_not_work(made: Made, trt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:
    """The genuine classes, which find nothing to wrap here."""
    import tensorrt_bindings

    monkeypatch.setattr(trt, "Builder", tensorrt_bindings.Builder)
    assert main(made.build_command(tmp_path / "out")) == 20
    assert "TensorRT refused to start its Builder: it gave no reason" in capsys.readouterr().err
    monkeypatch.setattr(trt, "Runtime", tensorrt_bindings.Runtime)
    assert "TensorRT refused to start its Runtime" in refusal(20, lambda: load(made))


@NEEDS_BINDINGS
def test_a_runtime_that_starts_with_an_error_is_not_used(made: Made, trt: ModuleType,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT's lean runtime does without a GPU; it may not even be deleted."""
    deleted = []

    class Runtime(trt.Runtime, owner="Runtime"):  # type: ignore[name-defined,misc]
        def __init__(self, logger: Any) -> None:
            super().__init__(logger)
            logger.log(trt.ILogger.Severity.ERROR, "createInferRuntime: Error Code 6: API Usage Error (CUDA "
                                                   "initialization failure with error: 35)")

        def __del__(self) -> None:
            deleted.append(self)

    monkeypatch.setattr(trt, "Runtime", Runtime)
    assert refusal(20, lambda: load(made)) == (
        "TensorRT refused to start its Runtime: CUDA initialization failure with error: 35")
    gc.collect()
    assert not deleted


@NEEDS_BINDINGS
def test_a_refused_layer_is_named(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    from tpllm.checkpoint.rank import RankCheckpoint

    load = RankCheckpoint.load

    def wrong(self: RankCheckpoint) -> Any:
        weights, fingerprint = load(self)
        weights["transformer.layers.1.mlp.fc.weight"] = weights["transformer.layers.1.mlp.fc.weight"][:, :-8]
        return weights, fingerprint

    monkeypatch.setattr(RankCheckpoint, "load", wrong)
    assert main(made.build_command(tmp_path / "out")) == 20
    assert "TensorRT refused layer transformer.layers.1.mlp.fc/matmul: IMatrixMultiply" in capsys.readouterr().err


@NEEDS_BINDINGS
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_of_zeros_have_scales_that_tensorrt_takes(precision: str, made: Made, tmp_path: Path) -> None:
    """Rows of the first layer's inner matrix, the whole of the second's; the answers are the reference's."""
    meta = shutil.copytree(made.meta, tmp_path / "meta")
    (source,) = meta.glob("consolidated.*.pth")
    weights = torch.load(source)
    weights["layers.0.feed_forward.w1.weight"][::3] = 0
    weights["layers.1.feed_forward.w2.weight"].zero_()
    torch.save(weights, source)
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(tmp_path / "checkpoint"),
                 "--use-weight-only", "--weight-only-precision", precision]) == 0
    assert main(["build", "--checkpoint-dir", str(tmp_path / "checkpoint"), "--output-dir", str(tmp_path / "engine"),
                 "--backend", "tensorrt", "--max-batch-size", "1", "--max-seq-len", str(MAX_SEQ)]) == 0
    engine = ModelRunner.from_dir(tmp_path / "engine", world=World()).engine
    logits = engine.step(StepInput(*(np.array(a, np.int32) for a in ([3, 1, 2], [0, 3], [0], [3], [0, 1, 2]))))
    assert_close(logits, dequantized_reference(meta, tmp_path / "checkpoint", 1).logits([3, 1, 2]))


@NEEDS_BINDINGS
def test_an_odd_number_of_int4_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_meta_dir(tmp_path / "meta", replace(LLAMA31_GQA, ffn_hidden=65))
    assert main(["convert", "--meta-ckpt-dir", str(tmp_path / "meta"), "--output-dir", str(tmp_path / "checkpoint"),
                 "--use-weight-only", "--weight-only-precision", "int4"]) == 0
    assert main(["build", "--checkpoint-dir", str(tmp_path / "checkpoint"), "--output-dir", str(tmp_path / "out"),
                 "--backend", "tensorrt"]) == 2
    assert "transformer.layers.0.mlp.proj has 65 columns on a rank" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@NEEDS_BINDINGS
def test_a_switch_that_has_no_such_position(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TPLLM_TENSORRT_ATTENTION", "flash")
    assert main(made.build_command(tmp_path / "out")) == 2
    assert "TPLLM_TENSORRT_ATTENTION is 'flash'; it can be fused or primitive" in capsys.readouterr().err


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    result = Made.__new__(Made)
    result.engine = tmp_path / "engine"
    shutil.copytree(made.engine, result.engine)
    return result


def load(made: Made) -> ModelRunner:
    return ModelRunner.from_dir(made.engine, world=World())


def rewrite(made: Made, edit: Callable[[dict[str, bytes]], object]) -> None:
    meta, members = read_engine(made.engine, made.config, Mapping(1))
    edit(members)
    write_engine(made.engine / "rank0.engine", meta, members)


@NEEDS_BINDINGS
def test_an_engine_needs_no_checkpoint(copy: Made) -> None:
    config = json.loads((copy.engine / "config.json").read_text())
    config["weights"]["checkpoint_dir"] = "/gone"
    (copy.engine / "config.json").write_text(json.dumps(config))
    assert load(copy).generate([[1, 2]], SamplingParams(max_output_len=2))


@NEEDS_BINDINGS
@pytest.mark.parametrize("algo", [None, "W8A16", "W4A16"])
def test_random_weights_to_measure_with(algo: str | None, made: Made, tmp_path: Path) -> None:
    """The same at every build, with logits that say something."""
    from tpllm.engine import build_engines

    def logits(name: str) -> torch.Tensor:
        config = replace(made.config, checkpoint_dir="", model=replace(made.config.model, quant_algo=algo))
        config = build_engines(config, tmp_path / name, None, World())
        engine = find_backend("tensorrt").load(tmp_path / name, config, Mapping(1), None, World())
        return engine.step(StepInput(*(np.array(a, np.int32) for a in ([3, 1, 2], [0, 3], [0], [3], [2]))))

    first = logits("first")
    assert first.isfinite().all() and float(first.std()) > 0.01
    assert first.equal(logits("second"))


@NEEDS_BINDINGS
@pytest.mark.parametrize(("key", "value", "sentence"), [
    ("tensorrt", "11.2.0.1", "was built with TensorRT 11.2.0.1, "), ("gpu", "sm_80", "a GPU of architecture sm_80, ")])
def test_plans_of_another_version_or_gpu(copy: Made, key: str, value: str, sentence: str) -> None:
    rewrite(copy, lambda members: members.update(
        {"made_for.json": json.dumps(json.loads(members["made_for.json"]) | {key: value}).encode()}))
    found = refusal(11, lambda: load(copy))
    assert sentence in found and "build it again here: mpirun -n 1 tpllm build" in found


@NEEDS_BINDINGS
def test_torn_engines(copy: Made) -> None:
    whole = (copy.engine / "rank0.engine").read_bytes()
    (copy.engine / "rank0.engine").write_bytes(whole[:-1000])
    assert "is torn" in refusal(12, lambda: load(copy))
    middle = len(whole) // 2
    (copy.engine / "rank0.engine").write_bytes(whole[:middle] + b"?" + whole[middle + 1:])
    assert "is torn" in refusal(12, lambda: load(copy))
    (copy.engine / "rank0.engine").write_bytes(whole)
    rewrite(copy, lambda members: members.update({"plan.trt": b"garbage"}))
    found = refusal(20, lambda: load(copy))
    assert "TensorRT refused the plan of 7 bytes" in found and found.endswith("Magic tag does not match")


@NEEDS_BINDINGS
def test_a_communicator_that_is_not_taken_ends_the_load(made: Made) -> None:
    from tensorrt_stub.runtime import Communicator

    from tpllm.engine.tensorrt.runtime import TensorrtEngine, take_gpu

    _, members = read_engine(made.engine, made.config, Mapping(1))
    engine = TensorrtEngine(made.config, members["plan.trt"], take_gpu(World()), World())
    found = refusal(20, lambda: engine.open(Communicator(None)))
    assert found == "TensorRT refused the NCCL communicator: The engine is not a multi-device engine"


@NEEDS_BINDINGS
def test_a_part_longer_than_the_profile_is_refused(made: Made) -> None:
    """The runtime's own check; prompts are refused before, by --max-input-len."""
    ids = list(range(MAX_SEQ + 1))
    found = refusal(20, lambda: made.step(ids, [0, len(ids)], [0], [len(ids)], [0]))
    assert "shape torch.Size([1, 41]) of tokens" in found


def test_tensorrt_is_imported_for_its_own_backend_only() -> None:
    modules = loaded("from tpllm.engine import find_backend\n"
                     "for name in ('eager', 'inductor', 'tensorrt'): find_backend(name)")
    assert "torch" in modules and not modules & {"tensorrt", "tensorrt_bindings", "nccl"}
