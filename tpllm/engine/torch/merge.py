"""What a model does with its weights, found by asking it once before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tpllm.models.base import Model


@dataclass(frozen=True)
class Survey:
    """`groups`: the names given to each `linears`, in order. `norms`: what the sum of the n-th `add` is normed by.

    Sums that are used otherwise, but by another `add` or `select_rows`, are left out.
    """

    groups: list[tuple[str, ...]] = field(default_factory=list)
    norms: dict[int, str] = field(default_factory=dict)


def merged_name(names: tuple[str, ...]) -> str:
    """One name for weights joined along their rows."""
    return "_and_".join(names)


def survey(model: Model) -> Survey:
    """Ask a model; it may only use verbs on what verbs return."""
    listener: Any = Listener()
    model.forward(listener)
    return Survey(listener.groups, {n: name for n, name in listener.norms.items() if n not in listener.used})


class Listener:
    """`Ops` that compute nothing; each result is an object of its own."""

    def __init__(self) -> None:
        self.groups: list[tuple[str, ...]] = []
        self.norms: dict[int, str] = {}
        self.used: set[int] = set()  # sums that other verbs use than the three that know what to do with shares of them
        self._sums: list[object] = []

    def linears(self, x: object, *names: str) -> tuple[object, ...]:
        self.groups.append(names)
        self._use(x)
        return tuple(object() for _ in names)

    def split_qkv(self, qkv: object) -> tuple[object, object, object]:
        self._use(qkv)
        return object(), object(), object()

    def select_rows(self, x: object) -> object:
        return object()

    def add(self, a: object, b: object) -> object:
        self._sums.append(object())
        return self._sums[-1]

    def rms_norm(self, x: object, name: str) -> object:
        if x in self._sums:
            self.norms.setdefault(self._sums.index(x), name)
        return object()

    def _use(self, *arguments: object) -> object:
        self.used |= {n for n, made in enumerate(self._sums) if made in arguments}
        return object()

    def __getattr__(self, verb: str) -> Callable[..., object]:
        return self._use
