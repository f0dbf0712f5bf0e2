"""LLaMA 1 to 3.x, dense: the weight table and the decoder, written once for every backend."""

from __future__ import annotations

from typing import TypeVar

from tpllm.models.base import Model
from tpllm.models.ops import Ops
from tpllm.sharding import Axis, Source, Weight

T = TypeVar("T")


class Llama(Model):
    """`LlamaForCausalLM`. Names are TensorRT-LLM's: its `mlp.fc` is Meta's w1 (SiLU), its `mlp.gate` w3."""

    architecture = "LlamaForCausalLM"
    first_weights = (
        Weight("transformer.vocab_embedding.weight", (
            Source("tok_embeddings.weight", "model.embed_tokens.weight",
                   (Axis.EMBEDDING_VOCAB, Axis.EMBEDDING_HIDDEN)),)),
    )
    layer_weights = (
        Weight("input_layernorm.weight", (
            Source("attention_norm.weight", "input_layernorm.weight", (Axis.HIDDEN,)),)),
        Weight("attention.qkv.weight", (
            Source("attention.wq.weight", "self_attn.q_proj.weight", (Axis.HEADS, Axis.HIDDEN), rotary=True),
            Source("attention.wk.weight", "self_attn.k_proj.weight", (Axis.KV_HEADS, Axis.HIDDEN), rotary=True),
            Source("attention.wv.weight", "self_attn.v_proj.weight", (Axis.KV_HEADS, Axis.HIDDEN)),)),
        Weight("attention.dense.weight", (
            Source("attention.wo.weight", "self_attn.o_proj.weight", (Axis.HIDDEN, Axis.HEADS)),)),
        Weight("post_layernorm.weight", (
            Source("ffn_norm.weight", "post_attention_layernorm.weight", (Axis.HIDDEN,)),)),
        Weight("mlp.fc.weight", (
            Source("feed_forward.w1.weight", "mlp.gate_proj.weight", (Axis.INTERMEDIATE, Axis.HIDDEN)),)),
        Weight("mlp.gate.weight", (
            Source("feed_forward.w3.weight", "mlp.up_proj.weight", (Axis.INTERMEDIATE, Axis.HIDDEN)),)),
        Weight("mlp.proj.weight", (
            Source("feed_forward.w2.weight", "mlp.down_proj.weight", (Axis.HIDDEN, Axis.INTERMEDIATE)),)),
    )
    last_weights = (
        Weight("transformer.ln_f.weight", (Source("norm.weight", "model.norm.weight", (Axis.HIDDEN,)),)),
        Weight("lm_head.weight", (Source("output.weight", "lm_head.weight", (Axis.VOCAB, Axis.HIDDEN)),)),
    )

    def attention(self, ops: Ops[T], x: T, prefix: str, layer: int) -> T:
        """What each rank's heads make of normalized rows `x`."""
        q, k, v = ops.split_qkv(ops.linear(x, prefix + "attention.qkv"))
        return ops.attend(ops.rope(q), ops.rope(k), v, layer)

    def mlp(self, ops: Ops[T], x: T, prefix: str) -> T:
        """SwiGLU: `proj(silu(fc(x)) * gate(x))`, a partial sum of each rank's inner columns."""
        fc, gate = ops.linears(x, prefix + "mlp.fc", prefix + "mlp.gate")
        return ops.linear(ops.mul(ops.silu(fc), gate), prefix + "mlp.proj")

    def decoder_layer(self, ops: Ops[T], h: T, layer: int) -> T:
        """One layer, with its two all-reduces: after attention and after the MLP.

        Behind the last one's attention only the rows go on whose logits are wanted.
        """
        prefix = self.layer_prefix(layer)
        context = self.attention(ops, ops.rms_norm(h, prefix + "input_layernorm"), prefix, layer)
        if layer == self.config.num_hidden_layers - 1:
            h, context = ops.select_rows(h), ops.select_rows(context)
        h = ops.add(h, ops.all_reduce(ops.linear(context, prefix + "attention.dense")))
        x = ops.rms_norm(h, prefix + "post_layernorm")
        return ops.add(h, ops.all_reduce(self.mlp(ops, x, prefix)))

    def forward(self, ops: Ops[T]) -> T:
        h = ops.embedding("transformer.vocab_embedding")
        for layer in range(self.config.num_hidden_layers):
            h = self.decoder_layer(ops, h, layer)
        return ops.vocab_logits(ops.rms_norm(h, "transformer.ln_f"), "lm_head")
