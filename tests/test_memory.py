"""What a rank takes of a GPU, foreseen: against the published sizes, and advice that works when it is followed."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import LLAMA31_GQA, make_meta_dir
from reference import Reference
from torch.multiprocessing.reductions import StorageWeakRef

from tpllm.bench import named_config
from tpllm.cli import main
from tpllm.distributed import World
from tpllm.engine.base import BuildConfig, EngineConfig
from tpllm.engine.torch import inductor
from tpllm.engine.torch.base import LoadedRank, PreparedRank, load_rank, prepare_rank
from tpllm.engine.torch.memory import SPARE_ROWS, Plan, plan_memory
from tpllm.errors import OutOfMemory, UsageError
from tpllm.mapping import Mapping
from tpllm.models import find_model
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams

# Parameters that the models' cards and papers give to three digits, here to the last: bfloat16 takes two bytes each.
PARAMETERS = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "llama-2-70b": 68_976_648_192}
# layers * 2 * key/value heads * head size * two bytes
ROW = {"llama-2-7b": 32 * 2 * 32 * 128 * 2, "llama-3-8b": 32 * 2 * 8 * 128 * 2, "llama-2-70b": 80 * 2 * 8 * 128 * 2}


def config(model: str, tp_size: int = 1, **limits: int) -> EngineConfig:
    build = BuildConfig("inductor", "cuda", **{"max_batch_size": 512, "max_seq_len": 2412} | limits)
    return EngineConfig(named_config(model, "bfloat16"), build, tp_size, "", {})


def plan(of: EngineConfig) -> Plan:
    return plan_memory(of, find_model(of.model.architecture)(of.model), Mapping(of.tp_size, 0))


@pytest.mark.parametrize("model", PARAMETERS)
def test_weights_and_cache_rows_are_the_published_sizes(model: str) -> None:
    found = plan(config(model))
    assert (found.weights, found.row) == (2 * PARAMETERS[model], ROW[model])
    of_two, shape = plan(config(model, tp_size=2)), config(model).model
    whole = 2 * shape.hidden_size * (shape.vocab_size + 2 * shape.num_hidden_layers + 1)  # embedding table and norms
    assert (of_two.weights - whole, of_two.row) == ((found.weights - whole) // 2, found.row // 2)


def test_as_many_rows_as_the_engine_is_built_for_or_as_fit() -> None:
    of = config("llama-2-7b")
    found, wanted = plan(of), 512 * 2412
    fixed = found.weights + found.workspace + SPARE_ROWS * found.row
    assert found.rows(of, fixed + wanted * found.row) == wanted
    assert found.rows(of, 10**13) == wanted
    assert found.rows(of, fixed + 5000 * found.row + 7) == 5000


def test_a_gpu_too_small_is_refused_with_a_length_that_fits() -> None:
    of = config("llama-2-7b")
    free = plan(of).weights + plan(of).workspace + (SPARE_ROWS + 2000) * ROW["llama-2-7b"]
    with pytest.raises(OutOfMemory, match=r"too little for one sequence of --max-seq-len 2412 \(1\.26 GB\): build with "
                                          r"--max-seq-len 2000 or less, or split the model over more ranks than 1"):
        plan(of).rows(of, free)
    shorter = replace(of, build=replace(of.build, max_seq_len=2000))
    assert plan(shorter).rows(shorter, free) == 2000
    with pytest.raises(OutOfMemory, match="there is no room for any sequence"):
        plan(of).rows(of, plan(of).weights)


def test_the_workspace_grows_with_the_tokens_of_a_step() -> None:
    small, large = (plan(config("llama-3-8b", max_num_tokens=tokens)).workspace for tokens in (2048, 8192))
    # At least what a layer of the step has at once: its input, the sum so far and both halves of the inner width.
    assert large - small >= (8192 - 2048) * 2 * (2 * 4096 + 2 * 14336)
    assert plan(config("llama-3-8b")).workspace == large


def test_steps_have_a_token_of_each_sequence() -> None:
    with pytest.raises(UsageError, match="--max-num-tokens 16 is less than --max-batch-size 32"):
        BuildConfig(max_batch_size=32, max_num_tokens=16)
    with pytest.raises(UsageError, match="--max-num-tokens is 0; it starts at 1"):
        BuildConfig(max_num_tokens=0)
    assert BuildConfig(device="cpu", max_batch_size=3000).step_tokens == 3000
    assert BuildConfig(device="cpu", max_num_tokens=100).step_tokens == 100


def test_logits_of_a_step_have_a_row_of_each_sequence() -> None:
    """And no more rows than they have tokens; whoever wants one of every token gets them in parts."""
    assert BuildConfig(device="cuda", max_batch_size=512).step_rows == 2048
    assert BuildConfig(device="cuda", max_batch_size=3000).step_rows == 3000
    assert BuildConfig(device="cpu", max_num_tokens=100).step_rows == 100


def test_neither_a_build_nor_an_engine_that_is_gone_keeps_weights(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may build an engine and load several: `tpllm bench` does the former."""
    exported: list[weakref.ref[torch.Tensor]] = []
    loaded: list[StorageWeakRef] = []

    def watched(*args: Any) -> PreparedRank:
        rank = prepare_rank(*args)
        exported.extend(weakref.ref(weight) for weight in rank.program.parameters())
        assert all(weight.numel() for weight in rank.program.parameters())
        return rank

    def watched_load(*args: Any) -> LoadedRank:
        rank = load_rank(*args)
        loaded.extend(StorageWeakRef(weight.untyped_storage()) for weight in rank.program.parameters())
        return rank

    monkeypatch.setattr(inductor, "prepare_rank", watched)
    monkeypatch.setattr(inductor, "load_rank", watched_load)
    meta, checkpoint = make_meta_dir(tmp_path / "meta", LLAMA31_GQA), tmp_path / "checkpoint"
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(checkpoint), "--dtype", "float32"]) == 0
    assert main(["build", "--checkpoint-dir", str(checkpoint), "--output-dir", str(tmp_path / "engine"),
                 "--backend", "inductor"]) == 0  # fmt: skip
    gc.collect()
    assert exported and not [weight for kept in exported if (weight := kept()) is not None and weight.numel()]

    runner = ModelRunner.from_dir(tmp_path / "engine", world=World())
    gc.collect()
    (output,) = runner.generate([[1, 2, 3]], SamplingParams(max_output_len=4, ignore_eos=True))
    assert output.outputs[0].token_ids == Reference(meta).greedy([1, 2, 3], 4)
    assert loaded and not any(storage.expired() for storage in loaded)
    del runner
    gc.collect()
    assert all(storage.expired() for storage in loaded)
