"""Kernels of Triton in tests: on a GPU where there is one, else in Triton's interpreter, in a process of its own.

That may have a Triton of its own, in the directory TPLLM_TEST_TRITON.
"""

import os
import subprocess
import sys

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"


def need_kernels() -> None:
    """Skip where Triton's kernels can run neither way."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    if not GPU and not INTERPRETED:
        pytest.skip("no CUDA device here")


def run_interpreted(file: str, passed: int, *options: str) -> None:
    """The tests of a file that are marked for GPUs, in the interpreter; so many must pass."""
    if GPU:
        pytest.skip("the kernels run on the GPU here")
    own = os.environ.get("TPLLM_TEST_TRITON")
    if not own:  # the interpreter of 3.6 fails with numpy 2.4
        pytest.importorskip("triton", minversion="3.9", reason="Triton 3.9 is not installed here")
    path = [part for part in (own, os.environ.get("PYTHONPATH")) if part]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *options, file]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and f"{passed} passed" in done.stdout, done.stdout
