"""Backend `tensorrt`: building and loading each rank's plan. TensorRT itself is imported when it is needed."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import torch

from tpllm.checkpoint.rank import RankCheckpoint
from tpllm.devices import assign
from tpllm.distributed import World
from tpllm.engine.base import (
    LAYERS,
    RANDOM,
    Backend,
    Engine,
    EngineConfig,
    RankEngine,
    build_command,
    engine_file,
    read_engine,
    write_engine,
)
from tpllm.engine.random_weights import random_weights
from tpllm.errors import MismatchError, PreflightError, UsageError
from tpllm.mapping import Mapping
from tpllm.models import find_model
from tpllm.models.base import Model
from tpllm.settings import choice

# Before, all-reduces of a network that also has attention did nothing, and said so only at load.
LEAST = (11, 2)
INSTALL = "pip install 'tpllm[tensorrt]'"
PLAN, MADE_FOR = "plan.trt", "made_for.json"


def tensorrt_version() -> str:
    """Of the TensorRT that is installed; refused when it is missing or too old."""
    least = ".".join(map(str, LEAST))
    try:
        import tensorrt
    except (ImportError, OSError) as e:
        raise PreflightError(f"backend tensorrt needs TensorRT {least} or newer, which cannot be imported here ({e}); "
                             f"type: {INSTALL}") from None
    version: str = tensorrt.__version__
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < LEAST:
        raise PreflightError(f"backend tensorrt needs TensorRT {least} or newer, this is {version}; type: {INSTALL}")
    return version


def nccl_version() -> str:
    """Of the NCCL that TensorRT's collectives go through."""
    try:
        from nccl import core
    except ImportError as e:
        raise PreflightError(f"TensorRT engines of several ranks need nccl4py, which cannot be imported here ({e}); "
                             f"type: {INSTALL}") from None
    if (found := core.get_version().libnccl) is None:
        raise PreflightError("TensorRT engines of several ranks need NCCL, and there is no libnccl.so.2 here; "
                             "type: pip install nvidia-nccl-cu13")
    return str(found.version)


def found_here(world: World) -> dict[str, str]:
    """What plans of this rank are made for: versions, and the GPU, which becomes the current one."""
    found = {"tensorrt": tensorrt_version()}
    from tpllm.engine.tensorrt import runtime

    found["gpu"] = runtime.take_gpu(world).architecture
    if world.size > 1:
        found["nccl"] = nccl_version()
    return found


class TensorrtBackend(Backend):
    """A plan holds its rank's weights and fits one TensorRT version and one kind of GPU."""

    def choose_device(self, name: str, world: World) -> str:
        if name == "cpu":
            raise UsageError("backend tensorrt makes engines for GPUs only; with --device cpu use --backend inductor")
        world.note(assign(world))
        return "cuda"

    def settle(self, config: EngineConfig, world: World) -> EngineConfig:
        config = super().settle(config, world)
        found = world.together("build", lambda: found_here(world))
        return replace(config, versions=config.versions | world.broadcast(found), weights_in_engine=True)

    def build(self, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None, out: Path, world: World,
              model_file: Path | None) -> None:
        def read() -> tuple[dict[str, str], Model, dict[str, torch.Tensor], str]:
            found = found_here(world)
            model = find_model(config.model.architecture, model_file)(config.model)
            if checkpoint_dir is None:
                return found, model, dict(random_weights(model, mapping, torch.device("cpu"))), RANDOM
            return found, model, *RankCheckpoint(checkpoint_dir, model, mapping).load()

        found, model, weights, fingerprint = world.together("read weights", read)
        from tpllm.engine.tensorrt.plan import Plan, make_plan

        def make(timing_cache: bytes) -> Plan:
            started = time.perf_counter()
            plan = make_plan(config, mapping, model, weights, world, timing_cache)
            world.say(f"build: rank 0's plan has {plan.collectives['all_reduce']} all-reduces and "
                      f"{len(plan.data) / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s")
            return plan

        # One rank finds the fastest kernels; the others, whose layers have the same shapes, take its word for it.
        first = world.together("build the plan", lambda: make(b"") if world.is_first else None)
        learned = world.broadcast(first.timing_cache if first else b"")
        plan = world.together("build the plan", lambda: first or make(learned))
        meta = RankEngine(mapping.rank, mapping.tp_size, config.build.backend, config.digest(), fingerprint,
                          plan.collectives)
        world.together("write", lambda: write_engine(out / engine_file(mapping.rank), meta, {
            MADE_FOR: json.dumps(found).encode(), LAYERS: plan.layers.encode(), PLAN: plan.data}))

    def load(self, directory: Path, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None,
             world: World) -> Engine:
        def read() -> bytes:
            found = found_here(world)
            _, members = read_engine(directory, config, mapping)
            needed = json.loads(members[MADE_FOR])
            for key, name in (("tensorrt", "TensorRT"), ("gpu", "a GPU of architecture")):
                if found[key] != needed[key]:
                    raise MismatchError(f"{directory / engine_file(mapping.rank)} was built with {name} {needed[key]}, "
                                        f"{world.host} has {found[key]}; build it again here: {build_command(config)}")
            return members[PLAN]

        # Rank 0's word counts: a graph's context is opened by all ranks or by none.
        graphs = world.broadcast(world.together("load", lambda: choice("TPLLM_TENSORRT_CUDA_GRAPHS", "0", "1")))
        plan = world.together("load", read)
        from tpllm.engine.tensorrt.runtime import TensorrtEngine, connect, take_gpu

        gpu = take_gpu(world)
        engine = world.together("load", lambda: TensorrtEngine(config, plan, gpu, world))
        communicator = connect(world) if world.size > 1 else None
        world.together("connect", lambda: engine.open(communicator, graphs == "1"))
        return engine
