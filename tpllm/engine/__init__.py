"""Engines: what turns a rank's checkpoint and the model's definition into logits, by backend name."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from tpllm.distributed import World
from tpllm.engine.base import Backend, EngineConfig
from tpllm.errors import UsageError
from tpllm.files import output_dir, write_json
from tpllm.mapping import Mapping

BACKENDS = {
    "inductor": "tpllm.engine.torch.inductor:InductorBackend",
    "eager": "tpllm.engine.torch.eager:EagerBackend",
    "tensorrt": "tpllm.engine.tensorrt.backend:TensorrtBackend",
}

# Where engines of each have run, for those who are to rely on them; the README's table says more.
RAN = {
    "inductor": "has run on CPUs at tp 1 to 8 and on H200s at tp 1 and 2",
    "eager": "has run on CPUs at tp 1 to 8 and on H200s at tp 1 and 2",
    "tensorrt": "has NEVER been run by TensorRT itself, only layer by layer in PyTorch: try `pytest -m tensorrt` first",
}


def find_backend(name: str) -> Backend:
    """The backend of that name; only then are its libraries imported."""
    if name not in BACKENDS:
        raise UsageError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    module, cls = BACKENDS[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), cls)()
    return backend


def build_engines(config: EngineConfig, directory: Path, checkpoint_dir: Path | None, world: World,
                  model_file: Path | None = None) -> EngineConfig:
    """Write the engine directory; without a checkpoint, for random weights. The config as built; collective."""
    backend = find_backend(config.build.backend)
    config = backend.settle(config, world)
    with contextlib.ExitStack() as stack:
        # Rank 0 owns the directory: it makes the partial one, all write into it, and its rename ends the build.
        opened = world.together("build", lambda: stack.enter_context(output_dir(directory)) if world.is_first else None)
        out = world.broadcast(opened)
        assert out is not None
        backend.build(config, Mapping(config.tp_size, world.rank), checkpoint_dir, out, world, model_file)
        if world.is_first:
            write_json(out / "config.json", config.to_json())
    world.barrier()
    return config
