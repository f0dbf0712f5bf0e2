"""Decode of one sequence: more of the model's verbs are answered by one kernel than of several rows (`cuda_ops.py`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpllm.engine.torch.collectives import library
from tpllm.engine.torch.cuda_ops import CudaOps, Origin
from tpllm.engine.torch.program import StepProgram

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


class FusedOps(CudaOps):
    """`CudaOps` for activations of one row, of a graph that is exported."""

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        made = super().rms_norm(x, name)
        known = self._normed and made is self._normed[2]
        return made if known else self._remember(made, Origin("rms_norm", x, (name,)))

    def linear(self, x: Tensor, name: str) -> Tensor:
        if (bias := self._find(name + ".bias")) is not None:
            return self._product(x, name) + bias
        product = self._remember(self._product(x, name), Origin("linear", x, (name,)))
        self._made = (product, x, self._get(name + ".weight"), None) if self._scale(name) is None else None
        return product

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        if linear := self._origin(b, "linear"):
            return self._product(linear.source, linear.names[0], residual=a)
        return super().add(a, b)

    def _swiglu(self, x: Tensor, name: str) -> Tensor:
        return self._product(x, name, swiglu=True)

    def _product(self, x: Tensor, name: str, residual: Tensor | None = None, swiglu: bool = False) -> Tensor:
        norm = None
        if origin := self._origin(x, "rms_norm"):
            x, norm = origin.source, self._get(origin.names[0] + ".weight")
        weight, scale, rest = self._get(name + ".weight"), self._scale(name), (norm, self.config.norm_epsilon, residual,
                                                                               swiglu)
        result: Tensor = (torch.ops.tpllm.gemv(x, weight, *rest) if scale is None
                          else torch.ops.tpllm.gemv_quantized(x, weight, scale, *rest))
        return result


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
