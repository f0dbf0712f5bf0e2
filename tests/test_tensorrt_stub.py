"""The stand-in for TensorRT: it refuses what the genuine bindings refuse, and what TensorRT documents as wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import tensorrt_stub
import torch
from tensorrt_stub import genuine

pytestmark = pytest.mark.skipif(genuine.lacking() is not None, reason=str(genuine.lacking()))


class Sketch:
    """A network on its way, with a logger that keeps errors."""

    def __init__(self, trt: ModuleType) -> None:
        class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, msg: str) -> None:
                self.errors.append(msg)

        self.trt, self.logger = trt, Logger()
        self.builder = trt.Builder(self.logger)
        self.network = self.builder.create_network()
        self.config = self.builder.create_builder_config()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kept: list[torch.Tensor] = []

    def input(self, shape: tuple[int, ...], dtype: str = "FLOAT", dynamic: int | None = None) -> Any:
        name = f"x{len(self.shapes)}"
        self.shapes[name] = shape
        declared = tuple(-1 if i == dynamic else n for i, n in enumerate(shape))
        return self.network.add_input(name, self.trt.DataType.__members__[dtype], declared)

    def constant(self, value: torch.Tensor, keep: bool = True) -> Any:
        if keep:
            self.kept.append(value)
        weights = self.trt.Weights(self.trt.DataType.FLOAT, value.data_ptr(), value.numel())
        return self.network.add_constant(tuple(value.shape), weights).get_output(0)

    def integers(self, shape: tuple[int, ...], dtype: str = "INT8") -> Any:
        """Constant: 0, 1, 2, … of int8, or int4 that are 0 and 1 in turns."""
        count = math.prod(shape)
        value = torch.arange(count, dtype=torch.int8) if dtype == "INT8" else torch.full((count,), 16, dtype=torch.int8)
        self.kept.append(value)
        weights = self.trt.Weights(self.trt.DataType.__members__[dtype], value.data_ptr(), count)
        return self.network.add_constant(shape, weights).get_output(0)

    def build(self) -> Any:
        profile = self.builder.create_optimization_profile()
        for name, shape in self.shapes.items():
            profile.set_shape(name, shape, shape, shape)
        assert self.config.add_optimization_profile(profile) == 0
        return self.builder.build_serialized_network(self.network, self.config)


@pytest.fixture
def net(trt: ModuleType) -> Sketch:
    return Sketch(trt)


WRONG_CALLS: dict[str, Callable[[Any, Any, Any], object]] = {
    "no such method": lambda net, trt, x: net.network.add_matmul(x, x),
    "missing argument": lambda net, trt, x: net.network.add_gather(x, x),
    "one too many": lambda net, trt, x: net.network.add_shape(x, 1),
    "order": lambda net, trt, x: net.network.add_matrix_multiply(x, x, trt.MatrixOperation.NONE,
                                                                 trt.MatrixOperation.NONE),
    "another enum": lambda net, trt, x: net.network.add_elementwise(x, x, trt.UnaryOperation.SQRT),
    "number for enum": lambda net, trt, x: net.network.add_elementwise(x, x, 0),
    "float for int": lambda net, trt, x: net.network.add_gather(x, x, 0.0),
    "number for bool": lambda net, trt, x: net.network.add_reduce(x, trt.ReduceOperation.AVG, 1, 1),
    "no such keyword": lambda net, trt, x: net.network.add_gather(x, x, dim=0),
    "none for tensor": lambda net, trt, x: net.network.add_shape(None),
    "no such property": lambda net, trt, x: setattr(net.network.add_shuffle(x), "reshape", (1,)),
    "property's type": lambda net, trt, x: setattr(net.network.add_shuffle(x), "reshape_dims", "1"),
    "reading what is not there": lambda net, trt, x: net.network.add_shuffle(x).output,
    "read only": lambda net, trt, x: setattr(x, "dtype", trt.DataType.HALF),
    "weights": lambda net, trt, x: trt.Weights(trt.DataType.FLOAT, "0", 1),
    "logger": lambda net, trt, x: trt.Builder(None),
    "capsule": lambda net, trt, x: net.context().set_communicator(5),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_calls_that_the_bindings_would_not_take(net: Sketch, name: str) -> None:
    net.context = lambda: tensorrt_stub.runtime.Context(  # type: ignore[attr-defined]
        tensorrt_stub.runtime.Engine(None, {}))
    with pytest.raises((TypeError, AttributeError, AssertionError)):
        WRONG_CALLS[name](net, net.trt, net.input((4, 4)))


def cache_update(net: Sketch, **different: Any) -> Any:
    cache = different.get("cache") or net.input((2, 1, 8, 4), different.get("dtype", "FLOAT"), different.get("dynamic"))
    update = net.input(different.get("update", (2, 1, 3, 4)))
    write = net.input((2,), different.get("write", "INT32"))
    return net.network.add_kv_cache_update(cache, update, write, net.trt.KVCacheMode.LINEAR)


def attention(net: Sketch, mask: Any = None, kind: str = "NONE", heads: int = 2) -> Any:
    q, k = net.input((1, 4, 3, 8)), net.input((1, heads, 5, 8))
    layer = net.network.add_attention_v2(q, k, k, net.trt.AttentionNormalizationOp.SOFTMAX,
                                         net.trt.CausalMaskKind.__members__[kind])
    if layer is not None and mask is not None:
        layer.mask = net.input(*mask)
        return layer if layer.mask is not None else None
    return layer


def collective(net: Sketch, operation: str, reduce: str, **kwargs: Any) -> Any:
    arguments = {"root": -1, "groups": []} | kwargs
    return net.network.add_dist_collective(net.input((2, 4)), net.trt.CollectiveOperation.__members__[operation],
                                           net.trt.ReduceOperation.__members__[reduce], **arguments)


def matmul(net: Sketch, a: Any, b: Any) -> Any:
    none = net.trt.MatrixOperation.NONE
    return net.network.add_matrix_multiply(a, none, b, none)


def product(net: Sketch, a: Any, b: Any) -> Any:
    return net.network.add_elementwise(a, b, net.trt.ElementWiseOperation.PROD)


def dequantize(net: Sketch, data: tuple[tuple[int, ...], str] = ((4, 6), "INT8"), scales: Any = None,
               output: str = "FLOAT", axis: int | None = None) -> Any:
    scale = net.constant(torch.ones(4) if scales is None else scales)
    layer = net.network.add_dequantize(net.integers(*data), scale, net.trt.DataType.__members__[output])
    if layer is not None and axis is not None:
        layer.axis = axis
    return layer


BLOCKS = (4, 6), "INT4"

# Each beside a form of it that is right.
RULES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "types of operands": (lambda n: product(n, n.input((2, 2)), n.input((2, 2), "HALF")),
                          lambda n: product(n, n.input((2, 2), "HALF"), n.input((2, 2), "HALF"))),
    "ranks in elementwise": (lambda n: product(n, n.input((2, 2)), n.input((2,))),
                             lambda n: product(n, n.input((2, 2)), n.input((1, 2)))),
    "ranks in matmul": (lambda n: matmul(n, n.input((3, 2, 2)), n.input((2, 2))),
                        lambda n: matmul(n, n.input((3, 2, 2)), n.input((1, 2, 2)))),
    "static capacity": (lambda n: cache_update(n, dynamic=2), lambda n: cache_update(n, dynamic=0)),
    "the cache is an input": (lambda n: cache_update(n, cache=n.constant(torch.zeros(2, 1, 8, 4))), cache_update),
    "type of the update": (lambda n: cache_update(n, dtype="BF16"), cache_update),
    "write indices are integers": (lambda n: cache_update(n, write="FLOAT"), lambda n: cache_update(n, write="INT64")),
    "heads of the update": (lambda n: cache_update(n, update=(2, 2, 3, 4)), cache_update),
    "groups of heads": (lambda n: attention(n, heads=3), lambda n: attention(n, heads=2)),
    "a mask or a causal kind": (lambda n: attention(n, ((1, 1, 3, 5), "BOOL"), "LOWER_RIGHT"),
                                lambda n: attention(n, ((1, 1, 3, 5), "BOOL"))),
    "type of the mask": (lambda n: attention(n, ((1, 1, 3, 5), "INT32")), lambda n: attention(n, ((1, 1, 3, 5),))),
    "shape of the mask": (lambda n: attention(n, ((1, 1, 1, 5), "BOOL")),
                          lambda n: attention(n, ((1, 4, 3, 5), "BOOL"))),
    "sums are reduced": (lambda n: collective(n, "ALL_REDUCE", "NONE"), lambda n: collective(n, "ALL_REDUCE", "SUM")),
    "gathers are not": (lambda n: collective(n, "ALL_GATHER", "SUM"), lambda n: collective(n, "ALL_GATHER", "NONE")),
    "no root": (lambda n: collective(n, "ALL_REDUCE", "SUM", root=0), lambda n: collective(n, "ALL_REDUCE", "SUM")),
    "scales are positive": (lambda n: dequantize(n, scales=torch.tensor([1.0, 0.0, 1.0, 1.0])), dequantize),
    "only numbers are dequantized": (
        lambda n: n.network.add_dequantize(n.constant(torch.ones(4)), n.constant(torch.ones(1)), n.trt.float32),
        lambda n: n.network.add_dequantize(n.integers((4,)), n.constant(torch.ones(1)), n.trt.float32)),
    "dequantized are floats": (lambda n: dequantize(n, output="INT32"), lambda n: dequantize(n, output="BF16")),
    "weights to dequantize are constant": (
        lambda n: n.network.add_dequantize(n.input((4, 6), "INT8"), n.constant(torch.ones(4)), n.trt.float32),
        lambda n: n.network.add_dequantize(n.integers((4, 6)), n.constant(torch.ones(4)), n.trt.float32)),
    "two int4 a byte": (lambda n: dequantize(n, ((6, 5), "INT4"), torch.ones(3, 5)),
                        lambda n: dequantize(n, ((6, 6), "INT4"), torch.ones(3, 6))),
    "blocks are of int4": (lambda n: dequantize(n, ((4, 6), "INT8"), torch.ones(4, 2)),
                           lambda n: dequantize(n, BLOCKS, torch.ones(4, 2))),
    "blocks are of one size": (lambda n: dequantize(n, BLOCKS, torch.ones(4, 4)),
                               lambda n: dequantize(n, BLOCKS, torch.ones(4, 3))),
    "blocks lie along one axis": (lambda n: dequantize(n, BLOCKS, torch.ones(2, 3)),
                                  lambda n: dequantize(n, BLOCKS, torch.ones(2, 6))),
    "size of a constant": (lambda n: n.network.add_constant((3,), n.trt.Weights(n.trt.DataType.FLOAT, 0, 0)),
                           lambda n: n.constant(torch.zeros(3))),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_layers(trt: ModuleType, rule: str) -> None:
    """A broken one gives None and one error, as TensorRT does; the right form gives a layer."""
    wrong, right = RULES[rule]
    net = Sketch(trt)
    assert wrong(net) is None and len(net.logger.errors) == 1
    net = Sketch(trt)
    assert right(net) is not None and not net.logger.errors


@pytest.mark.parametrize(("data", "scales", "axis", "sentence"), [
    (((4, 6), "INT8"), torch.ones(4), 1, "4 scales for axis 1 of (4, 6)"),
    (((4, 6), "INT8"), torch.ones(4), None, "axis -1 of (4, 6)"), (BLOCKS, torch.ones(4, 3), 2, "axis 2 of (4, 6)")])
def test_dequantizing_along_the_wrong_axis_or_none(net: Sketch, data: Any, scales: torch.Tensor, axis: int | None,
                                                   sentence: str) -> None:
    """Found when the network is built."""
    dequantize(net, data, scales, axis=axis).name = "weights/dequantize"
    net.input((1,))
    assert net.build() is None and f"weights/dequantize: {sentence}" in net.logger.errors[-1]
    right = Sketch(net.trt)
    dequantize(right, data, scales, axis=int(data[1] == "INT4"))
    right.input((1,))
    assert right.build() is not None


@pytest.mark.parametrize(("data", "scales", "axis", "expected"), [
    (((2, 3), "INT8"), torch.tensor([1.0, 10.0]), 0, [[0, 1, 2], [30, 40, 50]]),
    (((2, 3), "INT8"), torch.tensor([1.0, 10.0, 100.0]), 1, [[0, 10, 200], [3, 40, 500]]),
    (((2, 4), "INT4"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1, [[0, 1, 0, 2], [0, 3, 0, 4]]),
    (((4, 2), "INT4"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0, [[0, 2], [0, 2], [0, 4], [0, 4]]),
])
def test_what_dequantized_weights_are(net: Sketch, data: Any, scales: torch.Tensor, axis: int,
                                      expected: list[list[int]]) -> None:
    from tensorrt_stub.builder import read_plan
    from tensorrt_stub.interpreter import Interpreter

    output = dequantize(net, data, scales, axis=axis).get_output(0)
    net.input((1,))
    plan, values = read_plan(net.build()), {}  # type: ignore[var-annotated]
    assert plan is not None
    Interpreter(plan["layers"], lambda x: x, lambda x: [x]).run(values)
    assert values[output._number].tolist() == expected


def test_int4_of_both_signs(net: Sketch) -> None:
    value = torch.tensor([0x8F, 0x70, 0x12], dtype=torch.uint8)
    weights = net.trt.Weights(net.trt.DataType.INT4, value.data_ptr(), 6)
    assert weights.tensor((3, 2)).tolist() == [[-1, -8], [0, 7], [2, 1]]


def test_constants_whose_memory_was_freed(net: Sketch) -> None:
    net.constant(torch.ones(1000), keep=False)
    with pytest.raises(AssertionError, match="its memory was freed"):
        net.build()


def test_constants_whose_memory_was_written_to(net: Sketch) -> None:
    net.constant(torch.ones(1000))
    assert net.build() is not None
    net.kept[0][3] = 2
    with pytest.raises(AssertionError, match="its memory was changed"):
        net.builder.build_serialized_network(net.network, net.config)


def test_an_updated_cache_is_an_output(net: Sketch) -> None:
    cache_update(net)
    with pytest.raises(AssertionError, match="must be an output"):
        net.build()


def test_a_collective_is_told_the_number_of_ranks(net: Sketch) -> None:
    layer = collective(net, "ALL_GATHER", "NONE")
    with pytest.raises(AssertionError, match="num_ranks was not set"):
        net.build()
    layer.num_ranks = 2
    assert tuple(layer.get_output(0).shape) == (4, 4)
    assert net.builder.build_serialized_network(net.network, net.config) is not None


@pytest.fixture
def context(net: Sketch) -> Any:
    """Of a network that writes two rows of updates to a cache of eight."""
    layer = cache_update(net, update=(2, 1, 2, 4))
    layer.get_output(0).name = "updated"
    net.network.mark_output(layer.get_output(0))
    context = net.trt.Runtime(net.logger).deserialize_cuda_engine(net.build()).create_execution_context()
    assert context.set_optimization_profile_async(0, tensorrt_stub.runtime.STREAM)
    return context


def test_the_cache_has_one_address(net: Sketch, context: Any) -> None:
    cache, update = torch.zeros(2, 1, 8, 4), torch.ones(2, 1, 2, 4)
    write = torch.tensor([1, 6], dtype=torch.int32)
    for name, tensor in (("x0", cache), ("x1", update), ("x2", write)):
        assert context.set_input_shape(name, tuple(tensor.shape))
        assert context.set_tensor_address(name, tensor.data_ptr())
    stream, other = tensorrt_stub.runtime.STREAM, torch.zeros_like(cache)
    assert not context.execute_async_v3(stream) and "not set: ['updated']" in net.logger.errors[-1]
    assert context.set_tensor_address("updated", other.data_ptr())
    assert not context.execute_async_v3(stream) and "must have the address of x0" in net.logger.errors[-1]
    assert context.set_tensor_address("updated", cache.data_ptr()) and context.execute_async_v3(stream)
    assert cache.sum(dim=(1, 3)).tolist() == [[0, 4, 4, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 4, 4]]
    write[1] = 7
    with pytest.raises(AssertionError, match="outside of the cache"):
        context.execute_async_v3(stream)


def test_shapes_outside_of_the_profile(net: Sketch, context: Any) -> None:
    assert not context.set_input_shape("x1", (2, 1, 3, 4)) and "is not in profile 0" in net.logger.errors[-1]
    assert not context.set_input_shape("y", (1,)) and "no input y" in net.logger.errors[-1]
