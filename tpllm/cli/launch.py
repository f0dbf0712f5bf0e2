"""`tpllm launch`: a verb on its ranks, through the MPI or Slurm that is there."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tpllm.cli.interactive import wants_lines
from tpllm.devices import driver_inventory
from tpllm.errors import PreflightError, UsageError
from tpllm.launch.estimate import all_reduce_note, read_model, tp_size
from tpllm.launch.hostfile import Host, emit, parse_hosts, place, read_hostfile, slurm_hosts
from tpllm.launch.launchers import SESSION, Job, Launcher, find_launcher
from tpllm.launch.machine import address_towards, cores, gpus, is_this_host
from tpllm.launch.watch import Watch, say
from tpllm.launched import FINISHED_FILE

HELP = "start a verb on its ranks: finds Open MPI, MPICH, Intel MPI or srun"
RANKED = ("build", "run", "doctor", "batch", "eval", "bench")
CRASH_CODES = frozenset((11,))  # with which Hydra ends for a segmentation fault


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--ranks", type=positive, metavar="N",
                        help="ranks (default: what the engine or checkpoint is for, else all slots)")
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts in any dialect: NAME slots=N or NAME:N")
    hosts.add_argument("--host", metavar="A:N,B:N", help="hosts and their slots (default: this host, or Slurm's nodes)")
    parser.add_argument("--nodes", type=positive, metavar="N", help="spread the ranks evenly over N of the hosts")
    parser.add_argument("--mpi", choices=("auto", "openmpi", "mpich", "srun"), default="auto",
                        help="auto: an mpirun if there is one, else srun in a Slurm allocation")
    parser.add_argument("--timeout", type=float, metavar="S", help="end the job after S seconds, with exit code 21")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    parser.add_argument("ranked_verb", metavar="VERB", help=f"one of {', '.join(RANKED)}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="its options, passed on as they are")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return value


def work(args: argparse.Namespace) -> int:
    verb = parse_verb(args.ranked_verb, args.rest)
    if args.timeout is not None and not 0 < args.timeout < float("inf"):
        raise UsageError(f"--timeout {args.timeout:g}: give a number of seconds above 0")
    model, device = read_model(getattr(verb, "engine_dir", None), getattr(verb, "checkpoint_dir", None))
    device = device if device != "auto" else getattr(verb, "device", device)
    interactive = args.ranked_verb == "run" and wants_lines(verb)
    streaming = interactive or getattr(verb, "streaming", False)
    plan = make_plan(args, tp_size(model), on_gpu(device), streaming)
    if args.dry_run:
        name = "tpllm-hostfile"
        command = plan.launcher.command(plan.job, name)
        for line in [f"hostfile {name}:", *plan.hostfile.splitlines()] if plan.hostfile else []:
            print(f"# {line}")
        print(command.shown())
        return 0
    for note in plan.notes:
        say(note)
    if why := slow_all_reduce(plan, device):
        say(all_reduce_note(model, plan.job.ranks, why, plan.on_gpu))
    return start(plan, args.timeout, interactive)


def parse_verb(verb: str, rest: list[str]) -> argparse.Namespace:
    """The verb's own options, so that what is wrong with them is said before any rank starts."""
    from tpllm.cli import VERBS, dashed, make_parser

    if verb not in VERBS:
        raise UsageError(f"no such verb: {verb}; launch starts {', '.join(v for v in RANKED if v in VERBS)}")
    if verb not in RANKED:
        raise UsageError(f"{verb} has no ranks to start; type: tpllm {verb} …")
    return make_parser().parse_args([verb, *dashed(rest)])


def on_gpu(device: str) -> bool:
    return device == "cuda" or (device == "auto" and gpus() > 0)


@dataclass(frozen=True)
class Plan:
    """A job, who starts it, and on which hosts."""

    launcher: Launcher
    job: Job
    names: list[str]  # of all hosts, where they are known
    on_gpu: bool
    notes: list[str]

    @property
    def hostfile(self) -> str:
        """Its content in the launcher's dialect; empty where none is needed."""
        return "" if self.launcher.dialect == "srun" else emit(self.job.hosts, self.launcher.dialect)


def make_plan(args: argparse.Namespace, tp: int | None, gpu: bool, streaming: bool) -> Plan:
    """How many ranks, where, and through which launcher."""
    launcher = find_launcher(args.mpi)
    allocation = slurm_hosts(os.environ)
    given = read_hostfile(args.hostfile) if args.hostfile else parse_hosts(args.host) if args.host else []
    known = given or allocation
    if args.nodes and not known:
        raise UsageError(f"--nodes {args.nodes} needs hosts: give --hostfile FILE or --host A:N,B:N, or type it in a "
                         "Slurm allocation")
    ranks = args.ranks or tp or sum(host.slots for host in known) or (gpus() if gpu else cores())
    room = sum(host.slots for host in given) if given else cores()
    # Several hosts, or GPUs, never get more ranks than they have room for: that is a mistake in the hosts or in -n.
    crowded = ranks > room and not gpu and not args.nodes and (len(given) == 1 or not known)
    hosts = given if crowded or not (given or args.nodes) else place(known, ranks, args.nodes)
    used = hosts or fill(allocation, ranks)
    notes = [f"{ranks} ranks on {room} core(s) or slot(s): they take turns, which is slow"] if crowded else []
    remote = not all(is_this_host(host.name) for host in used)
    job = Job(ranks, [args.ranked_verb, *args.rest], hosts, remote, crowded, streaming)
    return Plan(launcher, job, [host.name for host in used], gpu, notes)


def fill(allocation: list[Host], ranks: int) -> list[Host]:
    """The nodes of an allocation that ranks will be on; all, where Slurm says too little of their slots."""
    return place(allocation, ranks) if ranks <= sum(host.slots for host in allocation) else allocation


def slow_all_reduce(plan: Plan, device: str) -> str:
    """Why all-reduces will take long, as far as it can be known here; empty when they will not."""
    if len(plan.names) > 1:
        return f"{len(plan.names)} hosts"
    seen = driver_inventory()[:plan.job.ranks] if device == "cuda" and not plan.job.remote else []
    alone = [gpu.index for gpu in seen if not {other.index for other in seen} <= {gpu.index, *gpu.peers}]
    return f"GPU {alone[0]} does not reach all others' memory" if alone else ""


def start(plan: Plan, timeout: float | None, interactive: bool) -> int:
    """Run the plan to its end."""
    from tpllm.launch.console import ConsoleServer

    if interactive and os.fstat(0).st_rdev == os.stat(os.devnull).st_rdev:
        raise UsageError("run has no prompts: give --input-text or --input-file, or lines on stdin")
    with scratch(plan.job.remote) as directory, session() as files, contextlib.ExitStack() as stack:
        hostfile, mark = directory / "hostfile", directory / "finished"
        if plan.hostfile:
            hostfile.write_text(plan.hostfile, encoding="utf-8")
        variables: dict[str, str] = {}
        if interactive:
            address = address_towards(plan.names[0]) if plan.job.remote else "127.0.0.1"
            server = ConsoleServer(address, sys.stdin.isatty())
            stack.callback(server.close)
            variables = server.variables
        environment = {**plan.launcher.environment(str(files)), **variables}
        command = plan.launcher.command(plan.job, str(hostfile), {**environment, FINISHED_FILE: str(mark)})
        say(f"$ {command.shown()}")
        crash = CRASH_CODES if plan.launcher.dialect == "mpich" else frozenset[int]()
        return Watch(command.argv, environment, mark, timeout, crash).run()


def scratch(remote: bool) -> contextlib.AbstractContextManager[Path]:
    """A directory that rank 0 sees too: if it may be on another host, one below this directory, which hosts share."""
    return temporary(".tpllm-launch-", os.getcwd() if remote else None)


def session() -> contextlib.AbstractContextManager[Path]:
    """A directory for the launcher's own files, on this host's disk, where the site wants them if it says so."""
    return temporary("tpllm-session-", os.environ.get(SESSION))


@contextlib.contextmanager
def temporary(prefix: str, parent: str | None) -> Iterator[Path]:
    """A directory that is gone in the end."""
    try:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)).resolve()
    except OSError as e:
        raise PreflightError(f"launch needs a directory to write to: {e}") from None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
