"""Which device a rank computes on."""

from __future__ import annotations

import torch

from tpllm.devices import assign, choose, inventory
from tpllm.distributed import World
from tpllm.errors import PreflightError


def choose_device(name: str, world: World) -> str:
    """What `--device` means in this launch, `cuda` or `cpu`, the same on every rank; collective.

    `auto` is `cuda` where every rank's host has one. Every rank is given its own then.
    """
    if name == "cpu":
        return "cpu"
    if not all(world.allgather(torch.cuda.is_available())):
        if name == "cuda":
            raise PreflightError(f"--device cuda: torch {torch.__version__} finds no GPU on every rank's host; use "
                                 "--device cpu, or install torch for CUDA on hosts with GPUs")
        return "cpu"
    world.note(assign(world))
    return "cuda"


def takes_one_process(device: torch.device) -> bool:
    """Whether a process beside this one is refused."""
    return device.type == "cuda" and any(own.index == device.index and own.exclusive for own in inventory())


def find_device(name: str, world: World) -> torch.device:
    """This rank's device for an engine's `--device`, made current."""
    own = choose(inventory(), world.local_rank) if name != "cpu" and torch.cuda.is_available() else None
    if own is None:
        if name == "cuda":
            raise PreflightError(f"this engine is for GPUs and rank {world.rank} on {world.host} has none that torch "
                                 f"{torch.__version__} can use; build one for this machine with --device cpu")
        return torch.device("cpu")
    torch.cuda.set_device(own.index)
    return torch.device("cuda", own.index)
