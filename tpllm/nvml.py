"""What NVIDIA's management library tells of the ranks' GPUs: energy, clocks, links. Without it, nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpllm.devices import inventory
from tpllm.distributed import World


def ask(world: World, question: Callable[[Any, Any], Any]) -> list[Any]:
    """Each rank's answer about its own GPU to `question(pynvml, handle)`, None where there is none. Collective."""
    return world.allgather(answer(world.places[world.rank].uuid, question))


def answer(uuid: str | None, question: Callable[[Any, Any], Any]) -> Any:
    if uuid is None:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return question(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:  # this GPU, or this user, is not told
        return None


def joules(world: World) -> float | None:
    """Energy that the ranks' GPUs have used since the driver was loaded; None where any does not tell. Collective."""
    found = ask(world, lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3)
    return None if None in found else float(sum(found))


def clocks(world: World) -> dict[str, list[int | None]] | None:
    """Each rank's clocks in MHz at this moment; None on CPU and without NVML. Collective."""
    def both(nvml: Any, gpu: Any) -> tuple[int, int]:
        return tuple(nvml.nvmlDeviceGetClockInfo(gpu, kind) for kind in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM))

    found = [pair or (None, None) for pair in ask(world, both)]
    if all(sm is None for sm, _ in found):
        return None
    return {"sm_mhz": [sm for sm, _ in found], "memory_mhz": [memory for _, memory in found]}


def topology(world: World) -> dict[str, Any] | None:
    """Each rank's host, GPU and NUMA node, how many peers' memory it reaches, its NVLinks; None on CPU. Collective."""
    if world.places[0].gpu is None:
        return None
    place = world.places[world.rank]
    peers = world.allgather(next((len(gpu.peers) for gpu in inventory() if gpu.uuid == place.uuid), 0))
    return {"hosts": [place.host for place in world.places], "gpus": [place.uuid for place in world.places],
            "numa": [place.numa for place in world.places], "peers": peers, "nvlinks": ask(world, links)}


def links(nvml: Any, gpu: Any) -> int:
    """NVLinks that are up; a GPU refuses to speak of one that it does not have."""
    up = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            up += nvml.nvmlDeviceGetNvLinkState(gpu, link)
        except nvml.NVMLError:
            break
    return up
