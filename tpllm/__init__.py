"""tpllm: tensor-parallel LLaMA inference started by mpirun and Slurm."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ModelRunner", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from tpllm.runner import ModelRunner
    from tpllm.sampling import SamplingParams

_HOMES = {"ModelRunner": "tpllm.runner", "SamplingParams": "tpllm.sampling"}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: `import tpllm` must load neither torch nor MPI."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tpllm' has no attribute {name!r}")
