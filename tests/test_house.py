"""The house rules: imports run one way, heavy libraries stay where they belong, and files and functions stay short."""

import ast
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tpllm

PACKAGE = Path(tpllm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
MAX_FILE, MAX_FUNCTION = 350, 60  # lines
MAX_CORE, MAX_PART = 5000, 650  # lines of code
# What only verbs stand on: who reads the core may leave it out.
PARTS = {
    "batch": ("batch", "cli.batch"),
    "bench": ("bench", "ceilings", "nvml", "cli.bench"),
    "convert": ("checkpoint.convert", "cli.convert", "checkpoint.verify", "cli.inspect", "cli.verify"),
    "demo": ("demo", "cli.demo"),
    "doctor": ("doctor", "cli.doctor"),
    "eval": ("evaluate", "cli.eval"),
    "interactive": ("cli.interactive", "launch.console"),
    "report": ("report",),
    "scale": ("records", "cli.scale"),
    "sbatch": ("launch.sbatch", "cli.sbatch"),
    "quantization": ("quantization", "engine.torch.quantized", "engine.torch.kernels.few_quantized",
                     "engine.torch.kernels.gemv_quantized", "engine.torch.kernels.int4"),
    "sources": ("checkpoint.hf", "checkpoint.reshard"),
    "tensorrt": ("engine.tensorrt",),
    # What engines of PyTorch have on GPUs only; nothing but these engines stands on it.
    "gpus": ("engine.torch.cuda", "engine.torch.cuda_ops", "engine.torch.fused", "engine.torch.graphs",
             "engine.torch.kernel_files", "engine.torch.memory", "engine.torch.padded", "engine.torch.rehearsal"),
    "peers": ("engine.torch.communicator", "engine.torch.exchange"),
    "kernels": ("engine.torch.kernels",),
}
STANDING = dict.fromkeys(("gpus", "peers", "kernels"), "tpllm.engine.torch.")  # on other parts only verbs do
# Where weights are described, written and multiplied with, the core asks this part whether they are quantized.
HOOKS = {"quantization": ("config", "models.base", "checkpoint.convert", "engine.random_weights",
                          "engine.torch.program", "engine.torch.communicator", "engine.torch.kernels.few",
                          "engine.tensorrt.lowering")}  # fmt: skip

# A module may import from lower floors only, or from its own package. A new one needs a floor here.
FLOORS = [
    {"errors", "mapping", "demo"},
    {"settings", "quantization", "records"},
    {"heartbeat", "launched", "runlog", "files", "chat"},
    {"config", "sampling", "tokenizer", "distributed", "compiler", "launch"},
    {"sharding", "inputs", "devices"},
    {"models"},
    {"checkpoint"},
    {"engine"},
    {"beam", "scheduler", "nvml"},
    {"answer"},
    {"runner", "doctor", "ceilings"},
    {"batch", "bench", "evaluate", "report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def for_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if not for_typing_only(child):
            yield child
            yield from walk(child)


def imports(name: str) -> set[str]:
    """The modules that a module imports, at its top or in its functions."""
    found: set[str] = set()
    for node in walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: relative import"
            # `from tpllm.engine.torch import collectives` imports a module, other names are inside of one.
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {dotted if dotted in MODULES else node.module for dotted in full}
    return found


def top(name: str) -> str:
    """What a module's floor goes by: `tpllm.engine.torch.base` -> `engine`."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    if name == "tpllm":  # whose public names are imported on first use
        assert not [m for m in imports(name) if m.startswith("tpllm")]
        return
    assert top(name) in FLOOR, f"{name} has no floor"
    for other in imports(name):
        if other.split(".")[0] == "tpllm" and other != "tpllm" and top(other) != top(name):
            assert FLOOR[top(other)] < FLOOR[top(name)], f"{name} imports {other}"


def test_the_rule_of_floors_would_notice_an_upward_import() -> None:
    assert FLOOR["errors"] < FLOOR["sharding"] < FLOOR["models"] < FLOOR["checkpoint"] < FLOOR["engine"]
    assert FLOOR["engine"] < FLOOR["runner"] < FLOOR["cli"]
    assert "tpllm.engine.base" in imports("tpllm.scheduler") and "tpllm.sharding" in imports("tpllm.models.llama")
    assert "tpllm.engine.torch.collectives" in imports("tpllm.engine.torch.base")
    assert "tpllm.runner" in imports("tpllm.cli.run")  # inside a function


def test_no_import_cycles() -> None:
    graph = {name: {other for other in imports(name) if other in MODULES and other != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    assert done == set(MODULES)


def importers(library: str) -> set[str]:
    """The modules, the demo's own scripts apart, that import a library at all."""
    return {name for name in MODULES if top(name) != "demo"
            and any(other.split(".")[0] == library for other in imports(name))}  # fmt: skip


@pytest.mark.parametrize(("library", "home"), [
    ("mpi4py", {"tpllm.distributed"}), ("sentencepiece", {"tpllm.tokenizer"}), ("tiktoken", {"tpllm.tokenizer"}),
    ("tokenizers", {"tpllm.tokenizer"}), ("safetensors", {"tpllm.checkpoint.rank"}), ("xxhash", {"tpllm.files"}),
    ("jinja2", {"tpllm.chat"}), ("pynvml", {"tpllm.nvml"}),
    ("matplotlib", {"tpllm.report.plots"}), ("rouge_score", {"tpllm.evaluate"}),
    ("tensorrt", {f"tpllm.engine.tensorrt.{name}" for name in ("backend", "lowering", "messages", "plan", "runtime")}),
    ("nccl", {"tpllm.engine.tensorrt.backend", "tpllm.engine.tensorrt.runtime"}),
])  # fmt: skip
def test_a_library_is_imported_in_its_home_only(library: str, home: set[str]) -> None:
    assert importers(library) == home


def test_models_know_no_backend() -> None:
    for name in MODULES:
        if top(name) == "models":
            for other in imports(name):
                assert other.split(".")[0] not in ("torch", "tensorrt", "mpi4py"), f"{name} imports {other}"
                assert top(other) not in ("engine", "checkpoint", "runner", "cli"), f"{name} imports {other}"


def test_checkpoint_and_engine_meet_on_disk_only() -> None:
    for name in MODULES:
        if top(name) == "checkpoint":
            assert not [other for other in imports(name) if top(other) == "engine" and other.startswith("tpllm.")]
        if name == "tpllm.engine" or name == "tpllm.engine.base":
            assert not [other for other in imports(name) if other.startswith("tpllm.engine.torch")]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_short_and_says_what_it_is_for(name: str) -> None:
    text = (PACKAGE / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    assert (ast.get_docstring(ast.parse(text)) or "").strip(), "no module docstring"


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            assert node.end_lineno - first + 1 <= MAX_FUNCTION, f"{node.name} in line {first}"


def code_lines(path: Path) -> int:
    """Lines that hold code: blank ones, comments and docstrings are not what makes a package large."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(bool(line.strip()) and not line.strip().startswith("#") and number not in skipped
               for number, line in enumerate(text.splitlines(), 1))


def part_of(name: str) -> str | None:
    """The part that a module belongs to; None: the core."""
    return next((part for part, modules in PARTS.items() for module in modules
                 if f"{name}.".startswith(f"tpllm.{module}.")), None)


def test_core_and_parts_are_small() -> None:
    sizes: Counter[str] = Counter()
    for path in FILES:
        sizes[part_of(module_name(path)) or "core"] += code_lines(path)
    assert sizes.pop("core") < MAX_CORE
    assert set(sizes) == set(PARTS) and all(size < MAX_PART for size in sizes.values()), sizes


@pytest.mark.parametrize("part", PARTS)
def test_only_verbs_stand_on_a_part(part: str) -> None:
    hooks = {f"tpllm.{name}" for name in HOOKS.get(part, ())}
    for name in MODULES:
        if part_of(name) != part and name not in hooks and not name.startswith(STANDING.get(part, "tpllm.cli.")):
            assert not [other for other in imports(name) if part_of(other) == part], name


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after some code in a fresh process."""
    show = "\nimport json, sys; print('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})  # fmt: skip
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(names)


def help_of(argv: list[str]) -> str:
    return f"from tpllm.cli import main\ntry: main({[*argv, '--help']!r})\nexcept SystemExit as e: assert e.code == 0\n"


@pytest.mark.parametrize("code", ["import tpllm", help_of([]), help_of(["convert"]), help_of(["build"]),
                                  help_of(["run"]), help_of(["eval"]), help_of(["batch"]), help_of(["launch"]),
                                  help_of(["sbatch"]), help_of(["demo"]), help_of(["bench"]),
                                  help_of(["scale"]), help_of(["inspect"]), help_of(["verify"])],
                         ids=lambda code: code[-60:-45])  # fmt: skip
def test_help_loads_nothing_heavy(code: str) -> None:
    modules = loaded(code)
    assert "tpllm" in modules
    assert not modules & {"torch", "mpi4py", "tensorrt", "sentencepiece", "tiktoken", "tokenizers", "safetensors",
                           "transformers", "matplotlib"}


def test_the_public_names_are_imported_on_first_use() -> None:
    modules = loaded("import tpllm\nassert tpllm.SamplingParams().temperature == 0.0")
    assert "tpllm" in modules and "torch" not in modules
    assert "torch" in loaded("import torch")  # the check would notice
    assert set(tpllm.__all__) - {"__version__"} == set(tpllm._HOMES)
    for name in tpllm.__all__:
        assert getattr(tpllm, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = tpllm.nothing


def test_help_is_quick() -> None:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tpllm", "--help"], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})  # fmt: skip
        return time.perf_counter() - started

    # The best of three, as other processes may be at work on this machine.
    assert min(once() for _ in range(3)) < 1.0
