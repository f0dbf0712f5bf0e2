"""Starting ranks: hosts, launchers and their dialects, the batch script, and the names of every site's variables."""

from __future__ import annotations

import os
from pathlib import Path

from tpllm.errors import UsageError

# What a site may set in the environment; this is the one place where these have their defaults.
DEFAULTS = {
    "TPLLM_MPIRUN": "",  # the mpirun to use, in place of the one beside this Python or in PATH
    "TPLLM_LAUNCH_ARGS": "",  # more words for mpirun or srun, before the program
    "TPLLM_SSH_ARGS": "-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=5 -o ServerAliveCountMax=3",
    "TPLLM_KEEPALIVE_SECONDS": "10",  # of silence between mpirun and a host before it is probed
    "TPLLM_DRAIN_SECONDS": "30",  # between a SIGTERM to launch, which drains the ranks, and their end
    "TPLLM_ALLREDUCE_US": "50",  # assumed for one small all-reduce between hosts
    "TPLLM_MEMORY_GB_S": "",  # assumed for one rank's memory; empty: 20 for a CPU, 3000 for a GPU
    "TPLLM_SITE": "~/.config/tpllm/site.toml",  # the profile of tpllm sbatch
}

# Set by launch for the ranks.
FINISHED_FILE = "TPLLM_FINISHED_FILE"  # where rank 0 writes its verb's exit code when that has ended in order
CONSOLE = "TPLLM_CONSOLE"  # where rank 0 gets the lines that a user types


def leave_mark(code: int) -> None:
    """Rank 0 tells launch how its verb ended: launchers lose exit codes, and some end with 0 after ranks were lost."""
    if path := os.environ.get(FINISHED_FILE):
        Path(path).write_text(f"{code}\n", encoding="utf-8")


def setting(name: str) -> str:
    """A site's variable, or its default."""
    return os.environ.get(name) or DEFAULTS[name]


def seconds(name: str) -> float:
    """The same where it must be a number that is not negative."""
    text = setting(name)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name}={text!r} is not a number; its default is {DEFAULTS[name]}")
    return value
