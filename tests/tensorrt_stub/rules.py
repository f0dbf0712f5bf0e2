"""TensorRT's rules for each layer, from its documentation, and the shape and type of what follows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tensorrt_bindings as trt

if TYPE_CHECKING:
    from tensorrt_stub.network import Layer

Type, Binary, Unary = trt.DataType, trt.ElementWiseOperation, trt.UnaryOperation
Collective, Reduce = trt.CollectiveOperation, trt.ReduceOperation
FLOATS, INTS = (Type.FLOAT, Type.HALF, Type.BF16), (Type.INT32, Type.INT64)
COMPARISONS, LOGIC = (Binary.EQUAL, Binary.LESS, Binary.GREATER), (Binary.AND, Binary.OR, Binary.XOR)
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


def dequantize_rule(layer: Layer) -> Rule:
    """Scales are one, one for each index of an axis, or, of int4, one for each block of the last dimensions."""
    data, scale, output = layer._in(0), layer._in(1), layer._params["output_type"]
    shape, scales = data._shape, scale._shape
    require(data._dtype in (Type.INT8, Type.INT4) and len(shape) > 0, f"{data._dtype} of {shape} cannot be dequantized")
    require(data._dtype != Type.INT4 or shape[-1] % 2 == 0, f"int4 are two a byte: {shape}")
    require(output in FLOATS and scale._dtype in (Type.FLOAT, output), f"{scale._dtype} scales for {output}")
    for tensor in (data, scale):
        require(tensor._source is not None and tensor._source._owner == "IConstantLayer", "weights must be constant")
    require(bool((scale._source._params["weights"].tensor(scales) > 0).all()), "scales must be positive")
    if math.prod(scales) > 1:
        axis = layer._values.get("axis", -1)
        known = axis != -1 or layer._network._complete
        require(not known or 0 <= axis < len(shape), f"axis {axis} of {shape}")
        if len(scales) == 1:
            require(not known or scales[0] == shape[axis], f"{scales[0]} scales for axis {axis} of {shape}")
        else:
            require(data._dtype == Type.INT4 and len(scales) == len(shape) == 2, f"blocks of {data._dtype} {shape}")
            blocks = [n // m if n % m == 0 else 0 for n, m in zip(shape, scales, strict=True)]
            require(0 not in blocks and 1 in blocks, f"{scales} scales of blocks of {shape}")
    return shape, output


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
