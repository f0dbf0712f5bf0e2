"""Engines: what turns a rank's checkpoint and the model's definition into logits, by backend name."""

from __future__ import annotations

import importlib

from tpllm.engine.base import Backend
from tpllm.errors import UsageError

BACKENDS = {
    "inductor": "tpllm.engine.torch.inductor:InductorBackend",
    "eager": "tpllm.engine.torch.eager:EagerBackend",
}


def find_backend(name: str) -> Backend:
    """The backend of that name; only then are its libraries imported."""
    if name not in BACKENDS:
        raise UsageError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    module, cls = BACKENDS[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), cls)()
    return backend
