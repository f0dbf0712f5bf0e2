"""What each layer computes, in PyTorch, from TensorRT's documentation of the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorrt_bindings as trt
import torch
from torch import Tensor

from tensorrt_stub.network import TORCH

Binary, Unary = trt.ElementWiseOperation, trt.UnaryOperation
BINARY: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    Binary.SUM: torch.add, Binary.PROD: torch.mul, Binary.MAX: torch.maximum, Binary.MIN: torch.minimum,
    Binary.SUB: torch.sub, Binary.EQUAL: torch.eq, Binary.LESS: torch.lt, Binary.GREATER: torch.gt,
}  # fmt: skip
UNARY = {Unary.SQRT: torch.sqrt, Unary.RECIP: torch.reciprocal, Unary.NOT: torch.logical_not}


class Interpreter:
    """Runs a plan's layers one after the other. `reduce` sums and `gather` lists a tensor over the ranks."""

    def __init__(self, layers: list[dict[str, Any]], reduce: Callable[[Tensor], Tensor],
                 gather: Callable[[Tensor], list[Tensor]]) -> None:
        self.layers, self.reduce, self.gather = layers, reduce, gather

    def run(self, values: dict[int, Tensor]) -> None:
        """Fills `values`, which holds the network's inputs, with every layer's output, by number."""
        for layer in self.layers:
            inputs = {i: values[number] for i, number in layer["inputs"].items()}
            values[layer["output"]] = getattr(self, layer["kind"])(inputs, layer["params"], layer["values"])

    def IConstantLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        constant: Tensor = params["constant"]
        return constant

    def IGatherLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        data, indices, axis = x[0], x[1].long(), params["axis"]
        assert 0 <= int(indices.min()) and int(indices.max()) < data.shape[axis], "gather beyond its data"
        return data.index_select(axis, indices.flatten()).reshape(data.shape[:axis] + indices.shape
                                                                  + data.shape[axis + 1:])

    def IElementWiseLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return BINARY[params["op"]](x[0], x[1])

    def IUnaryLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return UNARY[params["op"]](x[0])

    def IActivationLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        assert params["type"] == trt.ActivationType.SIGMOID
        return x[0].sigmoid()

    def IReduceLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        assert params["op"] == trt.ReduceOperation.AVG
        return x[0].mean([i for i in range(x[0].dim()) if params["axes"] >> i & 1], keepdim=params["keep_dims"])

    def ICastLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return x[0].to(TORCH[params["to_type"]])

    def IDequantizeLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        data, scale = x[0], x[1]
        if scale.dim() == 1 and scale.numel() > 1:
            scale = scale.reshape([-1 if i == values["axis"] else 1 for i in range(data.dim())])
        elif scale.numel() > 1:
            for axis, size in enumerate(data.shape):
                scale = scale.index_select(axis, torch.arange(size) // (size // scale.shape[axis]))
        return (data.float() * scale.float()).to(TORCH[params["output_type"]])

    def IMatrixMultiplyLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        a, b = (x[i].mT if params[f"op{i}"] == trt.MatrixOperation.TRANSPOSE else x[i] for i in (0, 1))
        return a @ b

    def IShuffleLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        data = x[0].permute(values["first_transpose"]) if "first_transpose" in values else x[0]
        if 1 in x:
            return data.reshape(x[1].tolist())
        if "reshape_dims" not in values:
            return data
        return data.reshape([data.shape[i] if n == 0 else n for i, n in enumerate(values["reshape_dims"])])

    def IConcatenationLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return torch.cat([x[i] for i in sorted(x)])

    def ISelectLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return torch.where(x[0], x[1], x[2])

    def ISoftMaxLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return x[0].softmax(values["axes"].bit_length() - 1)

    def IShapeLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        return torch.tensor(x[0].shape)

    def IRotaryEmbeddingLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        assert not params["interleaved"]
        data, cos, sin = x[0], x[1], x[2]
        if 3 in x:
            assert int(x[3].max()) < len(cos) and int(x[3].min()) >= 0, "a position beyond the tables"
            cos, sin = cos[x[3].long()], sin[x[3].long()]
        cos, sin = cos[:, None], sin[:, None]  # [B, 1, S, dim/2]: the same for every head
        dim = params["rotary_embedding_dim"] or data.shape[-1]
        real, imaginary, rest = data.split([dim // 2, dim // 2, data.shape[-1] - dim], dim=-1)
        return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos, rest], dim=-1)

    def IKVCacheUpdateLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        cache, update, write = x[0], x[1], x[2].tolist()
        for i, first in enumerate(write):
            # TensorRT ignores what lies outside; what becomes of the rest of such an update is not documented.
            assert 0 <= first and first + update.shape[2] <= cache.shape[2], "an update outside of the cache"
            cache[i, :, first:first + update.shape[2]] = update[i]
        return cache  # in place

    def IAttention(self, x: Any, params: Any, values: Any) -> Tensor:
        assert params["norm_op"] == trt.AttentionNormalizationOp.SOFTMAX
        assert params["causal_kind"] == trt.CausalMaskKind.NONE, "the recorder knows explicit masks only"
        q, k, v = (x[i].float() for i in range(3))
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        scores = q @ k.mT  # without a scale
        if 3 in x:
            mask = x[3]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return (scores.softmax(-1) @ v).to(x[0].dtype)

    def IDistCollectiveLayer(self, x: Any, params: Any, values: Any) -> Tensor:
        if params["op"] == trt.CollectiveOperation.ALL_REDUCE:
            assert params["reduce_op"] == trt.ReduceOperation.SUM
            return self.reduce(x[0])
        assert params["op"] == trt.CollectiveOperation.ALL_GATHER
        return torch.cat(self.gather(x[0]))
