"""Hosts on one machine: each has its own name, network link, processes, /dev/shm and temporary directory.

The file system is shared, as on a cluster. A host's first process ends when the pipe from this process closes, and the
kernel then ends all others of that host and removes its network: nothing is left behind, whatever happens here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Done = subprocess.CompletedProcess[str]

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
TOOLS = ("unshare", "nsenter", "ip", "mount", "timeout")
SSH_TOOLS = (*TOOLS, "sshd", "ssh", "ssh-keygen")
NETWORK = "10.77.0"  # inside the hosts' own networks only
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What the first process of a host does: $1 name, $2 hosts file, $3 temporary directory. It holds the host open until
# its input ends, and as it ignores SIGCHLD, the kernel reaps what other processes leave.
BOOT = """set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs "$3"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -m 755 /run/sshd
ip link set lo up
echo ready
exec env --ignore-signal=CHLD cat"""


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def missing(programs: Sequence[str] = TOOLS) -> str | None:
    """Why these hosts cannot be had here, or None."""
    if sys.platform != "linux" or os.geteuid():
        return "hosts of one machine need Linux and root"
    lacking = [program for program in programs if find(program) is None]
    if lacking:
        return f"not on this machine: {', '.join(lacking)} (.ci/run installs them)"
    probe = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c",
             "mount -t tmpfs tmpfs /run && ip link add tp0 type veth peer name tp1 && ip link add tp2 type bridge"]
    done = subprocess.run(["timeout", "-k", "5", "20", *probe], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    return f"namespaces or virtual links are not allowed here: {done.stderr.strip()}" if done.returncode else None


def wait_for(what: str, ready: Callable[[], object], seconds: float, every: float = 0.2) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(every)


@dataclass
class Host:
    name: str
    address: str
    keeper: subprocess.Popen[str]
    pid: int  # of its first process, as seen from outside

    @property
    def pids(self) -> list[int]:
        """Its processes, seen from outside, without the first one and without the dead."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int(entry.name) != self.pid and os.readlink(entry / "ns/pid") == own:
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


class Hosts:
    """Hosts `names`, all on one virtual switch whose links can be counted and cut."""

    def __init__(self, names: Sequence[str]) -> None:
        # The names of sockets have to be short: no deeper path than this.
        self.directory = Path(tempfile.mkdtemp(prefix="tpl-"))
        self.directory.chmod(0o755)
        for name in ("bin", "tmp", "log"):
            (self.directory / name).mkdir()
        self.tmp = self.directory / "tmp"
        self.environment = self._environment()
        self.hosts: dict[str, Host] = {}
        self._children: list[subprocess.Popen[str]] = []
        try:
            self._connect(names)
        except BaseException:
            self.close()
            raise

    def _environment(self) -> dict[str, str]:
        """This process's, without what a launcher or batch system around it may have left there."""
        own = {name: value for name, value in os.environ.items()
               if not name.startswith(("SLURM", "OMPI_", "PMI", "PRTE_", "OPAL_", "MPIR_", "HYDRA_"))}
        path = f"{self.directory / 'bin'}:{Path(sys.executable).parent}:{own.get('PATH', '')}:{SYSTEM_PATH}"
        # The hosts together have fewer cores than they say: a rank that waits must let others run.
        return {**own, "PATH": path, "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1",
                "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "OMPI_MCA_mpi_yield_when_idle": "1"}

    def _connect(self, names: Sequence[str]) -> None:
        table = self.directory / "hosts"
        addresses = {name: f"{NETWORK}.{10 + i}" for i, name in enumerate(names)}
        table.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in addresses.items()),
                         encoding="utf-8")
        self.switch = self._boot("switch", table)
        self._switch("link", "add", "lan0", "type", "bridge")
        self._switch("link", "set", "lan0", "up")
        for name, address in addresses.items():
            keeper = self._boot(name, table)
            pid = first_child(keeper)
            self.hosts[name] = Host(name, address, keeper, pid)
            self._switch("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
            self._switch("link", "set", f"to-{name}", "master", "lan0", "up")
            for command in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                self.on(name, ["ip", *command], timeout=20)

    def _boot(self, name: str, table: Path) -> subprocess.Popen[str]:
        # stderr goes to a file: a pipe that nobody reads could block.
        with (self.directory / "log" / f"boot-{name}").open("w", encoding="utf-8") as log:
            keeper = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", BOOT, "-", name,
                 str(table), str(self.tmp)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment,
                start_new_session=True)
        self._children.append(keeper)
        assert keeper.stdout is not None
        if keeper.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {name} did not start: {self.log(f'boot-{name}')}")
        return keeper

    def _switch(self, *command: str) -> str:
        argv = ["nsenter", "--target", str(first_child(self.switch)), "--net", "timeout", "-k", "5", "20", "ip",
                *command]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def enter(self, host: str, argv: Sequence[str], timeout: float) -> list[str]:
        """The command line that runs `argv` on a host, bounded in time; SIGTERM first, so that mpirun can tidy up."""
        return ["nsenter", "--target", str(self.hosts[host].pid), *NAMESPACES, f"--wd={os.getcwd()}", "--",
                "timeout", "-k", "5", f"{timeout:g}", *argv]

    def start(self, host: str, argv: Sequence[str], log: str, timeout: float = 3600,
              env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Run in the background; the output goes to two files, as what is left of a job may hold them open."""
        with (self.directory / "log" / log).open("w", encoding="utf-8") as out, \
                (self.directory / "log" / f"{log}.err").open("w", encoding="utf-8") as err:
            child = subprocess.Popen(self.enter(host, argv, timeout), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                     text=True, env={**self.environment, **(env or {})}, start_new_session=True)
        self._children.append(child)
        return child

    def on(self, host: str, argv: Sequence[str], timeout: float = 120, env: dict[str, str] | None = None,
           check: bool = True) -> Done:
        """Run as if logged in there, in this directory; exit code 124 says that it ran out of time."""
        log = f"run-{len(self._children)}"
        code = self.start(host, argv, log, timeout, env).wait(timeout + 30)
        done = Done(list(argv), code, self.log(log), self.log(f"{log}.err"))
        assert not (check and code), f"{host}: {argv}: exit code {code}\n{done.stdout}\n{done.stderr}"
        return done

    def log(self, name: str) -> str:
        return (self.directory / "log" / name).read_text(encoding="utf-8", errors="replace")

    def traffic(self, host: str) -> tuple[int, int]:
        """Bytes that the host has sent and received, the latter as counted at the switch."""
        [link] = json.loads(self._switch("-s", "-j", "link", "show", "dev", f"to-{host}"))
        return int(link["stats64"]["rx"]["bytes"]), int(link["stats64"]["tx"]["bytes"])

    def cut(self, host: str) -> None:
        self._switch("link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        self._switch("link", "set", f"to-{host}", "up")

    def processes(self, *hosts: str, naming: str = "") -> list[str]:
        """Command lines of the processes of these hosts (all of them by default) that hold the word `naming`."""
        found = []
        for host in hosts or self.hosts:
            for pid in self.hosts[host].pids:
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                line = " ".join(words).strip()  # empty for the dead
                if line and naming in line:
                    found.append(f"{host} {pid}: {line}")
        return found

    def close(self) -> None:
        """End all hosts, and with them all that runs there."""
        for child in reversed(self._children):
            if child.stdin:
                child.stdin.close()
        for child in self._children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout:
                child.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def first_child(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8"))


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def add_ssh(hosts: Hosts) -> None:
    """An sshd on every host, and an `ssh` first in PATH that knows the way: launchers need no option."""
    home, ssh = hosts.directory / "ssh", find("ssh")
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["timeout", "20", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f",
                        str(home / name)], check=True, stdin=subprocess.DEVNULL)
    public = (home / "host.pub").read_text(encoding="utf-8").split()[:2]
    known = write(home / "known_hosts", f"{NETWORK}.*,{','.join(hosts.hosts)} {' '.join(public)}\n")
    server = write(home / "sshd_config", f"""Port 22
HostKey {home}/host
AuthorizedKeysFile {home}/user.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
PrintMotd no
MaxStartups 100
SetEnv TMPDIR={hosts.tmp}
""")
    client = write(home / "ssh_config", f"""Host *
  User root
  IdentityFile {home}/user
  IdentitiesOnly yes
  UserKnownHostsFile {known}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 3
  LogLevel ERROR
""")
    write(hosts.directory / "bin" / "ssh", f'#!/bin/sh\nexec {ssh} -F {client} "$@"\n', 0o755)
    sshd = find("sshd") or "sshd"
    for name in hosts.hosts:
        hosts.start(name, [sshd, "-D", "-e", "-f", str(server)], f"sshd-{name}")
    first = next(iter(hosts.hosts))
    for name in hosts.hosts:

        def answers(name: str = name) -> bool:
            return hosts.on(first, ["ssh", name, "hostname"], timeout=10, check=False).stdout.strip() == name

        try:
            wait_for(f"sshd of {name}", answers, 30)
        except TimeoutError as e:
            raise RuntimeError(f"{e}\n{hosts.log(f'sshd-{name}.err')}") from None


@contextmanager
def hosts_lab(count: int = 2) -> Iterator[Hosts]:
    """Hosts h0, h1, … that reach each other by ssh."""
    hosts = Hosts([f"h{i}" for i in range(count)])
    try:
        add_ssh(hosts)
        yield hosts
    finally:
        hosts.close()
