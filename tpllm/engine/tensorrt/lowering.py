"""A rank's model as a TensorRT network: every verb of `models/ops.py` answered with native layers.

Networks are strongly typed: operands of a layer have one dtype and one rank, so casts and shapes are explicit here.
"""

from __future__ import annotations

import math
from typing import Any

import tensorrt as trt
import torch

from tpllm.engine.base import EngineConfig
from tpllm.engine.tensorrt.messages import Logger
from tpllm.errors import UsageError
from tpllm.mapping import Mapping, padded
from tpllm.models.rope import inverse_frequencies
from tpllm.quantization import GROUP, int4_pairs, scale_name
from tpllm.sharding import Axis, axis_slice

Tensor = Any  # trt.ITensor
Binary, Matrix, Unary = trt.ElementWiseOperation, trt.MatrixOperation, trt.UnaryOperation
Collective, Reduce = trt.CollectiveOperation, trt.ReduceOperation
FLOAT, INT32 = trt.DataType.FLOAT, trt.DataType.INT32
DTYPES = {torch.float32: FLOAT, torch.float16: trt.DataType.HALF, torch.bfloat16: trt.DataType.BF16,
          torch.int32: INT32, torch.int64: trt.DataType.INT64, torch.int8: trt.DataType.INT8,
          torch.uint8: trt.DataType.INT4}  # which are two a byte

# The network's inputs beside the caches, all int32, and its output beside them.
TOKENS, POSITIONS = "tokens", "positions"  # [B, S]
WRITE_INDEX = "write_index"  # [B] cache row of each sequence's first token
ROWS = "rows"  # [R] which of the B * S tokens need logits
LOGITS = "logits"  # [R, vocab] float32


def input_shapes(batch: int, length: int, rows: int) -> dict[str, tuple[int, ...]]:
    return {TOKENS: (batch, length), POSITIONS: (batch, length), WRITE_INDEX: (batch,), ROWS: (rows,)}


def cache_names(layer: int) -> list[tuple[str, str]]:
    """Input and output of a layer's key and value caches `[B, kv_heads/tp, slot_rows, head_size]`."""
    return [(f"{kind}_cache_{layer}", f"{kind}_cache_{layer}_updated") for kind in ("key", "value")]


def slot_rows(max_seq_len: int) -> int:
    """Rows of a sequence's cache; of 64 and its multiples, slots begin where TensorRT wants addresses: at 256 bytes."""
    return padded(max_seq_len, 64)


class TensorrtOps:
    """`Ops` as layers: activations are `[B, S, …]`, heads `[B, heads, S, head_size]`, selected rows `[1, R, …]`.

    TensorRT reads constants when it builds: `kept` holds the memory behind them and must live until then.
    """

    def __init__(self, network: Any, logger: Logger, config: EngineConfig, mapping: Mapping,
                 weights: dict[str, torch.Tensor], fused_attention: bool) -> None:
        self.network, self.logger, self.weights, self.fused_attention = network, logger, weights, fused_attention
        self.config, self.mapping, self.tp_size = config.model, mapping, mapping.tp_size
        self.sizes = self.config.local(self.tp_size)
        self.dtype = DTYPES[getattr(torch, self.config.dtype)]
        self.kept: list[torch.Tensor] = []
        self.collectives = {"all_reduce": 0, "all_gather": 0}
        self._scope = "inputs"  # what the next layers belong to; a part of their names
        self.cache_rows = slot_rows(config.build.max_seq_len)
        self.tokens = self._input(TOKENS, INT32, (-1, -1), "batch", "length")
        self.positions = self._input(POSITIONS, INT32, (-1, -1), "batch", "length")
        self.write_index = self._input(WRITE_INDEX, INT32, (-1,), "batch")
        self.rows = self._input(ROWS, INT32, (-1,), "rows")
        rows = torch.arange(self.cache_rows, dtype=torch.int32)
        angles = rows[:, None].float() * torch.from_numpy(inverse_frequencies(self.config))
        self.cos, self.sin = self._constant(angles.cos()), self._constant(angles.sin())  # [cache_rows, head_size/2]
        # Row j of its cache is open to a token at position i when j < i + 1: [B, 1, S, cache_rows].
        ends = self._binary(self._reshape(self.positions, (0, 1, -1, 1)),
                            self._constant(torch.ones(1, dtype=torch.int32), 4), Binary.SUM)
        self.mask = self._binary(self._constant(rows, 4), ends, Binary.LESS)

    # Layers

    def _add(self, layer: Any, what: str) -> Any:
        """A new layer with its name; TensorRT answers with None where it refuses one."""
        name = f"{self._scope}/{what}"
        if layer is None:
            raise self.logger.refusal(f"layer {name}")
        layer.name = name
        return layer

    def _out(self, layer: Any, what: str) -> Tensor:
        return self._add(layer, what).get_output(0)

    def _input(self, name: str, dtype: Any, shape: tuple[int, ...], *dims: str) -> Tensor:
        tensor = self.network.add_input(name, dtype, shape)
        if tensor is None:
            raise self.logger.refusal(f"input {name}")
        for index, dim in enumerate(dims):
            tensor.set_dimension_name(index, dim)
        return tensor

    def _constant(self, value: torch.Tensor, rank: int = 0) -> Tensor:
        """A tensor with leading ones up to `rank`."""
        value = value.contiguous()
        self.kept.append(value)
        each = 2 if value.dtype == torch.uint8 else 1
        weights = trt.Weights(DTYPES[value.dtype], value.data_ptr(), value.numel() * each)
        shape = (1,) * (rank - value.dim()) + (*value.shape[:-1], value.shape[-1] * each)
        return self._out(self.network.add_constant(shape, weights), "constant")

    def _binary(self, a: Tensor, b: Tensor, operation: Any) -> Tensor:
        return self._out(self.network.add_elementwise(a, b, operation), operation.name.lower())

    def _unary(self, x: Tensor, operation: Any) -> Tensor:
        return self._out(self.network.add_unary(x, operation), operation.name.lower())

    def _cast(self, x: Tensor, dtype: Any) -> Tensor:
        return x if x.dtype == dtype else self._out(self.network.add_cast(x, dtype), "cast")

    def _reshape(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """0 keeps the dimension in that place, -1 is what is left."""
        layer = self._add(self.network.add_shuffle(x), "reshape")
        layer.reshape_dims = dims
        return layer.get_output(0)

    def _transpose(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        layer = self._add(self.network.add_shuffle(x), "transpose")
        layer.first_transpose = order
        return layer.get_output(0)

    def _take(self, x: Tensor, axis: int, first: int, size: int) -> Tensor:
        """`size` entries of one axis from `first` on. A slice would need the dynamic sizes of the other axes."""
        places = self._constant(torch.arange(first, first + size, dtype=torch.int32))
        return self._out(self.network.add_gather(x, places, axis), "take")

    def _collective(self, x: Tensor, operation: Any, reduce: Any) -> Tensor:
        """Over all ranks of the communicator, which are the tensor-parallel ones."""
        name = operation.name.lower()
        layer = self._add(self.network.add_dist_collective(x, operation, reduce, -1, []),
                          f"{name}.{self.collectives[name]}")
        layer.num_ranks = self.tp_size
        self.collectives[name] += 1
        return layer.get_output(0)

    def _all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `[1, n, k]` side by side: `[n, tp * k]`."""
        width = self.tp_size * x.shape[-1]
        gathered = self._collective(x, Collective.ALL_GATHER, Reduce.NONE)  # [tp, n, k]
        return self._reshape(self._transpose(gathered, (1, 0, 2)), (-1, width))

    def finish(self, logits: Tensor) -> None:
        """Make what the model returned the network's output."""
        logits.name = LOGITS
        self.network.mark_output(logits)

    # The verbs

    def embedding(self, name: str) -> Tensor:
        self._scope = name
        weight = self.weights[name + ".weight"]
        table = self._constant(weight)
        if not self.config.use_parallel_embedding or self.tp_size == 1:
            return self._out(self.network.add_gather(table, self.tokens, 0), "gather")
        if self.config.embedding_sharding_dim == 1:
            part = self._out(self.network.add_gather(table, self.tokens, 0), "gather")
            whole = self._all_gather(self._reshape(part, (1, -1, weight.shape[1])))
            shape = self._out(self.network.add_concatenation([
                self._out(self.network.add_shape(self.tokens), "shape"),
                self._constant(torch.tensor([self.config.hidden_size]))]), "concatenation")
            layer = self._add(self.network.add_shuffle(whole), "reshape")
            layer.set_input(1, shape)
            return layer.get_output(0)
        first, _ = axis_slice(Axis.EMBEDDING_VOCAB, self.config, self.mapping)
        low, start, high = (self._constant(torch.tensor([n], dtype=torch.int32), 2)
                            for n in (0, first, weight.shape[0] - 1))
        local = self._binary(self.tokens, start, Binary.SUB)
        inside = self._binary(self._binary(local, low, Binary.MAX), high, Binary.MIN)
        mine = self._reshape(self._binary(local, inside, Binary.EQUAL), (0, 0, 1))
        rows = self._out(self.network.add_gather(table, inside, 0), "gather")
        zero = self._constant(torch.zeros(1, dtype=weight.dtype), 3)
        return self.all_reduce(self._out(self.network.add_select(mine, rows, zero), "select"))

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        self._scope = name
        rank = len(x.shape)
        x32 = self._cast(x, FLOAT)
        mean = self._out(self.network.add_reduce(self._binary(x32, x32, Binary.PROD), Reduce.AVG, 1 << (rank - 1),
                                                 True), "mean")
        epsilon = self._constant(torch.tensor([self.config.norm_epsilon], dtype=torch.float32), rank)
        root = self._unary(self._binary(mean, epsilon, Binary.SUM), Unary.SQRT)
        y = self._cast(self._binary(x32, self._unary(root, Unary.RECIP), Binary.PROD), x.dtype)
        return self._binary(y, self._constant(self.weights[name + ".weight"], rank), Binary.PROD)

    def linear(self, x: Tensor, name: str) -> Tensor:
        self._scope = name
        rank, weight, bias = len(x.shape), self.weights[name + ".weight"], self.weights.get(name + ".bias")
        weight = self._constant(weight, rank) if weight.is_floating_point() else self._dequantized(name, weight, x)
        y = self._out(self.network.add_matrix_multiply(x, Matrix.NONE, weight, Matrix.TRANSPOSE), "matmul")
        return y if bias is None else self._binary(y, self._constant(bias, rank), Binary.SUM)

    def _dequantized(self, name: str, weight: torch.Tensor, x: Tensor) -> Tensor:
        """What a quantized weight stands for, `[1, out, in]`, or of the rank of the `x` that is multiplied with it.

        int8 has a scale a row. int4 has one a block of columns, which are all of one size: where the last group of a
        row is short, groups are cut into several blocks.
        """
        columns, axis = x.shape[-1], 0
        scale = self.weights[scale_name(name + ".weight", str(self.config.quant_algo))]
        if weight.dtype == torch.int32:
            block, axis = math.gcd(columns, GROUP), 1
            if columns % 2:
                raise UsageError(f"{name} has {columns} columns on a rank, and TensorRT takes an even number of int4; "
                                 "convert with --weight-only-precision int8")
            weight = int4_pairs(weight, columns)
            scale = scale.repeat_interleave(GROUP // block, 1)[:, :columns // block]
        # TensorRT wants scales above zero; where ours are zero, so are all numbers.
        scales = self._constant(scale.where(scale > 0, 1))
        layer = self._add(self.network.add_dequantize(self._constant(weight), scales, x.dtype), "dequantize")
        layer.axis = axis
        return self._reshape(layer.get_output(0), (1,) * (len(x.shape) - 2) + (-1, columns))

    def linears(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        return tuple(self.linear(x, name) for name in names)

    def split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv = self.sizes.num_heads, self.sizes.num_kv_heads
        split = self._reshape(qkv, (0, 0, heads + 2 * kv, self.config.head_size))
        by_head = self._transpose(split, (0, 2, 1, 3))  # [B, heads + 2 kv_heads, S, head_size]
        q, k, v = (self._take(by_head, 1, first, size)
                   for first, size in ((0, heads), (heads, kv), (heads + kv, kv)))
        return q, k, v

    def rope(self, x: Tensor) -> Tensor:
        # In float32, as a 16-bit table would be coarse at large positions.
        layer = self._add(self.network.add_rotary_embedding(self._cast(x, FLOAT), self.cos, self.sin, False,
                                                            self.config.head_size), "rope")
        layer.set_input(3, self.positions)
        return self._cast(layer.get_output(0), x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        self._scope = f"transformer.layers.{layer}.attention"
        shape = (-1, self.sizes.num_kv_heads, self.cache_rows, self.config.head_size)
        stored = []
        for update, (name, updated) in zip((k, v), cache_names(layer), strict=True):
            cache = self._input(name, self.dtype, shape, "batch")
            stored.append(self._out(self.network.add_kv_cache_update(
                cache, update, self.write_index, trt.KVCacheMode.LINEAR), name))
            stored[-1].name = updated
            self.network.mark_output(stored[-1])
        # Attention has no scale of its own.
        scale = self._constant(torch.tensor([1 / math.sqrt(self.config.head_size)]), 4)
        q = self._cast(self._binary(self._cast(q, FLOAT), scale, Binary.PROD), self.dtype)
        context = (self._fused if self.fused_attention else self._primitive)(q, *stored)
        width = self.sizes.num_heads * self.config.head_size
        return self._reshape(self._transpose(context, (0, 2, 1, 3)), (0, 0, width))

    def _fused(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attention = self._add(self.network.add_attention_v2(
            q, keys, values, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE), "attention")
        attention.mask = self.mask
        attention.decomposable = True  # several kernels where there is no fused one for this dtype and head size
        if attention.mask is None:  # what cannot be set is left out without a word
            raise self.logger.refusal(f"the mask of {attention.name}")
        return attention.get_output(0)

    def _primitive(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same in matrix products; heads are grouped by the keys they share: `[B, kv_heads, group, S, …]`."""
        kv, heads, size = self.sizes.num_kv_heads, self.sizes.num_heads, self.config.head_size
        q = self._reshape(q, (0, kv, heads // kv, -1, size))
        keys, values = (self._reshape(x, (0, kv, 1, self.cache_rows, size)) for x in (keys, values))
        scores = self._cast(self._out(self.network.add_matrix_multiply(q, Matrix.NONE, keys, Matrix.TRANSPOSE),
                                      "scores"), FLOAT)
        mask = self._reshape(self.mask, (0, 1, 1, -1, self.cache_rows))
        closed = self._constant(torch.tensor([-1e30]), 5)
        softmax = self._add(self.network.add_softmax(self._out(self.network.add_select(mask, scores, closed),
                                                               "select")), "softmax")
        softmax.axes = 1 << 4
        weights = self._cast(softmax.get_output(0), self.dtype)
        mixed = self._out(self.network.add_matrix_multiply(weights, Matrix.NONE, values, Matrix.NONE), "context")
        return self._reshape(mixed, (0, heads, -1, size))

    def silu(self, x: Tensor) -> Tensor:
        gate = self._out(self.network.add_activation(x, trt.ActivationType.SIGMOID), "sigmoid")
        return self._binary(x, gate, Binary.PROD)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary(a, b, Binary.PROD)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._binary(a, b, Binary.SUM)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._collective(x, Collective.ALL_REDUCE, Reduce.SUM) if self.tp_size > 1 else x

    def select_rows(self, x: Tensor) -> Tensor:
        flat = self._reshape(x, (1, -1, x.shape[-1]))
        return self._out(self.network.add_gather(flat, self.rows, 1), "rows")

    def vocab_logits(self, x: Tensor, name: str) -> Tensor:
        logits = self.linear(x, name)  # [1, R, vocab/tp]
        logits = self._all_gather(logits) if self.tp_size > 1 else self._reshape(logits, (-1, logits.shape[-1]))
        if logits.shape[-1] > self.config.vocab_size:
            logits = self._take(logits, 1, 0, self.config.vocab_size)
        return self._cast(logits, FLOAT)
