"""The private names of PyTorch that tpllm relies on are there, in the PyTorch that is installed."""

import ast
import importlib
import inspect
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tpllm.compiler import compiler_problem, find_compiler
from tpllm.engine.torch import private

PACKAGE = Path(private.__file__).parents[2]
TREE = ast.parse(Path(private.__file__).read_text(encoding="utf-8"))


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def torch_names(tree: ast.AST) -> set[str]:
    """Every dotted name under torch that a module imports or reads."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            names.add(ast.unparse(node))
    return names


PRIVATE_NAMES = sorted(name for name in torch_names(TREE) if is_private(name))


def resolve(dotted: str) -> Any:
    """The object of a dotted name, modules imported on the way."""
    found: Any = torch
    parts = dotted.split(".")
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


def test_there_are_private_names_to_check() -> None:
    assert {"torch._C._aoti.AOTIModelPackageLoader", "torch._inductor.aoti_compile_and_package"} <= set(PRIVATE_NAMES)


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_name_resolves(name: str) -> None:
    assert resolve(name) is not None


def test_symmetric_memory_has_what_peers_use() -> None:
    handle = resolve("torch._C._distributed_c10d._SymmetricMemory")
    assert {"empty_strided_p2p", "get_buffer", "put_signal", "wait_signal"} <= set(dir(handle))


def test_the_compiler_takes_our_arguments_and_options() -> None:
    signature = inspect.signature(resolve("torch._inductor.aoti_compile_and_package"))
    signature.bind(None, package_path="x.pt2", inductor_configs=private.COMPILE_OPTIONS)
    config: Any = importlib.import_module("torch._inductor.config")
    for option in [*private.COMPILE_OPTIONS, "aot_inductor.output_path"]:
        assert isinstance(config.get_type(option), type)
    assert {option: config.get_type(option) for option in private.CUDA_OPTIONS} == {"cpp.vec_isa_ok": bool | None}


@pytest.mark.parametrize(("command", "problem"), [("g++", None), ("g++ -static-libstdc++", "statically"),
                                                  ("g++ -no-such-option", "does not compile")])  # fmt: skip
def test_a_compiler_is_tried_first(command: str, problem: str | None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    found = compiler_problem(command)
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 64, 48), (2, 7, 5), (8, 768, 1024), (65, 33, 130)])
def test_products(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    """Of weights that begin anywhere, as those of a mapped file do."""
    x, bias = torch.randn(rows, inner).to(dtype), torch.randn(outer).to(dtype)
    weight = torch.randn(outer * inner + 3).to(dtype)[3:].view(outer, inner)
    exact = x.double() @ weight.double().T
    for expected, given in ((exact, None), (exact + bias.double(), bias)):
        torch.testing.assert_close(private.linear(x, weight, given).double(), expected, atol=1e-4 * inner**0.5,
                                   rtol=1e-5 if dtype == torch.float32 else 1e-2)


def test_compiling_leaves_nothing_where_other_ranks_compile() -> None:
    """Inductor names files by code without constants: ranks that differ in one would overwrite each other's."""
    new = random.random()  # code that no earlier run has left there

    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * new + torch.tensor([1.0, 2.0])

    cache = Path(resolve("torch._inductor.runtime.cache_dir_utils.cache_dir")())
    before = set(cache.rglob("*.wrapper*"))
    exported = torch.export.export(Add(), (torch.zeros(2),))
    package = private.compile_package(exported, find_compiler(print), torch.device("cpu"))
    assert set(cache.rglob("*.wrapper*")) == before
    run = private.load_package(package, {}, torch.device("cpu"))
    torch.testing.assert_close(run(torch.ones(2)), torch.tensor([1.0, 2.0]) + new)


@pytest.mark.parametrize("kept", [True, False])
def test_a_part_of_the_compiled_file_declares_the_arrays_it_uses(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch 2.11's way of remembering them, which without our help goes wrong."""
    wrapper: Any = resolve("torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu")

    def by_address(self: dict[Any, str], array: str, writeline: Any, known_statically: bool = False) -> str:
        key = array, id(writeline), known_statically
        if key not in self:
            self[key] = f"int_array_{len(self)}"
            writeline(self[key])
        return self[key]

    inspect.signature(wrapper.codegen_int_array_var).bind(wrapper, "{1}", print, known_statically=True, graph=None)
    monkeypatch.setattr(wrapper, "codegen_int_array_var", by_address)
    parts: list[list[str]] = [[] for _ in range(50)]
    names: dict[Any, str] = {}
    used = []
    with private.writers_kept() if kept else nullcontext():
        for part in parts * 2:
            used.append((part, wrapper.codegen_int_array_var(names, "{1, 2}", part.append, known_statically=True)))
    assert all(name in part for part, name in used) == kept
    assert wrapper.codegen_int_array_var is by_address
    if kept:
        assert [len(part) for part in parts] == [1] * 50


@pytest.mark.parametrize("method", ["boxed_run", "get_constant_fqns", "load_constants"])
def test_the_loader_has_the_methods_that_are_called(method: str) -> None:
    called = {node.func.attr for node in ast.walk(TREE) if isinstance(node, ast.Call)
              and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "loader"}  # fmt: skip
    assert method in called
    assert callable(getattr(resolve("torch._C._aoti.AOTIModelPackageLoader"), method))


def test_no_other_module_uses_a_private_name_of_torch() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != Path(private.__file__):
            found = [n for n in torch_names(ast.parse(path.read_text(encoding="utf-8"))) if is_private(n)]
            assert not found, f"{path}: {found}"


def test_loading_does_not_import_the_compiler() -> None:
    """The reason for the private names: their public twins would import all of Inductor, or SymPy."""
    code = ("import sys, torch, torch.distributed._symmetric_memory as memory, tpllm.engine.torch.private as p\n"
            "from torch._C._aoti import AOTIModelPackageLoader\n"
            "class Fake:\n"
            "    empty_strided_p2p = staticmethod(lambda *args: torch.empty_strided(args[0], args[1], dtype=args[2]))\n"
            "torch._C._distributed_c10d._SymmetricMemory = Fake\n"
            "memory.rendezvous, p.world_group = lambda *args: None, lambda: None\n"
            "tensor, _ = p.symmetric_memory((2, 3, 4), torch.float16, torch.device('cpu'))\n"
            "assert tensor.shape == (2, 3, 4) and tensor.is_contiguous() and tensor.dtype == torch.float16\n"
            "assert not {'torch._inductor.compile_fx', 'sympy'} & sys.modules.keys()\n")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
