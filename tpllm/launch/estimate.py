"""How many ranks a model is split over, and what its all-reduces between hosts will cost: both from config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpllm.settings import seconds, setting

BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "W8A16": 1.0, "W4A16": 0.5, "W4A16_AWQ": 0.5}


def read_model(engine_dir: Path | None, checkpoint_dir: Path | None) -> tuple[dict[str, Any], str]:
    """The model's part of the engine's or checkpoint's config.json, and the device it is for ("auto" if not said).

    Empty where there is none that can be read: the verb itself says what is wrong with it.
    """
    for directory in (engine_dir, checkpoint_dir):
        if directory is not None:
            try:
                data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
                return data.get("pretrained_config", data), data.get("build_config", {}).get("device", "auto")
            except (OSError, ValueError, AttributeError):
                break
    return {}, "auto"


def tp_size(model: dict[str, Any]) -> int | None:
    """The ranks that an engine or a checkpoint is for."""
    try:
        size = model["mapping"]["tp_size"]
    except (KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size >= 1 else None


def weight_bytes(model: dict[str, Any], ranks: int) -> float:
    """What one rank reads for each token it generates: its part of every matrix, the embedding table apart."""
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    kv_heads = max(model.get("num_key_value_heads") or heads, ranks)  # fewer than ranks are repeated
    head = model.get("head_size") or hidden // heads
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    layer = attention + 3 * hidden * (model.get("intermediate_size") or 4 * hidden)
    size = BYTES.get(model["dtype"], 2.0)
    in_layers = BYTES.get((model.get("quantization") or {}).get("quant_algo") or "", size)
    return float(model["num_hidden_layers"] * layer * in_layers + hidden * model["vocab_size"] * size) / ranks


def all_reduce_share(model: dict[str, Any], ranks: int, latency: float, bandwidth: float) -> float:
    """The share of a token's time that goes into its 2 x layers all-reduces.

    One takes `latency` seconds; the rest of the time is reading the rank's weights at `bandwidth` bytes/s.
    """
    if ranks < 2:
        return 0.0
    reducing = 2.0 * int(model["num_hidden_layers"]) * latency
    return reducing / (reducing + weight_bytes(model, ranks) / bandwidth)


def all_reduce_note(model: dict[str, Any], ranks: int, why: str, on_gpu: bool) -> str:
    """The line that is printed before ranks start on several hosts or without peer access, which `why` says."""
    latency = seconds("TPLLM_ALLREDUCE_US")
    bandwidth = seconds("TPLLM_MEMORY_GB_S") if setting("TPLLM_MEMORY_GB_S") else 3000.0 if on_gpu else 20.0
    try:
        share = all_reduce_share(model, ranks, latency * 1e-6, bandwidth * 1e9)
    except (KeyError, TypeError, ZeroDivisionError):
        return f"{why}: every layer's two all-reduces are slow"
    return (f"{why}: the {2 * model['num_hidden_layers']} all-reduces of a token at batch 1 will take about "
            f"{share:.0%} of its time, assuming {latency:g} us for one and {bandwidth:g} GB/s of memory a rank "
            "(TPLLM_ALLREDUCE_US, TPLLM_MEMORY_GB_S)")
