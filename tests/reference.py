"""A plain LLaMA on full Meta-format weights, the oracle that the tests compare everything else with."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Params:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    tied: bool  # the checkpoint has no output.weight of its own

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# The dim along which each tensor's shards are joined; the norms and tok_embeddings have rules of their own.
SHARD_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def merge(name: str, pieces: list[Tensor], dim: int, n_kv_heads: int) -> Tensor:
    """Joins one tensor's pieces, listed in shard order."""
    part = name.split(".")[-2]  # "layers.0.attention.wq.weight" -> "wq"
    if part in ("attention_norm", "ffn_norm", "norm"):
        return pieces[0]  # every shard has the same copy
    if part == "tok_embeddings":
        # Rows of full width are a slice of the vocabulary (Llama 3), narrower ones of the width (Llama 2).
        return torch.cat(pieces, dim=0 if pieces[0].shape[1] == dim else 1)
    if part in ("wk", "wv") and len(pieces) > n_kv_heads:
        # Each shard holds one head and neighbours repeat it: of 4 shards with heads 0 0 1 1 keep 0 and 2.
        pieces = pieces[:: len(pieces) // n_kv_heads]
    return torch.cat(pieces, dim=SHARD_DIM[part])


def load_full(meta_dir: Path | str) -> tuple[Params, dict[str, Tensor]]:
    """Reads params.json and all consolidated.NN.pth; output.weight is always there, tied or not."""
    raw = json.loads((Path(meta_dir) / "params.json").read_text())
    shards = [torch.load(f, weights_only=True) for f in sorted(Path(meta_dir).glob("consolidated.*.pth"))]
    dim, n_heads = raw["dim"], raw["n_heads"]
    n_kv_heads = raw.get("n_kv_heads") or n_heads
    names = [name for name in shards[0] if not name.endswith("rope.freqs")]
    full = {name: merge(name, [shard[name] for shard in shards], dim, n_kv_heads) for name in names}
    tied = "output.weight" not in full
    full.setdefault("output.weight", full["tok_embeddings.weight"])
    vocab_size = len(full["output.weight"])
    assert raw.get("vocab_size", -1) in (-1, vocab_size)  # -1 means "ask the tokenizer"
    params = Params(
        dim, raw["n_layers"], n_heads, n_kv_heads, vocab_size, raw.get("norm_eps", 1e-5),
        raw.get("rope_theta", 10000.0), raw.get("use_scaled_rope", False), tied,
    )  # fmt: skip
    return params, full


def scale_frequency(freq: float, factor: float) -> float:
    """Llama 3.1: long wavelengths are stretched by factor, short ones kept, those between blended."""
    low_freq_factor, high_freq_factor, old_context_len = 1.0, 4.0, 8192
    wavelength = 2 * math.pi / freq
    if wavelength < old_context_len / high_freq_factor:
        return freq
    if wavelength > old_context_len / low_freq_factor:
        return freq / factor
    smooth = (old_context_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - smooth) * freq / factor + smooth * freq


class Reference:
    """One sequence at a time, no cache, no parallelism; every step is done in dtype (float32 or float64)."""

    def __init__(
        self, meta_dir: Path | str, dtype: torch.dtype = torch.float32, rope_scaling_factor: float = 8.0
    ) -> None:
        self.params, full = load_full(meta_dir)
        self.weights = {name: tensor.to(dtype) for name, tensor in full.items()}
        head_dim = self.params.head_dim
        freqs = 1.0 / self.params.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        if self.params.use_scaled_rope:
            freqs = torch.tensor([scale_frequency(f, rope_scaling_factor) for f in freqs.tolist()])
        self.freqs = freqs.to(dtype)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.pow(2).mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.params.norm_eps) * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates x [T, H, head_dim] as Meta does: neighbours (x0, x1), (x2, x3), … are complex numbers."""
        angles = torch.outer(torch.arange(len(x), dtype=x.dtype), self.freqs)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    def attention(self, x: Tensor, layer: str) -> Tensor:
        p, length = self.params, len(x)
        q = self.rotate(self.linear(x, f"{layer}.attention.wq").view(length, p.n_heads, p.head_dim))
        k = self.rotate(self.linear(x, f"{layer}.attention.wk").view(length, p.n_kv_heads, p.head_dim))
        v = self.linear(x, f"{layer}.attention.wv").view(length, p.n_kv_heads, p.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
        heads = []
        for h in range(p.n_heads):
            kv = h // (p.n_heads // p.n_kv_heads)  # neighbouring query heads share a key/value head
            scores = q[:, h] @ k[:, kv].T / math.sqrt(p.head_dim)
            heads.append(scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v[:, kv])
        return self.linear(torch.cat(heads, dim=-1), f"{layer}.attention.wo")

    def feed_forward(self, x: Tensor, layer: str) -> Tensor:
        gate = silu(self.linear(x, f"{layer}.feed_forward.w1"))
        return self.linear(gate * self.linear(x, f"{layer}.feed_forward.w3"), f"{layer}.feed_forward.w2")

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits [T, V] after each of the T tokens."""
        x = self.weights["tok_embeddings.weight"][token_ids]
        for i in range(self.params.n_layers):
            layer = f"layers.{i}"
            x = x + self.attention(self.norm(x, f"{layer}.attention_norm"), layer)
            x = x + self.feed_forward(self.norm(x, f"{layer}.ffn_norm"), layer)
        return self.linear(self.norm(x, "norm"), "output")

    def greedy_with_gaps(self, prompt_ids: list[int], n: int) -> list[tuple[int, float]]:
        """The n best next tokens, each with its logit's lead over the runner-up (a tiny lead is a tie)."""
        new: list[tuple[int, float]] = []
        for _ in range(n):
            best = self.logits(prompt_ids + [token for token, _ in new])[-1].topk(2)
            new.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
        return new

    def greedy(self, prompt_ids: list[int], n: int, eos_ids: Collection[int] = ()) -> list[int]:
        """At most n new tokens (without the prompt); ends after the first of eos_ids, which is included."""
        new: list[int] = []
        while len(new) < n and not (new and new[-1] in eos_ids):
            new.append(int(self.logits(prompt_ids + new)[-1].argmax()))
        return new
