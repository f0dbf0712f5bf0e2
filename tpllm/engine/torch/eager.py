"""Backend `eager`: the model's own Python, run as it is; needs no compiler."""

from __future__ import annotations

from pathlib import Path

from tpllm.distributed import World
from tpllm.engine.base import Backend, EngineConfig
from tpllm.engine.torch.base import (
    TorchEngine,
    count_collectives,
    export_step,
    load_rank,
    make_cache,
    prepare_rank,
    write_rank_engine,
)
from tpllm.engine.torch.device import choose_device
from tpllm.mapping import Mapping


class EagerBackend(Backend):
    """An engine is the description alone, and the model's file when it is not one of the package's."""

    choose_device = staticmethod(choose_device)

    def build(self, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None, out: Path, world: World,
              model_file: Path | None) -> None:
        def write() -> None:
            rank = prepare_rank(config, mapping, checkpoint_dir, model_file, world)
            found = count_collectives(export_step(rank.program, config, single=False))
            write_rank_engine(out, config, mapping, rank.fingerprint, found, rank.members)

        world.together("build", write)

    def load(self, directory: Path, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None,
             world: World) -> TorchEngine:
        rank = load_rank(directory, config, mapping, checkpoint_dir, world)
        return TorchEngine(config, rank.program, make_cache(config, rank.program.device, rank.rows))
