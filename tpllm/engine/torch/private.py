"""Every private name of PyTorch that tpllm uses, in one place; `tests/test_private.py` resolves each.

AOTInductor's public loader imports the whole compiler (seconds); the C++ class behind it loads in milliseconds.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

COMPILE_OPTIONS = {
    # Constants stay outside the library: an engine is code, the weights remain in the checkpoint.
    "aot_inductor.package_constants_in_so": False,
    # A precompiled header saves a file's compiler 1 s and takes 4 s, and each is used once.
    "aot_inductor.precompile_headers": False,
}
# Finding the processor's vectors takes ten Pythons that import PyTorch, and a GPU's graph has no loops for them.
CUDA_OPTIONS = {"cpp.vec_isa_ok": False}


def compile_package(exported: torch.export.ExportedProgram, compiler: str, device: torch.device) -> bytes:
    """A graph exported for a device compiled ahead of time, as the bytes of AOTInductor's `.pt2` archive.

    Its files get a directory of their own: Inductor names one by the graph's code without its constants, where
    ranks whose graphs differ in a constant only would overwrite each other's files.
    """
    import torch._inductor
    import torch._inductor.config

    lower_operators(exported)
    options = COMPILE_OPTIONS | (CUDA_OPTIONS if device.type == "cuda" else {}) | {"cpp.cxx": (compiler,)}
    with (tempfile.TemporaryDirectory(prefix="tpllm-") as scratch, warnings.catch_warnings(),
          torch._inductor.config.patch({"aot_inductor.output_path": scratch}), writers_kept()):
        warnings.simplefilter("ignore", FutureWarning)
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(Path(scratch, "step.pt2")), inductor_configs=options)
        return Path(path).read_bytes()


def lower_operators(exported: torch.export.ExportedProgram) -> None:
    """Tell Inductor of our operators, as it does by itself where it first meets one.

    But for its log it then (torch 2.11) writes out the operands with all that led to them: in a chain of layers whose
    sums are used twice that never ends.
    """
    import torch._inductor.lowering as lowering
    import torch._library.utils

    for node in exported.graph.nodes:
        operator = node.target
        if str(operator).startswith("tpllm.") and operator not in lowering.lowerings:
            tag = torch._library.utils.get_layout_constraint_tag(operator, with_default=True)
            lowering.make_fallback(operator, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)


@contextmanager
def writers_kept() -> Iterator[None]:
    """Let what Inductor writes its C++ with live as long as the compilation.

    PyTorch before 2.13 remembers the arrays of sizes it has declared by `id` of a bound method, which ends with the
    call: another part of the file may get that address next and use an array that it does not have. Now and then a
    graph of many layers would not compile.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    name_of = CppWrapperCpu.codegen_int_array_var
    kept: dict[Callable[..., None], Callable[..., None]] = {}

    def with_kept_writer(wrapper: CppWrapperCpu, array: str, writeline: Callable[..., None],
                         *args: Any, **kwargs: Any) -> str:
        return name_of(wrapper, array, kept.setdefault(writeline, writeline), *args, **kwargs)

    CppWrapperCpu.codegen_int_array_var = with_kept_writer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = name_of  # type: ignore[method-assign, assignment]


def operator_schemas() -> set[str]:
    """Our operators as graphs call them: names, operands, results."""
    return {str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("tpllm::")}


def drop_unused(exported: torch.export.ExportedProgram) -> None:
    """Remove what no output needs; export's checks of dtypes would keep it, and Inductor drops them too late."""
    graph = exported.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def load_package(package: bytes, constants: dict[str, torch.Tensor],
                 device: torch.device) -> Callable[..., torch.Tensor]:
    """A compiled graph as a function of its inputs; `constants` are used in place and must stay alive."""
    from torch._C._aoti import AOTIModelPackageLoader

    with tempfile.NamedTemporaryFile(prefix="tpllm-", suffix=".pt2") as file:
        file.write(package)
        file.flush()
        # name of the model in the package, no locks for concurrent runs, one runner, device index
        loader = AOTIModelPackageLoader(file.name, "model", True, 1, -1 if device.type == "cpu" else device.index)
    names = loader.get_constant_fqns()
    # not an inactive buffer, all constants must be given, memory remains ours
    loader.load_constants({name: constants[name] for name in names}, False, True, True)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = loader.boxed_run(list(inputs))[0]
        return result

    return run


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` of `x [T, in]`; on CPUs by oneDNN, where PyTorch has it.

    PyTorch gives float32 to MKL, which on AMD's processors takes about twice as long for 2 to 64 rows. In a graph that
    is to be compiled `weight` must be a parameter.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


class Peers:
    """How the ranks of the process group reach each other's part of symmetric memory."""

    def __init__(self, handle: torch._C._distributed_c10d._SymmetricMemory) -> None:
        self._handle = handle

    def buffer(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """A rank's part, of the shape of this rank's."""
        found: torch.Tensor = self._handle.get_buffer(rank, like.shape, like.dtype)
        return found

    def signal(self, rank: int, channel: int) -> None:
        """Let that rank's `wait` end once the stream's work so far is done; after the last signal was waited for."""
        self._handle.put_signal(rank, channel)

    def wait(self, rank: int, channel: int) -> None:
        """Hold up the stream, not the host, for a signal of that rank."""
        self._handle.wait_signal(rank, channel)


def symmetric_memory(shape: tuple[int, ...], dtype: torch.dtype,
                     device: torch.device) -> tuple[torch.Tensor, Peers]:
    """Memory that all ranks of the process group reach; collective."""
    import torch.distributed._symmetric_memory

    strides = torch.empty(shape, device="meta").stride()
    # PyTorch's own `empty` would import SymPy first, to check the shape.
    tensor = torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p(shape, strides, dtype, device)
    return tensor, Peers(torch.distributed._symmetric_memory.rendezvous(tensor, world_group()))


def two_shot_all_reduce(x: torch.Tensor) -> None:
    """The sum over the ranks in place; `x` is the beginning of symmetric memory."""
    torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", world_group().group_name)


def world_group() -> torch.distributed.ProcessGroup:
    """The process group of all ranks."""
    import torch.distributed as dist

    assert dist.group.WORLD is not None, "no process group yet"
    return dist.group.WORLD
