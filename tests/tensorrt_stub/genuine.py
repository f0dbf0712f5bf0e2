"""TensorRT's own Python bindings, imported without TensorRT: three empty libraries stand in for its own."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
# What the extension needs to be loaded; nothing of it is called here.
SYMBOLS = ("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
           "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
           "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins", "getInferLibVersion")


def lacking() -> str | None:
    """Why the bindings cannot be imported here."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        return "no TensorRT bindings: pip install tensorrt-cu13-bindings"
    return None if shutil.which("cc") else "no C compiler (cc)"


def python_path() -> str:
    """Where the bindings are."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent.parent)


def compile_stubs(directory: Path) -> None:
    """The libraries, in an existing directory."""
    source = directory / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for name in LIBRARIES:
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}.so.11", "-o", str(directory / f"{name}.so.11"),
                        str(source)], check=True)


def import_bindings(directory: Path) -> ModuleType:
    """The bindings, with the libraries of `compile_stubs` already in the process."""
    for name in LIBRARIES:
        ctypes.CDLL(str(directory / f"{name}.so.11"))
    import tensorrt_bindings

    return tensorrt_bindings
