"""Building one rank's plan: the network, its two profiles, and TensorRT's builder."""

from __future__ import annotations

import os
from dataclasses import dataclass

import tensorrt as trt
import torch

from tpllm.distributed import World
from tpllm.engine.base import EngineConfig
from tpllm.engine.tensorrt.lowering import (
    POSITIONS,
    ROWS,
    TOKENS,
    WRITE_INDEX,
    TensorrtOps,
    cache_names,
    slot_rows,
)
from tpllm.engine.tensorrt.messages import ErrorRecorder, Logger, Progress
from tpllm.errors import UsageError
from tpllm.mapping import Mapping
from tpllm.models.base import Model

ATTENTION = "TPLLM_TENSORRT_ATTENTION"
Sizes = tuple[int, int, int]  # least, the one to be fastest at, most
ONE = (1, 1, 1)


@dataclass(frozen=True)
class Plan:
    """A serialized engine, the collectives in its network, and what was learned about kernels' speed."""

    data: memoryview
    collectives: dict[str, int]
    timing_cache: bytes


def fused_attention() -> bool:
    """Whether attention is TensorRT's own layer, or, where that misbehaves, matrix products and a softmax."""
    chosen = os.environ.get(ATTENTION, "fused")
    if chosen not in ("fused", "primitive"):
        raise UsageError(f"{ATTENTION} is {chosen!r}; it can be fused or primitive")
    return chosen == "fused"


def make_plan(config: EngineConfig, mapping: Mapping, model: Model, weights: dict[str, torch.Tensor], world: World,
              timing_cache: bytes) -> Plan:
    """This rank's plan. With another rank's `timing_cache` kernels are chosen as there, and soon."""
    logger = Logger(world)
    builder = logger.start(trt.Builder)
    recorder = ErrorRecorder(logger)
    builder.error_recorder = recorder
    network = builder.create_network()
    network.error_recorder = recorder
    ops = TensorrtOps(network, logger, config, mapping, weights, fused_attention())
    ops.finish(model.forward(ops))
    settings = builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)  # float32 is to mean that: the same tokens at every tp
    monitor = Progress()
    if world.is_first:
        settings.progress_monitor = monitor
    longest, most = config.build.max_input_len, config.build.max_batch_size
    add_profile(builder, settings, logger, config, mapping, batch=ONE, length=(1, longest, longest))
    add_profile(builder, settings, logger, config, mapping, batch=(1, most, most), length=ONE)
    # TensorRT only borrows caches. One from another kind of GPU it refuses, which leaves the empty one.
    caches = [settings.create_timing_cache(content) for content in (b"", timing_cache)]
    for cache in caches:
        if cache is not None:
            settings.set_timing_cache(cache, False)
    serialized = builder.build_serialized_network(network, settings)
    if serialized is None:
        raise logger.refusal("to build the network")
    learned = settings.get_timing_cache()
    content = b"" if learned is None else bytes(learned.serialize())
    # The bindings say that what they hand out are floats.
    return Plan(memoryview(serialized).cast("B"), ops.collectives, content)


def add_profile(builder: trt.Builder, settings: trt.IBuilderConfig, logger: Logger, config: EngineConfig,
                mapping: Mapping, batch: Sizes, length: Sizes) -> None:
    """Sizes that the engine is made for: number 0 is prefill, one sequence of any length; number 1 decode."""
    model = config.model
    cache = (model.local(mapping.tp_size).num_kv_heads, slot_rows(config.build.max_seq_len), model.head_size)
    shapes: dict[str, list[tuple[int, ...]]] = {
        TOKENS: list(zip(batch, length, strict=True)), WRITE_INDEX: [(b,) for b in batch],
        ROWS: [(1,), (batch[1],), (batch[2] * length[2],)]}
    shapes[POSITIONS] = shapes[TOKENS]
    for layer in range(model.num_hidden_layers):
        shapes |= {name: [(b, *cache) for b in batch] for name, _ in cache_names(layer)}
    profile = builder.create_optimization_profile()
    for name, sizes in shapes.items():
        profile.set_shape(name, sizes[0], sizes[1], sizes[2])
    if settings.add_optimization_profile(profile) < 0:
        raise logger.refusal(f"the sizes {batch} x {length}")
