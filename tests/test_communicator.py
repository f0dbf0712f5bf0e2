"""What of the GPUs' communicator can be seen without one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tpllm.engine.torch import communicator

PROGRAM = """
import os, sys
import torch
from tpllm.distributed import World
from tpllm.engine.torch import communicator

def hook(kind, error, trace):
    print(f"ours: {error}", file=sys.stderr, flush=True)
    os._exit(20)

init = communicator.dist.init_process_group
communicator.dist.init_process_group = lambda backend, *, device_id, **rest: init("gloo", **rest)
sys.excepthook = hook
communicator.start_group(World(), torch.device("cpu"))
raise RuntimeError("it fails")
"""


def test_a_rank_that_dies_after_the_group_has_begun_says_why() -> None:
    """PyTorch puts a hook of its own around ours, which would keep to itself what ours prints."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (20, "ours: it fails")


@pytest.mark.parametrize(("took", "best"), [
    ({"push": 5.0, "two-shot": 4.6, "nccl": 9.0}, "push"), ({"push": 5.0, "two-shot": 4.4, "nccl": 4.3}, "two-shot"),
    ({"push": 5.0, "two-shot": 4.6, "nccl": 4.4}, "nccl"), ({"nccl": 3.0}, "nccl")])
def test_a_way_that_is_hardly_faster_is_not_taken(took: dict[str, float], best: str) -> None:
    assert communicator.clearly_fastest(took) == best
