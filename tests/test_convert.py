"""tpllm convert: every tensor of every rank file where the format says, and every refusal with nothing left behind."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from makers import (
    LLAMA2_MHA,
    LLAMA31_GQA,
    NAMED_SHAPES,
    ODD_VOCAB,
    QKV_BIAS,
    TIED,
    Shape,
    make_meta_dir,
    random_weights,
)
from safetensors.torch import load_file
from torch import Tensor

from tpllm.checkpoint import meta
from tpllm.checkpoint.meta import MetaCheckpoint
from tpllm.cli import main
from tpllm.config import RopeScaling
from tpllm.demo import MODEL_DIR

QWEN_FILE = Path(__file__).with_name("qwen2_model.py")
DISK = namedtuple("DISK", "total used free")
CONTEXT = ("--max-position-embeddings", "64")  # not guessed, so there is no note about it


def convert(source: Path, out: Path, *options: str) -> int:
    return main(["convert", "--meta-ckpt-dir", str(source), "--output-dir", str(out), *options])


def model_options(shape: Shape) -> list[str]:
    return ["--model-file", str(QWEN_FILE)] if shape.qkv_bias else []


# What the format expects, from the full weights.


def half_order(rows: Tensor, head_size: int) -> Tensor:
    """Within each head the even rows, then the odd ones."""
    order = [*range(0, head_size, 2), *range(1, head_size, 2)]
    heads = rows.split(head_size)
    return torch.cat([head[order] for head in heads])


def heads_of_rank(rows: Tensor, heads: int, head_size: int, t: int, tp: int) -> Tensor:
    """Rank t's heads; of fewer heads than ranks each is repeated for consecutive ranks."""
    mine = [t * heads // tp] if heads < tp else range(t * heads // tp, (t + 1) * heads // tp)
    return torch.cat([rows[h * head_size:(h + 1) * head_size] for h in mine])


def zero_padded(table: Tensor, tp: int) -> Tensor:
    missing = -len(table) % tp
    return torch.cat([table, table.new_zeros(missing, table.shape[1])])


def expected_rank(shape: Shape, full: dict[str, Tensor], rank: int, tp: int, pp: int, embedding: int | None,
                  dtype: torch.dtype) -> dict[str, Tensor]:
    """All that rank's file must hold; `embedding` is the dimension along which the embedding table is split."""
    t, stage = rank % tp, rank // tp
    size = shape.head_dim
    tensors: dict[str, Tensor] = {}

    def packed(layer: int, kind: str) -> Tensor:
        parts = []
        for part, heads in (("wq", shape.n_heads), ("wk", shape.n_kv_heads), ("wv", shape.n_kv_heads)):
            rows = heads_of_rank(full[f"layers.{layer}.attention.{part}.{kind}"], heads, size, t, tp)
            parts.append(rows if part == "wv" else half_order(rows, size))
        return torch.cat(parts)

    if stage == 0:
        table = full["tok_embeddings.weight"]
        if embedding == 0:
            table = zero_padded(table, tp).chunk(tp, 0)[t]
        elif embedding == 1:
            table = table.chunk(tp, 1)[t]
        tensors["transformer.vocab_embedding.weight"] = table
    for local, layer in enumerate(np.array_split(np.arange(shape.n_layers), pp)[stage].tolist()):
        ours, theirs = f"transformer.layers.{local}", f"layers.{layer}"
        tensors[f"{ours}.input_layernorm.weight"] = full[f"{theirs}.attention_norm.weight"]
        tensors[f"{ours}.post_layernorm.weight"] = full[f"{theirs}.ffn_norm.weight"]
        tensors[f"{ours}.attention.qkv.weight"] = packed(layer, "weight")
        if shape.qkv_bias:
            tensors[f"{ours}.attention.qkv.bias"] = packed(layer, "bias")
        tensors[f"{ours}.attention.dense.weight"] = full[f"{theirs}.attention.wo.weight"].chunk(tp, 1)[t]
        tensors[f"{ours}.mlp.fc.weight"] = full[f"{theirs}.feed_forward.w1.weight"].chunk(tp, 0)[t]
        tensors[f"{ours}.mlp.gate.weight"] = full[f"{theirs}.feed_forward.w3.weight"].chunk(tp, 0)[t]
        tensors[f"{ours}.mlp.proj.weight"] = full[f"{theirs}.feed_forward.w2.weight"].chunk(tp, 1)[t]
    if stage == pp - 1:
        tensors["transformer.ln_f.weight"] = full["norm.weight"]
        head = full["tok_embeddings.weight" if shape.tied else "output.weight"]
        tensors["lm_head.weight"] = zero_padded(head, tp).chunk(tp, 0)[t]
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def check_ranks(out: Path, shape: Shape, tp: int, pp: int = 1, embedding: int | None = None,
                dtype: torch.dtype = torch.float32, seed: int = 0, source: torch.dtype = torch.float32) -> None:
    """Every rank file of a converted `make_meta_dir(…, seed, source dtype)`, bit for bit."""
    full = {name: tensor.to(source) for name, tensor in random_weights(shape, seed).items()}
    assert sorted(p.name for p in out.glob("rank*")) == [f"rank{r}.safetensors" for r in range(tp * pp)]
    for rank in range(tp * pp):
        found = load_file(out / f"rank{rank}.safetensors")
        expected = expected_rank(shape, full, rank, tp, pp, embedding, dtype)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], tensor), f"rank {rank}: {name}"


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_every_tensor_of_every_rank(name: str, shards: int, tp: int, pp: int, tmp_path: Path) -> None:
    shape = NAMED_SHAPES[name]
    if shape.vocab_size % shards:
        shape = replace(shape, vocab_size=104)  # Meta's own shards have no padding; 104 fits 8 shards and 8 ranks
    source, out = make_meta_dir(tmp_path / "meta", shape, shards, seed=7), tmp_path / "out"
    sizes = ["--tp-size", str(tp), "--pp-size", str(pp)]
    assert convert(source, out, *sizes, *model_options(shape)) == 0
    check_ranks(out, shape, tp, pp, seed=7)
    assert not out.with_name("out.partial").exists() and not (out / ".lock").exists()


@pytest.mark.parametrize("tp", [3, 4, 5])
@pytest.mark.parametrize("embedding", [None, 0])
def test_an_odd_vocabulary_is_padded_with_zero_rows(embedding: int | None, tp: int, tmp_path: Path) -> None:
    # 101 rows over 3, 4 and 5 ranks; 15 heads and 30 inner rows for tp 3 and 5.
    shape = ODD_VOCAB if tp == 4 else replace(ODD_VOCAB, dim=60, n_heads=15, n_kv_heads=15, ffn_hidden=30)
    source, out = make_meta_dir(tmp_path / "meta", shape), tmp_path / "out"
    options = [] if embedding is None else ["--use-parallel-embedding", "--embedding-sharding-dim", "0"]
    assert convert(source, out, "--tp-size", str(tp), *options) == 0
    check_ranks(out, shape, tp, embedding=embedding)


@pytest.mark.parametrize("name", ["llama2_mha", "tied"])
@pytest.mark.parametrize("dim", [0, 1])
def test_parallel_embedding_splits_the_table_along_its_dimension(dim: int, name: str, tmp_path: Path) -> None:
    shape = NAMED_SHAPES[name]
    source, out = make_meta_dir(tmp_path / "meta", shape, 2), tmp_path / "out"
    assert convert(source, out, "--tp-size", "4", "--pp-size", "2", "--use-parallel-embedding",
                   "--embedding-sharding-dim", str(dim)) == 0
    check_ranks(out, shape, 4, 2, embedding=dim)
    config = json.loads((out / "config.json").read_text())
    assert (config["use_parallel_embedding"], config["embedding_sharding_dim"]) == (True, dim)


def test_uneven_stages_give_the_first_one_the_extra_layer(tmp_path: Path) -> None:
    shape = replace(TIED, n_layers=5)
    source, out = make_meta_dir(tmp_path / "meta", shape), tmp_path / "out"
    assert convert(source, out, "--tp-size", "2", "--pp-size", "3") == 0
    check_ranks(out, shape, 2, 3)
    layers = [len({name.split(".")[2] for name in load_file(out / f"rank{r}.safetensors") if ".layers." in name})
              for r in (0, 2, 4)]
    assert layers == [2, 2, 1]


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_dtypes(dtype: str, source: torch.dtype, tmp_path: Path) -> None:
    directory, out = make_meta_dir(tmp_path / "meta", LLAMA31_GQA, 2, dtype=source), tmp_path / "out"
    assert convert(directory, out, "--dtype", dtype, "--tp-size", "2") == 0
    expected = source if dtype == "auto" else getattr(torch, dtype)
    check_ranks(out, LLAMA31_GQA, 2, dtype=expected, source=source)
    assert f"torch.{json.loads((out / 'config.json').read_text())['dtype']}" == str(expected)


# The other files


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_config_json_has_tensorrt_llms_fields(name: str, tmp_path: Path) -> None:
    shape = NAMED_SHAPES[name]
    source = make_meta_dir(tmp_path / "meta", shape, vocab_in_params=name != "llama2_mha")
    out = tmp_path / "out"
    assert convert(source, out, "--tp-size", "4", "--pp-size", "2", *CONTEXT, *model_options(shape)) == 0
    config = json.loads((out / "config.json").read_text())
    expected = {
        "architecture": "Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM", "dtype": "float32",
        "logits_dtype": "float32", "vocab_size": shape.vocab_size, "max_position_embeddings": 64,
        "hidden_size": shape.dim, "num_hidden_layers": shape.n_layers, "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads, "head_size": shape.head_dim,
        "rotary_embedding_dim": shape.head_dim, "intermediate_size": shape.ffn_width, "hidden_act": "silu",
        "norm_epsilon": shape.norm_eps, "position_embedding_type": "rope_gpt_neox",
        "rotary_base": shape.rope_theta, "mlp_bias": False, "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
    }  # fmt: skip
    assert {key: config.get(key, "absent") for key in expected} == expected
    mapping = {"world_size": 8, "tp_size": 4, "pp_size": 2}
    assert {key: config["mapping"].get(key) for key in mapping} == mapping and "rank" not in config["mapping"]
    assert config["quantization"]["quant_algo"] is None
    llama3 = {"type": "llama3", **asdict(RopeScaling())}
    assert config["rotary_scaling"] is None if not shape.use_scaled_rope else llama3.items() <= (
        config["rotary_scaling"].items())


def test_the_manifest_describes_every_tensor(tmp_path: Path) -> None:
    source, out = make_meta_dir(tmp_path / "meta", LLAMA2_MHA, dtype=torch.bfloat16), tmp_path / "out"
    assert convert(source, out, "--tp-size", "2") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["digest"] == "xxh3_128"
    assert manifest["source"] == {"kind": "meta", "directory": str(source)}
    assert manifest["ranks"].keys() == {"rank0.safetensors", "rank1.safetensors"}
    for name, entry in manifest["ranks"].items():
        digests = {key: xxhash.xxh3_128_hexdigest(tensor.view(torch.int16).numpy().tobytes())
                   for key, tensor in load_file(out / name).items()}
        assert entry["tensors"] == digests
        assert entry["bytes"] == (out / name).stat().st_size
        lines = "\n".join(f"{key} {value}" for key, value in sorted(digests.items()))
        assert entry["fingerprint"] == xxhash.xxh3_128_hexdigest(lines.encode())


def test_conversion_is_reproducible_and_independent_of_the_source_shards(tmp_path: Path) -> None:
    for shards in (1, 8):
        source = make_meta_dir(tmp_path / f"meta{shards}", LLAMA31_GQA, shards)
        assert convert(source, tmp_path / f"out{shards}", "--tp-size", "4") == 0
    for name in [f"rank{r}.safetensors" for r in range(4)] + ["config.json"]:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out8" / name).read_bytes()


@pytest.mark.parametrize("shape", [LLAMA31_GQA, TIED], ids=["gqa", "tied"])
def test_the_number_of_workers_changes_nothing(shape: Shape, tmp_path: Path) -> None:
    source = make_meta_dir(tmp_path / "meta", shape, shards=2)
    for workers in ("1", "2", "7"):
        assert convert(source, tmp_path / workers, "--tp-size", "2", "--workers", workers, *CONTEXT) == 0
    for path in sorted((tmp_path / "1").iterdir()):
        assert {(tmp_path / workers / path.name).read_bytes() for workers in ("2", "7")} == {path.read_bytes()}


@pytest.mark.parametrize(("workers", "words"), [("3", "type --workers 2"), ("8", "type --workers 2")])
def test_too_little_memory_for_the_workers(workers: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker holds the largest weight and a rank's slice of it: here the table of the vocabulary, in float32."""
    source = make_meta_dir(tmp_path / "meta", LLAMA31_GQA)
    full = load_file_bytes(source)
    monkeypatch.setattr("tpllm.checkpoint.convert.memory_limit", lambda: (2 * 2 * full + 1, "the test's limit"))
    assert convert(source, tmp_path / "out", "--workers", workers, *CONTEXT) == 10
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr("tpllm.checkpoint.convert.memory_limit", lambda: (2 * full - 1, "the test's limit"))
    assert convert(source, tmp_path / "out", "--workers", "1", *CONTEXT) == 10
    assert "use a host with more" in capsys.readouterr().err
    monkeypatch.setattr("tpllm.checkpoint.convert.memory_limit", lambda: (2 * 2 * full, "the test's limit"))
    assert convert(source, tmp_path / "out", "--workers", "2", *CONTEXT) == 0
    assert f"takes up to {4 * full / 1e3:.0f}kB of memory for 2 worker(s)" in capsys.readouterr().out


def load_file_bytes(source: Path) -> int:
    """Of the largest weight of a Meta directory with one shard; attention's three count as one."""
    weights = torch.load(source / "consolidated.00.pth", weights_only=True)
    merged = sum(weights[f"layers.0.attention.w{name}.weight"].nbytes for name in "qkv")
    return max(merged, *(tensor.nbytes for tensor in weights.values()))


@pytest.mark.parametrize("place", ["own", "parent", "both", "none"])
def test_the_tokenizer_comes_along(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = MODEL_DIR / "tokenizer.model" if place in ("own", "both") else None
    source = make_meta_dir(tmp_path / "model" / "7B", LLAMA2_MHA, tokenizer=own)
    parent = source.parent / "tokenizer.model"
    if place in ("parent", "both"):
        parent.write_bytes(b"the parent's")
    out = tmp_path / "out"
    assert convert(source, out) == 0
    note = "no tokenizer in" in capsys.readouterr().out
    if place == "none":
        assert note and not (out / "tokenizer.model").exists()
    else:
        assert not note
        assert (out / "tokenizer.model").read_bytes() == (own or parent).read_bytes()


def test_the_parents_tokenizer_is_found_through_a_relative_and_a_linked_path(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_meta_dir(tmp_path / "model" / "7B", LLAMA2_MHA)
    (source.parent / "tokenizer.model").write_bytes(b"the parent's")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    for number, path in enumerate((Path("."), tmp_path / "link")):
        out = tmp_path / f"out{number}"
        assert convert(path, out) == 0
        assert (out / "tokenizer.model").read_bytes() == b"the parent's"


def test_what_convert_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_meta_dir(tmp_path / "meta", TIED, 2), tmp_path / "out"
    assert convert(source, out, "--tp-size", "4") == 0
    printed = capsys.readouterr().out
    assert "2 shard(s) of LlamaForCausalLM -> 4 rank file(s)" in printed and str(out) in printed
    assert "no output.weight" in printed and "tied" in printed
    assert "max_position_embeddings is 8192 (--max-position-embeddings overrides)" in printed
    assert "float32" in printed


@pytest.mark.parametrize(("change", "expected"), [
    ({}, 4096), ({"norm_eps": 1e-6}, 2048), ({"rope_theta": 500000.0}, 8192), ({"max_seq_len": 512}, 512),
    ({"use_scaled_rope": True, "rope_theta": 500000.0}, 131072),
])  # fmt: skip
def test_the_context_length_is_guessed_aloud(change: dict[str, Any], expected: int, tmp_path: Path) -> None:
    source = changed_params(make_meta_dir(tmp_path, LLAMA2_MHA), change)
    checkpoint = MetaCheckpoint(source, llama())
    assert checkpoint.config.max_position_embeddings == expected
    said = [note for note in checkpoint.notes if "max_position_embeddings" in note]
    assert len(said) == ("max_seq_len" not in change) and all(str(expected) in note for note in said)
    assert MetaCheckpoint(source, llama(), max_position_embeddings=99).config.max_position_embeddings == 99


# RoPE's factor


def llama() -> Any:
    from tpllm.models.llama import Llama

    return Llama


def changed_params(directory: Path, change: dict[str, Any]) -> Path:
    """The directory with some keys of params.json set, or removed where the value is None."""
    path = directory / "params.json"
    params = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in params.items() if value is not None}))
    return directory


@pytest.mark.parametrize(("dims", "override", "factor", "words"), [
    ((4096, 32), None, 8.0, "the RoPE scaling factor is 8"),
    ((2048, 16), None, 32.0, "Llama 3.2 1B"),
    ((3072, 28), None, 32.0, "Llama 3.2 3B"),
    ((2048, 16), 8.0, 8.0, None),
    ((4096, 32), 32.0, 32.0, None),
])  # fmt: skip
def test_the_rope_factor_follows_the_dimensions(dims: tuple[int, int], override: float | None, factor: float,
                                                words: str | None) -> None:
    checkpoint = object.__new__(MetaCheckpoint)  # the rule alone: such weights are gigabytes
    checkpoint.notes = []
    assert checkpoint._rope_factor(*dims, override) == factor
    if words is None:
        assert not checkpoint.notes
    else:
        assert len(checkpoint.notes) == 1
        for word in (words, f"factor is {factor:.0f}", "--rope-scaling-factor"):
            assert word in checkpoint.notes[0]


@pytest.mark.parametrize(("options", "factor"), [((), 32.0), (("--rope-scaling-factor", "5.5"), 5.5)])
def test_the_rope_factor_reaches_config_json(options: tuple[str, ...], factor: float, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(meta.FACTOR_32_MODELS, (LLAMA31_GQA.dim, LLAMA31_GQA.n_layers), "a small one")
    source, out = make_meta_dir(tmp_path / "meta", LLAMA31_GQA), tmp_path / "out"
    assert convert(source, out, *options) == 0
    assert json.loads((out / "config.json").read_text())["rotary_scaling"]["factor"] == factor
    assert ("a small one" in capsys.readouterr().out) == (not options)


# Refusals


class Refusal:
    """A convert command that must fail: `message` is what it says, and nothing is left behind."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.source, self.out, self._capsys = tmp_path / "meta", tmp_path / "out", capsys

    def __call__(self, code: int, *options: str) -> str:
        before = sorted(self.out.iterdir()) if self.out.exists() else None
        self._capsys.readouterr()
        assert convert(self.source, self.out, *options) == code
        printed = self._capsys.readouterr()
        assert (sorted(self.out.iterdir()) if self.out.exists() else None) == before
        assert not self.out.with_name("out.partial").exists()
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("tpllm: "), printed.err
        return lines[0]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


def test_no_such_directory(refused: Refusal) -> None:
    message = refused(2)
    assert "no such directory" in message and str(refused.source) in message


def test_a_directory_without_params_json(refused: Refusal) -> None:
    refused.source.mkdir()
    message = refused(12)
    assert "Meta LLaMA" in message and "params.json" in message and str(refused.source) in message


def test_a_directory_without_weights(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    (refused.source / "consolidated.00.pth").unlink()
    message = refused(12)
    assert "consolidated.00.pth" in message and str(refused.source) in message


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\ufeff{}", ""])
def test_params_json_that_is_no_json_object(text: str, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    (refused.source / "params.json").write_text(text)
    assert str(refused.source / "params.json") in refused(12)


@pytest.mark.parametrize("change", [{"dim": None}, {"n_heads": None}, {"n_layers": None}, {"n_heads": 0},
                                    {"n_heads": "8"}, {"dim": [64]}, {"n_layers": 0}, {"n_kv_heads": 3},
                                    {"vocab_size": "96"}, {"rope_theta": "big"}, {"norm_eps": "small"},
                                    {"max_seq_len": "long"}], ids=str)  # fmt: skip
def test_params_json_with_bad_values(change: dict[str, Any], refused: Refusal) -> None:
    changed_params(make_meta_dir(refused.source, LLAMA2_MHA), change)
    refused(12)


@pytest.mark.parametrize("key", ["quantization_args", "lora_args", "moe", "moe_args", "vision_chunk_size"])
def test_unsupported_params(key: str, refused: Refusal) -> None:
    changed_params(make_meta_dir(refused.source, LLAMA2_MHA), {key: {"x": 1}})
    message = refused(12)
    assert f"has {key}, which is not supported" in message and "params.json" in message


@pytest.mark.parametrize("file", ["consolidated.01.pth", "params.json", "tokenizer.model"])
def test_md5_mismatch_names_the_file(file: str, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, 2, checklist=True, tokenizer=MODEL_DIR / "tokenizer.model")
    path = refused.source / file
    wanted = hashlib.md5(path.read_bytes()).hexdigest()
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x20 if file == "params.json" else 1  # "}" would no longer be JSON …
    if file == "params.json":
        data = bytearray(path.read_bytes() + b" ")  # … and a blank does not change its meaning
    path.write_bytes(data)
    message = refused(12)
    for word in (str(path), wanted, hashlib.md5(data).hexdigest(), "checklist.chk"):
        assert word in message


def test_a_right_checklist_passes(tmp_path: Path) -> None:
    source = make_meta_dir(tmp_path / "meta", LLAMA2_MHA, 2, checklist=True)
    assert convert(source, tmp_path / "out") == 0


def test_a_file_of_the_checklist_that_is_not_there(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, 2, checklist=True, tokenizer=MODEL_DIR / "tokenizer.model")
    (refused.source / "tokenizer.model").unlink()
    message = refused(12)
    assert "tokenizer.model" in message and "checklist.chk" in message


@pytest.mark.parametrize("line", [b"not a checksum", b"\xff\xfe\x00"])
def test_a_checklist_that_is_none(line: bytes, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    (refused.source / "checklist.chk").write_bytes(line + b"\n")
    assert "checklist.chk" in refused(12)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -1000])
def test_a_truncated_shard_is_named(keep: int, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, 2)
    path = refused.source / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(12)
    assert str(path) in message and f"{path.stat().st_size} bytes" in message and "truncated" in message


@pytest.mark.parametrize("content", [[1, 2], {"a": {"b": 1}}, torch.zeros(3)], ids=["list", "nested", "tensor"])
def test_a_shard_of_another_kind_is_named(content: Any, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    torch.save(content, refused.source / "consolidated.00.pth")
    assert "consolidated.00.pth does not hold a flat dictionary of tensors" in refused(12)


def edit_shard(directory: Path, shard: int, remove: str | None = None, add: dict[str, Tensor] | None = None) -> Path:
    path = directory / f"consolidated.{shard:02d}.pth"
    state = torch.load(path)
    if remove is not None:
        del state[remove]
    torch.save(state | (add or {}), path)
    return path


@pytest.mark.parametrize("vocab_in_params", [True, False])
@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "norm.weight",
                                  "layers.1.attention.wk.weight", "output.weight"])  # fmt: skip
def test_a_missing_tensor_is_named(name: str, shard: int, vocab_in_params: bool, refused: Refusal) -> None:
    # output.weight may lack from all shards (tied), but not from one of them.
    make_meta_dir(refused.source, LLAMA2_MHA, 2, vocab_in_params=vocab_in_params)
    edit_shard(refused.source, shard, remove=name)
    assert name in refused(12)


def test_many_missing_tensors_are_counted(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    changed_params(refused.source, {"n_layers": 4})
    message = refused(12)
    assert "consolidated.00.pth lacks 18 tensor(s)" in message and "layers.2.attention.wk.weight" in message


@pytest.mark.parametrize("shard", [0, 1])
def test_an_extra_tensor_is_named(shard: int, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, 2)
    path = edit_shard(refused.source, shard, add={"layers.0.attention.wq.bias": torch.zeros(32)})
    message = refused(12)
    assert str(path) in message and "layers.0.attention.wq.bias" in message and "LlamaForCausalLM" in message


def test_biases_need_the_model_that_has_them(refused: Refusal) -> None:
    make_meta_dir(refused.source, QKV_BIAS)
    assert "layers.0.attention.wk.bias" in refused(12)


def test_a_missing_shard_number_is_named(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, 4)
    (refused.source / "consolidated.02.pth").unlink()
    assert "lacks consolidated.02.pth" in refused(12)


def test_a_missing_last_shard_is_found_by_the_shapes(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, 4)
    (refused.source / "consolidated.03.pth").unlink()
    message = refused(12)
    assert "3 shard(s)" in message and "tok_embeddings.weight" in message


@pytest.mark.parametrize("tp", [3, 16])
def test_heads_that_do_not_divide_list_the_sizes_that_work(tp: int, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    message = refused(2, "--tp-size", str(tp))
    assert f"--tp-size {tp}" in message and "8 attention heads" in message
    assert message.endswith("sizes that work: 1, 2, 4, 8")


@pytest.mark.parametrize(("options", "words"), [
    (("--tp-size", "0"), "--tp-size and --pp-size start at 1"),
    (("--pp-size", "0"), "--tp-size and --pp-size start at 1"),
    (("--workers", "0"), "--workers is 0; it starts at 1"),
    (("--pp-size", "3"), "--pp-size 3 is more than the model's 2 layers"),
    (("--rope-scaling-factor", "8"), "--rope-scaling-factor is for models whose params.json says use_scaled_rope"),
    (("--model-file", "/nowhere/model.py"), "no such model file: /nowhere/model.py"),
])  # fmt: skip
def test_options_that_cannot_be(options: tuple[str, ...], words: str, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    assert words in refused(2, *options)


@pytest.mark.parametrize("factor", ["0", "-8", "nan"])
def test_a_rope_factor_that_is_no_factor(factor: str, refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA31_GQA)
    assert "rope" in refused(2, f"--rope-scaling-factor={factor}").lower()


def test_a_full_output_directory(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    refused.out.mkdir()
    (refused.out / "thesis.txt").write_text("mine")
    message = refused(2)
    assert f"{refused.out} exists and is not empty" in message and "--output-dir" in message
    assert (refused.out / "thesis.txt").read_text() == "mine"


def test_an_output_path_that_is_a_file_or_under_one(refused: Refusal) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA)
    file = refused.out.with_name("file")
    file.write_text("mine")
    for out in (file, file / "out"):
        assert convert(refused.source, out) == 2
        assert file.read_text() == "mine"
    assert not file.with_name("file.partial").exists()


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert convert(make_meta_dir(tmp_path / "meta", LLAMA2_MHA), tmp_path / "out") == 0
    check_ranks(tmp_path / "out", LLAMA2_MHA, 1)


WRITER = """
import sys
from pathlib import Path
from tpllm.files import output_dir
with output_dir(Path(sys.argv[1])) as partial:
    (partial / "rank0.safetensors").write_text("half")
    (partial / "old").mkdir()
    (partial / "old" / "rank1.safetensors").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `out`."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "out")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_an_output_directory_in_use_then_left_by_a_dead_process(
        writer: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_meta_dir(tmp_path / "meta", LLAMA2_MHA), tmp_path / "out"
    assert convert(source, out) == 2
    message = capsys.readouterr().err
    assert f"{out} is in use" in message and f"process {writer.pid} " in message and "Traceback" not in message
    # The other's work is left alone, and ours did not become the result.
    assert (tmp_path / "out.partial" / "rank0.safetensors").read_text() == "half" and not out.exists()
    writer.kill()
    writer.wait()
    assert convert(source, out) == 0
    assert not (tmp_path / "out.partial").exists()
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "manifest.json", "rank0.safetensors"]
    check_ranks(out, LLAMA2_MHA, 1)


def test_no_free_space(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    make_meta_dir(refused.source, LLAMA31_GQA)
    asked: list[Path] = []

    def disk_usage(path: Path) -> DISK:
        asked.append(path)
        return DISK(1 << 40, 0, 1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    message = refused(10)
    assert "0.00 GiB free" in message and "are needed" in message and "--output-dir" in message
    assert asked and all(Path(path) in refused.out.parents for path in asked)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a tmpfs of the given number of bytes at `tmp_path/disk`."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("lies", [False, True])
def test_a_disk_that_is_full(lies: bool, small_disk: Any, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    # A quota can make the free space a lie: then the allocation itself must be refused as clearly.
    make_meta_dir(refused.source, LLAMA31_GQA)
    disk = small_disk(1 << 20)
    refused.out = disk / "out"
    if lies:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK(1 << 40, 0, 1 << 40))
    message = refused(10)
    assert ("No space left" in message) if lies else ("--output-dir" in message)
    assert str(disk) in message and not list(disk.iterdir())


def test_a_disk_with_room_for_the_weights_but_not_for_the_rest(small_disk: Any, refused: Refusal,
                                                               tmp_path: Path) -> None:
    make_meta_dir(refused.source, LLAMA2_MHA, tokenizer=MODEL_DIR / "tokenizer.model")
    assert convert(refused.source, tmp_path / "elsewhere") == 0
    page = os.sysconf("SC_PAGESIZE")
    weights = -(-(tmp_path / "elsewhere" / "rank0.safetensors").stat().st_size // page) * page
    refused.out = small_disk(weights + page) / "out"  # one page for the lock
    message = refused(10)
    assert "space" in message.lower()


def test_an_interrupted_convert_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_meta_dir(tmp_path / "meta", LLAMA2_MHA), tmp_path / "out"
    tensor = MetaCheckpoint.tensor

    def interrupted(self: MetaCheckpoint, part: Any, layer: int | None) -> Tensor:
        if layer == 1:
            assert (tmp_path / "out.partial" / "rank0.safetensors").is_file()
            raise KeyboardInterrupt
        return tensor(self, part, layer)

    monkeypatch.setattr(MetaCheckpoint, "tensor", interrupted)
    assert convert(source, out) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta"]
    assert capsys.readouterr().err.strip().endswith("tpllm: interrupted")


# The command line


def test_underscores_are_accepted_as_in_tensorrt_llm(tmp_path: Path) -> None:
    source = make_meta_dir(tmp_path / "meta_with_underscores", LLAMA2_MHA)
    assert main(["convert", "--meta_ckpt_dir", str(source), f"--output_dir={tmp_path / 'out_dir'}", "--tp_size", "2",
                 "--use_parallel_embedding", "--embedding_sharding_dim=1"]) == 0  # fmt: skip
    check_ranks(tmp_path / "out_dir", LLAMA2_MHA, 2, embedding=1)


@pytest.mark.parametrize("argv", [[], ["convert"], ["convert", "--meta-ckpt-dir", "x"], ["fly"],
                                  ["convert", "--meta-ckpt-dir", "x", "--output-dir", "y", "--dtype", "int3"],
                                  ["convert", "--meta-ckpt-dir", "x", "--output-dir", "y", "--tp-size", "two"]])
def test_bad_command_lines_end_with_2_and_a_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: tpllm") and "Traceback" not in error
