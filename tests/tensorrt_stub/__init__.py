"""A stand-in for TensorRT that binds every call to the genuine signatures and runs networks in PyTorch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def install(libraries: Path) -> ModuleType:
    """Make `import tensorrt` and `import nccl.core` find the stand-ins, and this process's CPU be rank's GPU."""
    from tensorrt_stub.genuine import import_bindings

    genuine = import_bindings(libraries)
    from tensorrt_stub import builder, network, runtime

    module = ModuleType("tensorrt")
    module.__dict__.update(vars(genuine))
    # Only what would call into TensorRT is replaced.
    module.__dict__.update(Builder=builder.Builder, Runtime=runtime.Runtime, Weights=network.Weights)
    sys.modules["tensorrt"] = module
    core = ModuleType("nccl.core")
    core.__dict__.update(get_unique_id=lambda: os.urandom(128), Communicator=runtime.Communicator,
                         get_version=lambda: SimpleNamespace(libnccl=SimpleNamespace(version="2.30.7")))
    sys.modules["nccl"] = ModuleType("nccl")
    sys.modules["nccl"].core = core  # type: ignore[attr-defined]
    sys.modules["nccl.core"] = core

    import torch

    import tpllm.engine.tensorrt.backend as backend
    import tpllm.engine.tensorrt.runtime as ours

    class Cpu(ours.Gpu):
        def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
            return runtime.capture(enqueue)

    backend.assign = lambda world: ""
    ours.take_gpu = lambda world: Cpu(torch.device("cpu"), runtime.STREAM, "sm_90")
    return module


def remove() -> None:
    """Take what was imported against a stand-in, or without TensorRT, out of this process again."""
    for name in list(sys.modules):
        if name in ("tensorrt", "nccl", "nccl.core") or (
                name.startswith("tpllm.engine.tensorrt.") and name != "tpllm.engine.tensorrt.backend"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def trt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The stand-in, for the tests of one module."""
    from tensorrt_stub import genuine

    directory = tmp_path_factory.mktemp("stubs")
    genuine.compile_stubs(directory)
    yield install(directory)
    remove()
