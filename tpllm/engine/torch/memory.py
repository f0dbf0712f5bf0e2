"""What an engine takes of a GPU's memory, foreseen before any of it is allocated."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass

import torch

from tpllm.distributed import World
from tpllm.engine.base import EngineConfig
from tpllm.errors import OutOfMemory
from tpllm.mapping import Mapping
from tpllm.models.base import Model

SPARE_ROWS = 256  # of the cache, for the padding of steps
SPARE = 2 << 30  # bytes for CUDA graphs, the libraries' own buffers and the gaps between allocations


@dataclass(frozen=True)
class Plan:
    """One rank's bytes; `row` is what a token's keys and values take in all layers."""

    weights: int
    workspace: int
    row: int

    def rows(self, config: EngineConfig, free: int) -> int:
        """Rows of the cache that fit: as many as the engine is built for, or fewer; refused when one sequence has no
        room."""
        build = config.build
        most = (free - self.weights - self.workspace) // self.row - SPARE_ROWS
        if most < build.max_seq_len:
            shorter = f"build with --max-seq-len {most} or less" if most > 0 else "there is no room for any sequence"
            raise OutOfMemory(
                f"{self}; the GPU has {gigabytes(free)} free, too little for one sequence of --max-seq-len "
                f"{build.max_seq_len} ({gigabytes(build.max_seq_len * self.row)}): {shorter}, or split the model over "
                f"more ranks than {config.tp_size}")
        return min(build.max_batch_size * build.max_seq_len, most)

    def __str__(self) -> str:
        return f"a rank takes {gigabytes(self.weights)} of weights and {gigabytes(self.workspace)} of workspace"


def plan_memory(config: EngineConfig, model: Model, mapping: Mapping) -> Plan:
    """What one rank of an engine takes."""
    shape = config.model
    local, size = shape.local(config.tp_size), getattr(torch, shape.dtype).itemsize
    weights = sum(getattr(torch, dtype).itemsize * math.prod(dims)
                  for dtype, dims in model.rank_tensors(mapping).values())
    inner = shape.intermediate_size // config.tp_size
    heads = (local.num_heads + 2 * local.num_kv_heads) * shape.head_size
    # The widest moment of a full step, of several ranks' once more in CUDA graphs, what the ranks write into each
    # other's memory, and logits in float32 before and after they are gathered.
    token = size * (8 * shape.hidden_size + 4 * inner + 2 * heads)
    if config.tp_size > 1:
        token = 2 * (token + size * shape.hidden_size)
    workspace = SPARE + config.build.step_tokens * token + config.build.step_rows * 10 * shape.vocab_size
    row = 2 * shape.num_hidden_layers * local.num_kv_heads * shape.head_size * size
    return Plan(weights, workspace, row)


def cache_rows(config: EngineConfig, model: Model, mapping: Mapping, device: torch.device, world: World) -> int:
    """Rows of the cache on every rank, printed with the rest of the plan; collective."""
    def fitting() -> tuple[Plan, int, int]:
        plan = plan_memory(config, model, mapping)
        gc.collect()  # an engine that nobody has any more is in cycles
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        return plan, free, plan.rows(config, free)

    plan, free, mine = world.together("load", fitting)
    rows = min(world.allgather(mine))
    wanted = config.build.max_batch_size * config.build.max_seq_len
    fewer = "" if rows == wanted else f" of {wanted} (sequences will wait for room)"
    world.note(f"memory: {plan}, {gigabytes(rows * plan.row)} of cache for {rows} tokens{fewer}; "
               f"{gigabytes(free)} are free")
    return rows


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
