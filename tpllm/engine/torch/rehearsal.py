"""What a load launches, launched while the engine is built: its kernels go into the engine, and no load compiles any.

By a process of its own, of a model of two layers, which have the kernels of all: the last one's products are of fewer
rows.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tpllm.distributed import World
from tpllm.engine.base import EngineConfig, StepInput
from tpllm.engine.torch import collectives, communicator
from tpllm.engine.torch.base import export_decode, export_step, make_program
from tpllm.engine.torch.cuda import CudaEngine
from tpllm.engine.torch.exchange import Parts
from tpllm.engine.torch.kernel_files import pack_kernels
from tpllm.mapping import Mapping
from tpllm.models import find_model

LAYERS = 2


def make_kernels(config: EngineConfig, model_file: Path | None, device: torch.device) -> dict[str, bytes]:
    """Members of the engines of all ranks."""
    torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory(prefix="tpllm-") as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch  # of this process, which has not used Triton yet
        rehearse(replace(config, model=replace(config.model, num_hidden_layers=LAYERS)), model_file, device)
        return pack_kernels(Path(scratch))


def rehearse(config: EngineConfig, model_file: Path | None, device: torch.device) -> None:
    """Load an engine and let it step, with each way of summing, as the first rank: all have the same kernels."""
    model = find_model(config.model.architecture, model_file)(config.model)
    program = make_program(model, Mapping(config.tp_size, 0), device)
    for parameter in program.parameters():
        parameter.zero_()
    mixed, one = export_step(program, config, single=False).module(), export_decode(program, config).module()
    for way in ("push", "nccl") if config.tp_size > 1 else ("alone",):
        if config.tp_size > 1:
            stand_in(config, device, way)
        CudaEngine(config, mixed, one, device, config.build.max_seq_len).step(prompt_beside_a_token())
    torch.cuda.synchronize(device)


def stand_in(config: EngineConfig, device: torch.device, way: str) -> None:
    """Let operators take this process for the first rank."""
    alone = first_alone(config, device, way)
    alone.sum_all()
    collectives.bind(World(), alone)


def first_alone(config: EngineConfig, device: torch.device, way: str) -> Alone:
    """The first rank of an engine, alone."""
    return Alone(0, config.tp_size, device, config.model.hidden_size, getattr(torch, config.model.dtype), way)


def prompt_beside_a_token() -> StepInput:
    """Two sequences: one token, and a prompt of two."""
    def ints(*values: int) -> NDArray[np.int32]:
        return np.array(values, np.int32)

    return StepInput(ints(0, 0, 0), ints(0, 1, 3), ints(0, 1), ints(1, 2), ints(0, 2))


class Alone(communicator.Communicator):
    """One rank without the others: what it sends them comes to it in their places."""

    def __init__(self, rank: int, ranks: int, device: torch.device, width: int, dtype: torch.dtype, way: str) -> None:
        from tpllm.engine.torch.kernels.peers import SETS, make_buffers
        from tpllm.engine.torch.kernels.push import push_all_reduce

        self.world, self.device, self.width, self.dtype, self._way = World(), device, width, dtype, way
        self.world.rank, self.world.size = rank, ranks
        self._exchanged, self._most = None, 0
        rows = communicator.push_rows(width, dtype)
        places = torch.empty((SETS, ranks, rows, width), dtype=dtype, device=device)
        self._buffers = make_buffers((places,) * ranks, rank)
        self._ways = {"nccl": torch.clone, "push": lambda x: push_all_reduce(x, self._buffers)}

    def path(self, rows: int) -> communicator.Path:
        return communicator.Path(rows, self._way if rows <= self._buffers.rows else "nccl", 0.0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x] * self.world.size)

    def broadcast(self, x: torch.Tensor) -> None:
        pass

    def _parts(self, rows: int) -> Parts | None:
        return None

    def sum_all(self) -> None:
        """What the ranks begin with, to see which way is the fastest."""
        from tpllm.engine.torch.kernels.gemv import LOADS_EARLY
        from tpllm.engine.torch.kernels.norm import Shares, add_norm

        for rows in (LOADS_EARLY, LOADS_EARLY + 1):
            x = torch.zeros((rows, self.width), dtype=self.dtype, device=self.device)
            self.all_reduce(x)
            self.all_reduce_add_norm(x, x, x[0], 1.0)
            add_norm(x, x, x[0], 1.0, shares=Shares(x, self.world.rank, self.world.size, 0))
