"""Which device a rank computes on."""

from __future__ import annotations

import torch

from tpllm.distributed import World
from tpllm.errors import PreflightError


def gpu_index(world: World) -> int | None:
    """This rank's own GPU among those it sees: one a rank, in order; None when there is none for it."""
    count = torch.cuda.device_count()
    # A launcher may show every rank its own GPU only, which then has number 0 for all of them.
    index = 0 if count == 1 else world.local_rank
    return index if index < count else None


def choose_device(name: str, world: World) -> str:
    """What `--device` means in this launch, `cuda` or `cpu`, the same on every rank; collective.

    `auto` is `cuda` for one rank that has a GPU.
    """
    seen = world.allgather((world.host, gpu_index(world)))
    lacking = [host for host, index in seen if index is None]
    if name == "cuda" and lacking:
        raise PreflightError(f"--device cuda: {len(lacking)} of {world.size} rank(s) have no GPU of their own, the "
                             f"first on {lacking[0]}; start one rank a GPU, or use --device cpu")
    if name == "cuda" and world.size > 1:
        raise PreflightError("--device cuda: engines over several GPUs are not built by this version; use one rank, or "
                             "--device cpu")
    return ("cpu" if lacking or world.size > 1 else "cuda") if name == "auto" else name


def find_device(name: str, world: World) -> torch.device:
    """This rank's device for an engine's `--device`, made current."""
    index = None if name == "cpu" else gpu_index(world)
    if index is None:
        if name == "cuda":
            raise PreflightError(f"this engine is for GPUs and rank {world.rank} on {world.host} has none; "
                                 "build one for this machine with --device cpu")
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
