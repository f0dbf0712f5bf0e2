"""Engines of one rank, built once a module by the commands that a user gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import makers
import pytest
import torch
from makers import Shape, make_meta_dir
from reference import Reference

from tpllm.cli import main
from tpllm.demo import MODEL_DIR
from tpllm.distributed import World
from tpllm.engine.base import EngineConfig
from tpllm.runner import ModelRunner

QWEN_FILE = Path(__file__).with_name("qwen2_model.py")
MAX_BATCH, MAX_INPUT, MAX_SEQ = 3, 24, 32


class Built:
    """A Meta directory, its checkpoint and its eager engine."""

    def __init__(self, root: Path) -> None:
        self.meta, self.checkpoint, self.engine = root / "meta", root / "checkpoint", root / "engine"
        self._runner: ModelRunner | None = None
        self._reference: Reference | None = None

    def run(self, *convert_options: str, model_file: Path | None = None, max_seq: int = MAX_SEQ,
            max_input: int = MAX_INPUT) -> "Built":
        """Convert and build, by the commands a user gives."""
        model = ["--model-file", str(model_file)] if model_file else []
        assert main(["convert", "--meta-ckpt-dir", str(self.meta), "--output-dir", str(self.checkpoint),
                     *convert_options, *model]) == 0  # fmt: skip
        assert main(["build", "--checkpoint-dir", str(self.checkpoint), "--output-dir", str(self.engine), "--backend",
                     "eager", "--max-batch-size", str(MAX_BATCH), "--max-input-len", str(min(max_seq, max_input)),
                     "--max-seq-len", str(max_seq), *model]) == 0  # fmt: skip
        return self

    @property
    def runner(self) -> ModelRunner:
        self._runner = self._runner or ModelRunner.from_dir(self.engine, world=World())
        return self._runner

    @property
    def reference(self) -> Reference:
        self._reference = self._reference or Reference(self.meta)
        return self._reference

    @property
    def config(self) -> EngineConfig:
        return EngineConfig.load(self.engine)


Build = Callable[..., Built]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Engines by shape and options, each made once."""
    made: dict[Any, Built] = {}

    def get(shape: Shape, *options: str, dtype: torch.dtype = torch.float32) -> Built:
        key = (shape, options, dtype)
        if key not in made:
            made[key] = Built(tmp_path_factory.mktemp("engine"))
            make_meta_dir(made[key].meta, shape, seed=5, dtype=dtype)
            made[key].run(*options, model_file=QWEN_FILE if shape.qkv_bias else None)
        return made[key]

    return get


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The shipped model, which has a tokenizer."""
    built = Built(tmp_path_factory.mktemp("demo"))
    built.meta = MODEL_DIR
    return built.run("--dtype", "float32", max_seq=128)


def random_ids(built: Built, *lengths: int, seed: int = 0) -> list[list[int]]:
    return makers.random_ids(built.config.model.vocab_size, *lengths, seed=seed)
