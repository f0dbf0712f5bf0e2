"""What the PyTorch backends share: preparing a rank's program, its weights and its cache, and stepping."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tpllm.checkpoint.rank import RankCheckpoint
from tpllm.devices import assign
from tpllm.distributed import World
from tpllm.engine.base import (
    RANDOM,
    Engine,
    EngineConfig,
    RankEngine,
    StepInput,
    check_shard,
    engine_file,
    read_engine,
    write_engine,
)
from tpllm.engine.random_weights import random_weights
from tpllm.engine.torch import collectives
from tpllm.engine.torch.cuda_ops import CudaOps
from tpllm.engine.torch.device import find_device
from tpllm.engine.torch.fused import DecodeProgram
from tpllm.engine.torch.kernel_files import unpack_kernels
from tpllm.engine.torch.memory import cache_rows
from tpllm.engine.torch.private import drop_unused
from tpllm.engine.torch.program import StepProgram, TorchOps
from tpllm.mapping import Mapping
from tpllm.models import find_model
from tpllm.models.base import Model

if TYPE_CHECKING:
    from tpllm.engine.torch.communicator import Communicator

Step = Callable[..., torch.Tensor]
MODEL_FILE = "model.py"  # in an engine file: the definition of a model from outside the package


def use_threads(world: World) -> None:
    """Share this host's cores among its ranks, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))


class TorchEngine(Engine):
    """One rank's program with its weights and cache arena; `program` takes `StepProgram.forward`'s arguments."""

    unit = singles = 1
    ahead = False

    def __init__(self, config: EngineConfig, program: Step, cache: torch.Tensor) -> None:
        self.config = config
        self.capacity = cache.shape[2]
        self._program = program
        self._cache = cache

    @torch.inference_mode()
    def step(self, step: StepInput) -> torch.Tensor:
        """Float32 logits `[R, vocab]`."""
        copy_rows(self._cache, step)
        arrays = (step.tokens, prompt_starts(step), step.start, step.length, step.rows)
        return self._program(*(torch.from_numpy(a).to(self._cache.device) for a in arrays), self._cache)


def prompt_starts(step: StepInput) -> NDArray[np.int32]:
    """`query_start` without the sequences of one token before the first longer one: their number says where they are.

    Attention answers those by a kernel of their own; schedulers put them first.
    """
    longer = np.diff(step.query_start) > 1
    return step.query_start[int(longer.argmax()) if longer.any() else len(longer):]


def make_cache(config: EngineConfig, device: torch.device, rows: int) -> torch.Tensor:
    """The arena, of as many rows."""
    model = config.model
    return torch.empty(model.num_hidden_layers, 2, rows, model.local(config.tp_size).num_kv_heads, model.head_size,
                       dtype=getattr(torch, model.dtype), device=device)


def copy_rows(cache: torch.Tensor, step: StepInput) -> None:
    """The step's copies within the arena."""
    if step.copies is not None and len(step.copies):
        source, target = (torch.cat([torch.arange(row, row + count) for row, count in step.copies[:, [i, 2]].tolist()])
                          .to(cache.device) for i in (0, 1))
        cache[:, :, target] = cache[:, :, source]  # reads into new memory before it writes


@dataclass(frozen=True)
class PreparedRank:
    """What a rank has before its engine is made; `members` go into the engine file as they are."""

    program: StepProgram
    fingerprint: str
    members: dict[str, bytes]


def prepare_rank(config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None, model_file: Path | None,
                 world: World) -> PreparedRank:
    """The program, without its weights (export needs only shapes), and the fingerprint of the shard it is for."""
    model = find_model(config.model.architecture, model_file)(config.model)
    fingerprint = RankCheckpoint(checkpoint_dir, model, mapping).fingerprint() if checkpoint_dir else RANDOM
    members = {MODEL_FILE: model_file.read_bytes()} if model_file else {}
    return PreparedRank(make_program(model, mapping, find_device(config.build.device, world)), fingerprint, members)


def make_program(model: Model, mapping: Mapping, device: torch.device) -> StepProgram:
    """A rank's, whose weights are still to come."""
    return StepProgram(model, mapping, device, CudaOps if device.type == "cuda" else TorchOps)


@dataclass(frozen=True)
class LoadedRank:
    """A rank's program with the weights its engine was built for, the engine's members, and rows for the cache."""

    program: StepProgram
    members: dict[str, bytes]
    rows: int


def load_rank(directory: Path, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None,
              world: World) -> LoadedRank:
    """What every engine of PyTorch begins with; collective."""
    use_threads(world)

    def open_engine() -> tuple[RankEngine, dict[str, bytes], Model, torch.device]:
        meta, members = read_engine(directory, config, mapping)
        # The model's file is read from the engine, so it stays only as long as its class is being made.
        with tempfile.TemporaryDirectory(prefix="tpllm-") as scratch:
            model_file = None
            if MODEL_FILE in members:
                model_file = Path(scratch, MODEL_FILE)
                model_file.write_bytes(members[MODEL_FILE])
            model = find_model(config.model.architecture, model_file)(config.model)
        unpack_kernels(members)
        return meta, members, model, find_device(config.build.device, world)

    meta, members, model, device = world.together("load", open_engine)
    rows = config.build.max_batch_size * config.build.max_seq_len
    if device.type == "cuda":
        world.note(assign(world))  # where no verb has done so, as under a program of the user's own
        rows = cache_rows(config, model, mapping, device, world)
    collectives.bind(world, connect_gpus(config, device, world))

    def fill() -> StepProgram:
        program = make_program(model, mapping, device)
        if checkpoint_dir is None:
            program.fill(random_weights(model, mapping, device))
            return program
        checkpoint = RankCheckpoint(checkpoint_dir, model, mapping)
        weights, fingerprint = checkpoint.load()
        check_shard(checkpoint.path, meta, fingerprint, config)
        program.load(weights)
        return program

    return LoadedRank(world.together("load", fill), members, rows)


def connect_gpus(config: EngineConfig, device: torch.device, world: World) -> Communicator | None:
    """What the ranks' GPUs speak through, when there are several."""
    if device.type == "cpu" or world.size == 1:
        return None
    from tpllm.engine.torch.communicator import Communicator  # which needs a PyTorch with NCCL

    return Communicator(world, device, config.model.hidden_size, getattr(torch, config.model.dtype),
                        config.build.step_tokens)


def example_inputs(config: EngineConfig, device: torch.device, tokens: int, prompts: int, batch: int, rows: int,
                   capacity: int) -> tuple[torch.Tensor, ...]:
    """Inputs of `StepProgram.forward` of the right shapes and dtypes, for export."""
    sizes = (tokens, prompts + 1, batch, batch, rows)
    ints = (torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
    return (*ints, make_cache(config, device, capacity))


def export_step(program: StepProgram, config: EngineConfig, single: bool) -> torch.export.ExportedProgram:
    """The graph of a step: of exactly one token (`single`), or of any number of tokens and sequences."""
    if single:
        shapes, inputs = None, example_inputs(
            config, program.device, 1, 0, 1, 1, config.build.max_batch_size * config.build.max_seq_len)
    else:
        dim = torch.export.Dim
        tokens, rows = dim("tokens", min=2), dim("rows", min=1)
        batch, starts = dim("batch", min=1), dim("starts", min=1)
        capacity = dim("capacity", min=2)
        shapes = ({0: tokens}, {0: starts}, {0: batch}, {0: batch}, {0: rows}, {2: capacity})
        inputs = example_inputs(config, program.device, 9, 2, 4, 5, capacity=32)
    return export(program, inputs, shapes)


def export_decode(program: StepProgram, config: EngineConfig) -> torch.export.ExportedProgram:
    """The graph of `DecodeProgram`."""
    tokens, _, start, length, _, cache = example_inputs(config, program.device, 1, 0, 1, 1, capacity=32)
    shapes = (None, None, None, {2: torch.export.Dim("capacity", min=2)})
    return export(DecodeProgram(program), (tokens, start, length, cache), shapes)


def export(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        exported = torch.export.export(module, inputs, dynamic_shapes=shapes)
    drop_unused(exported)  # verbs that another one's kernel has answered as well
    return exported


def count_collectives(exported: torch.export.ExportedProgram) -> dict[str, int]:
    """How often each collective stands in a graph."""
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    return {op: sum(name.startswith("tpllm.") and op in name for name in names) for op in ("all_reduce", "all_gather")}


def write_rank_engine(out: Path, config: EngineConfig, mapping: Mapping, fingerprint: str,
                      collectives_found: dict[str, int], members: dict[str, bytes]) -> None:
    """Write `rank{N}.engine` into `out`."""
    meta = RankEngine(rank=mapping.rank, tp_size=mapping.tp_size, backend=config.build.backend,
                      config_digest=config.digest(), shard_fingerprint=fingerprint, collectives=collectives_found)
    write_engine(out / engine_file(mapping.rank), meta, members)
