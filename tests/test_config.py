"""ModelConfig: its JSON both ways, what it refuses and why, possible rank counts, and RoPE's frequencies."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.config import ModelConfig, RopeScaling
from tpllm.errors import DataError
from tpllm.mapping import padded
from tpllm.models.rope import inverse_frequencies

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", dtype="bfloat16", vocab_size=128256, hidden_size=4096, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_size=128, intermediate_size=14336, norm_epsilon=1e-5,
    rotary_base=500000.0, max_position_embeddings=131072, rotary_scaling=RopeScaling(),
)  # fmt: skip
PLAIN = replace(CONFIG, rotary_scaling=None, rotary_base=10000.0, dtype="float16")


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        ModelConfig.from_json(data)
    return str(caught.value)


@pytest.mark.parametrize("config", [
    CONFIG, PLAIN, replace(PLAIN, use_parallel_embedding=True, embedding_sharding_dim=1),
    replace(CONFIG, rotary_scaling=RopeScaling(32.0, 1.5, 3.0, 4096), head_size=64),
    replace(CONFIG, quant_algo="W8A16"), replace(PLAIN, quant_algo="W4A16"),
])  # fmt: skip
def test_json_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_json_has_every_field_under_its_own_name_and_tensorrt_llm_constants() -> None:
    data = CONFIG.to_json()
    for name, value in asdict(PLAIN).items():
        found = PLAIN.to_json()
        assert (found["quantization"] if name == "quant_algo" else found)[name] == value
    assert data["rotary_scaling"] == {"type": "llama3", "rope_type": "llama3", **asdict(RopeScaling())}
    assert (data["hidden_act"], data["logits_dtype"]) == ("silu", "float32")
    assert (data["position_embedding_type"], data["rotary_embedding_dim"]) == ("rope_gpt_neox", CONFIG.head_size)
    assert (data["mlp_bias"], data["attn_bias"]) == (False, False)


def test_defaults_of_absent_fields_are_tensorrt_llms() -> None:
    data = PLAIN.to_json()
    for name in ("num_key_value_heads", "head_size", "intermediate_size", "norm_epsilon", "rotary_base",
                 "rotary_scaling", "use_parallel_embedding", "embedding_sharding_dim", "position_embedding_type"):
        del data[name]
    expected = replace(PLAIN, num_key_value_heads=PLAIN.num_attention_heads, intermediate_size=4 * PLAIN.hidden_size)
    assert ModelConfig.from_json(data) == expected


def test_unknown_keys_are_ignored() -> None:
    later = {"producer": {"name": "x"}, "qk_layernorm": False, "moe": {"num_experts": 0}, "runtime_defaults": None,
             "quantization": {"quant_algo": None, "group_size": 128}}
    assert ModelConfig.from_json(CONFIG.to_json() | later) == CONFIG


REFUSED = {
    "bad dtype": ({"dtype": "float8"}, ["dtype", "'float8'", "float32, float16, bfloat16"]),
    "heads": ({"num_attention_heads": 30}, ["num_attention_heads (30)", "multiple", "num_key_value_heads (8)"]),
    "odd head": ({"head_size": 63}, ["head_size is 63", "even"]),
    "zero layers": ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "positive"]),
    "text vocab": ({"vocab_size": "32000"}, ["vocab_size is '32000'", "positive whole number"]),
    "fraction": ({"hidden_size": 4096.5}, ["hidden_size is 4096.5"]),
    "negative": ({"max_position_embeddings": -1}, ["max_position_embeddings is -1"]),
    "sharding dim": ({"embedding_sharding_dim": 2}, ["embedding_sharding_dim is 2"]),
    "quantization": ({"quantization": {"quant_algo": "W8A16"}}, ["quant_algo", "'W8A16'", "not supported"]),
    "misspelt quantization": ({"quantization": {"quant_aglo": "FP8"}}, ["quant_algo", "'FP8'"]),
    "moe": ({"moe": {"num_experts": 8}}, ["8 experts", "dense"]),
    "old moe": ({"moe_num_experts": 4}, ["4 experts"]),
    "mlp_bias": ({"mlp_bias": True}, ["mlp_bias", "not supported"]),
    "qk_layernorm": ({"qk_layernorm": True}, ["qk_layernorm"]),
    "residual_mlp": ({"residual_mlp": True}, ["residual_mlp"]),
    "learned positions": ({"position_embedding_type": "learned_absolute"}, ["'learned_absolute'", "rope_gpt_neox"]),
    "rope type": ({"rotary_scaling": {"type": "yarn", "factor": 4.0}}, ["rotary_scaling", "'yarn'", "'llama3'"]),
    "rope type, new spelling": ({"rotary_scaling": {"rope_type": "linear"}}, ["'linear'"]),
    "rope without type": ({"rotary_scaling": {"factor": 8.0}}, ["rotary_scaling", "None"]),
    "rope not an object": ({"rotary_scaling": "llama3"}, ["config.json"]),
    "architecture": ({"architecture": ["x"]}, ["architecture is ['x']"]),
    "embedding": ({"use_parallel_embedding": "no"}, ["use_parallel_embedding 'no'"]),
    "layers": ({"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "10000"]),
    "truth": ({"num_hidden_layers": True}, ["num_hidden_layers is True"]),
    "epsilon": ({"norm_epsilon": "1e-5"}, ["norm_epsilon is '1e-5'"]),
    "base": ({"rotary_base": float("nan")}, ["rotary_base is nan"]),
    "factor": ({"rotary_scaling": {"type": "llama3", "factor": 0}}, ["factor is 0", "above 0"]),
    "heads as text": ({"num_attention_heads": "32"}, ["num_attention_heads is '32'"]),
    "no head size to derive": ({"num_attention_heads": "32", "head_size": None}, ["config.json", "TypeError"]),
    "no heads": ({"num_attention_heads": 0, "head_size": None}, ["config.json", "ZeroDivisionError"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_is_wrong(name: str) -> None:
    change, words = REFUSED[name]
    message = refusal(CONFIG.to_json() | change)
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers",
                                  "num_attention_heads", "max_position_embeddings"])  # fmt: skip
def test_a_missing_field_is_named(name: str) -> None:
    data = CONFIG.to_json()
    del data[name]
    assert repr(name) in refusal(data)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "gelu"), ("rotary_embedding_dim", 64)])
def test_what_would_compute_another_model_is_refused(key: str, value: Any) -> None:
    assert key in refusal(CONFIG.to_json() | {key: value})


def test_rope_scaling_reads_both_spellings_of_its_type() -> None:
    expected = RopeScaling(factor=32.0)
    for spelling in ("type", "rope_type"):
        assert RopeScaling.from_json({spelling: "llama3", "factor": 32.0}) == expected
    assert RopeScaling.from_json(expected.to_json()) == expected
    assert RopeScaling.from_json({"type": "llama3"}) == RopeScaling()  # what TensorRT-LLM writes from Meta's weights


@pytest.mark.parametrize(("change", "tp", "words"), [
    ({}, 3, ["32 attention heads", "3"]),
    ({"num_attention_heads": 36, "num_key_value_heads": 12}, 9, ["12 key/value heads", "neither", "9"]),
    ({"intermediate_size": 14340}, 8, ["intermediate size 14340", "8"]),
    ({"use_parallel_embedding": True, "embedding_sharding_dim": 1, "hidden_size": 4100}, 8, ["hidden size 4100", "8"]),
])  # fmt: skip
def test_tp_problem_says_which_size_does_not_divide(change: dict[str, Any], tp: int, words: list[str]) -> None:
    problem = replace(CONFIG, **change).tp_problem(tp)
    assert problem is not None
    for word in words:
        assert word in problem


def test_hidden_size_matters_only_to_an_embedding_split_along_it() -> None:
    config = replace(CONFIG, hidden_size=4100)
    for split in (config, replace(config, use_parallel_embedding=True)):
        assert split.tp_problem(8) is None


@given(heads_per_kv=st.integers(1, 6), kv=st.integers(1, 12), inter=st.integers(1, 96), vocab=st.integers(1, 99))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_valid_sizes_are_those_that_give_whole_local_sizes(heads_per_kv: int, kv: int, inter: int, vocab: int) -> None:
    heads = heads_per_kv * kv
    config = replace(CONFIG, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inter,
                     vocab_size=vocab)
    sizes = config.valid_tp_sizes(limit=32)
    for tp in range(1, 33):
        whole = heads % tp == 0 and inter % tp == 0 and (kv % tp == 0 or tp % kv == 0)
        assert (tp in sizes) == whole
        if whole:
            local = config.local(tp)
            assert local.num_heads * tp == heads and local.intermediate_size * tp == inter
            assert local.num_kv_heads * tp == max(kv, tp)
            assert local.vocab_size * tp == padded(vocab, tp)


@pytest.mark.parametrize("head_size", [8, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1000000.0])
def test_default_frequencies_are_transformers_own(base: float, head_size: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": base})).inv_freq  # fmt: skip
    ours = inverse_frequencies(replace(PLAIN, head_size=head_size, rotary_base=base))
    assert ours.dtype == np.float32 and ours.shape == (head_size // 2,)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(factor=32.0), RopeScaling(4.0, 1.0, 8.0, 4096),
                                     RopeScaling(16.0, 2.0, 6.0, 1024)])  # fmt: skip
@pytest.mark.parametrize(("base", "head_size"), [(500000.0, 128), (500000.0, 64), (10000.0, 96), (1e6, 8)])
def test_scaled_frequencies_are_transformers_llama3(base: float, head_size: int, scaling: RopeScaling) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": base, **asdict(scaling)})  # fmt: skip
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    assert attention_factor == 1.0
    shape = replace(CONFIG, head_size=head_size, rotary_base=base)
    ours = inverse_frequencies(replace(shape, rotary_scaling=scaling))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    # The comparison would prove nothing if the scaling touched no frequency.
    assert not np.array_equal(ours, inverse_frequencies(replace(shape, rotary_scaling=None)))


@pytest.mark.parametrize("quantization", [
    {"quant_algo": None, "quant_aglo": "FP8"}, {"quant_algo": None, "kv_cache_quant_algo": "INT8"}, ["W8A16"],
])  # fmt: skip
def test_any_quantization_is_refused(quantization: Any) -> None:
    assert "quant" in refusal(CONFIG.to_json() | {"quantization": quantization})
