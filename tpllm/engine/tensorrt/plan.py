"""Building one rank's plan: the network, its two profiles, and TensorRT's builder."""

from __future__ import annotations

from dataclasses import dataclass

import tensorrt as trt
import torch

from tpllm.distributed import World
from tpllm.engine.base import EngineConfig
from tpllm.engine.tensorrt.lowering import TensorrtOps, cache_names, input_shapes, slot_rows
from tpllm.engine.tensorrt.messages import ErrorRecorder, Logger, Progress
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.settings import choice

Sizes = tuple[int, int, int]  # least, the one to be fastest at, most
ONE = (1, 1, 1)


@dataclass(frozen=True)
class Plan:
    """A serialized engine, the collectives in its network, and what was learned about kernels' speed."""

    data: memoryview
    collectives: dict[str, int]
    timing_cache: bytes
    layers: str  # JSON: what the network became, by TensorRT's engine inspector


def make_plan(config: EngineConfig, mapping: Mapping, model: Model, weights: dict[str, torch.Tensor], world: World,
              timing_cache: bytes) -> Plan:
    """This rank's plan. With another rank's `timing_cache` kernels are chosen as there, and soon."""
    logger = Logger(world)
    builder = logger.start(trt.Builder)
    network = builder.create_network()
    builder.error_recorder = network.error_recorder = ErrorRecorder(logger)
    fused = choice("TPLLM_TENSORRT_ATTENTION", "fused", "primitive") == "fused"
    ops = TensorrtOps(network, logger, config, mapping, weights, fused)
    ops.finish(model.forward(ops))
    settings = builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)  # float32 is to mean that: the same tokens at every tp
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows the layers' names only
    if world.is_first:
        settings.progress_monitor = Progress()
    longest, most = config.build.max_input_len, config.build.max_batch_size
    add_profile(builder, settings, logger, config, mapping, batch=ONE, length=(1, longest, longest))
    add_profile(builder, settings, logger, config, mapping, batch=(1, most, most), length=ONE)
    # TensorRT only borrows caches. One from another kind of GPU it refuses, which leaves the empty one.
    caches = [settings.create_timing_cache(content) for content in (b"", timing_cache)]
    for cache in filter(None, caches):
        settings.set_timing_cache(cache, False)
    serialized = builder.build_serialized_network(network, settings)
    if serialized is None:
        raise logger.refusal("to build the network")
    learned = settings.get_timing_cache()
    content = b"" if learned is None else bytes(learned.serialize())
    data = memoryview(serialized).cast("B")  # the bindings say that what they hand out are floats
    inspector = logger.deserialize(data).create_engine_inspector()
    return Plan(data, ops.collectives, content, inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def add_profile(builder: trt.Builder, settings: trt.IBuilderConfig, logger: Logger, config: EngineConfig,
                mapping: Mapping, batch: Sizes, length: Sizes) -> None:
    """Sizes that the engine is made for: number 0 is prefill, one sequence of any length; number 1 decode."""
    model = config.model
    cache = (model.local(mapping.tp_size).num_kv_heads, slot_rows(config.build.max_seq_len), model.head_size)
    caches = [name for layer in range(model.num_hidden_layers) for name, _ in cache_names(layer)]
    rows = (1, batch[1], batch[2] * length[2])
    least, best, most = (input_shapes(*sizes) | dict.fromkeys(caches, (sizes[0], *cache))
                         for sizes in zip(batch, length, rows, strict=True))
    profile = builder.create_optimization_profile()
    for name in least:
        profile.set_shape(name, least[name], best[name], most[name])
    if settings.add_optimization_profile(profile) < 0:
        raise logger.refusal(f"the sizes {batch} x {length}")
