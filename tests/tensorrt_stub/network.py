"""A recorded network: TensorRT's rules for each layer, from its documentation, and the shapes that follow.

A layer that breaks a rule is refused as TensorRT does: None, and an error to the logger and the error recorder.
"""

from __future__ import annotations

import ctypes
import gc
import math
from typing import Any

import tensorrt_bindings as trt
import torch

from tensorrt_stub.signatures import Recorded

Type, Binary, Unary = trt.DataType, trt.ElementWiseOperation, trt.UnaryOperation
Collective, Reduce = trt.CollectiveOperation, trt.ReduceOperation
FLOATS, INTS = (Type.FLOAT, Type.HALF, Type.BF16), (Type.INT32, Type.INT64)
COMPARISONS, LOGIC = (Binary.EQUAL, Binary.LESS, Binary.GREATER), (Binary.AND, Binary.OR, Binary.XOR)
TORCH = {Type.FLOAT: torch.float32, Type.HALF: torch.float16, Type.BF16: torch.bfloat16, Type.INT32: torch.int32,
         Type.INT64: torch.int64, Type.BOOL: torch.bool}
Shape = tuple[int, ...]


class Refused(Exception):
    """A rule is broken; the text is TensorRT's to log."""


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise Refused(rule)


def broadcast(*shapes: Shape) -> Shape:
    """Of equal rank; each dimension is equal, 1, or known only when the network runs."""
    require(len({len(shape) for shape in shapes}) == 1, f"ranks differ: {shapes}")
    out = []
    for sizes in zip(*shapes, strict=True):
        large = {n for n in sizes if n != 1}
        require(len(large - {-1}) <= 1, f"dimensions cannot be broadcast: {shapes}")
        out.append(max(large, default=1))
    return tuple(out)


def fits(a: int, b: int) -> bool:
    return a == b or -1 in (a, b)


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
        self.dtype, self.ptr, self.size, self.nbytes = type, ptr, count, self.genuine.nbytes
        self.first_read = self.read()

    def stands_for(self) -> str:
        return "Weights"

    def read(self) -> bytes:
        return ctypes.string_at(self.ptr, self.nbytes)

    def tensor(self, shape: Shape) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.read()), dtype=TORCH[self.dtype]).reshape(shape)


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


Rule = tuple[Shape, Any]


def shapes_of(layer: Layer, *indices: int) -> list[Shape]:
    return [layer._in(i)._shape for i in indices]


def same_dtype(layer: Layer, *indices: int) -> Any:
    found = {layer._in(i)._dtype for i in indices}
    require(len(found) == 1, f"operands have different types: {sorted(map(str, found))}")
    return found.pop()


def gather_rule(layer: Layer) -> Rule:
    data, indices = shapes_of(layer, 0, 1)
    axis = layer._params["axis"]
    require(layer._in(1)._dtype in INTS and 0 <= axis < len(data), "indices must be integers, the axis one of the data")
    return data[:axis] + indices + data[axis + 1:], layer._in(0)._dtype


def elementwise_rule(layer: Layer) -> Rule:
    operation, dtype = layer._params["op"], same_dtype(layer, 0, 1)
    require((dtype == Type.BOOL) == (operation in LOGIC), f"{operation} of {dtype}")
    return broadcast(*shapes_of(layer, 0, 1)), Type.BOOL if operation in COMPARISONS else dtype


def unary_rule(layer: Layer) -> Rule:
    x = layer._in(0)
    require((x._dtype in FLOATS) == (layer._params["op"] != Unary.NOT), f"{layer._params['op']} of {x._dtype}")
    return x._shape, x._dtype


def float_rule(layer: Layer) -> Rule:
    require(layer._in(0)._dtype in FLOATS, f"of {layer._in(0)._dtype}")
    return layer._in(0)._shape, layer._in(0)._dtype


def softmax_rule(layer: Layer) -> Rule:
    axes = layer._values.get("axes", 1)
    require(axes.bit_count() == 1 and axes < 1 << len(layer._in(0)._shape), f"axes {axes:b}")
    return float_rule(layer)


def cast_rule(layer: Layer) -> Rule:
    return layer._in(0)._shape, layer._params["to_type"]


def reduce_rule(layer: Layer) -> Rule:
    (shape,), axes = shapes_of(layer, 0), layer._params["axes"]
    require(0 < axes < 1 << len(shape) and layer._params["keep_dims"], f"axes {axes:b} of {shape}")
    return tuple(1 if axes >> i & 1 else n for i, n in enumerate(shape)), float_rule(layer)[1]


def matmul_rule(layer: Layer) -> Rule:
    a, b = ((*s[:-2], s[-1], s[-2]) if layer._params[op] == trt.MatrixOperation.TRANSPOSE else s
            for s, op in zip(shapes_of(layer, 0, 1), ("op0", "op1"), strict=True))
    require(len(a) == len(b) >= 2, f"ranks differ: {a}, {b}")
    require(fits(a[-1], b[-2]), f"{a} times {b}")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1]), same_dtype(layer, 0, 1)


def shuffle_rule(layer: Layer) -> Rule:
    (shape,) = shapes_of(layer, 0)
    if "first_transpose" in layer._values:
        order = tuple(layer._values["first_transpose"])
        require(sorted(order) == list(range(len(shape))), f"{order} of {shape}")
        shape = tuple(shape[i] for i in order)
    if 1 in layer._inputs:
        require(layer._in(1)._dtype in INTS and len(layer._in(1)._shape) == 1, "the shape must be integers")
        return (-1,) * layer._in(1)._shape[0], layer._in(0)._dtype
    if "reshape_dims" in layer._values:
        dims = tuple(layer._values["reshape_dims"])
        require(dims.count(-1) <= 1, f"more than one -1 in {dims}")
        require(all(i < len(shape) for i, n in enumerate(dims) if n == 0), f"0 without a dimension in {dims}")
        # What 0 means after a transpose is not documented clearly enough to rely on.
        require(0 not in dims or "first_transpose" not in layer._values, "0 after a transpose")
        filled = [shape[i] if n == 0 else n for i, n in enumerate(dims)]
        known, total = math.prod(n for n in filled if n > 0), math.prod(n for n in shape if n > 0)
        if -1 not in shape:
            require(total % known == 0 and (-1 in dims or total == known), f"{shape} as {dims}")
            filled = [total // known if n == -1 else n for n in filled]
        shape = tuple(filled)
    return shape, layer._in(0)._dtype


def concatenation_rule(layer: Layer) -> Rule:
    shapes = shapes_of(layer, *layer._inputs)
    require(all(len(shape) == 1 for shape in shapes), "the recorder joins vectors only")
    return (sum(shape[0] for shape in shapes),), same_dtype(layer, *layer._inputs)


def select_rule(layer: Layer) -> Rule:
    require(layer._in(0)._dtype == Type.BOOL, "the condition must be boolean")
    return broadcast(*shapes_of(layer, 0, 1, 2)), same_dtype(layer, 1, 2)


def shape_rule(layer: Layer) -> Rule:
    return (len(layer._in(0)._shape),), Type.INT64


def rotary_rule(layer: Layer) -> Rule:
    x, cos, sin = shapes_of(layer, 0, 1, 2)
    dim = layer._params["rotary_embedding_dim"] or x[-1]
    require(len(x) == 4 and same_dtype(layer, 0, 1, 2) in FLOATS, f"input {x}")
    require(cos == sin and cos[-1] * 2 == dim <= x[-1] and dim % 2 == 0, f"tables {cos}, {sin} for {dim}")
    if 3 in layer._inputs:
        positions = layer._in(3)
        require(len(cos) == 2 and positions._dtype in INTS, f"tables {cos} with position ids {positions._dtype}")
        require(len(positions._shape) == 2 and fits(positions._shape[0], x[0]) and fits(positions._shape[1], x[2]),
                f"position ids {positions._shape} for {x}")
    return x, layer._in(0)._dtype


def cache_rule(layer: Layer) -> Rule:
    cache, update, write = shapes_of(layer, 0, 1, 2)
    require(layer._in(0)._source is None, "the cache must be an input of the network")
    require(len(cache) == 4 and cache[2] > 0, f"the cache's capacity must be static: {cache}")
    require(len(update) == 4 and all(fits(cache[i], update[i]) for i in (0, 1, 3)), f"{update} into {cache}")
    require(same_dtype(layer, 0, 1) in FLOATS, "caches are float32, float16 or bfloat16")
    require(layer._in(2)._dtype in INTS and len(write) == 1 and fits(write[0], cache[0]), f"write indices {write}")
    return cache, layer._in(0)._dtype


def attention_rule(layer: Layer) -> Rule:
    q, k, v = shapes_of(layer, 0, 1, 2)
    dtype = same_dtype(layer, 0, 1, 2)
    require(dtype in FLOATS and len(q) == len(k) == len(v) == 4 and k == v, f"{q}, {k}, {v}")
    require(min(q[1], q[3], k[1], k[3]) > 0, f"numbers of heads and their size must be known: {q}, {k}")
    require(q[1] % k[1] == 0 and q[3] == k[3] and fits(q[0], k[0]), f"{q} with {k}")
    mask = layer._values.get("mask")
    if mask is not None:
        require(layer._params["causal_kind"] == trt.CausalMaskKind.NONE, "a mask cannot go with a causal kind")
        require(mask._dtype in (Type.BOOL, dtype), f"a mask of {mask._dtype}")
        require(broadcast(mask._shape, (q[0], q[1], q[2], k[2])) is not None and fits(mask._shape[2], q[2])
                and fits(mask._shape[3], k[2]), f"mask {mask._shape} for {q}, {k}")
        mask._used = True
        layer._inputs[3] = mask
    return q, dtype


def collective_rule(layer: Layer) -> Rule:
    operation, reduce, ranks = layer._params["op"], layer._params["reduce_op"], layer._values.get("num_ranks", 1)
    require(isinstance(reduce, Reduce), f"reduce_op {reduce!r} is no ReduceOperation")
    require((reduce != Reduce.NONE) == (operation in (Collective.ALL_REDUCE, Collective.REDUCE,
                                                      Collective.REDUCE_SCATTER)), f"{operation} with {reduce}")
    require(layer._params["root"] == -1 and not layer._params["groups"], "all ranks, and no root")
    (shape,) = shapes_of(layer, 0)
    if operation == Collective.ALL_GATHER:
        shape = (shape[0] * ranks if shape[0] > 0 else -1, *shape[1:])
    return shape, float_rule(layer)[1]


class Network(Recorded, owner="INetworkDefinition"):
    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger, self._layers, self._inputs, self._outputs, self._tensors = logger, [], [], [], 0

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
