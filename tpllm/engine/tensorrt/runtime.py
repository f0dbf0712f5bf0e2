"""Running a plan: slots of the cache, one execution context for prompts and one for decode."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from numpy.typing import NDArray

from tpllm.distributed import World
from tpllm.engine.base import Engine, EngineConfig, StepInput, build_command
from tpllm.engine.tensorrt.lowering import (
    LOGITS,
    POSITIONS,
    ROWS,
    TOKENS,
    WRITE_INDEX,
    cache_names,
    input_shapes,
    slot_rows,
)
from tpllm.engine.tensorrt.messages import Logger
from tpllm.engine.torch.device import find_device
from tpllm.errors import PreflightError

CAPSULE = b"ncclComm_t"  # a capsule keeps a pointer to its name
MAX_GRAPHS = 32  # runs of slots whose decode is captured; others are executed as without graphs
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Gpu:
    """A rank's GPU and the stream that everything of this process runs on."""

    device: torch.device
    stream: int
    architecture: str

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What launches all that `enqueue` puts on the stream, as one CUDA graph; nothing of it runs yet."""
        graph = torch.cuda.CUDAGraph()
        # Threads of NCCL may use CUDA meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device), capture_error_mode="thread_local"):
            enqueue()
        return graph.replay


def take_gpu(world: World) -> Gpu:
    """This rank's own GPU, made current."""
    if not torch.cuda.is_available():
        raise PreflightError(f"TensorRT engines run on GPUs, and torch {torch.__version__} finds none on {world.host}; "
                             "build one for CPUs: --backend inductor --device cpu")
    device = find_device("cuda", world)
    # Not the default stream, which TensorRT would wait for again and again; sampling goes to the same one.
    stream = torch.cuda.Stream(device)
    torch.cuda.set_stream(stream)
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(device, stream.cuda_stream, f"sm_{major}{minor}")


def connect(world: World) -> Any:
    """An NCCL communicator of all ranks, in rank order; collective."""
    from nccl import core

    unique_id = world.broadcast(core.get_unique_id() if world.is_first else None)
    return core.Communicator.init(nranks=world.size, rank=world.rank, unique_id=unique_id)


def capsule(pointer: int) -> Any:
    """An `ncclComm_t` as TensorRT takes it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(pointer, CAPSULE, None)


class Lane:
    """An execution context with its profile; remembers which slots its cache addresses are those of.

    Its working memory is `scratch`, where that is given, of which lanes that never run at once may share one.
    """

    def __init__(self, engine: trt.ICudaEngine, logger: Logger, profile: int, gpu: Gpu, communicator: Any,
                 scratch: torch.Tensor | None = None) -> None:
        self._logger, self._stream, kinds = logger, gpu.stream, trt.ExecutionContextAllocationStrategy
        self._bound: tuple[int, int] | None = None
        self._context = engine.create_execution_context(kinds.STATIC if scratch is None else kinds.USER_MANAGED)
        if self._context is None:
            raise logger.refusal("an execution context")
        if scratch is not None:
            self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self._check(self._context.set_optimization_profile_async(profile, gpu.stream), f"profile {profile}")
        if communicator is not None:
            # Without it the all-reduces of the plan would do nothing and the answers be wrong. The call waits for the
            # other ranks, and holds Python's lock meanwhile.
            self._check(self._context.set_communicator(capsule(communicator.ptr)), "the NCCL communicator")

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise self._logger.refusal(what)

    def bind_caches(self, cache: torch.Tensor, first: int, batch: int) -> None:
        """Let the network's caches be slots `first` to `first + batch` of `[layers, 2, slots, …]`."""
        if self._bound == (first, batch):
            return
        slots = cache[:, :, first:first + batch]
        for layer, pair in enumerate(slots):
            for (name, updated), part in zip(cache_names(layer), pair, strict=True):
                self._check(self._context.set_input_shape(name, tuple(part.shape)), f"shape {part.shape} of {name}")
                for tensor in (name, updated):  # one address: the update is in place
                    self._check(self._context.set_tensor_address(tensor, part.data_ptr()), f"address of {tensor}")
        self._bound = first, batch

    def run(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Enqueue one execution, which fills `logits`."""
        for name, tensor in inputs.items():
            self._check(self._context.set_input_shape(name, tuple(tensor.shape)), f"shape {tensor.shape} of {name}")
            self._check(self._context.set_tensor_address(name, tensor.data_ptr()), f"address of {name}")
        self._check(self._context.set_tensor_address(LOGITS, logits.data_ptr()), f"address of {LOGITS}")
        self.enqueue()

    def enqueue(self) -> None:
        """The same execution as the last one."""
        self._check(self._context.execute_async_v3(self._stream), "to run a step")


class Graph:
    """Decode of one run of slots as a CUDA graph, whose inputs and logits stay where they are.

    Its lane is its own: TensorRT does not define what a graph does after its context's shapes or addresses changed.
    """

    def __init__(self, lane: Lane, gpu: Gpu, batch: int, vocab_size: int) -> None:
        self._launch: Callable[[], None] | None = None  # first, as graphs must go before their contexts
        self._gpu, self._lane = gpu, lane
        self._inputs = {name: torch.zeros(shape, dtype=torch.int32, device=gpu.device)
                        for name, shape in input_shapes(batch, 1, batch).items()}
        self._logits = torch.empty((batch, vocab_size), device=gpu.device)

    def run(self, arrays: dict[str, Ints]) -> torch.Tensor:
        """Logits `[batch, vocab]`, until the next call."""
        for name, array in arrays.items():
            self._inputs[name].copy_(torch.from_numpy(array))
        if self._launch:
            self._launch()
        else:
            # Before it can be captured, TensorRT must have executed these shapes once.
            self._lane.run(self._inputs, self._logits)
            self._launch = self._gpu.capture(self._lane.enqueue)
        return self._logits


class TensorrtEngine(Engine):
    """One rank's plan with its caches. A sequence owns a whole slot, so `capacity` is given out in `unit`s.

    `open` comes before the first step.
    """

    def __init__(self, config: EngineConfig, plan: bytes, gpu: Gpu, world: World) -> None:
        build, model = config.build, config.model
        self.config, self.unit, self.singles, self.ahead = config, build.max_seq_len, 1, False
        self.capacity = build.max_batch_size * self.unit
        self._gpu, self._logger = gpu, Logger(world)
        self._engine = self._logger.deserialize(plan, f"; build it again: {build_command(config)}")
        # Zeros: what was never written is masked, but a NaN there would show through.
        self._cache = torch.zeros(model.num_hidden_layers, 2, build.max_batch_size,
                                  model.local(config.tp_size).num_kv_heads, slot_rows(build.max_seq_len),
                                  model.head_size, dtype=getattr(torch, model.dtype), device=gpu.device)

    def open(self, communicator: Any, graphs: bool = False) -> None:
        """Make the contexts; of several ranks collective, and all must come to it at about the same time."""
        self._communicator = communicator  # must outlive them
        self._prefill, self._decode = (Lane(self._engine, self._logger, profile, self._gpu, communicator)
                                       for profile in (0, 1))
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._most = MAX_GRAPHS if graphs else 0
        self._scratch = torch.empty(self._engine.device_memory_size_v2 if graphs else 0, dtype=torch.uint8,
                                    device=self._gpu.device)

    def _graph(self, first: int, batch: int) -> Graph | None:
        """That of slots `first` to `first + batch`; of several ranks collective where it is new."""
        if (first, batch) not in self._graphs and len(self._graphs) < self._most:
            lane = Lane(self._engine, self._logger, 1, self._gpu, self._communicator, self._scratch)
            lane.bind_caches(self._cache, first, batch)
            self._graphs[first, batch] = Graph(lane, self._gpu, batch, self.config.model.vocab_size)
        return self._graphs.get((first, batch))

    @torch.inference_mode()
    def step(self, step: StepInput) -> torch.Tensor:
        """Float32 logits `[R, vocab]` on the GPU.

        Sequences of one new token share an execution, from the lowest of their slots to the highest; each longer
        part has one of its own, without padding.
        """
        self._copy(step)
        assert not (step.start % self.unit).any(), "every run must be a slot"
        slots, counts = step.start // self.unit, np.diff(step.query_start)
        owner = np.searchsorted(step.query_start, step.rows, side="right") - 1  # of each wanted row
        logits = torch.empty((len(step.rows), self.config.model.vocab_size), device=self._gpu.device)
        single = np.flatnonzero(counts == 1)
        groups = ([(self._decode, single)] if len(single) else []) + [
            (self._prefill, np.array([i])) for i in np.flatnonzero(counts > 1)]
        for lane, members in groups:
            first = int(slots[members].min())
            batch, length = int(slots[members].max()) - first + 1, int(counts[members[0]])
            tokens, positions = np.zeros((2, batch, length), np.int32)
            # Slots in between that sit this step out write to their last row: nobody reads it before its own token,
            # which is a sequence's last, is there.
            write = np.full(batch, slot_rows(self.unit) - 1, np.int32)
            places = slots[members] - first
            write[places] = step.length[members] - length
            positions[places] = write[places, None] + np.arange(length)
            tokens[places] = step.tokens[step.query_start[members, None] + np.arange(length)]
            wanted = np.flatnonzero(np.isin(owner, members))
            rows = (slots[owner[wanted]] - first) * length + step.rows[wanted] - step.query_start[owner[wanted]]
            logits[torch.from_numpy(wanted)] = self._execute(lane, first, tokens, positions, write, rows)
        return logits

    def _execute(self, lane: Lane, first: int, tokens: Ints, positions: Ints, write: Ints, rows: Ints) -> torch.Tensor:
        arrays = {TOKENS: tokens, POSITIONS: positions, WRITE_INDEX: write}
        if lane is self._decode and (graph := self._graph(first, len(write))):
            logits = graph.run(arrays | {ROWS: np.arange(len(write), dtype=np.int32)})
            return logits[torch.from_numpy(rows.astype(np.int64))]
        lane.bind_caches(self._cache, first, len(write))
        arrays[ROWS] = rows if len(rows) else np.zeros(1, np.int32)  # the network gives one row at least
        inputs = {name: torch.from_numpy(a.astype(np.int32)).to(self._gpu.device) for name, a in arrays.items()}
        logits = torch.empty((len(arrays[ROWS]), self.config.model.vocab_size), device=self._gpu.device)
        lane.run(inputs, logits)
        return logits[:len(rows)]

    def _copy(self, step: StepInput) -> None:
        """Rows from slot to slot; all are read before any is written."""
        if step.copies is None:
            return
        runs = [(*divmod(source, self.unit), *divmod(target, self.unit), count)
                for source, target, count in step.copies.tolist()]
        read = [self._cache[:, :, slot, :, row:row + count].clone() for slot, row, _, _, count in runs]
        for (_, _, slot, row, count), part in zip(runs, read, strict=True):
            self._cache[:, :, slot, :, row:row + count] = part
