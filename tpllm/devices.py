"""The GPUs that a rank sees, and its own among them: the one place that chooses."""

from __future__ import annotations

import functools
import uuid
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tpllm.distributed import Place, World
from tpllm.errors import PreflightError

ONE_VISIBLE = ("each rank sees one GPU only, which takes peer access away: with Slurm, use --gpus-per-node in place of "
               "--gpus-per-task")


@dataclass(frozen=True)
class Device:
    """One GPU: its number in this process, name, UUID, memory in bytes, the numbers of the peers it reaches, and its
    NUMA node where that is known.

    An exclusive one refuses a second process: `nvidia-smi -c EXCLUSIVE_PROCESS`.
    """

    index: int
    name: str
    uuid: str
    memory: int
    peers: tuple[int, ...]
    numa: int | None = None
    exclusive: bool = False


@functools.cache
def inventory() -> list[Device]:
    """All GPUs visible to this process: as the driver tells, or torch where cuda-python is not installed."""
    return driver_inventory() or torch_inventory()


def driver_inventory() -> list[Device]:
    """The same, without torch; none where cuda-python or the driver is not installed."""
    try:
        from cuda.bindings import driver

        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS:
            return []
    except (ImportError, RuntimeError):  # the latter where there is no driver's library
        return []
    handles = [_ask(driver, driver.cuDeviceGet(i)) for i in range(_ask(driver, driver.cuDeviceGetCount()))]
    return [Device(
        index=i, name=_ask(driver, driver.cuDeviceGetName(80, device)).split(b"\0")[0].decode(),
        uuid=f"GPU-{uuid.UUID(bytes=bytes(_ask(driver, driver.cuDeviceGetUuid(device)).bytes))}",
        memory=_ask(driver, driver.cuDeviceTotalMem(device)),
        peers=tuple(j for j, other in enumerate(handles)
                    if j != i and _ask(driver, driver.cuDeviceCanAccessPeer(device, other))),
        numa=numa_node(_ask(driver, driver.cuDeviceGetPCIBusId(16, device)).split(b"\0")[0].decode()),
        exclusive=_ask(driver, driver.cuDeviceGetAttribute(
            driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_MODE,
            device)) == driver.CUcomputemode.CU_COMPUTEMODE_EXCLUSIVE_PROCESS,
    ) for i, device in enumerate(handles)]


def _ask(driver: Any, answer: tuple[Any, ...]) -> Any:
    """A driver call's value, refused when the call failed."""
    if answer[0] != driver.CUresult.CUDA_SUCCESS:
        raise PreflightError(f"the CUDA driver answers {answer[0].name}; `nvidia-smi` shows whether it is well")
    return answer[1]


def torch_inventory() -> list[Device]:
    import torch.cuda as cuda

    everyone = range(cuda.device_count())
    found = [cuda.get_device_properties(i) for i in everyone]
    return [Device(
        index=i, name=p.name, uuid=f"GPU-{p.uuid}", memory=p.total_memory,
        peers=tuple(j for j in everyone if j != i and cuda.can_device_access_peer(i, j)),
    ) for i, p in enumerate(found)]


def numa_node(address: str) -> int | None:
    """Of a PCI device `domain:bus:device.function`; None where the kernel does not say."""
    try:
        node = int(Path("/sys/bus/pci/devices", address.lower(), "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def choose(devices: list[Device], local_rank: int) -> Device | None:
    """The local rank's own device: the only visible one, or its number among several; None when there is none."""
    if len(devices) == 1:
        return devices[0]
    return devices[local_rank] if local_rank < len(devices) else None


def assign(world: World) -> str:
    """Give every rank a GPU of its own in `world.places`; collective, and only once a run.

    Returns the map to show, empty when there was one already. Raises a `PreflightError`, on all ranks alike, where a
    rank has no GPU or shares one.
    """
    if world.places[0].gpu is not None:
        return ""
    visible = world.together("devices", inventory)
    own = choose(visible, world.local_rank)
    mine = Place(world.rank, world.host, *((own.index, own.uuid, own.numa) if own else ()))
    rows = world.allgather((mine, len(visible), world.local_size))
    holders: dict[str | None, int] = {}
    for place, count, ranks in rows:
        if place.gpu is None:
            raise PreflightError(f"rank {place.rank} has no GPU of its own, {place.host} has {count} for {ranks} "
                                 "rank(s): start one rank a GPU, or build and run with --device cpu")
        if (first := holders.setdefault(place.uuid, place.rank)) != place.rank:
            raise PreflightError(f"ranks {first} and {place.rank} both have {place.uuid} on {place.host}: start as "
                                 "many ranks as GPUs, and let each see all of its host's (--gpus-per-node)")
    world.places = [place for place, _, _ in rows]
    table = [[f.name for f in fields(Place)], *map(astuple, world.places)]
    lines = [" ".join("-" if word is None else str(word) for word in row) for row in table]
    return "\n".join(lines + [ONE_VISIBLE] * any(count == 1 < ranks for _, count, ranks in rows))
