"""Makers of small random checkpoints in Meta's layout, and of the same model in transformers."""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import load_full
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    ffn_hidden: int | None = None  # given outright, or else by Meta's formula from the next two
    multiple_of: int = 32
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    tied: bool = False
    qkv_bias: bool = False
    embedding_dim: int = 1  # the dim that tok_embeddings is sharded on: 1 = Llama 2, 0 = Llama 3

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_width(self) -> int:
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


LLAMA2_MHA = Shape(dim=64, n_layers=2, n_heads=8, n_kv_heads=8, vocab_size=96)
LLAMA31_GQA = Shape(
    dim=128, n_layers=2, n_heads=16, n_kv_heads=2, vocab_size=128, multiple_of=64, ffn_dim_multiplier=1.3,
    rope_theta=500000.0, use_scaled_rope=True, embedding_dim=0,
)  # fmt: skip
TIED = Shape(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=96, multiple_of=16, ffn_dim_multiplier=1.5,
    rope_theta=500000.0, tied=True, embedding_dim=0,
)  # fmt: skip
ODD_VOCAB = Shape(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=101)
QKV_BIAS = Shape(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=96, ffn_hidden=160,
    norm_eps=1e-6, rope_theta=1000000.0, qkv_bias=True,
)  # fmt: skip
NAMED_SHAPES = {
    "llama2_mha": LLAMA2_MHA, "llama31_gqa": LLAMA31_GQA, "tied": TIED, "odd_vocab": ODD_VOCAB,
    "qkv_bias": QKV_BIAS,
}  # fmt: skip


def random_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """The whole model's weights in float32; they depend on shape and seed only, not on the sharding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        # Inputs of unit variance give outputs whose standard deviation is the gain.
        return normal(rows, columns, std=gain / math.sqrt(columns))

    dim, ffn, vocab = shape.dim, shape.ffn_width, shape.vocab_size
    q_rows, kv_rows = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    # A tied table is also the output matrix, so it is made small enough for logits of order 2.
    embeddings = matrix(vocab, dim, 2.0) if shape.tied else normal(vocab, dim, std=1.0)
    weights = {"tok_embeddings.weight": embeddings}
    for i in range(shape.n_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        # A gain of 1.5 for both q and k gives scores of order 2: attention that is far from uniform.
        for part, rows, gain in (("wq", q_rows, 1.5), ("wk", kv_rows, 1.5), ("wv", kv_rows, 1.0)):
            weights[f"{attention}.{part}.weight"] = matrix(rows, dim, gain)
            if shape.qkv_bias:
                weights[f"{attention}.{part}.bias"] = normal(rows, std=0.5)
        weights[f"{attention}.wo.weight"] = matrix(dim, q_rows, 1.5)
        weights[f"{feed_forward}.w1.weight"] = matrix(ffn, dim, 1.5)
        weights[f"{feed_forward}.w2.weight"] = matrix(dim, ffn, 1.5)
        weights[f"{feed_forward}.w3.weight"] = matrix(ffn, dim)
        weights[f"layers.{i}.attention_norm.weight"] = 1.0 + normal(dim, std=0.2)
        weights[f"layers.{i}.ffn_norm.weight"] = 1.0 + normal(dim, std=0.2)
    weights["norm.weight"] = 1.0 + normal(dim, std=0.2)
    if not shape.tied:
        weights["output.weight"] = matrix(vocab, dim, 2.0)
    return weights


def shard_tensor(name: str, tensor: Tensor, shape: Shape, shard: int, shards: int) -> Tensor:
    """The piece of one full tensor that Meta's shard number `shard` holds."""
    part = name.split(".")[-2]
    if part.endswith("norm"):
        return tensor.clone()
    if part in ("wk", "wv") and shards > shape.n_kv_heads:
        if shards % shape.n_kv_heads:
            raise ValueError(f"{shape.n_kv_heads} key/value heads cannot be repeated over {shards} shards")
        head = shard // (shards // shape.n_kv_heads)
        return tensor[head * shape.head_dim : (head + 1) * shape.head_dim].clone()
    # All others, wq wk wv w1 w3 output and the biases, are split on dim 0.
    dim = {"wo": 1, "w2": 1, "tok_embeddings": shape.embedding_dim}.get(part, 0)
    if tensor.shape[dim] % shards:
        raise ValueError(f"{name}: {tensor.shape[dim]} cannot be split over {shards} shards")
    # A clone, as saving a view would write the whole tensor behind it.
    return tensor.chunk(shards, dim=dim)[shard].clone()


def params_json(shape: Shape, vocab_in_params: bool) -> dict[str, Any]:
    params = {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads if shape.n_kv_heads != shape.n_heads else None,
        "vocab_size": shape.vocab_size if vocab_in_params else -1,
        "hidden_dim": shape.ffn_hidden,
        "multiple_of": shape.multiple_of if shape.ffn_hidden is None else None,
        "ffn_dim_multiplier": shape.ffn_dim_multiplier,
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "use_scaled_rope": True if shape.use_scaled_rope else None,
    }
    # As in Meta's files, what does not apply is left out.
    return {key: value for key, value in params.items() if value is not None}


def make_meta_dir(
    path: Path | str, shape: Shape, shards: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32,
    checklist: bool = False, tokenizer: Path | None = None, vocab_in_params: bool = True,
) -> Path:  # fmt: skip
    """Writes a checkpoint folder; with vocab_in_params=False params.json says vocab_size -1, as Llama 2's."""
    if shape.n_heads % shards:
        raise ValueError(f"{shape.n_heads} heads cannot be split over {shards} shards")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = random_weights(shape, seed)
    for shard in range(shards):
        pieces = {name: shard_tensor(name, full, shape, shard, shards) for name, full in weights.items()}
        state = {name: piece.to(dtype) for name, piece in pieces.items()}
        if not shape.use_scaled_rope:  # files up to Llama 2 carry the frequencies, later ones do not
            exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
            state["rope.freqs"] = (1.0 / shape.rope_theta**exponents).to(dtype)
        torch.save(state, path / f"consolidated.{shard:02d}.pth")
    (path / "params.json").write_text(json.dumps(params_json(shape, vocab_in_params)))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, path / "tokenizer.model")
    if checklist:
        files = sorted(file for file in path.iterdir() if file.name != "checklist.chk")
        lines = [f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
        (path / "checklist.chk").write_text("".join(lines))
    return path


def half_split(tensor: Tensor, n_heads: int) -> Tensor:
    """Reorders the rows of every head from Meta's (0 1)(2 3)… pairs to evens first, then odds."""
    by_pair: Tensor = tensor.unflatten(0, (n_heads, -1, 2))  # [head, pair, even or odd, …]
    return by_pair.transpose(1, 2).flatten(0, 2)


def transformers_state(meta_dir: Path | str) -> dict[str, Tensor]:
    """The checkpoint's weights in float32 under transformers' names and in its row order."""
    params, full = load_full(meta_dir)
    outside = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    in_layer = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    state = {}
    for name, tensor in full.items():
        module, kind = name.rsplit(".", 1)  # kind is "weight" or "bias"
        if module.endswith("wq"):
            tensor = half_split(tensor, params.n_heads)
        elif module.endswith("wk"):
            tensor = half_split(tensor, params.n_kv_heads)
        if module in outside:
            state[f"{outside[module]}.{kind}"] = tensor.float()
        else:
            _, layer, inner = module.split(".", 2)
            state[f"model.layers.{layer}.{in_layer[inner]}.{kind}"] = tensor.float()
    return state


def transformers_model(meta_dir: Path | str, rope_scaling_factor: float = 8.0) -> Any:
    """LlamaForCausalLM, or Qwen2ForCausalLM when q, k, v have biases, with the checkpoint's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    params, full = load_full(meta_dir)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        rope.update(rope_type="llama3", factor=rope_scaling_factor, low_freq_factor=1.0, high_freq_factor=4.0)
        rope["original_max_position_embeddings"] = 8192
    settings: dict[str, Any] = dict(
        vocab_size=params.vocab_size, hidden_size=params.dim, num_hidden_layers=params.n_layers,
        intermediate_size=len(full["layers.0.feed_forward.w1.weight"]),
        num_attention_heads=params.n_heads, num_key_value_heads=params.n_kv_heads,
        max_position_embeddings=131072 if params.use_scaled_rope else 4096,
        rms_norm_eps=params.norm_eps, rope_parameters=rope, tie_word_embeddings=params.tied,
        attn_implementation="eager", bos_token_id=None,
        eos_token_id=None,  # the default (2) is an ordinary token of these models
    )  # fmt: skip
    model: Any
    if "layers.0.attention.wq.bias" in full:
        # Llama's attention_bias would put a bias on the output projection too; Qwen2 has it on q, k, v alone.
        model = Qwen2ForCausalLM(Qwen2Config(**settings)).float().eval()
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings)).float().eval()
    model.load_state_dict(transformers_state(meta_dir), strict=True)
    return model


@torch.no_grad()
def transformers_logits(model: Any, ids: list[int]) -> Tensor:
    """Logits [T, V] after each of the T tokens."""
    logits: Tensor = model(input_ids=torch.tensor([ids])).logits
    return logits[0]


def transformers_greedy(model: Any, ids: list[int], n: int, eos_ids: Collection[int] = ()) -> list[int]:
    """At most n new tokens (without the prompt); ends after the first of eos_ids, which is included."""
    from transformers import GenerationConfig

    batch = torch.tensor([ids])
    ends = list(eos_ids) or None
    settings = GenerationConfig(do_sample=False, max_new_tokens=n, pad_token_id=0, eos_token_id=ends)
    output = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=settings)
    new: list[int] = output[0, len(ids) :].tolist()
    return new


def save_hf_dir(meta_dir: Path | str, path: Path | str, rope_scaling_factor: float = 8.0,
                max_shard_size: str = "5GB") -> Path:  # fmt: skip
    """Writes the checkpoint as a transformers folder: config.json, and model.safetensors or several and their index."""
    transformers_model(meta_dir, rope_scaling_factor).save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


def random_ids(vocab_size: int, *lengths: int, seed: int = 0) -> list[list[int]]:
    """Token ids of as many prompts as there are lengths."""
    chance = random.Random(seed)
    return [[chance.randrange(vocab_size) for _ in range(length)] for length in lengths]
