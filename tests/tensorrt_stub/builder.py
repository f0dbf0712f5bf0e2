"""`trt.Builder` and what goes with it; a plan is the recorded network with its constants, pickled."""

from __future__ import annotations

import io
import pickle
from typing import Any

import tensorrt_bindings as trt

from tensorrt_stub.network import Network, Type, owned_memory, report
from tensorrt_stub.rules import Refused
from tensorrt_stub.signatures import Recorded

MAGIC = b"recorded plan"
MEASURED = b"what this build measured"


class Profile(Recorded, owner="IOptimizationProfile"):
    def __init__(self) -> None:
        super().__init__()
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        sizes = tuple(min), tuple(opt), tuple(max)
        if not all(0 <= a <= b <= c for a, b, c in zip(*sizes, strict=True)):
            raise ValueError(f"shapes of {input} are not in order: {sizes}")
        self._shapes[input] = sizes


class TimingCache(Recorded, owner="ITimingCache"):
    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._content = content

    def serialize(self) -> bytes:
        return self._content


class BuilderConfig(Recorded, owner="IBuilderConfig"):
    def __init__(self) -> None:
        super().__init__()
        self._profiles: list[Profile] = []
        self._cache: TimingCache | None = None
        self._flags = {trt.BuilderFlag.TF32}

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> TimingCache | None:
        content = bytes(serialized_timing_cache)
        return TimingCache(content) if content in (b"", MEASURED) else None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._cache


class Builder(Recorded, owner="Builder"):
    """`fails` makes the next builds fail with that message; `measured` counts builds that began without a cache."""

    fails: str | None = None
    _measured = 0

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger)
        super().__init__()
        self._logger = logger

    def create_network(self, flags: int = 0) -> Network:
        return Network(self._logger)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        network._complete = True
        for layer in network._layers:
            try:
                layer._rule(layer)
            except Refused as e:
                report(self._logger, self._values.get("error_recorder"), f"[builder.cpp::build::1] Error Code 4: "
                                                                         f"Internal Error ({layer.name}: {e})")
                return None
        check_network(network, config)
        monitor = config._values.get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Tactics", "Building", 5)
            assert monitor.step_complete("Tactics", 0) and monitor.step_complete("Building", 0)
            monitor.phase_finish("Tactics")
        if Builder.fails:
            report(self._logger, self._values.get("error_recorder"), Builder.fails)
            return None
        if config._cache is not None and not config._cache._content:
            config._cache._content = MEASURED
            Builder._measured += 1
        plan = serialize(network, config)
        if monitor is not None:
            monitor.phase_finish("Building")
        check_constants(network)
        return plan


def check_network(network: Network, config: BuilderConfig) -> None:
    """What TensorRT finds out when it builds."""
    outputs = network._outputs
    names = [tensor.name for tensor in [*network._inputs, *outputs]]
    assert len(set(names)) == len(names), f"names are not unique: {names}"
    for layer in network._layers:
        if layer._owner == "IKVCacheUpdateLayer":
            assert layer._output in outputs, f"{layer.name}: its output must be an output of the network"
        if layer._owner == "IDistCollectiveLayer":
            assert layer._values.get("num_ranks", 1) > 1, f"{layer.name}: num_ranks was not set"
    for tensor in network._inputs:
        for profile in config._profiles:
            sizes = profile._shapes[tensor.name]
            for shape in sizes:
                assert len(shape) == len(tensor._shape) and all(
                    a in (-1, b) for a, b in zip(tensor._shape, shape, strict=True)), f"{tensor.name}: {shape}"
    assert config._profiles, "dynamic inputs need a profile"
    check_constants(network)


def check_constants(network: Network) -> None:
    """The memory behind every constant is still some tensor's, and as it was when the constant was made."""
    owned = owned_memory()
    for layer in network._layers:
        if layer._owner == "IConstantLayer":
            weights = layer._params["weights"]
            first, last = weights.ptr, weights.ptr + weights.nbytes
            assert any(a <= first and last <= b for a, b in owned), f"{layer.name}: its memory was freed"
            assert weights.read() == weights.first_read, f"{layer.name}: its memory was changed"


class EnumPickler(pickle.Pickler):
    """Pickles the bindings' enums by name."""

    def reducer_override(self, value: Any) -> Any:
        if type(value).__module__.startswith("tensorrt_bindings"):
            return getattr, (type(value), value.name)
        return NotImplemented


def serialize(network: Network, config: BuilderConfig) -> bytes:
    layers = []
    for layer in network._layers:
        params = {k: v for k, v in layer._params.items() if k != "weights"}
        if "weights" in layer._params:
            params["constant"] = layer._params["weights"].tensor(layer._output._shape)
        values = {k: tuple(v) if k in ("reshape_dims", "first_transpose") else v
                  for k, v in layer._values.items() if k != "mask"}
        layers.append({"kind": layer._owner, "name": layer.name, "params": params, "values": values,
                       "inputs": {i: tensor._number for i, tensor in layer._inputs.items()},
                       "output": layer._output._number})
    aliases = {layer._output.name: layer._in(0).name for layer in network._layers
               if layer._owner == "IKVCacheUpdateLayer"}
    plan = {"tf32": trt.BuilderFlag.TF32 in config._flags,
            "verbosity": config._values.get("profiling_verbosity", trt.ProfilingVerbosity.LAYER_NAMES_ONLY),
            "version": trt.__version__, "layers": layers, "aliases": aliases,
            "profiles": [profile._shapes for profile in config._profiles],
            "inputs": {t.name: (t._number, t._dtype, t._dims) for t in network._inputs},
            "outputs": {t.name: (t._number, t._dtype) for t in network._outputs}}
    assert all(dtype != Type.BOOL for _, dtype, _ in plan["inputs"].values())
    out = io.BytesIO()
    EnumPickler(out).dump(plan)
    return MAGIC + out.getvalue()


def read_plan(data: bytes) -> dict[str, Any] | None:
    """None for what is no plan, or no whole one."""
    if not data.startswith(MAGIC):
        return None
    try:
        plan: dict[str, Any] = pickle.loads(data[len(MAGIC):])
    except Exception:
        return None
    return plan
