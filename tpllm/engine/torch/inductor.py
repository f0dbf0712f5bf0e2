"""Backend `inductor`: each rank's graph exported and compiled ahead of time by PyTorch's AOTInductor."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import torch

from tpllm.compiler import find_compiler
from tpllm.distributed import World
from tpllm.engine.base import Backend, Engine, EngineConfig, build_command, engine_file, read_engine
from tpllm.engine.torch.base import (
    PreparedRank,
    TorchEngine,
    count_collectives,
    export_decode,
    export_step,
    load_rank,
    make_cache,
    prepare_rank,
    write_rank_engine,
)
from tpllm.engine.torch.device import choose_device
from tpllm.engine.torch.private import compile_package, drop_unused, load_package
from tpllm.engine.torch.program import StepProgram
from tpllm.errors import MismatchError
from tpllm.files import digest
from tpllm.mapping import Mapping

ISA = "cpu-features"
Graph = torch.export.ExportedProgram


class InductorBackend(Backend):
    """Ranks of one host whose graphs are equal compile once; the others copy the result."""

    choose_device = staticmethod(choose_device)

    def build(self, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None, out: Path, world: World,
              model_file: Path | None) -> None:
        started = time.perf_counter()

        def export() -> tuple[PreparedRank, str, dict[str, Graph]]:
            compiler = find_compiler(world.say)
            rank = prepare_rank(config, mapping, checkpoint_dir, model_file, world)
            return rank, compiler, export_graphs(rank.program, config)

        rank, compiler, graphs = world.together("export", export)
        found = count_collectives(graphs["mixed"])
        world.say(f"build: exported {len(graphs)} graphs of {found['all_reduce']} all-reduces each, "
                  f"{time.perf_counter() - started:.1f} s; compiling …")
        constants = [buffer.tolist() for buffer in rank.program.buffers()]
        key = digest("\n".join([*map(str, graphs.values()), str(constants)]).encode())
        leader = world.allgather((world.host, key)).index((world.host, key))

        def compile_graphs() -> None:
            if leader == world.rank:
                members = {}
                for number, (name, graph) in enumerate(graphs.items(), 1):
                    began = time.perf_counter()
                    members[f"{name}.pt2"] = compile_package(graph, compiler)
                    world.say(f"build: compiled {number} of {len(graphs)}, {name}, {time.perf_counter() - began:.1f} s")
                members[ISA] = " ".join(sorted(features(rank.program.device))).encode()
                write_rank_engine(out, config, mapping, rank.fingerprint, found, members | rank.members)

        def copy_compiled() -> None:
            if leader != world.rank:
                _, members = read_engine(out, config, Mapping(mapping.tp_size, leader))
                write_rank_engine(out, config, mapping, rank.fingerprint, found, members)

        world.together("compile", compile_graphs)
        world.together("compile", copy_compiled)

    def load(self, directory: Path, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None,
             world: World) -> Engine:
        if config.versions["torch"] != torch.__version__:
            raise MismatchError(f"{directory} was compiled with torch {config.versions['torch']}, this is "
                                f"{torch.__version__}; build again: {build_command(config)}")
        program, members = load_rank(directory, config, mapping, checkpoint_dir, world)
        if lacking := set(members[ISA].decode().split()) - features(program.device):
            raise MismatchError(f"{directory / engine_file(mapping.rank)} was compiled for a processor with "
                                f"{', '.join(sorted(lacking))}, which {world.host} lacks; build it on this machine: "
                                f"{build_command(config)}")
        state = program.state_dict()
        constants = state | {f"step.{name}": tensor for name, tensor in state.items()}
        graphs = {name.removesuffix(".pt2"): load_package(package, constants, program.device)
                  for name, package in members.items() if name.endswith(".pt2")}
        if program.device.type == "cuda":
            from tpllm.engine.torch.cuda import CudaEngine

            return CudaEngine(config, graphs["mixed"], graphs["one"], program.device)
        decode, mixed = graphs["decode"], graphs["mixed"]

        def run(tokens: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return (decode if tokens.shape[0] == 1 else mixed)(tokens, *rest)

        return TorchEngine(config, run, make_cache(config, program.device))


def export_graphs(program: StepProgram, config: EngineConfig) -> dict[str, Graph]:
    """What is compiled. Steps of one sequence have a graph of their own: fixed shapes make faster products."""
    if program.device.type == "cpu":
        return {"decode": export_step(program, config, single=True), "mixed": export_step(program, config, False)}
    graphs = {"one": export_decode(program, config), "mixed": export_step(program, config, False)}
    for graph in graphs.values():
        drop_unused(graph)  # verbs that a fused kernel has answered as well
    return graphs


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

