"""`trt.Runtime`, engines and execution contexts over the interpreter, and NCCL over MPI."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from typing import Any

import tensorrt_bindings as trt
import torch
from torch import Tensor

from tensorrt_stub.builder import read_plan
from tensorrt_stub.interpreter import Interpreter
from tensorrt_stub.network import TORCH, report
from tensorrt_stub.signatures import Recorded

Strategy = trt.ExecutionContextAllocationStrategy
SCRATCH = 512  # bytes that a context works in
CAPTURES: list[list[Callable[[], None]]] = []  # every CUDA graph: its launches
CAPTURING: list[list[Callable[[], None]]] = []  # the one that is being captured
STREAM = 7  # the handle of the only stream there is
COMMUNICATORS: dict[int, Any] = {}  # MPI communicators by the address that stands for an ncclComm_t


class Runtime(Recorded, owner="Runtime"):
    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger)
        super().__init__()
        self._logger = logger

    def _report(self, text: str) -> None:
        report(self._logger, self._values.get("error_recorder"), text)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        plan = read_plan(bytes(serialized_engine))
        if plan is None:
            self._report("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Magic tag does not match.)")
            return None
        return Engine(self, plan)


class Engine(Recorded, owner="ICudaEngine"):
    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        super().__init__()
        self._runtime, self._plan, self._contexts = runtime, plan, []
        self._values["device_memory_size_v2"] = SCRATCH

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> Context:
        self._contexts.append(Context(self, strategy))
        return self._contexts[-1]

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self._plan)


class Inspector(Recorded, owner="EngineInspector"):
    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__()
        self._plan = plan

    def get_engine_information(self, format: Any) -> str:
        assert format == trt.LayerInformationFormat.JSON
        detailed = self._plan["verbosity"] == trt.ProfilingVerbosity.DETAILED
        return json.dumps({"Layers": [{"Name": layer["name"], "LayerType": layer["kind"]} if detailed
                                      else layer["name"] for layer in self._plan["layers"]],
                           "I/O Tensors": [{"Name": name} for name in self._plan["inputs"] | self._plan["outputs"]]})


class Context(Recorded, owner="IExecutionContext"):
    def __init__(self, engine: Engine, strategy: Any = Strategy.STATIC) -> None:
        super().__init__()
        self._scratch = SCRATCH if strategy == Strategy.STATIC else 0
        self._executed: Any = None  # shapes and addresses of the last ordinary execution
        self._engine, self._plan = engine, engine._plan
        self._profile, self._comm = 0, None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def _no(self, text: str) -> bool:
        self._engine._runtime._report(f"IExecutionContext: Error Code 3: API Usage Error ({text})")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._plan["profiles"]) or stream_handle != STREAM:
            return self._no(f"profile {profile_index} on stream {stream_handle}")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory and not self._scratch, "this context has its own memory"
        self._scratch = size

    def set_communicator(self, communicator: Any) -> bool:
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        if not any(layer["kind"] == "IDistCollectiveLayer" for layer in self._plan["layers"]):
            return self._no("The engine is not a multi-device engine.")
        self._comm = COMMUNICATORS[get(communicator, b"ncclComm_t")]
        self._comm.Barrier()  # the call blocks until every rank has made it
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if name not in self._plan["inputs"]:
            return self._no(f"no input {name}")
        least, _, most = self._plan["profiles"][self._profile][name]
        if len(shape) != len(least) or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return self._no(f"{name} of {tuple(shape)} is not in profile {self._profile}, {least} to {most}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._plan["inputs"] | self._plan["outputs"]:
            return self._no(f"no tensor {name}")
        # TensorRT wants multiples of 256, which a CPU's allocator does not give; slots must keep to it all the same.
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan = self._plan
        if missing := (plan["inputs"].keys() - self._shapes.keys()) | (
                (plan["inputs"] | plan["outputs"]).keys() - self._addresses.keys()):
            return self._no(f"not set: {sorted(missing)}")
        for output, source in plan["aliases"].items():
            if self._addresses[output] != self._addresses[source]:
                return self._no(f"{output} must have the address of {source}")
        sizes: dict[str, set[int]] = {}
        for name, (_, _, dims) in plan["inputs"].items():
            for index, dim in dims.items():
                sizes.setdefault(dim, set()).add(self._shapes[name][index])
        if any(len(found) > 1 for found in sizes.values()):
            return self._no(f"dimensions of one name differ: {sizes}")
        if self._scratch < SCRATCH:
            return self._no(f"{self._scratch} bytes to work in, {SCRATCH} needed")
        assert stream_handle == STREAM
        state = dict(self._shapes), dict(self._addresses)
        if CAPTURING:
            assert self._executed == state, "captured without an execution since shapes or addresses changed"
            CAPTURING[-1].append(lambda: self._launch(state))
        else:
            self._interpret()
            self._executed = state
        return True

    def _launch(self, state: Any) -> None:
        """Of a graph: TensorRT does not define what it does when its context was changed."""
        assert (self._shapes, self._addresses) == state, "the context changed after it was captured"
        self._interpret()

    def _interpret(self) -> None:
        plan = self._plan
        values = {number: memory(self._addresses[name], self._shapes[name], TORCH[dtype])
                  for name, (number, dtype, _) in plan["inputs"].items()}
        Interpreter(plan["layers"], self._reduce, self._gather).run(values)
        for name, (number, dtype) in plan["outputs"].items():
            if name not in plan["aliases"]:
                result = values[number]
                assert result.dtype == TORCH[dtype]
                memory(self._addresses[name], tuple(result.shape), result.dtype).copy_(result)

    def _gather(self, x: Tensor) -> list[Tensor]:
        assert self._comm is not None, "a collective without a communicator"
        found: list[Tensor] = self._comm.allgather(x)
        assert all(part.shape == x.shape and part.dtype == x.dtype for part in found)
        return found

    def _reduce(self, x: Tensor) -> Tensor:
        return torch.stack([part.float() for part in self._gather(x)]).sum(0).to(x.dtype)


def capture(enqueue: Callable[[], None]) -> Callable[[], None]:
    """As CUDA does, run nothing, and keep what would have run with what it was given."""
    launches: list[Callable[[], None]] = []
    CAPTURING.append(launches)
    enqueue()
    CAPTURING.clear()
    CAPTURES.append(launches)

    def replay() -> None:
        for launch in launches:
            launch()

    return replay


def memory(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over memory that belongs to somebody else."""
    count = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).reshape(shape)


class Communicator:
    """`nccl.core.Communicator` over MPI."""

    def __init__(self, comm: Any) -> None:
        self._handle = ctypes.create_string_buffer(8)
        self.ptr = ctypes.addressof(self._handle)
        COMMUNICATORS[self.ptr] = comm

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: bytes, config: None = None) -> Communicator:
        from mpi4py import MPI

        assert (MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank) == (nranks, rank)
        assert set(MPI.COMM_WORLD.allgather(unique_id)) == {unique_id}, "ranks have different ids"
        return cls(MPI.COMM_WORLD.Dup())
