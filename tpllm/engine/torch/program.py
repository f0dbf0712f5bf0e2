"""A rank's model as a PyTorch module: weights, step and cache in, logits out; what both backends run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpllm.config import ModelConfig
from tpllm.engine.torch import quantized
from tpllm.engine.torch.attention import attend
from tpllm.engine.torch.collectives import all_gather, all_reduce
from tpllm.engine.torch.merge import Survey, merged_name, survey
from tpllm.engine.torch.private import linear
from tpllm.mapping import Mapping
from tpllm.models.base import Model
from tpllm.models.rope import inverse_frequencies
from tpllm.quantization import SCALES, scale_name
from tpllm.sharding import Axis, axis_slice

# Values that are no weights; a compiler may write small ones into its code, so they count as part of the graph.
INV_FREQ, VOCAB_START = "rope_inverse_frequencies", "first_vocabulary_row"


def parameter_name(weight: str) -> str:
    """A checkpoint name as a module attribute, which may hold no dots."""
    return weight.replace(".", "_")


class StepProgram(nn.Module):
    """`forward` is one step of one rank. Weights are uninitialized until `load` (export needs only shapes)."""

    def __init__(self, model: Model, mapping: Mapping, device: torch.device, ops: type[TorchOps]) -> None:
        super().__init__()
        self.model, self.mapping, self.device, self._ops = model, mapping, device, ops
        # One wide product reads weights faster than several narrow ones; on CPU weights stay as they are mapped.
        self.survey = survey(model) if device.type == "cuda" else Survey()
        self._places: dict[str, tuple[str, int]] = {}  # checkpoint name → parameter, its first row there
        tensors = model.rank_tensors(mapping)
        self._rows = {name: shape[0] for name, (_, shape) in tensors.items()}
        for parameter, names in self._joined(list(tensors)).items():
            rows = 0
            for name in names:
                self._places[name] = (parameter, rows)
                rows += self._rows[name]
            dtype, shape = tensors[names[0]]
            empty = torch.empty((rows, *shape[1:]), dtype=getattr(torch, dtype), device=device)
            self.register_parameter(parameter, nn.Parameter(empty, requires_grad=False))
        for name, constant in self._constants().items():
            self.register_buffer(name, constant.to(device))

    def _joined(self, names: list[str]) -> dict[str, list[str]]:
        """Parameters, and the checkpoint's tensors whose rows each one joins."""
        grouped = {f"{name}.{kind}": f"{merged_name(group)}.{kind}"
                   for group in self.survey.groups for name in group for kind in ("weight", "bias", *SCALES.values())}
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(parameter_name(grouped.get(name, name)), []).append(name)
        return found

    def _constants(self) -> dict[str, Tensor]:
        found = {INV_FREQ: torch.from_numpy(inverse_frequencies(self.model.config))}
        if self.model.config.use_parallel_embedding:  # the only one that differs from rank to rank
            start, _ = axis_slice(Axis.EMBEDDING_VOCAB, self.model.config, self.mapping)
            found[VOCAB_START] = torch.tensor([start])
        return found

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take a rank checkpoint's tensors (dotted names) in place of the uninitialized ones; on CPU without a copy."""
        if self.device.type == "cpu":
            state = {parameter_name(name): tensor for name, tensor in weights.items()}
            self.load_state_dict(state | dict(self.named_buffers()), strict=True, assign=True)
        else:
            self.fill((name, weights[name]) for name in self._places)

    @torch.no_grad()
    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy these into their places, one after the other."""
        for name, weight in weights:
            parameter, row = self._places[name]
            self.get_parameter(parameter)[row:row + weight.shape[0]].copy_(weight)

    def rows(self, name: str) -> int:
        """Rows of a checkpoint tensor on this rank."""
        return self._rows[name]

    def forward(self, tokens: Tensor, query_start: Tensor, start: Tensor, length: Tensor, rows: Tensor,
                cache: Tensor) -> Tensor:
        """The arrays of `StepInput`, of `query_start` what `prompt_starts` leaves, and the arena → float32 logits
        `[R, vocab]`."""
        positions, slots = token_places(tokens.shape[0], query_start, start, length)
        return self.model.forward(self._ops(self, tokens, positions, slots, (query_start, start, length), rows, cache))


class TorchOps:
    """`Ops` on packed tensors: activations are `[T, …]`."""

    def __init__(self, program: StepProgram, tokens: Tensor, positions: Tensor, slots: Tensor,
                 runs: tuple[Tensor, Tensor, Tensor], rows: Tensor | None, cache: Tensor) -> None:
        self.program, self.tokens, self.rows, self.cache = program, tokens, rows, cache
        self.config: ModelConfig = program.model.config
        self.sizes = self.config.local(program.mapping.tp_size)
        self.tp_size = program.mapping.tp_size
        self.slots, self.runs = slots, runs
        self.cos, self.sin = self._angles(positions)  # [T, head_size/2]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * self._get(INV_FREQ)
        return angles.cos(), angles.sin()

    @property
    def _streams(self) -> bool:
        """Products are to be compiled from scratch: of one row on a CPU, where libraries are slower."""
        return torch.compiler.is_exporting() and self.program.device.type == "cpu" and self.tokens.shape[0] == 1

    def _get(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self.program, parameter_name(name))
        return tensor

    def _find(self, name: str) -> Tensor | None:
        found: Tensor | None = getattr(self.program, parameter_name(name), None)
        return found

    def _scale(self, name: str) -> Tensor | None:
        """Of a weight that is quantized."""
        algo = self.config.quant_algo
        return self._find(scale_name(name + ".weight", algo)) if algo else None

    def embedding(self, name: str) -> Tensor:
        table = self._get(name + ".weight")
        if not self.config.use_parallel_embedding or self.tp_size == 1:
            return F.embedding(self.tokens, table)
        if self.config.embedding_sharding_dim == 1:
            return all_gather(F.embedding(self.tokens, table), self.tp_size)
        local = self.tokens - self._get(VOCAB_START)
        mine = (local >= 0) & (local < table.shape[0])
        return self.all_reduce(F.embedding(local.clamp(0, table.shape[0] - 1), table) * mine[:, None])

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.config.norm_epsilon)
        return x32.to(x.dtype) * self._get(name + ".weight")

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias, scale = self._get(name + ".weight"), self._find(name + ".bias"), self._scale(name)
        if not self._streams:
            if scale is None:
                return linear(x, weight, bias)
            y = quantized.linear(x, weight, scale)
            return y if bias is None else y + bias
        # The compiler makes one loop of this, which reads weights as fast as memory gives them. Without `as_strided`,
        # which wants its input in memory, it would make x anew in the loop for each row: a norm, say.
        row = x.float()
        row = row.as_strided(row.shape, row.stride())
        y = ((row * weight.float()).sum(-1) if scale is None else quantized.row_product(row, weight, scale))[None]
        return (y if bias is None else y + bias).to(x.dtype)

    def linears(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        if names not in self.program.survey.groups:
            return tuple(self.linear(x, name) for name in names)
        widths = [self.program.rows(name + ".weight") for name in names]
        parts: tuple[Tensor, ...] = self.linear(x, merged_name(names)).split(widths, dim=-1)
        return parts

    def split_qkv(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv, size = self.sizes.num_heads, self.sizes.num_kv_heads, self.config.head_size
        q, k, v = qkv.view(-1, heads + 2 * kv, size).split([heads, kv, kv], dim=1)
        return q, k, v

    def rope(self, x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, dim=-1)
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return attend(q, k, v, self.cache, layer, self.slots, *self.runs).flatten(1)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self.tp_size == 1 else all_reduce(x)

    def select_rows(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def vocab_logits(self, x: Tensor, name: str) -> Tensor:
        logits = self.linear(x, name).float()
        if self.tp_size > 1:
            logits = all_gather(logits, self.tp_size)
        return logits[:, :self.config.vocab_size]


def token_places(count: int, query_start: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """(position in its sequence, row in the arena) of each of `count` packed tokens, both int64 `[T]`.

    The last P of the B sequences begin at `query_start [P+1]`, which ends with T; those before have one token each.
    """
    index = torch.arange(count, device=query_start.device)
    # Of the whole of `query_start`: of a slice of it, Inductor (torch 2.11, CUDA) searches what the slice begins in.
    begun = torch.searchsorted(query_start, index.to(query_start.dtype), right=True)
    prompts = query_start.shape[0] - 1
    singles = length.shape[0] - prompts
    single = begun == 0
    # Within bounds on any input: compilers try a graph on zeros.
    owner = torch.where(single, index, singles + begun - 1).clamp(max=length.shape[0] - 1)
    end = torch.where(single, index + 1, query_start[begun.clamp(max=prompts)])
    positions = length[owner] - (end - index)
    return positions, start[owner] + positions
