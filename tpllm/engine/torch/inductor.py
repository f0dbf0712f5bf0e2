"""Backend `inductor`: each rank's graph exported and compiled ahead of time by PyTorch's AOTInductor."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tpllm import __version__
from tpllm.compiler import find_compiler
from tpllm.distributed import World
from tpllm.engine.base import Backend, Engine, EngineConfig, build_command, engine_file, read_engine
from tpllm.engine.torch.aside import Aside
from tpllm.engine.torch.base import (
    PreparedRank,
    Step,
    TorchEngine,
    count_collectives,
    export_decode,
    export_step,
    load_rank,
    make_cache,
    make_program,
    prepare_rank,
    use_threads,
    write_rank_engine,
)
from tpllm.engine.torch.device import choose_device, takes_one_process
from tpllm.engine.torch.memory import SPARE
from tpllm.engine.torch.private import compile_package, load_package, operator_schemas
from tpllm.engine.torch.program import StepProgram
from tpllm.errors import MismatchError
from tpllm.files import digest
from tpllm.mapping import Mapping
from tpllm.models import find_model

ISA, OPERATORS = "cpu-features", "operators"  # members of an engine that say what its code relies on
Graph = torch.export.ExportedProgram


class InductorBackend(Backend):
    """Ranks of one host whose graphs are equal compile once; the others copy the result."""

    choose_device = staticmethod(choose_device)

    def build(self, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None, out: Path, world: World,
              model_file: Path | None) -> None:
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:

            def prepare() -> tuple[PreparedRank, Rest, Graph]:
                compiler = find_compiler(world.say)
                use_threads(world)  # whose number the compiler writes into the code
                rank = prepare_rank(config, mapping, checkpoint_dir, model_file, world)
                rest = Rest(config, mapping, model_file, rank.program.device, compiler)
                if takes_one_process(rest.device):
                    world.say(f"build: rank {world.rank}'s GPU takes one process at a time (`nvidia-smi -c "
                              "EXCLUSIVE_PROCESS`); loads will have to compile kernels, with a C compiler")
                # The first rank of a host compiles in any case, so it need not wait for what the others' graphs are.
                if world.local_rank == 0 and has_room_twice(rank.program, 1):
                    rest.begin(stack)
                return rank, rest, GRAPHS["mixed"](rank.program, config)

            rank, rest, mixed = world.together("export", prepare)
            found = count_collectives(mixed)
            world.say(f"build: exported a graph of {found['all_reduce']} all-reduces, "
                      f"{time.perf_counter() - started:.1f} s; compiling …")
            constants = [buffer.tolist() for buffer in rank.program.buffers()]
            # Code is made for a kind of GPU; which one of a host's it runs on is said when it is loaded.
            key = digest(re.sub(r"cuda:\d+", "cuda", f"{mixed}\n{constants}").encode())
            leader = world.allgather((world.host, key)).index((world.host, key))

            def compile_graphs() -> None:
                if leader == world.rank:
                    if world.local_rank > 0 and has_room_twice(rank.program, world.local_size):
                        rest.begin(stack)
                    members = {"mixed.pt2": compile_package(mixed, rest.compiler, rest.device),
                               ISA: " ".join(sorted(features(rest.device))).encode(),
                               OPERATORS: "\n".join(sorted(operator_schemas())).encode()} | rest.made(stack)
                    write_rank_engine(out, config, mapping, rank.fingerprint, found, members | rank.members)

            def copy_compiled() -> None:
                if leader != world.rank:
                    _, members = read_engine(out, config, Mapping(mapping.tp_size, leader))
                    write_rank_engine(out, config, mapping, rank.fingerprint, found, members)

            world.together("compile", compile_graphs)
            world.together("compile", copy_compiled)
            empty(rank.program.parameters())

    def load(self, directory: Path, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None,
             world: World) -> Engine:
        if config.versions["torch"] != torch.__version__:
            raise MismatchError(f"{directory} was compiled with torch {config.versions['torch']}, this is "
                                f"{torch.__version__}; build again: {build_command(config)}")
        rank = load_rank(directory, config, mapping, checkpoint_dir, world)
        program = rank.program
        state = program.state_dict()

        def load_graphs() -> dict[str, Step]:
            if problem := code_problem(rank.members, program.device, world.host):
                raise MismatchError(f"{directory / engine_file(mapping.rank)} {problem}: {build_command(config)}")
            constants = state | {f"step.{name}": tensor for name, tensor in state.items()}
            return {name.removesuffix(".pt2"): load_package(package, constants, program.device)
                    for name, package in rank.members.items() if name.endswith(".pt2")}

        engine = make_engine(config, world.together("load", load_graphs), program.device, rank.rows)
        weakref.finalize(engine, empty, list(state.values())).atexit = False
        return engine


def code_problem(members: dict[str, bytes], device: torch.device, host: str) -> str | None:
    """Why an engine's code cannot run, and what to do; None where it can."""
    if set(members.get(OPERATORS, b"none").decode().splitlines()) - operator_schemas():
        return f"calls operators that are not those of tpllm {__version__} as it is here; build it again"
    if lacking := set(members[ISA].decode().split()) - features(device):
        return (f"was compiled for a processor with {', '.join(sorted(lacking))}, which {host} lacks; build it on this "
                "machine")
    return None


def make_engine(config: EngineConfig, graphs: dict[str, Step], device: torch.device, rows: int) -> Engine:
    """Of compiled graphs, with a cache of so many rows."""
    if device.type == "cuda":
        from tpllm.engine.torch.cuda import CudaEngine

        return CudaEngine(config, graphs["mixed"], graphs["one"], device, rows)
    decode, mixed = graphs["decode"], graphs["mixed"]

    def run(tokens: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return (decode if tokens.shape[0] == 1 else mixed)(tokens, *rest)

    return TorchEngine(config, run, make_cache(config, device, rows))


def empty(tensors: Iterable[torch.Tensor]) -> None:
    """Give their memory back, whoever has them: PyTorch (2.11, 2.13) keeps what it has exported, and the constants of
    packages, for good, and a process may go on to load another engine."""
    for tensor in tensors:
        tensor.data = tensor.new_empty(0)


# Steps of one sequence have a graph of their own: fixed shapes make faster products.
GRAPHS: dict[str, Callable[[StepProgram, EngineConfig], Graph]] = {
    "mixed": lambda program, config: export_step(program, config, single=False),
    "decode": lambda program, config: export_step(program, config, single=True),
    "one": export_decode,
}


class Rest:
    """The graph for steps of one sequence and the kernels of a GPU, made in other processes beside this one or later.

    A graph has no need of a process of its own, kernels do: where a GPU takes one only, loads must compile them.
    """

    def __init__(self, config: EngineConfig, mapping: Mapping, model_file: Path | None, device: torch.device,
                 compiler: str) -> None:
        self.name = "decode" if device.type == "cpu" else "one"
        self.device, self.compiler = device, compiler
        self._graph_work = (self.name, config, mapping, model_file, device, compiler, torch.get_num_threads())
        self._kernel_work = (config, model_file, device)
        self._graph: Aside[bytes] | None = None
        self._kernels: Aside[dict[str, bytes]] | None = None

    def begin(self, stack: contextlib.ExitStack) -> None:
        """Start the other processes, which end with `stack`."""
        self._graph = stack.enter_context(Aside(make_package, *self._graph_work))
        self._begin_kernels(stack)

    def _begin_kernels(self, stack: contextlib.ExitStack) -> None:
        if self.device.type == "cuda" and not takes_one_process(self.device):
            from tpllm.engine.torch.rehearsal import make_kernels

            self._kernels = stack.enter_context(Aside(make_kernels, *self._kernel_work))

    def made(self, stack: contextlib.ExitStack) -> dict[str, bytes]:
        """Members of the engine."""
        graph = self._graph.result() if self._graph else make_package(*self._graph_work)
        if self._kernels is None:
            self._begin_kernels(stack)
        return {f"{self.name}.pt2": graph} | (self._kernels.result() if self._kernels else {})


def make_package(name: str, config: EngineConfig, mapping: Mapping, model_file: Path | None, device: torch.device,
                 compiler: str, threads: int) -> bytes:
    """One of the graphs exported and compiled."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = find_model(config.model.architecture, model_file)(config.model)
    return compile_package(GRAPHS[name](make_program(model, mapping, device), config), compiler, device)


def has_room_twice(program: StepProgram, compiling: int) -> bool:
    """Whether each of so many ranks has room for another process: a core, or a GPU's memory for its weights."""
    if program.device.type == "cpu":
        return len(os.sched_getaffinity(0)) >= 2 * compiling
    if takes_one_process(program.device):
        return False
    weights = sum(parameter.nbytes for parameter in program.parameters())
    return bool(torch.cuda.mem_get_info(program.device)[0] > weights + SPARE)


def features(device: torch.device) -> set[str]:
    """What compiled code may rely on: instruction sets, and the GPU's architecture."""
    if device.type == "cpu":
        return cpu_features()
    major, minor = torch.cuda.get_device_capability(device)
    return cpu_features() | {f"sm_{major}{minor}"}


def cpu_features() -> set[str]:
    """Instruction sets that compiled code may use: it is made for the processor it is compiled on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {platform.machine()}
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    names = flags[1].split() if flags else []
    return {platform.machine(), *(n for n in names if re.match(r"sse|ssse|avx|amx|fma|bmi|f16c|sve|asimd", n))}

