"""The models by architecture name: those of the package, and one from a file of the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path

from tpllm.errors import DataError, UsageError
from tpllm.models.base import Model
from tpllm.models.llama import Llama

MODELS: dict[str, type[Model]] = {Llama.architecture: Llama}


def find_model(architecture: str, model_file: Path | None = None) -> type[Model]:
    """The class of an architecture, from `model_file` when one is given."""
    if model_file is not None:
        model = load_model_file(model_file)
        if model.architecture != architecture:
            raise UsageError(f"{model_file} defines {model.architecture!r}, the checkpoint holds {architecture!r}")
        return model
    if architecture not in MODELS:
        raise DataError(f"architecture {architecture!r} is not in the package ({', '.join(MODELS)}); "
                        "give the file that defines it: --model-file FILE.py")
    return MODELS[architecture]


def load_model_file(path: Path) -> type[Model]:
    """The one `Model` subclass that a Python file defines."""
    if not path.is_file():
        raise UsageError(f"no such model file: {path}")
    # A name of its own for each content: two files called model.py must not shadow each other.
    name = "tpllm_model_file_" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise UsageError(f"{path} cannot be imported: {type(e).__name__}: {e}") from e
    found = [c for _, c in inspect.getmembers(module, inspect.isclass)
             if issubclass(c, Model) and c.__module__ == name and not inspect.isabstract(c)]
    if len(found) != 1:
        raise UsageError(f"{path} must define exactly one subclass of tpllm.models.base.Model; it has {len(found)}")
    return found[0]
