"""The model's verbs on a GPU: sequences of them that one kernel can answer are recognized when a graph is exported.

A verb's result remembers how it was made; when a later verb can do both at once it starts again from the earlier
input. What then nobody uses is dropped when the graph is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tpllm.engine.torch.attention import rotate_and_attend, rotation
from tpllm.engine.torch.collectives import (
    all_reduce_add_norm,
    library,
    linear_all_reduce_add_norm,
    select_summed_rows,
)
from tpllm.engine.torch.merge import merged_name
from tpllm.engine.torch.program import INV_FREQ, TorchOps

# A scale is that of a quantized weight.
library.define("linear(Tensor x, Tensor weight, Tensor? scale) -> Tensor")
library.define("linear_swiglu(Tensor x, Tensor weight, Tensor? scale) -> Tensor")
library.define("linear_add_norm(Tensor x, Tensor weight, Tensor? scale, Tensor residual, Tensor norm, float epsilon) "
               "-> Tensor")


@torch.library.impl(library, "linear", "CUDA")
def _linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    # Triton is there on machines with GPUs only.
    from tpllm.engine.torch.kernels.few import linear

    return linear(x, weight, scale)


@torch.library.impl(library, "linear_swiglu", "CUDA")
def _linear_swiglu(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    from tpllm.engine.torch.kernels.few import linear_swiglu

    return linear_swiglu(x, weight, scale)


@torch.library.impl(library, "linear_add_norm", "CUDA")
def _linear_add_norm(x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor, norm: Tensor,
                     epsilon: float) -> Tensor:
    from tpllm.engine.torch.kernels.few import linear_add_norm

    return linear_add_norm(x, weight, scale, residual, norm, epsilon)


@torch.library.register_fake("tpllm::linear", lib=library)
def _(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("tpllm::linear_swiglu", lib=library)
def _(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


@torch.library.register_fake("tpllm::linear_add_norm", lib=library)
def _(x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor, norm: Tensor, epsilon: float) -> Tensor:
    return x.new_empty((2, *residual.shape))


class Origin(NamedTuple):
    """How a tensor was made: by which verb, from what, with which weights."""

    verb: str
    source: Tensor
    names: tuple[str, ...] = ()
    part: int = 0


RECENT = 16  # a verb's result is used soon or not at all


class CudaOps(TorchOps):
    """`TorchOps` on CUDA."""

    def __init__(self, *step: Any) -> None:
        super().__init__(*step)
        self._origins: list[tuple[Tensor, Origin]] = []
        self._rotations: list[tuple[Tensor, Tensor]] = []  # (rotated, what it was before)
        self._adds = 0
        # The last product without a bias, of what, and of which weight and scale.
        self._made: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        self._reduced: tuple[Tensor, Tensor] | None = None  # the last all-reduce's result, what it was made of
        self._normed: tuple[Tensor, str, Tensor] | None = None  # the last sum normed in the same kernel, its norm
        self._shared: list[Tensor] = []  # sums of which this rank may have only some rows

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(positions, self._get(INV_FREQ))

    def _remember(self, made: Tensor, origin: Origin) -> Tensor:
        self._origins.append((made, origin))
        return made

    def _origin(self, tensor: Tensor, verb: str) -> Origin | None:
        found = [origin for made, origin in self._origins[-RECENT:] if made is tensor and origin.verb == verb]
        return found[-1] if found else None

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        if self._normed and x is self._normed[0] and name == self._normed[1]:
            return self._normed[2]
        return super().rms_norm(self._whole(x), name)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias, scale = self._get(name + ".weight"), self._find(name + ".bias"), self._scale(name)
        self._made = None
        if bias is not None and scale is None:
            return super().linear(x, name)
        product: Tensor = torch.ops.tpllm.linear(x, weight, scale)
        if bias is not None:
            return product + bias
        self._made = (product, x, weight, scale)
        return product

    def linears(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        parts = super().linears(x, *names)
        if names not in self.program.survey.groups or self._find(merged_name(names) + ".bias") is not None:
            return parts
        return tuple(self._remember(part, Origin("linears", x, names, i)) for i, part in enumerate(parts))

    def rope(self, x: Tensor) -> Tensor:
        rotated = super().rope(x)
        self._rotations.append((rotated, x))
        return rotated

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        # The kernel rotates what it loads anyway; the rotation that the model asked for is then used by nobody.
        before = [x for tensor in (q, k) for rotated, x in self._rotations if rotated is tensor]
        self._rotations.clear()
        cos, sin = self.cos, self.sin
        if len(before) == 2:
            q, k = before
        else:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        return rotate_and_attend(q, k, v, cos, sin, self.cache, layer, self.slots, *self.runs).flatten(1)

    def silu(self, x: Tensor) -> Tensor:
        return self._remember(super().silu(x), Origin("silu", x))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        silu, second = self._origin(a, "silu"), self._origin(b, "linears")
        first = self._origin(silu.source, "linears") if silu else None
        if first and second and (first.source is second.source, first.names, first.part, second.part) == (
                True, second.names, 0, 1) and len(first.names) == 2:
            fused = self._swiglu(first.source, merged_name(first.names))
            if fused is not None:
                return fused
        return super().mul(a, b)

    def _swiglu(self, x: Tensor, name: str) -> Tensor | None:
        """Of both halves of a product, if one kernel makes it."""
        if not torch.compiler.is_exporting():
            return None
        fused: Tensor = torch.ops.tpllm.linear_swiglu(x, self._get(name + ".weight"), self._scale(name))
        return fused

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        norm, exporting = self.program.survey.norms.get(self._adds), torch.compiler.is_exporting()
        self._adds += 1
        # A product or all-reduce alone is then used by nobody and dropped by the compiler.
        if norm is not None and exporting and (summed := self._summed(a, b, self._get(norm + ".weight"))):
            self._normed = (summed[0], norm, summed[1])
            return summed[0]
        a, b = self._whole(a), self._whole(b)
        if exporting:
            # The same sum, but none that Inductor makes part of the product before it, which would begin with a
            # copy of the residual: here it becomes part of the norm behind it.
            return (a.float() + b.float()).to(a.dtype)
        return a + b

    def _summed(self, a: Tensor, b: Tensor, norm: Tensor) -> tuple[Tensor, Tensor] | None:
        """The sum and its norm, if one operator makes both."""
        epsilon = self.config.norm_epsilon
        if self.tp_size == 1 and self._made and b is self._made[0]:
            _, x, weight, scale = self._made
            total, normed = torch.ops.tpllm.linear_add_norm(x, weight, scale, a, norm, epsilon).unbind(0)
            return total, normed
        if self._reduced is None or b is not self._reduced[0]:
            return None
        product = self._reduced[1]
        if self._made is None or product is not self._made[0]:
            return all_reduce_add_norm(product, self._whole(a), norm, epsilon)
        total, normed = linear_all_reduce_add_norm(*self._made[1:], a, norm, epsilon)
        self._shared.append(total)
        return total, normed

    def all_reduce(self, x: Tensor) -> Tensor:
        reduced = super().all_reduce(x)
        self._reduced = (reduced, x) if self.tp_size > 1 else None
        return reduced

    def select_rows(self, x: Tensor) -> Tensor:
        shared = self.rows is not None and self._is_shared(x)
        return select_summed_rows(x, self.rows) if shared else super().select_rows(x)

    def _whole(self, x: Tensor) -> Tensor:
        return select_summed_rows(x, None) if self._is_shared(x) else x

    def _is_shared(self, x: Tensor) -> bool:
        return any(x is total for total in self._shared)
