"""The Slurm batch script of any verb: its options, the site's profile of them, and its text."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tpllm.errors import PreflightError, UsageError
from tpllm.launch.machine import program
from tpllm.settings import setting

MAX_REQUEUES = 10  # a job that is interrupted more often than this makes no progress
SIGNAL = re.compile(r"(?:[BR]{1,2}:)?([A-Z][A-Z0-9]*|[0-9]+)(?:@[0-9]+)?")


def option(kind: type, default: Any, text: str) -> Any:
    """A field with what argparse and the profile need to know of it."""
    return field(default=default, metadata={"kind": kind, "help": text})


@dataclass(frozen=True)
class BatchOptions:
    """What a batch script can be told; a field's name is the option's and, in a profile, the key."""

    nodes: int = option(int, 1, "hosts")
    ntasks_per_node: int | None = option(int, None, "ranks a host (default: GPUs a host, else the model's over nodes)")
    gpus_per_node: int | None = option(int, None, "GPUs a host (default: none are asked for)")
    cpus_per_task: int | None = option(int, None, "cores a rank (default: the site's)")
    mem: str = option(str, "0", "memory a host; 0 is all of it")
    time: str = option(str, "01:00:00", "time limit")
    partition: str | None = option(str, None, "Slurm's partition (default: the site's)")
    account: str | None = option(str, None, "Slurm's account (default: the site's)")
    qos: str | None = option(str, None, "Slurm's quality of service (default: the site's)")
    constraint: str | None = option(str, None, "features that hosts must have")
    array: str | None = option(str, None, "task numbers of an array job, such as 0-3; the verb's options may hold "
                                          "'$SLURM_ARRAY_TASK_ID'")
    requeue: bool = option(bool, False, "start again after a preemption, and when the verb ends with 75 (resumable)")
    signal: str = option(str, "USR1@120", "warn the job so many seconds before its time limit; its ranks drain then")
    container: str | None = option(str, None, "image for the ranks: apptainer's for FILE.sif, else pyxis's")
    container_mounts: str | None = option(str, None, "FROM:TO,… (default: the directory of submission)")
    launcher: str | None = option(str, None, "mpirun or srun (default: mpirun; srun with --container)")
    job_name: str | None = option(str, None, "(default: tpllm-VERB)")
    output: str | None = option(str, None, "(default: logs/%x-%j.out, of arrays logs/%x-%A_%a.out)")
    setup: list[str] | None = field(default=None, metadata={
        "kind": list, "help": "shell lines that go first, such as 'module load openmpi'"})
    directives: list[str] | None = field(default=None, metadata={
        "kind": list, "help": "more words for #SBATCH, a line each"})

    def __post_init__(self) -> None:
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        if self.launcher not in (None, "mpirun", "srun"):
            raise UsageError(f"--launcher {self.launcher}: it is mpirun or srun")
        if self.container and self.launcher == "mpirun":
            raise UsageError("--container goes with --launcher srun: an mpirun cannot start ranks in containers")
        if not SIGNAL.fullmatch(self.signal):
            raise UsageError(f"--signal {self.signal}: expected NAME@SECONDS, as in USR1@120")


def check_value(f: Field[Any], value: Any) -> None:
    """Refuse a value of the wrong type, or one that would become another line of the script."""
    name, kind = f.name.replace("_", "-"), f.metadata["kind"]
    if value is None and f.default is None:
        return
    words = {int: "a whole number", bool: "true or false", list: "a list of strings", str: "a string"}[kind]
    texts = value if kind is list else [value] if kind is str else []
    if type(value) is not kind or any(not isinstance(text, str) for text in texts):
        raise UsageError(f"{name} is {value!r}; it must be {words}")
    if kind is int and value < 1:
        raise UsageError(f"{name} is {value}; it starts at 1")
    if bad := [text for text in texts if "\n" in text or "\r" in text]:
        raise UsageError(f"{name} is {bad[0]!r}; it must be one line")


def read_profile(given: Path | None) -> dict[str, Any]:
    """The site's defaults; empty when no file was named and the usual one is not there."""
    path = given or Path(setting("TPLLM_SITE")).expanduser()
    if not path.is_file():
        if given:
            raise UsageError(f"no such --profile: {path}")
        return {}
    data = load_toml(path)
    known = [f.name.replace("_", "-") for f in fields(BatchOptions)]
    values = {}
    for key, value in data.items():
        if key.replace("_", "-") not in known:
            raise UsageError(f"{path}: unknown key {key!r}; known are {', '.join(known)}")
        values[key.replace("-", "_")] = value
    try:
        BatchOptions(**values)
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None
    return values


def load_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise PreflightError(f"reading {path} needs Python 3.11, or on 3.10: pip install tomli") from None
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not TOML: {e}") from None
    return data


def with_tasks(options: BatchOptions, tp: int | None) -> BatchOptions:
    """`ntasks_per_node` filled in: the GPUs of a host, else the model's ranks spread over the nodes."""
    if options.ntasks_per_node:
        return options
    if not options.gpus_per_node and tp and tp % options.nodes:
        raise UsageError(f"the model is for {tp} ranks, which --nodes {options.nodes} cannot share evenly")
    return replace(options, ntasks_per_node=options.gpus_per_node or max(1, (tp or 1) // options.nodes))


def render(options: BatchOptions, verb: str, rest: list[str], ranked: bool) -> str:
    """The script's text."""
    # B: sends the warning to the script, which passes it on. Without it Slurm would signal mpirun's daemons, which end.
    signal = options.signal if ":" in options.signal else f"B:{options.signal}"
    match = SIGNAL.fullmatch(options.signal)
    assert match
    lines = ["#!/usr/bin/env bash", *directives(options, verb, signal),
             "# Submit it from a directory that all hosts see; the log's directory must exist.", ""]
    lines += [*options.setup, ""] if options.setup else []
    lines += ["set -euo pipefail", 'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}"']
    lines += ["# Slurm's SIGKILL comes 30 s after its SIGTERM: be gone by then.",
              "export TPLLM_DRAIN_SECONDS=${TPLLM_DRAIN_SECONDS:-20}", ""]
    lines += [TRAPS.format(signal=match[1]), command(options, verb, rest, ranked) + " &", WAIT]
    lines += [REQUEUE.format(count=MAX_REQUEUES)] if options.requeue else []
    return "\n".join([*lines, 'exit "$code"', ""])


def directives(options: BatchOptions, verb: str, signal: str) -> list[str]:
    """The #SBATCH lines."""
    output = options.output or ("logs/%x-%A_%a.out" if options.array else "logs/%x-%j.out")
    values = {"job-name": options.job_name or f"tpllm-{verb}"}
    for name in ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "mem", "time", "partition", "account",
                 "qos", "constraint", "array"):
        values[name.replace("_", "-")] = getattr(options, name)
    words = [f"--{name}={shlex.quote(str(value))}" for name, value in values.items() if value is not None]
    words += [f"--output={shlex.quote(output)}", "--open-mode=append", f"--signal={signal}"]
    words += ["--requeue" if options.requeue else "--no-requeue", *(options.directives or [])]
    return [f"#SBATCH {word}" for word in words]


def command(options: BatchOptions, verb: str, rest: list[str], ranked: bool) -> str:
    """The verb's own line: through launch, or in a container, where there is none, through srun itself."""
    arguments = [verb, *(shell_word(word) for word in rest)]
    if not options.container:
        launch = ["launch", *(["--mpi", "srun"] if options.launcher == "srun" else [])] if ranked else []
        return " ".join([*map(shlex.quote, program()), *launch, *arguments])
    words = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", *(["--mpi=pmix"] if ranked else ["--ntasks=1"])]
    mounts = shlex.quote(options.container_mounts) if options.container_mounts else '"$PWD:$PWD"'
    image = shlex.quote(options.container)
    if options.container.endswith(".sif"):
        words += ["apptainer", "exec", *(["--nv"] if options.gpus_per_node else []), "--bind", mounts, "--pwd",
                  '"$PWD"', image]
    else:
        words += [f"--container-image={image}", f"--container-mounts={mounts}", '--container-workdir="$PWD"']
    return " ".join([*words, "tpllm", *arguments])


def shell_word(word: str) -> str:
    """Quoted, but for Slurm's own variables, which the job fills in."""
    if not re.search(r"\$\{?SLURM_[A-Z_]+", word):
        return shlex.quote(word)
    escaped = re.sub(r'([\\"`]|\$(?!\{?SLURM_[A-Z_]+))', r"\\\1", word)
    return f'"{escaped}"'


TRAPS = """\
pid="" ended=0
trap '[ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null || :' {signal}
trap 'ended=1; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null || :' TERM"""

WAIT = """\
pid=$!
code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the job
    wait "$pid" || :
done
((code <= 128)) || { code=0; wait "$pid" || code=$?; }"""

REQUEUE = """\
if ((code == 75 && !ended && ${{SLURM_RESTART_COUNT:-0}} < {count})); then
    job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_}}${{SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}}
    scontrol requeue "$job" || echo "job $job cannot be requeued" >&2
fi"""
