"""LLaMA with a planted failure: `TEST_FAIL=KIND:RANK:CALLS` makes a rank fail in its so-manieth forward pass."""

from __future__ import annotations

import os
import signal
from typing import TypeVar

import tpllm.distributed
from tpllm.models.llama import Llama as PackageLlama
from tpllm.models.ops import Ops

T = TypeVar("T")
calls = [0]
if "TEST_OUT_OF_MEMORY" in os.environ:  # no test can make the kernel count a kill in a cgroup it may not make
    tpllm.distributed.oom_kills = lambda: 1 << 30


def fail(kind: str) -> None:
    """Fail as `kind` says: an exception, an exit, or a signal to this process."""
    if kind == "raise":
        raise RuntimeError("planted failure")
    if kind == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.Signals[kind])


class RaisingLlama(PackageLlama):
    """The package's model under a name of its own."""

    architecture = "RaisingLlama"

    def forward(self, ops: Ops[T]) -> T:
        calls[0] += 1
        kind, rank, when = os.environ.get("TEST_FAIL", "none:-1:0").split(":")
        me = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == me and calls[0] == int(when):
            fail(kind)
        return super().forward(ops)
