"""Sharding: from any number of Meta's shards to full tensors, and from those to any number of ranks, nothing lost."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import NAMED_SHAPES, Shape, make_meta_dir, params_json, random_weights
from torch import Tensor

from tpllm.checkpoint.meta import MetaCheckpoint
from tpllm.config import ModelConfig
from tpllm.errors import DataError
from tpllm.mapping import Mapping
from tpllm.models.llama import Llama
from tpllm.sharding import Source, full_shape, local_shape, shard

WEIGHTS = [(weight, layer) for table, layer in ((Llama.first_weights, None), (Llama.layer_weights, 0),
                                                (Llama.last_weights, None)) for weight in table]  # fmt: skip
SOURCES = [(source, layer) for weight, layer in WEIGHTS for source in weight.sources]
# How the shape table of the format's documentation splits each source: rows, columns or not at all.
ROWS, COLUMNS = {"wq", "wk", "wv", "w1", "w3", "output"}, {"wo", "w2"}


@dataclass(frozen=True)
class Case:
    """A random model and the embedding split of its conversion."""

    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    inner: int
    vocab: int
    tp: int
    parallel: bool = False
    dim: int = 0

    def config(self) -> ModelConfig:
        return ModelConfig(
            architecture="LlamaForCausalLM", dtype="float32", vocab_size=self.vocab, hidden_size=self.hidden,
            num_hidden_layers=1, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_size=self.head_size, intermediate_size=self.inner, norm_epsilon=1e-5, rotary_base=1e4,
            max_position_embeddings=64, use_parallel_embedding=self.parallel, embedding_sharding_dim=self.dim)

    def shape(self, part: str) -> tuple[int, ...]:
        """The full tensor's, written out per name rather than by axes."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "tok_embeddings": (self.vocab, self.hidden), "output": (self.vocab, self.hidden),
            "wq": (q, self.hidden), "wk": (kv, self.hidden), "wv": (kv, self.hidden), "wo": (self.hidden, q),
            "w1": (self.inner, self.hidden), "w3": (self.inner, self.hidden), "w2": (self.hidden, self.inner),
            "attention_norm": (self.hidden,), "ffn_norm": (self.hidden,), "norm": (self.hidden,),
        }[part]  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tp = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    divisors = [n for n in range(1, tp + 1) if tp % n == 0]
    # Either whole groups of key/value heads on a rank, or a divisor of the ranks.
    kv = draw(st.one_of(st.integers(1, 2).map(lambda n: n * tp), st.sampled_from(divisors)))
    heads = max(kv, tp) * draw(st.integers(1, 3))
    hidden = draw(st.integers(1, 6)) * tp
    return Case(heads, kv, 2 * draw(st.integers(1, 3)), hidden, draw(st.integers(1, 4)) * tp,
                draw(st.integers(1, 40)), tp, draw(st.booleans()), draw(st.sampled_from([0, 1])))


def part_of(source: Source) -> str:
    return source.meta.split(".")[-2]


def numbered(shape: tuple[int, ...]) -> Tensor:
    """No two elements alike, none zero: a wrong place cannot go unseen."""
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).view(shape)


def rejoin(part: str, pieces: list[Tensor], full: Tensor, case: Case) -> Tensor:
    """All ranks' pieces as one tensor, every repetition checked on the way."""
    if part in ("wk", "wv") and case.kv_heads < case.tp:
        repeats = case.tp // case.kv_heads
        for rank, piece in enumerate(pieces):
            assert torch.equal(piece, pieces[rank - rank % repeats])
        return torch.cat(pieces[::repeats], 0)
    embedding_dim = case.dim if case.parallel else None
    dim = 0 if part in ROWS else 1 if part in COLUMNS else embedding_dim if part == "tok_embeddings" else None
    if dim is None:
        for piece in pieces:
            assert torch.equal(piece, pieces[0])
        return pieces[0]
    joined = torch.cat(pieces, dim)
    size = full.shape[dim]
    assert 0 <= joined.shape[dim] - size < case.tp
    assert not joined.narrow(dim, size, joined.shape[dim] - size).any(), "padding must be zeros"
    return joined.narrow(dim, 0, size)


@pytest.mark.parametrize("source", [s for s, _ in SOURCES], ids=lambda s: part_of(s))
@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_all_ranks_parts_make_the_full_tensor(source: Source, case: Case) -> None:
    config, part = case.config(), part_of(source)
    assert config.tp_problem(case.tp) is None
    full = numbered(case.shape(part))
    assert full_shape(source, config) == tuple(full.shape)
    pieces = [shard(full, source.axes, config, mapping) for mapping in Mapping.all_ranks(case.tp)]
    assert torch.equal(rejoin(part, pieces, full, case), full)


@given(case=cases())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_local_shape_is_the_shape_of_the_joined_parts(case: Case) -> None:
    config = case.config()
    for mapping in Mapping.all_ranks(case.tp):
        local = config.local(case.tp)
        for weight, _ in WEIGHTS:
            parts = [shard(numbered(case.shape(part_of(s))), s.axes, config, mapping) for s in weight.sources]
            assert local_shape(weight, config, mapping) == tuple(torch.cat(parts).shape)
        shapes = {weight.name: local_shape(weight, config, mapping) for weight, _ in WEIGHTS}
        rows = (local.num_heads + 2 * local.num_kv_heads) * case.head_size
        assert shapes["attention.qkv.weight"] == (rows, case.hidden)
        assert shapes["lm_head.weight"] == (local.vocab_size, case.hidden)
        assert shapes["mlp.proj.weight"] == (case.hidden, local.intermediate_size)


@given(case=cases())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_ranks_key_value_heads_are_those_its_query_heads_use(case: Case) -> None:
    config = case.config()
    axes = {part_of(s): s.axes for s, _ in SOURCES}
    # Rows that carry their head's number instead of a weight.
    queries = torch.arange(case.heads).repeat_interleave(case.head_size)[:, None].expand(-1, case.hidden)
    keys = torch.arange(case.kv_heads).repeat_interleave(case.head_size)[:, None].expand(-1, case.hidden)
    for mapping in Mapping.all_ranks(case.tp):
        q = shard(queries, axes["wq"], config, mapping)[::case.head_size, 0].tolist()
        k = shard(keys, axes["wk"], config, mapping)[::case.head_size, 0].tolist()
        assert len(q) % len(k) == 0
        group = case.heads // case.kv_heads
        assert [k[i // (len(q) // len(k))] for i in range(len(q))] == [head // group for head in q]


@st.composite
def sources(draw: st.DrawFn) -> tuple[Shape, int]:
    """A model that can be written as that many of Meta's shards, often with fewer key/value heads than shards."""
    shards = draw(st.sampled_from([1, 2, 4, 8]))
    kv = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if n % shards == 0 or shards % n == 0]))
    heads = max(kv, shards) * draw(st.integers(1, 2))
    embedding_dim = draw(st.sampled_from([0, 1]))
    # Files split by vocabulary need it to divide, and so does output.weight, unless there is one shard.
    vocab = draw(st.integers(3, 30)) * shards
    return Shape(dim=heads * 2 * draw(st.integers(1, 2)), n_layers=draw(st.integers(1, 2)), n_heads=heads,
                 n_kv_heads=kv, vocab_size=vocab, ffn_hidden=draw(st.integers(1, 9)) * shards,
                 tied=draw(st.booleans()), embedding_dim=embedding_dim), shards  # fmt: skip


@given(model=sources(), vocab_in_params=st.booleans())
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_number_of_metas_shards_gives_back_the_full_tensors(model: tuple[Shape, int],
                                                                vocab_in_params: bool) -> None:
    shape, shards = model
    full = random_weights(shape, seed=3)
    full.setdefault("output.weight", full["tok_embeddings.weight"])
    with tempfile.TemporaryDirectory() as scratch:
        make_meta_dir(scratch, shape, shards, seed=3, vocab_in_params=vocab_in_params)
        checkpoint = MetaCheckpoint(Path(scratch), Llama)
        assert checkpoint.config.vocab_size == shape.vocab_size
        assert checkpoint.config.intermediate_size == shape.ffn_width
        for source, layer in SOURCES:
            for number in [None] if layer is None else range(shape.n_layers):
                name = source.meta if number is None else f"layers.{number}.{source.meta}"
                assert torch.equal(checkpoint.tensor(source, number), full[name]), name


@pytest.mark.parametrize("name", ["llama31_gqa", "tied"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_and_ranks_are_independent(name: str, shards: int, tmp_path: Path) -> None:
    shape, case_tp = NAMED_SHAPES[name], 4
    checkpoint = MetaCheckpoint(make_meta_dir(tmp_path, shape, shards), Llama)
    case = Case(shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.dim, shape.ffn_width, shape.vocab_size, case_tp)
    for source, layer in SOURCES:
        full = checkpoint.tensor(source, layer)
        pieces = [shard(full, source.axes, checkpoint.config, mapping) for mapping in Mapping.all_ranks(case_tp)]
        assert torch.equal(rejoin(part_of(source), pieces, full, case), full)


def write_two_shards(path: Path, name: str, second: Tensor) -> None:
    """The llama2_mha checkpoint in two shards with one tensor of shard 1 replaced."""
    make_meta_dir(path, NAMED_SHAPES["llama31_gqa"], shards=4)
    file = path / "consolidated.01.pth"
    state = torch.load(file)
    torch.save(state | {name: second}, file)


def test_repeated_key_value_heads_that_differ_are_refused(tmp_path: Path) -> None:
    shape = NAMED_SHAPES["llama31_gqa"]  # 2 key/value heads, so shards 0 and 1 hold the same one
    name = "layers.1.attention.wk.weight"
    write_two_shards(tmp_path, name, torch.zeros(shape.head_dim, shape.dim))
    checkpoint = MetaCheckpoint(tmp_path, Llama)
    source = next(s for s, _ in SOURCES if s.meta == "attention.wk.weight")
    checkpoint.tensor(source, 0)
    with pytest.raises(DataError, match=rf"{name}: shards 0 to 1 .*same key/value head"):
        checkpoint.tensor(source, 1)


def test_shards_of_different_shapes_are_refused(tmp_path: Path) -> None:
    shape, name = NAMED_SHAPES["llama31_gqa"], "layers.0.feed_forward.w2.weight"
    write_two_shards(tmp_path, name, torch.zeros(shape.dim, 3))
    source = next(s for s, _ in SOURCES if s.meta == "feed_forward.w2.weight")
    with pytest.raises(DataError, match=rf"{name} has different shapes"):
        MetaCheckpoint(tmp_path, Llama).tensor(source, 0)


def test_shards_that_make_no_full_tensor_are_refused_with_both_shapes(tmp_path: Path) -> None:
    shape = NAMED_SHAPES["odd_vocab"]
    make_meta_dir(tmp_path, shape)
    params = params_json(shape, vocab_in_params=True) | {"vocab_size": shape.vocab_size + 1}
    (tmp_path / "params.json").write_text(str(params).replace("'", '"'))
    source = next(s for s, _ in SOURCES if s.meta == "output.weight")
    with pytest.raises(DataError) as caught:
        MetaCheckpoint(tmp_path, Llama).tensor(source, None)
    for words in ("output.weight", str([shape.vocab_size, shape.dim]), str([shape.vocab_size + 1, shape.dim])):
        assert words in str(caught.value)
