"""A staged check of what a job needs, under the launcher that will run it; each stage has a deadline."""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpllm import devices
from tpllm.devices import Device
from tpllm.distributed import SharedError, World
from tpllm.engine import RAN
from tpllm.engine.base import EngineConfig
from tpllm.errors import MismatchError, PreflightError, TimeOutError
from tpllm.files import digest
from tpllm.launched import memory_limit
from tpllm.runlog import installed_versions, package_version

ALL_REDUCE_BYTES = (8 << 10, 64 << 20)


@dataclass
class Patient:
    """What the stages look at, and what they learn of it for later ones."""

    world: World
    directories: list[Path]
    devices: list[Device] = field(default_factory=list)
    gpu: Device | None = None  # whose memory the weights need, in place of the host's


# A check ends on all ranks alike: it must not raise on one of them between two collective calls.
Check = Callable[[Patient], str]


def check_world_map(patient: Patient) -> str:
    """Who runs where."""
    world = patient.world
    rows = world.allgather((world.rank, world.host, world.local_rank, len(os.sched_getaffinity(0))))
    one_core = any(row[3] == 1 for row in rows)
    bound = "\n    (ranks bound to one core: mpirun --bind-to none frees them)" if one_core else ""
    table = "\n".join(f"    rank {rank} on {host}, local rank {local}, {cores} cores"
                      for rank, host, local, cores in rows)
    return f"{world.size} rank(s) on {len({row[1] for row in rows})} host(s)\n{table}{bound}"


def check_versions(patient: Patient) -> str:
    """The same program everywhere: hosts with different installations fail later, and strangely."""
    mine = installed_versions()
    world = patient.world
    first = world.broadcast(mine)
    if different := [name for name in mine if mine[name] != first[name]]:
        name = different[0]
        raise MismatchError(f"{name} is {mine[name]} on {world.host} (rank {world.rank}) and {first[name]} on rank 0: "
                            f"install the same version on all hosts, or share one environment ({sys.prefix} here)")
    return ", ".join(f"{name} {version}" for name, version in mine.items())


def check_backends(patient: Patient) -> str:
    """What a user of each backend should know; TensorRT's version is looked up without importing it."""
    lines = [f"{name} {ran}" for name, ran in RAN.items()]
    return "\n    ".join(["", *lines, f"TensorRT for CUDA 13: {package_version('tensorrt-cu13')}"])


def check_files(patient: Patient) -> str:
    """The directories named are the same for all ranks."""
    world = patient.world
    configs = [directory / "config.json" for directory in patient.directories]
    found = [digest(path.read_bytes()) if path.is_file() else None for path in configs]
    for path, mine, first in zip(configs, found, world.broadcast(found), strict=True):
        if mine is None or mine != first:
            what = "is not there" if mine is None else "is another file than rank 0's"
            raise PreflightError(f"{path} {what} on {world.host} (rank {world.rank}): put it on a file system that all "
                                 "hosts share, under the same path")
    return ", ".join(map(str, patient.directories)) or "none to look at: give --engine-dir or --checkpoint-dir"


def check_memory(patient: Patient) -> str:
    """Room for the shards of this host's ranks, within the cgroup's or Slurm's limit."""
    world = patient.world
    available, why = memory_limit()
    holder = world.host
    if patient.gpu:
        available, why, holder = patient.gpu.memory, patient.gpu.name, patient.gpu.uuid
    mine = sum(path.stat().st_size for directory in patient.directories
               for path in [directory / f"rank{world.rank}.safetensors"] if path.is_file())
    needed = sum(size for place, size in world.allgather((holder, mine)) if place == holder)
    if needed > available:
        raise PreflightError(f"{world.host} has {available / 2**30:.1f} GiB ({why}), the weights there take "
                             f"{needed / 2**30:.1f} GiB: use more hosts or ranks, or ask Slurm for more (--mem)")
    return f"{available / 2**30:.1f} GiB available ({why}), weights {needed / 2**30:.2f} GiB"


def check_devices(patient: Patient) -> str:
    """One GPU a rank, and no GPU twice."""
    world = patient.world
    patient.devices = world.together("devices", devices.inventory)
    if not any(world.allgather(bool(patient.devices))):
        return "no GPU is visible: engines run on CPU"
    table = devices.assign(world).replace("\n", "\n    ")
    return f"{patient.devices[0].name}, {patient.devices[0].memory / 2**30:.0f} GiB\n    {table}"


def check_peers(patient: Patient) -> str:
    """GPUs of one host should reach each other's memory: the fast all-reduce needs it."""
    if not patient.devices:
        return "no GPUs"
    if len(patient.devices) == 1 and patient.world.local_size > 1:
        return devices.ONE_VISIBLE
    pairs = [(d.index, other) for d in patient.devices for other in d.peers]
    return f"{len(pairs)} of {len(patient.devices) * (len(patient.devices) - 1)} directed pairs"


def check_all_reduce(patient: Patient) -> str:
    """The engines' own all-reduce: its value, then its time."""
    import torch

    from tpllm.engine.torch import collectives

    world = patient.world
    if world.size == 1:
        return "one rank: there is none"
    collectives.bind(world)
    lines = []
    for size in ALL_REDUCE_BYTES:
        # Whole numbers, exact in float32 whatever the order of the sum; every rank and place has another one.
        pattern = torch.arange(size // 4).remainder(97)
        x = pattern.float() + world.rank
        right = torch.equal(collectives.all_reduce(x).long(), world.size * pattern + sum(range(world.size)))
        if wrong := [rank for rank, good in enumerate(world.allgather(right)) if not good]:
            raise PreflightError(f"an all-reduce of {size} bytes gives a wrong sum on rank(s) {wrong}: the network or "
                                 "MPI's transport is at fault; try another one, for example TCP")
        seconds = []
        for _ in range(100 if size < 1 << 20 else 3):
            start = time.perf_counter()
            collectives.all_reduce(x)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        lines.append(f"{size >> 10} KiB: {median * 1e6:.0f} us, {size / median / 1e9:.2f} GB/s")
    return ", ".join(lines)


def check_clocks(patient: Patient) -> str:
    """Hosts' clocks: logs of hosts that disagree cannot be put together."""
    patient.world.barrier()
    times = patient.world.allgather(time.time())
    spread = max(times) - min(times)
    return f"wall clocks within {spread * 1e3:.0f} ms" + (" (more than a second: check NTP)" if spread > 1 else "")


STAGES: tuple[tuple[str, float, Check], ...] = (
    ("world", 30, check_world_map), ("versions", 30, check_versions), ("backends", 30, check_backends),
    ("files", 60, check_files), ("memory", 30, check_memory), ("devices", 60, check_devices),
    ("peer access", 30, check_peers), ("all-reduce", 120, check_all_reduce), ("clocks", 30, check_clocks),
)


def preflight(world: World, engine_dir: Path | None, checkpoint_dir: Path | None) -> None:
    """What every run can afford to check, without a word when all is well; collective.

    Directories that rank 0 does not see are left to the verb, which may be about to make them.
    """
    given = [path for path in (engine_dir, checkpoint_dir) if path is not None]
    patient = Patient(world, world.broadcast([path for path in given if (path / "config.json").is_file()]))
    for name, check in (("versions", check_versions), ("files", check_files)):
        world.together(name, functools.partial(check, patient))
    if engine_dir is None or engine_dir not in patient.directories:
        return
    config = world.together("load", lambda: EngineConfig.load(engine_dir))
    if config.tp_size == world.size:  # else the verb refuses it
        if config.build.device == "cuda":
            world.note(world.together("devices", lambda: devices.assign(world)))
            patient.gpu = devices.choose(devices.inventory(), world.local_rank)
        weights = checkpoint_dir or config.checkpoint_dir  # none where they are random
        patient.directories = [Path(weights)] if weights else []
        world.together("memory", functools.partial(check_memory, patient))


def examine(patient: Patient, as_json: bool) -> int:
    """All stages in order up to the first that fails; returns the exit code, the same on every rank."""
    world, report = patient.world, []
    code = 0
    for number, (name, deadline, check) in enumerate(STAGES, 1):
        if world.is_first and not as_json:
            print(f"doctor: [{number}/{len(STAGES)}] {name} … ", end="", flush=True)
        started = time.perf_counter()
        with Deadline(world, name, deadline):
            try:
                detail, ok = world.together(name, functools.partial(check, patient)), True
            except SharedError as e:
                detail, ok, code = str(e), False, e.exit_code
        report.append({"stage": name, "ok": ok, "seconds": round(time.perf_counter() - started, 3), "detail": detail})
        if world.is_first and not as_json:
            print(detail if ok else f"FAILED\ntpllm: {detail}", flush=True)
        if not ok:
            break
    if world.is_first and as_json:
        print(json.dumps({"ok": code == 0, "stages": report}, indent=2))
    elif world.is_first and not code:
        print("doctor: all is well")
    return code


class Deadline:
    """Ends the job, naming the stage, when a block takes longer than its bound."""

    def __init__(self, world: World, stage: str, seconds: float) -> None:
        self._world, self._stage, self._seconds = world, stage, seconds

    def __enter__(self) -> None:
        self._timer = threading.Timer(self._seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        world = self._world
        print(f"tpllm: rank {world.rank} of {world.size} on {world.host}: stage '{self._stage}' has not ended within "
              f"{self._seconds:g} s; a rank that did not reach it prints no such line", file=sys.stderr)
        self._world.abort(TimeOutError.exit_code)
