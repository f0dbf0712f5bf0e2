"""Several ranks on one GPU, for tests on a machine that has no more.

Results are those of ranks with a GPU each, times are not: a rank that waits for the others has the whole GPU until the
driver takes it away.
"""

import os
from dataclasses import replace

import torch

from tpllm import devices
from tpllm.distributed import World
from tpllm.engine.torch import communicator, device


def share(world: World) -> None:
    """From now on every local rank has the first GPU, reaches the others' memory, and times nothing twice."""
    # NCCL refuses a GPU that it has seen on the same host.
    os.environ |= {"NCCL_HOSTID": f"rank{world.rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1",
                   "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    [own, *_], free = devices.inventory(), torch.cuda.mem_get_info

    def inventory() -> list[devices.Device]:
        return [replace(own, uuid=f"{own.uuid}-{rank}") for rank in range(world.local_size)]

    def part_of_memory(of: torch.device | None = None) -> tuple[int, int]:
        left, total = free(of)
        return left // (2 * world.local_size), total

    devices.inventory = inventory
    device.inventory = inventory  # type: ignore[attr-defined]
    communicator.reaches_peers = lambda world: True
    communicator.REPEATS = communicator.PER_GRAPH = 1
    torch.cuda.mem_get_info = part_of_memory
