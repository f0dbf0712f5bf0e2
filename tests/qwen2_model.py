"""A model from outside the package: Qwen2, a LLaMA whose q, k and v projections have a bias."""

from __future__ import annotations

from typing import TypeVar

from tpllm.models.base import Model
from tpllm.models.ops import Ops
from tpllm.sharding import Axis, Source, Weight

T = TypeVar("T")
HIDDEN, HEADS, KV_HEADS, INNER, VOCAB = Axis.HIDDEN, Axis.HEADS, Axis.KV_HEADS, Axis.INTERMEDIATE, Axis.VOCAB


class Qwen2(Model):
    """Each `Source` names a tensor in Meta's and in Hugging Face's spelling and labels its dimensions."""

    architecture = "Qwen2ForCausalLM"
    first_weights = (
        Weight("transformer.vocab_embedding.weight", (
            Source("tok_embeddings.weight", "model.embed_tokens.weight",
                   (Axis.EMBEDDING_VOCAB, Axis.EMBEDDING_HIDDEN)),)),
    )
    layer_weights = (
        Weight("input_layernorm.weight", (Source("attention_norm.weight", "input_layernorm.weight", (HIDDEN,)),)),
        Weight("attention.qkv.weight", (
            Source("attention.wq.weight", "self_attn.q_proj.weight", (HEADS, HIDDEN), rotary=True),
            Source("attention.wk.weight", "self_attn.k_proj.weight", (KV_HEADS, HIDDEN), rotary=True),
            Source("attention.wv.weight", "self_attn.v_proj.weight", (KV_HEADS, HIDDEN)),)),
        Weight("attention.qkv.bias", (
            Source("attention.wq.bias", "self_attn.q_proj.bias", (HEADS,), rotary=True),
            Source("attention.wk.bias", "self_attn.k_proj.bias", (KV_HEADS,), rotary=True),
            Source("attention.wv.bias", "self_attn.v_proj.bias", (KV_HEADS,)),)),
        Weight("attention.dense.weight", (
            Source("attention.wo.weight", "self_attn.o_proj.weight", (HIDDEN, HEADS)),)),
        Weight("post_layernorm.weight", (
            Source("ffn_norm.weight", "post_attention_layernorm.weight", (HIDDEN,)),)),
        Weight("mlp.fc.weight", (Source("feed_forward.w1.weight", "mlp.gate_proj.weight", (INNER, HIDDEN)),)),
        Weight("mlp.gate.weight", (Source("feed_forward.w3.weight", "mlp.up_proj.weight", (INNER, HIDDEN)),)),
        Weight("mlp.proj.weight", (Source("feed_forward.w2.weight", "mlp.down_proj.weight", (HIDDEN, INNER)),)),
    )
    last_weights = (
        Weight("transformer.ln_f.weight", (Source("norm.weight", "model.norm.weight", (HIDDEN,)),)),
        Weight("lm_head.weight", (Source("output.weight", "lm_head.weight", (VOCAB, HIDDEN)),)),
    )

    def decoder_layer(self, ops: Ops[T], h: T, layer: int) -> T:
        """One layer; `linear` adds `attention.qkv.bias` because the table has it."""
        p = self.layer_prefix(layer)
        q, k, v = ops.split_qkv(ops.linear(ops.rms_norm(h, p + "input_layernorm"), p + "attention.qkv"))
        context = ops.attend(ops.rope(q), ops.rope(k), v, layer)
        h = ops.add(h, ops.all_reduce(ops.linear(context, p + "attention.dense")))
        fc, gate = ops.linears(ops.rms_norm(h, p + "post_layernorm"), p + "mlp.fc", p + "mlp.gate")
        return ops.add(h, ops.all_reduce(ops.linear(ops.mul(ops.silu(fc), gate), p + "mlp.proj")))

    def forward(self, ops: Ops[T]) -> T:
        h = ops.embedding("transformer.vocab_embedding")
        for layer in range(self.config.num_hidden_layers):
            h = self.decoder_layer(ops, h, layer)
        return ops.vocab_logits(ops.rms_norm(ops.select_rows(h), "transformer.ln_f"), "lm_head")
