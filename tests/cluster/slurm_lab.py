"""A real Slurm on one machine: slurmctld and munged on host `login`, a slurmd with made-up GPUs on each other host."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.hosts_lab import TOOLS, Hosts, find, missing, wait_for, write

SLURM_TOOLS = (*TOOLS, "slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "squeue", "scontrol", "sinfo")
LOGIN = "login"
# The job ended, or Slurm still tidies up after it.
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def slurm_missing() -> str | None:
    """Why this Slurm cannot be had here, or None."""
    reason = missing(SLURM_TOOLS)
    # srun's plugin opens the library by its unversioned name, which is in the development package.
    plain = [Path(d) for d in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")]
    if reason is None and not any((d / "libpmix.so").exists() or (d / "pmix2/lib/libpmix.so").exists() for d in plain):
        reason = "srun --mpi=pmix needs libpmix.so (Debian: libpmix-dev)"
    return reason


@dataclass(frozen=True)
class Job:
    """What became of a job, or of one task of an array job."""

    id: str
    task: str | None
    state: str
    code: int
    output: str


class Slurm:
    """Commands of a user at the login host."""

    def __init__(self, hosts: Hosts, nodes: Sequence[str], cpus: int, gpus: int) -> None:
        self.hosts, self.nodes = hosts, list(nodes)
        self.home = hosts.directory / "slurm"
        for name in ("state", "munge", "gpu", "out"):
            (self.home / name).mkdir(parents=True)
        hosts.environment["SLURM_CONF"] = str(self._configure(cpus, gpus))
        self._start()

    def _configure(self, cpus: int, gpus: int) -> Path:
        home, nodes = self.home, ",".join(self.nodes)
        # slurmd wants a device; the digits at the end become the numbers in CUDA_VISIBLE_DEVICES.
        for i in range(gpus):
            (home / "gpu" / f"fake{i}").symlink_to("/dev/null")
        devices = ",".join(str(home / "gpu" / f"fake{i}") for i in range(gpus))
        write(home / "gres.conf", f"NodeName={nodes} Name=gpu File={devices}\n" if gpus else "")
        write(home / "cgroup.conf", "CgroupPlugin=cgroup/v1\n")  # read, though no plugin here uses it
        addresses = ",".join(self.hosts.hosts[name].address for name in self.nodes)
        return write(home / "slurm.conf", f"""ClusterName=lab
SlurmctldHost={LOGIN}({self.hosts.hosts[LOGIN].address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge/socket
StateSaveLocation={home}/state
SlurmdSpoolDir={self.hosts.tmp}/spool
TmpFS={self.hosts.tmp}
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={self.hosts.tmp}/slurmd.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=5
InactiveLimit=0
MinJobAge=3600
GresTypes=gpu
NodeName={nodes} NodeAddr={addresses} CPUs={cpus} RealMemory=1000 {f"Gres=gpu:{gpus}" if gpus else ""} State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
""")

    def _start(self) -> None:
        munge, login = self.home / "munge", LOGIN
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        self.hosts.start(login, [find("munged") or "munged", "--foreground", f"--key-file={munge}/key",
                                 f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
                                 f"--seed-file={munge}/seed"], "munged")
        try:
            wait_for("munged", (munge / "socket").exists, 20)
            self.hosts.start(login, [find("slurmctld") or "slurmctld", "-D", "-i"], "slurmctld")
            for node in self.nodes:
                self.hosts.start(node, [find("slurmd") or "slurmd", "-D"], node)
            wait_for("idle nodes", lambda: self.idle() == len(self.nodes), 60)
        except TimeoutError as e:
            logs = [self.hosts.log(f"{name}.err")[-1500:] for name in ("munged", "slurmctld", *self.nodes)]
            raise RuntimeError("\n".join([str(e), *logs])) from None

    def idle(self) -> int:
        done = self.hosts.on(LOGIN, ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], timeout=10, check=False)
        return len(set(done.stdout.split()))

    def run(self, argv: Sequence[str], timeout: float = 60, check: bool = True) -> str:
        return self.hosts.on(LOGIN, argv, timeout, check=check).stdout

    def submit(self, script: str, *options: str) -> str:
        """`sbatch` of this text; the job's number."""
        number = len(list(self.home.glob("*.sh")))
        path = write(self.home / f"job{number}.sh", script, 0o755)
        output = str(self.home / "out" / "%A.%a")
        return self.run(["sbatch", "--parsable", "-o", output, "-e", output, *options, str(path)]).strip()

    def records(self, job: str) -> list[dict[str, str]]:
        """`scontrol show job`: one record, or one for each task of an array job."""
        printed = self.run(["scontrol", "-o", "show", "job", job], timeout=20, check=False)
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in printed.splitlines() if "JobState=" in line]

    def wait(self, job: str, seconds: float) -> list[Job]:
        """The job, or the tasks of an array job, once nothing of it runs any more; cancelled when the time is over."""
        end = time.monotonic() + seconds
        while True:
            records = self.records(job)
            if records and all(record["JobState"] in OVER for record in records):
                return sorted((self.result(record) for record in records), key=lambda j: int(j.task or 0))
            if time.monotonic() > end:
                self.run(["scancel", job], check=False)
                raise TimeoutError(f"job {job}, {seconds:g} s: {records}\n" + "\n".join(self.outputs(job)))
            time.sleep(0.5)

    def outputs(self, job: str) -> list[str]:
        return [path.read_text(encoding="utf-8", errors="replace") for path in (self.home / "out").glob(f"{job}.*")]

    def result(self, record: dict[str, str]) -> Job:
        path = Path(record["StdOut"])
        code, _, signal = record["ExitCode"].partition(":")
        return Job(record["JobId"], record.get("ArrayTaskId"), record["JobState"], int(code) or int(signal or 0),
                   path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")

    def batch(self, script: str, *options: str, seconds: float = 300) -> list[Job]:
        """Submit and wait."""
        return self.wait(self.submit(script, *options), seconds)


@contextmanager
def slurm_lab(nodes: int = 2, cpus: int = 4, gpus: int = 2) -> Iterator[Slurm]:
    """Slurm with nodes node0, node1, …"""
    names = [f"node{i}" for i in range(nodes)]
    hosts = Hosts([LOGIN, *names])
    try:
        yield Slurm(hosts, names, cpus, gpus)
    finally:
        hosts.close()
