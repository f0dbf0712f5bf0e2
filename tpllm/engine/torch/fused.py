"""Decode of one sequence: the model's verbs recognized in the sequences that one kernel can answer.

A verb's result remembers how it was made; when a later verb can do both at once it starts again from the earlier
input. What then nobody uses is dropped when the graph is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tpllm.engine.torch.collectives import library
from tpllm.engine.torch.merge import merged_name
from tpllm.engine.torch.program import StepProgram, TorchOps

library.define("gemv(Tensor x, Tensor weight, Tensor? norm, float epsilon, Tensor? residual, bool swiglu) -> Tensor")


@torch.library.impl(library, "gemv", "CUDA")
def _gemv(x: Tensor, weight: Tensor, norm: Tensor | None, epsilon: float, residual: Tensor | None,
          swiglu: bool) -> Tensor:
    # Triton is there on machines with GPUs only.
    from tpllm.engine.torch.kernels.gemv import gemv

    return gemv(x, weight, norm, epsilon, residual, swiglu)


@torch.library.register_fake("tpllm::gemv", lib=library)
def _(x: Tensor, weight: Tensor, norm: Tensor | None, epsilon: float, residual: Tensor | None, swiglu: bool) -> Tensor:
    return x.new_empty((1, weight.shape[0] // 2 if swiglu else weight.shape[0]))


class Origin(NamedTuple):
    """How a tensor was made: by which verb, from what, with which weights."""

    verb: str
    source: Tensor
    names: tuple[str, ...] = ()
    part: int = 0


RECENT = 16  # a verb's result is used soon or not at all


class FusedOps(TorchOps):
    """`TorchOps` for activations of one row on CUDA."""

    def __init__(self, *step: Any) -> None:
        super().__init__(*step)
        self._origins: list[tuple[Tensor, Origin]] = []

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        made = super().rms_norm(x, name)
        known = self._normed and made is self._normed[2]
        return made if known else self._remember(made, Origin("rms_norm", x, (name,)))

    def linear(self, x: Tensor, name: str) -> Tensor:
        if (bias := self._find(name + ".bias")) is not None:
            return self._product(x, name) + bias
        product = self._remember(self._product(x, name), Origin("linear", x, (name,)))
        self._made = (product, x, self._get(name + ".weight")) if self._scale(name) is None else None
        return product

    def linears(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        if names not in self.program.survey.groups or self._find(merged_name(names) + ".bias") is not None:
            return super().linears(x, *names)
        parts = super().linears(x, *names)
        return tuple(self._remember(part, Origin("linears", x, names, i)) for i, part in enumerate(parts))

    def silu(self, x: Tensor) -> Tensor:
        return self._remember(super().silu(x), Origin("silu", x))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        silu, second = self._origin(a, "silu"), self._origin(b, "linears")
        first = self._origin(silu.source, "linears") if silu else None
        if first and second and (first.source is second.source, first.names, first.part, second.part) == (
                True, second.names, 0, 1) and len(first.names) == 2:
            return self._product(first.source, merged_name(first.names), swiglu=True)
        return super().mul(a, b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        if linear := self._origin(b, "linear"):
            return self._product(linear.source, linear.names[0], residual=a)
        return super().add(a, b)

    def _product(self, x: Tensor, name: str, residual: Tensor | None = None, swiglu: bool = False) -> Tensor:
        norm = None
        if origin := self._origin(x, "rms_norm"):
            x, norm = origin.source, self._get(origin.names[0] + ".weight")
        weight, scale, rest = self._get(name + ".weight"), self._scale(name), (norm, self.config.norm_epsilon, residual,
                                                                               swiglu)
        result: Tensor = (torch.ops.tpllm.gemv(x, weight, *rest) if scale is None
                          else torch.ops.tpllm.gemv_quantized(x, weight, scale, *rest))
        return result

    def _remember(self, made: Tensor, origin: Origin) -> Tensor:
        self._origins.append((made, origin))
        return made

    def _origin(self, tensor: Tensor, verb: str) -> Origin | None:
        found = [origin for made, origin in self._origins[-RECENT:] if made is tensor and origin.verb == verb]
        return found[-1] if found else None


class DecodeProgram(nn.Module):
    """A step of one new token of one sequence: fewer inputs than a `StepProgram`'s, and fewer kernels."""

    def __init__(self, step: StepProgram) -> None:
        super().__init__()
        self.step = step

    def forward(self, tokens: Tensor, start: Tensor, length: Tensor, cache: Tensor) -> Tensor:
        """`tokens`, `start`, `length` `[1]` and the arena → float32 logits `[1, vocab]`."""
        runs = (length, start, length)  # one sequence, and it has one token: any `query_start` of one entry says so
        # Nobody asks for the arena's row, which this kernel finds by itself: in `start`'s place its sum with the
        # position would be a kernel in front of every layer's attention.
        return self.step.model.forward(FusedOps(self.step, tokens, length - 1, start, runs, None, cache))
