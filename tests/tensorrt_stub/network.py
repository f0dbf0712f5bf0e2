"""A recorded network; `rules` has what TensorRT demands of each layer.

A layer that breaks a rule is refused as TensorRT does: None, and an error to the logger and the error recorder.
"""

from __future__ import annotations

import ctypes
import gc
import math
from typing import Any

import tensorrt_bindings as trt
import torch

from tensorrt_stub.rules import (
    Refused,
    Rule,
    Shape,
    attention_rule,
    cache_rule,
    cast_rule,
    collective_rule,
    concatenation_rule,
    dequantize_rule,
    elementwise_rule,
    float_rule,
    gather_rule,
    matmul_rule,
    reduce_rule,
    require,
    rotary_rule,
    select_rule,
    shape_rule,
    shuffle_rule,
    softmax_rule,
    unary_rule,
)
from tensorrt_stub.signatures import Recorded

Type = trt.DataType
TORCH = {Type.FLOAT: torch.float32, Type.HALF: torch.float16, Type.BF16: torch.bfloat16, Type.INT32: torch.int32,
         Type.INT64: torch.int64, Type.BOOL: torch.bool, Type.INT8: torch.int8, Type.INT4: torch.int8}


class Tensor(Recorded, owner="ITensor"):
    def __init__(self, number: int, shape: Shape, dtype: Any, source: Any) -> None:
        super().__init__()
        self._number, self._source, self._used = number, source, False
        self._shape, self._dims = shape, {}
        self._values.update(name=f"(Unnamed ITensor* {number})", dtype=dtype)

    @property
    def _dtype(self) -> Any:
        return self._values["dtype"]

    def __getattr__(self, name: str) -> Any:
        return trt.Dims(self._shape) if name == "shape" else super().__getattr__(name)

    def set_dimension_name(self, index: int, name: str) -> None:
        assert self._source is None and 0 <= index < len(self._shape)
        self._dims[index] = name


class Weights:
    """`trt.Weights` of the pointer form, which is all that can carry bfloat16; the genuine object is made too."""

    def __init__(self, type: Any, ptr: int, count: int) -> None:
        self.genuine = trt.Weights(type, ptr, count)
        # The genuine object does not know the size of int4.
        self.dtype, self.ptr, self.size = type, ptr, count
        self.nbytes = -(-count // 2) if type == Type.INT4 else self.genuine.nbytes
        self.first_read = self.read()

    def stands_for(self) -> str:
        return "Weights"

    def read(self) -> bytes:
        return ctypes.string_at(self.ptr, self.nbytes)

    def tensor(self, shape: Shape) -> torch.Tensor:
        if self.dtype != Type.INT4:
            return torch.frombuffer(bytearray(self.read()), dtype=TORCH[self.dtype]).reshape(shape)
        # Two a byte, in two's complement, the first in the lower half.
        values = [(byte >> shift & 15) - 16 * (byte >> shift + 3 & 1) for byte in self.read() for shift in (0, 4)]
        return torch.tensor(values, dtype=torch.int8).reshape(shape)


def owned_memory() -> list[tuple[int, int]]:
    """Where every tensor that is alive has its memory."""
    found = []
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return found


class Layer(Recorded):
    """Of any kind; `rule` checks its inputs and gives its output's shape and dtype, again after each change."""

    def __init__(self, network: Network, owner: str, inputs: list[Tensor], rule: Any, **params: Any) -> None:
        super().__init__(owner)
        self._network, self._inputs, self._rule, self._params = network, dict(enumerate(inputs)), rule, params
        self._values["name"] = f"(Unnamed Layer* {len(network._layers)}) [{owner}]"
        if owner == "IAttention":
            self._values["mask"] = None
        shape, dtype = rule(self)
        self._output = Tensor(network._count(), shape, dtype, self)
        for tensor in inputs:
            tensor._used = True
        network._layers.append(self)

    def _in(self, index: int) -> Tensor:
        tensor: Tensor = self._inputs[index]
        return tensor

    def _changed(self, name: str) -> None:
        if name == "name":
            return
        assert not self._output._used, f"{self.name}: {name} changed after its output was used"
        try:
            self._output._shape, _ = self._rule(self)
        except Refused as e:
            self._network._refuse(f"{self.name}: {e}")
            if name == "mask":
                self._values["mask"] = None  # it is not set, and nothing else says so

    def set_input(self, index: int, tensor: Tensor) -> None:
        self._inputs[index] = tensor
        tensor._used = True
        self._changed(f"input {index}")

    def get_output(self, index: int) -> Tensor | None:
        return self._output if index == 0 else None


class Network(Recorded, owner="INetworkDefinition"):
    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger, self._layers, self._inputs, self._outputs, self._tensors = logger, [], [], [], 0
        self._complete = False  # it is being built: nothing will be set any more

    def _count(self) -> int:
        self._tensors += 1
        return int(self._tensors)

    def _refuse(self, text: str) -> None:
        report(self._logger, self._values.get("error_recorder"), f"[network.cpp::add::1] Error Code 3: API Usage Error "
                                                                 f"({text})")

    def _layer(self, owner: str, inputs: list[Tensor], rule: Any, **params: Any) -> Layer | None:
        try:
            return Layer(self, owner, inputs, rule, **params)
        except Refused as e:
            self._refuse(f"{owner}: {e}")
            return None

    def add_input(self, name: str, dtype: Any, shape: Any) -> Tensor | None:
        if name in [tensor.name for tensor in self._inputs]:
            return self._refuse(f"two inputs {name}")
        tensor = Tensor(self._count(), tuple(shape), dtype, None)
        tensor.name = name
        self._inputs.append(tensor)
        return tensor

    def mark_output(self, tensor: Tensor) -> None:
        self._outputs.append(tensor)

    def add_constant(self, shape: Any, weights: Weights) -> Layer | None:
        def rule(layer: Layer) -> Rule:
            require(weights.dtype != Type.BOOL and math.prod(shape) == weights.size, f"{weights.size} for {shape}")
            return tuple(shape), weights.dtype

        return self._layer("IConstantLayer", [], rule, weights=weights)

    def add_gather(self, input: Tensor, indices: Tensor, axis: int) -> Layer | None:
        return self._layer("IGatherLayer", [input, indices], gather_rule, axis=axis)

    def add_elementwise(self, input1: Tensor, input2: Tensor, op: Any) -> Layer | None:
        return self._layer("IElementWiseLayer", [input1, input2], elementwise_rule, op=op)

    def add_unary(self, input: Tensor, op: Any) -> Layer | None:
        return self._layer("IUnaryLayer", [input], unary_rule, op=op)

    def add_activation(self, input: Tensor, type: Any) -> Layer | None:
        return self._layer("IActivationLayer", [input], float_rule, type=type)

    def add_reduce(self, input: Tensor, op: Any, axes: int, keep_dims: bool) -> Layer | None:
        return self._layer("IReduceLayer", [input], reduce_rule, op=op, axes=axes, keep_dims=keep_dims)

    def add_cast(self, input: Tensor, to_type: Any) -> Layer | None:
        return self._layer("ICastLayer", [input], cast_rule, to_type=to_type)

    def add_matrix_multiply(self, input0: Tensor, op0: Any, input1: Tensor, op1: Any) -> Layer | None:
        return self._layer("IMatrixMultiplyLayer", [input0, input1], matmul_rule, op0=op0, op1=op1)

    def add_dequantize(self, input: Tensor, scale: Tensor, output_type: Any) -> Layer | None:
        return self._layer("IDequantizeLayer", [input, scale], dequantize_rule, output_type=output_type)

    def add_shuffle(self, input: Tensor) -> Layer | None:
        return self._layer("IShuffleLayer", [input], shuffle_rule)

    def add_concatenation(self, inputs: list[Tensor]) -> Layer | None:
        return self._layer("IConcatenationLayer", list(inputs), concatenation_rule)

    def add_select(self, condition: Tensor, then_input: Tensor, else_input: Tensor) -> Layer | None:
        return self._layer("ISelectLayer", [condition, then_input, else_input], select_rule)

    def add_softmax(self, input: Tensor) -> Layer | None:
        return self._layer("ISoftMaxLayer", [input], softmax_rule)

    def add_shape(self, input: Tensor) -> Layer | None:
        return self._layer("IShapeLayer", [input], shape_rule)

    def add_rotary_embedding(self, input: Tensor, cos_cache: Tensor, sin_cache: Tensor, interleaved: bool,
                             rotary_embedding_dim: int) -> Layer | None:
        return self._layer("IRotaryEmbeddingLayer", [input, cos_cache, sin_cache], rotary_rule,
                           interleaved=interleaved, rotary_embedding_dim=rotary_embedding_dim)

    def add_kv_cache_update(self, cache: Tensor, update: Tensor, write_indices: Tensor,
                            cache_mode: Any) -> Layer | None:
        return self._layer("IKVCacheUpdateLayer", [cache, update, write_indices], cache_rule, mode=cache_mode)

    def add_attention_v2(self, query: Tensor, key: Tensor, value: Tensor, norm_op: Any,
                         causal_kind: Any) -> Layer | None:
        return self._layer("IAttention", [query, key, value], attention_rule, norm_op=norm_op, causal_kind=causal_kind)

    def add_dist_collective(self, input: Tensor, dist_collective_op: Any, reduce_op: Any, root: Any,
                            groups: Any) -> Layer | None:
        return self._layer("IDistCollectiveLayer", [input], collective_rule, op=dist_collective_op,
                           reduce_op=reduce_op, root=root, groups=groups)


def report(logger: Any, recorder: Any, text: str) -> None:
    """An error goes to the error recorder where there is one, else to the logger."""
    if recorder is not None:
        recorder.report_error(trt.ErrorCodeTRT.INVALID_ARGUMENT, text)
    else:
        logger.log(trt.ILogger.Severity.ERROR, text)
