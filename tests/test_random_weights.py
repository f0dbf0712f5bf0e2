"""Random weights to measure with are one model, however many ranks share it."""

import pytest
import torch
from makers import NAMED_SHAPES

from tpllm.config import ModelConfig
from tpllm.engine.random_weights import random_weights
from tpllm.mapping import Mapping
from tpllm.models.llama import Llama

CPU = torch.device("cpu")
LAYER = "transformer.layers.1."
# How TensorRT-LLM's checkpoints split each: along rows, along columns, or not at all (`qkv` apart).
SPLIT = {"attention.dense": 1, "mlp.fc": 0, "mlp.gate": 0, "mlp.proj": 1, "input_layernorm": None}


def ranks(tp: int, quant_algo: str | None = None) -> list[dict[str, torch.Tensor]]:
    shape = NAMED_SHAPES["llama31_gqa"]
    config = ModelConfig("LlamaForCausalLM", "float32", shape.vocab_size, shape.dim, 2, shape.n_heads,
                         shape.n_kv_heads, shape.head_dim, shape.ffn_width, 1e-5, 1e4, 64, quant_algo=quant_algo)
    return [dict(random_weights(Llama(config), Mapping(tp, rank), CPU)) for rank in range(tp)]


@pytest.mark.parametrize("tp", [2, 4])  # 4 is more than the key/value heads
def test_the_ranks_hold_parts_of_the_same_tensors(tp: int) -> None:
    (whole,), parts = ranks(1), ranks(tp)
    assert list(whole) == list(parts[0])
    for name, dim in SPLIT.items():
        pieces = [part[f"{LAYER}{name}.weight"] for part in parts]
        assert torch.equal(pieces[0] if dim is None else torch.cat(pieces, dim), whole[f"{LAYER}{name}.weight"])
    shape = NAMED_SHAPES["llama31_gqa"]
    heads, kv, size = shape.n_heads, shape.n_kv_heads, shape.head_dim
    q, k, v = whole[LAYER + "attention.qkv.weight"].split([heads * size, kv * size, kv * size])
    for rank, part in enumerate(parts):
        mine, own = heads // tp, max(1, kv // tp)
        first = rank * own if kv >= tp else rank // (tp // kv)
        expected = [q[rank * mine * size:][:mine * size], *(x[first * size:][:own * size] for x in (k, v))]
        assert torch.equal(part[LAYER + "attention.qkv.weight"], torch.cat(expected))


def test_they_are_drawn_and_every_weight_is_another_one() -> None:
    (weights,) = ranks(1)
    matrices = [weight for weight in weights.values() if weight.dim() == 2]
    for weight in matrices:
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert len({tuple(weight.flatten()[:4].tolist()) for weight in matrices}) == len(matrices)
    (again,) = ranks(1)
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_quantized_ones_are_those_weights_quantized() -> None:
    name = LAYER + "mlp.proj."
    (full,), (part,) = ranks(1), ranks(1, "W8A16")
    restored = part[name + "weight"].float() * part[name + "per_channel_scale"][:, None]
    error = (restored - full[name + "weight"]).abs().amax(-1) / full[name + "weight"].abs().amax(-1)
    assert part[name + "weight"].dtype == torch.int8 and float(error.max()) < 0.5 / 126
