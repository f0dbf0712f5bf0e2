"""Products with quantized weights (`tpllm/quantization.py`), which become numbers on the way to the sum.

On CPU the compiler fuses the two for one row; many rows take a matrix in the model's dtype. On CUDA they are kernels
(`cuda_ops.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpllm.engine.torch.collectives import library
from tpllm.quantization import GROUP, WORDS

library.define("gemv_quantized(Tensor x, Tensor weight, Tensor scale, Tensor? norm, float epsilon, Tensor? residual, "
               "bool swiglu) -> Tensor")


@torch.library.impl(library, "gemv_quantized", "CUDA")
def _gemv_quantized(x: Tensor, weight: Tensor, scale: Tensor, norm: Tensor | None, epsilon: float,
                    residual: Tensor | None, swiglu: bool) -> Tensor:
    # Triton is there on machines with GPUs only.
    from tpllm.engine.torch.kernels.gemv_quantized import gemv

    product: Tensor = gemv(x, weight, scale, norm, epsilon, residual, swiglu)
    return product


@torch.library.register_fake("tpllm::gemv_quantized", lib=library)
def _(x: Tensor, weight: Tensor, scale: Tensor, norm: Tensor | None, epsilon: float, residual: Tensor | None,
      swiglu: bool) -> Tensor:
    return x.new_empty((1, weight.shape[0] // 2 if swiglu else weight.shape[0]))


def linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`[T, out]`: x `[T, in]` times the weight that the two stand for, which is written out."""
    return F.linear(x, dequantized(weight, scale, x.shape[1]).to(x.dtype))


def row_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same of one row, `[out]` in float32, in a form that the compiler makes one loop of."""
    if weight.dtype == torch.int8:
        return (x.float() * weight.float()).sum(-1) * scale
    columns = F.pad(x.float(), (0, scale.shape[1] * GROUP - x.shape[1]))
    by_group = (columns.view(-1, GROUP // WORDS, WORDS) * unpacked(weight, scale)).sum((-1, -2))
    return (by_group * scale).sum(-1)


def dequantized(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    """`[out, columns]` in float32."""
    if weight.dtype == torch.int8:
        return weight.float() * scale[:, None]
    return (unpacked(weight, scale) * scale.float()[:, :, None, None]).flatten(1)[:, :columns]


def unpacked(weight: Tensor, scale: Tensor) -> Tensor:
    """Int4 words as numbers `[out, groups, 8, 16]`, in the order of columns."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)[:, None]
    return ((weight.view(*scale.shape, 1, WORDS) >> shifts) & 15).float() - 8
