"""The GPUs that this process sees, asked of the driver through cuda-python; none where that is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpllm.errors import PreflightError


@dataclass(frozen=True)
class Device:
    """One GPU: its number in this process, name, UUID, memory in bytes, and the numbers of the peers it reaches."""

    index: int
    name: str
    uuid: str
    memory: int
    peers: tuple[int, ...]


def inventory() -> list[Device]:
    """All GPUs visible to this process."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return []
    if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS:
        return []
    handles = [_ask(driver, driver.cuDeviceGet(i)) for i in range(_ask(driver, driver.cuDeviceGetCount()))]
    return [Device(
        index=i, name=_ask(driver, driver.cuDeviceGetName(80, device)).split(b"\0")[0].decode(),
        uuid="GPU-" + bytes(_ask(driver, driver.cuDeviceGetUuid(device)).bytes).hex(),
        memory=_ask(driver, driver.cuDeviceTotalMem(device)),
        peers=tuple(j for j, other in enumerate(handles)
                    if j != i and _ask(driver, driver.cuDeviceCanAccessPeer(device, other))),
    ) for i, device in enumerate(handles)]


def _ask(driver: Any, answer: tuple[Any, ...]) -> Any:
    """A driver call's value, refused when the call failed."""
    if answer[0] != driver.CUresult.CUDA_SUCCESS:
        raise PreflightError(f"the CUDA driver answers {answer[0].name}; `nvidia-smi` shows whether it is well")
    return answer[1]


def choose(devices: list[Device], local_rank: int, local_size: int) -> Device | None:
    """The local rank's own device: its number among several, or the only visible one; None without GPUs."""
    if not devices:
        return None
    if len(devices) == 1:
        return devices[0]
    if len(devices) < local_size:
        raise PreflightError(f"{local_size} ranks on this host and {len(devices)} GPUs: start as many ranks on a host "
                             "as it has GPUs")
    return devices[local_rank]
