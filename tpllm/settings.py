"""What a site may set in the environment: the one place where these variables have their defaults."""

from __future__ import annotations

import os

from tpllm.errors import UsageError

DEFAULTS = {
    "TPLLM_HEARTBEAT": "30",  # seconds of a rank's silence that end the job; 0: none do
    "TPLLM_LOG_DIR": "logs",  # of every run: a log for each rank and a record
    "TPLLM_CACHE": "~/.cache/tpllm",  # of engines made by tpllm run from weights
    "TPLLM_MPIRUN": "",  # the mpirun to use, in place of the one beside this Python or in PATH
    "TPLLM_LAUNCH_ARGS": "",  # more words for mpirun or srun, before the program
    "TPLLM_SSH_ARGS": "-o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=5 -o ServerAliveCountMax=3",
    "TPLLM_KEEPALIVE_SECONDS": "10",  # of silence between mpirun and a host before it is probed
    "TPLLM_DRAIN_SECONDS": "30",  # between a SIGTERM to launch, which drains the ranks, and their end
    "TPLLM_ALLREDUCE_US": "50",  # assumed for one small all-reduce between hosts, or GPUs without peer access
    "TPLLM_ALL_REDUCE": "auto",  # push, two-shot or nccl: the only path between GPUs, in place of the fastest
    "TPLLM_TENSORRT_ATTENTION": "fused",  # or primitive: matrix products and a softmax in place of TensorRT's layer
    "TPLLM_TENSORRT_CUDA_GRAPHS": "0",  # 1: decode of TensorRT engines replays CUDA graphs
    "TPLLM_MEMORY_GB_S": "",  # assumed for one rank's memory; empty: 20 for a CPU, 3000 for a GPU
    "TPLLM_SITE": "~/.config/tpllm/site.toml",  # the profile of tpllm sbatch
}


def setting(name: str) -> str:
    """A site's variable, or its default."""
    return os.environ.get(name) or DEFAULTS[name]


def choice(name: str, *allowed: str) -> str:
    """The same where it must be one of a few words."""
    if (text := setting(name)) not in allowed:
        raise UsageError(f"{name} is {text!r}; it can be {' or '.join(allowed)}")
    return text


def seconds(name: str) -> float:
    """The same where it must be a number that is not negative."""
    text = setting(name)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name}={text!r} is not a number from 0 on; its default is {DEFAULTS[name]}")
    return value
