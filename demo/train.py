"""Train the demo model from scratch on generated text and write it as a two-shard Meta LLaMA checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import FACT_FAMILIES, documents, sum_prompts
from sentencepiece import SentencePieceProcessor as Tokenizer
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

from tpllm.demo import DEMO_PROMPTS

WINDOW = 512  # as long as the longest context, so that every position is trained
POOL_TOKENS = 25_000_000
TOKENIZER_DOCUMENTS = 30_000
PEAK_LR, WARMUP_STEPS = 2e-3, 300
SHARDS = 2
EPILOG = "The defaults are for a GPU; one CPU thread, at about 3,300 tokens/s, would need more than two days."
# The dimension along which Meta's files split a weight; weights not named here (norms, rope) are replicated.
SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}


@dataclass(frozen=True)
class Params:
    """The contents of params.json."""

    dim: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    vocab_size: int = 512
    multiple_of: int = 64
    ffn_dim_multiplier: float = 0.75
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = WINDOW

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Meta's formula for the hidden size of the feed-forward layer."""
        hidden = int(self.ffn_dim_multiplier * int(2 * (4 * self.dim) / 3))
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def rope_frequencies(self) -> Tensor:
        return self.rope_theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Meta's interleaved rotary embedding: turns (x0, x1), (x2, x3), ... by the angle of the position."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.head_dim, self.queries_per_kv = p.head_dim, p.n_heads // p.n_kv_heads
        self.wq = nn.Linear(p.dim, p.n_heads * p.head_dim, bias=False)
        self.wk = nn.Linear(p.dim, p.n_kv_heads * p.head_dim, bias=False)
        self.wv = nn.Linear(p.dim, p.n_kv_heads * p.head_dim, bias=False)
        self.wo = nn.Linear(p.n_heads * p.head_dim, p.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected = (self.wq(x), self.wk(x), self.wv(x))
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for heads in projected)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        k, v = (heads.repeat_interleave(self.queries_per_kv, dim=1) for heads in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(attended.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.w1 = nn.Linear(p.dim, p.ffn_dim, bias=False)
        self.w2 = nn.Linear(p.ffn_dim, p.dim, bias=False)
        self.w3 = nn.Linear(p.dim, p.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    def __init__(self, p: Params) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(p), FeedForward(p)
        self.attention_norm, self.ffn_norm = RMSNorm(p.dim, p.norm_eps), RMSNorm(p.dim, p.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h: Tensor = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Llama(nn.Module):
    """The model under Meta's parameter names, so that its state dict only has to be split to be stored."""

    cos: Tensor
    sin: Tensor

    def __init__(self, p: Params) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(p.vocab_size, p.dim)
        self.layers = nn.ModuleList(Block(p) for _ in range(p.n_layers))
        self.norm = RMSNorm(p.dim, p.norm_eps)
        self.output = nn.Linear(p.dim, p.vocab_size, bias=False)
        angles = torch.outer(torch.arange(p.max_seq_len), p.rope_frequencies())
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Each block adds to the residual stream twice; smaller outputs keep its variance steady.
                shrink = math.sqrt(2 * p.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 / shrink)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, self.cos[:length], self.sin[:length])
        logits: Tensor = self.output(self.norm(h))
        return logits


def train_tokenizer(seed: int, vocab_size: int) -> bytes:
    """Train a LLaMA-style BPE tokenizer; one thread and a fixed order of text make it reproducible."""
    model = io.BytesIO()
    lines = chain.from_iterable(text.split("\n") for text in islice(documents(seed), TOKENIZER_DOCUMENTS))
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, split_digits=True, character_coverage=1.0, hard_vocab_limit=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=1,
    )  # fmt: skip
    return model.getvalue()


def token_pool(sp: Tokenizer, seed: int, size: int, threads: int) -> Tensor:
    """At least `size` tokens of documents, one after the other, each as BOS, text, EOS."""
    texts, chunks, total = documents(seed), [], 0
    while total < size:
        batch = sp.encode(list(islice(texts, 5000)), add_bos=True, add_eos=True, num_threads=threads)
        chunks.append(np.fromiter(chain.from_iterable(batch), dtype=np.int16))
        total += len(chunks[-1])
    return torch.from_numpy(np.concatenate(chunks))


def windows(pool: Tensor, bos: int, batch_size: int) -> Iterator[Tensor]:
    """Endless batches of windows that begin with a document, as prompts do; the next ones fill them up."""
    starts = (pool[: -WINDOW - 1] == bos).nonzero()
    offsets = torch.arange(WINDOW + 1, device=pool.device)
    while True:
        chosen = torch.randint(len(starts), (batch_size,), device=pool.device)
        yield pool[starts[chosen] + offsets].long()


def learning_rate(step: int, steps: int) -> float:
    """A cosine from the peak down to a hundredth of it, with a linear warm-up."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * cosine)


def train(model: Llama, batches: Iterator[Tensor], steps: int) -> float:
    """Train in place and return the mean loss of the last twentieth of the steps."""
    device = model.cos.device
    weights = list(model.parameters())
    decays = {2: 0.1, 1: 0.0}  # by number of dimensions: matrices decay, the gains of the norms do not
    groups = [{"params": [w for w in weights if w.dim() == n], "weight_decay": decays[n]} for n in decays]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=device.type == "cuda")
    losses = []
    for step in (bar := tqdm(range(steps), desc="training", unit="step", mininterval=1.0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = next(batches)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0:  # reading the loss waits for the GPU, so not at every step
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return torch.stack(losses[-max(1, steps // 20) :]).mean().item()


def write_checkpoint(model: Llama, p: Params, tokenizer: bytes, folder: Path) -> None:
    """Write params.json, tokenizer.model and the two consolidated.NN.pth with bfloat16 weights."""
    weights = {**model.state_dict(), "rope.freqs": p.rope_frequencies()}
    for rank in range(SHARDS):
        shard = {}
        for name, weight in weights.items():
            split_dim = SPLIT_DIM.get(name.split(".")[-2])
            part = weight if split_dim is None else weight.chunk(SHARDS, split_dim)[rank]
            # A view would drag the whole tensor it looks into along into the file.
            shard[name] = part.to("cpu", torch.bfloat16).contiguous().clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(asdict(p)) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)


def read_checkpoint(folder: Path, device: torch.device) -> tuple[Llama, Tokenizer]:
    """Load what write_checkpoint wrote, computing in float32 with the stored bfloat16 weights."""
    model = Llama(Params(**json.loads((folder / "params.json").read_text())))
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    state = {}
    for name in model.state_dict():
        parts, split_dim = [shard[name].float() for shard in shards], SPLIT_DIM.get(name.split(".")[-2])
        state[name] = parts[0] if split_dim is None else torch.cat(parts, dim=split_dim)
    model.load_state_dict(state)
    return model.to(device).eval(), Tokenizer(model_proto=(folder / "tokenizer.model").read_bytes())


@torch.inference_mode()
def continue_batch(model: Llama, sp: Tokenizer, prompts: list[list[int]], limit: int) -> list[str]:
    """Continue prompts of one length greedily; they are too short for a key-value cache to matter."""
    eos = sp.eos_id()
    tokens = torch.tensor(prompts, device=model.cos.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    for _ in range(limit):
        best = model(tokens)[:, -1].argmax(-1).masked_fill(ended, eos)
        tokens, ended = torch.cat((tokens, best[:, None]), dim=1), ended | (best == eos)
        if ended.all():
            break
    rows = [row[: row.index(eos)] if eos in row else row for row in tokens.tolist()]
    # Decoded together with its prompt, because on its own a text would lose its leading space.
    return [sp.decode(row)[len(sp.decode(prompt)) :] for row, prompt in zip(rows, prompts, strict=True)]


def continuations(model: Llama, sp: Tokenizer, texts: Iterable[str], limit: int) -> dict[str, str]:
    """The greedy continuation of each text, batched by length so that no padding is needed."""
    by_length: dict[int, list[str]] = {}
    for text in dict.fromkeys(texts):
        by_length.setdefault(len(sp.encode(text)), []).append(text)
    found: dict[str, str] = {}
    for group in by_length.values():
        found |= zip(group, continue_batch(model, sp, sp.encode(group, add_bos=True), limit), strict=True)
    return found


def report(folder: Path, device: torch.device, seed: int) -> dict[str, dict[str, float]]:
    """Ask the stored model sums, facts and the demo prompts, and print how it does."""
    model, sp = read_checkpoint(folder, device)
    questions = {
        "sums_trained": random.Random(seed).sample(list(sum_prompts(False, seed)), 2000),
        "sums_held_out": list(sum_prompts(True, seed)),
        "facts": list(chain.from_iterable(FACT_FAMILIES)),
    }
    results = {}
    for name, prompts in questions.items():
        limit = 1 + max(len(sp.encode(prompt.expected or "")) for prompt in prompts)
        found = continuations(model, sp, (prompt.text for prompt in prompts), limit)
        right = sum(prompt.accepts(found[prompt.text]) for prompt in prompts)
        results[name] = {"right": right, "asked": len(prompts), "accuracy": round(right / len(prompts), 4)}
        print(f"{name}: {right} of {len(prompts)} right ({right / len(prompts):.1%})")
    found = continuations(model, sp, (prompt.text for prompt in DEMO_PROMPTS), 200)
    for prompt in DEMO_PROMPTS:
        print(f"\n{prompt.text} >>>{found[prompt.text]}")
        if prompt.expected is not None:
            verdict = "right" if prompt.accepts(found[prompt.text]) else f"WRONG, expected {prompt.expected}"
            print(f"    [{verdict}{', held out' if prompt.held_out else ''}]")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python demo/train.py", description=__doc__, epilog=EPILOG)
    parser.add_argument("--output-dir", type=Path, required=True, help="new folder for the checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128, help=f"windows of {WINDOW} tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    output: Path = args.output_dir
    partial = output.with_name(output.name + ".partial")
    for folder in (output, partial):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            sys.exit(f"{folder} exists and is not an empty folder; remove it or choose another --output-dir.")
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started, p = time.monotonic(), Params()
    print("Making the tokenizer and the training text ...", flush=True)
    tokenizer = train_tokenizer(args.seed, p.vocab_size)
    sp = Tokenizer(model_proto=tokenizer)
    tokens_seen = args.steps * args.batch_size * WINDOW
    pool = token_pool(sp, args.seed, min(POOL_TOKENS, tokens_seen), args.threads).to(device)
    model = Llama(p).to(device)
    loss = train(model, windows(pool, sp.bos_id(), args.batch_size), args.steps)
    seconds = round(time.monotonic() - started, 1)

    partial.mkdir(parents=True, exist_ok=True)
    write_checkpoint(model, p, tokenizer, partial)
    record = {
        "command": shlex.join(["python", "demo/train.py", *sys.argv[1:]]),
        "seed": args.seed, "steps": args.steps, "tokens_seen": tokens_seen, "final_loss": round(loss, 4),
        "seconds": seconds, "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "torch": torch.__version__, "greedy_answers": report(partial, device, args.seed),
    }  # fmt: skip
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    sums = [f"{hashlib.md5(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(partial.iterdir())]
    (partial / "checklist.chk").write_text("".join(sums))
    partial.rename(output)
    print(f"\nWrote {output} after {seconds:.0f} s of training.")


if __name__ == "__main__":
    main()
