"""Which weights are always multiplied with the same input, found by asking the model once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpllm.models.base import Model


def merged_name(names: tuple[str, ...]) -> str:
    """One name for weights joined along their rows."""
    return "_and_".join(names)


def shared_inputs(model: Model) -> list[tuple[str, ...]]:
    """The names given to each `linears`, in order; a model may only use verbs on what verbs return."""
    listener: Any = Listener()
    model.forward(listener)
    groups: list[tuple[str, ...]] = listener.groups
    return groups


class Listener:
    """`Ops` that compute nothing."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, ...]] = []

    def linears(self, x: None, *names: str) -> tuple[None, ...]:
        self.groups.append(names)
        return (None,) * len(names)

    def split_qkv(self, qkv: None) -> tuple[None, None, None]:
        return None, None, None

    def __getattr__(self, verb: str) -> Callable[..., None]:
        return lambda *arguments: None
