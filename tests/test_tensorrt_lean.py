"""TensorRT's own deserializer, from its lean runtime, on bytes that are no plan: a sentence, and never a crash.

The lean runtime reads plans that were built for it, which takes TensorRT's builder; here it only refuses.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Our `messages` with the lean bindings in the place of the whole ones; prints the sentences.
PROGRAM = """
import json, random, sys
import tensorrt_lean_bindings
sys.modules["tensorrt"] = tensorrt_lean_bindings
from tpllm.distributed import World
from tpllm.engine.tensorrt.messages import Logger
from tpllm.errors import TpllmError

found = []
for plan in (b"", b"garbage", bytes(1 << 16), random.Random(1).randbytes(1 << 20), b"ftrt" + bytes(1000)):
    try:
        found.append(repr(Logger(World()).deserialize(plan, "; build it again")))
    except TpllmError as e:
        found.append(str(e))
print(json.dumps(found))
"""


def sentences() -> list[str]:
    """In a process of its own, whose end shows a crash."""
    if importlib.util.find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("no lean runtime of TensorRT: pip install tensorrt-lean-cu13")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.gpu
def test_bytes_that_are_no_plan() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for sentence, size in zip(sentences(), (0, 7, 1 << 16, 1 << 20, 1004), strict=True):
        assert sentence.startswith(f"TensorRT refused the plan of {size} bytes; build it again: ")
        assert not sentence.endswith("it gave no reason")


def test_without_a_gpu_the_runtime_does_not_start() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for sentence in sentences():
        assert sentence.startswith("TensorRT refused to start its Runtime: ")
        assert "CUDA initialization failure" in sentence
