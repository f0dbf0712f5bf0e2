"""TensorRT-LLM's checkpoints as a source: from any number of ranks to any other, and what does not fit together."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from makers import NAMED_SHAPES, make_meta_dir
from safetensors.torch import load_file, save_file
from test_sharding import SOURCES, Case, cases, numbered, part_of

from tpllm.cli import main
from tpllm.mapping import Mapping
from tpllm.sharding import shard, unshard


@pytest.mark.parametrize("source", [s for s, _ in SOURCES], ids=lambda s: part_of(s))
@given(case=cases())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_unshard_undoes_shard(source: object, case: Case) -> None:
    from tpllm.sharding import Source

    assert isinstance(source, Source)
    config, full = case.config(), numbered(case.shape(part_of(source)))
    parts = [shard(full, source.axes, config, mapping) for mapping in Mapping.all_ranks(case.tp)]
    assert torch.equal(unshard(parts, source.axes, config), full)


def convert(option: str, source: Path, out: Path, *options: str) -> int:
    return main(["convert", option, str(source), "--output-dir", str(out), *options])


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted([*directory.glob("rank*"), directory / "config.json"])}


LAYOUTS = {"1": ("--tp-size", "1"), "4": ("--tp-size", "4"), "2x2": ("--tp-size", "2", "--pp-size", "2"),
           "vocab": ("--tp-size", "4", "--use-parallel-embedding"),
           "hidden": ("--tp-size", "2", "--use-parallel-embedding", "--embedding-sharding-dim", "1")}  # fmt: skip


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("name", ["llama31_gqa", "odd_vocab", "qkv_bias"])
def test_any_layout_to_any_other_is_as_from_the_source(name: str, before: str, after: str, tmp_path: Path) -> None:
    meta = make_meta_dir(tmp_path / "meta", NAMED_SHAPES[name], seed=5)
    model = ["--model-file", str(Path(__file__).with_name("qwen2_model.py"))] if name == "qkv_bias" else []
    assert convert("--meta-ckpt-dir", meta, tmp_path / "first", *LAYOUTS[before], *model) == 0
    assert convert("--checkpoint-dir", tmp_path / "first", tmp_path / "second", *LAYOUTS[after], *model) == 0
    assert convert("--meta-ckpt-dir", meta, tmp_path / "direct", *LAYOUTS[after], *model) == 0
    assert files(tmp_path / "second") == files(tmp_path / "direct")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two key/value heads over four ranks, in the form another tool leaves: without manifest."""
    meta = make_meta_dir(tmp_path / "meta", NAMED_SHAPES["llama31_gqa"])
    assert convert("--meta-ckpt-dir", meta, tmp_path / "checkpoint", "--tp-size", "4") == 0
    (tmp_path / "checkpoint" / "manifest.json").unlink()
    return tmp_path / "checkpoint"


def change(path: Path, name: str, row: int) -> None:
    tensors = load_file(path)
    tensors[name][row] += 1
    save_file(tensors, path)


@pytest.mark.parametrize(("rank", "name", "row", "found"), [
    (0, "transformer.layers.1.attention.qkv.weight", -1, True),  # a value head that rank 1 has too
    (0, "transformer.layers.1.attention.qkv.weight", 0, False),  # a query head of its own
    (2, "transformer.ln_f.weight", 3, True),
    (3, "transformer.vocab_embedding.weight", 5, True),
    (3, "lm_head.weight", 5, False),
])  # fmt: skip
def test_ranks_must_agree_on_what_they_repeat(rank: int, name: str, row: int, found: bool, checkpoint: Path,
                                              tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(checkpoint / f"rank{rank}.safetensors", name, row)
    code = convert("--checkpoint-dir", checkpoint, tmp_path / "out")
    message = capsys.readouterr().err
    assert code == (12 if found else 0) and (name in message) == found and (tmp_path / "out").exists() == (not found)


def test_padding_that_is_not_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = make_meta_dir(tmp_path / "meta", NAMED_SHAPES["odd_vocab"])
    assert convert("--meta-ckpt-dir", meta, tmp_path / "first", "--tp-size", "4") == 0
    (tmp_path / "first" / "manifest.json").unlink()
    change(tmp_path / "first" / "rank3.safetensors", "lm_head.weight", -1)
    assert convert("--checkpoint-dir", tmp_path / "first", tmp_path / "out") == 12
    assert "padding is not zero" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ["W8A16", "W4A16", "W4A16_AWQ", "FP8"])
def test_quantized_weights_are_refused_with_the_reason(algo: str, checkpoint: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((checkpoint / "config.json").read_text())
    data["quantization"]["quant_algo"] = algo
    (checkpoint / "config.json").write_text(json.dumps(data))
    assert convert("--checkpoint-dir", checkpoint, tmp_path / "out") == 12
    message = capsys.readouterr().err
    assert algo in message and "for its own kernels" in message and "convert the original weights" in message


@pytest.mark.parametrize("before", ["1", "4", "vocab", "hidden"])
def test_a_head_that_is_the_embedding_table(before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other tools leave it out; not where the table's columns are split, which the head's are not."""
    meta = make_meta_dir(tmp_path / "meta", NAMED_SHAPES["tied"])
    assert convert("--meta-ckpt-dir", meta, tmp_path / "first", *LAYOUTS[before]) == 0
    assert convert("--meta-ckpt-dir", meta, tmp_path / "direct", "--tp-size", "2") == 0
    (tmp_path / "first" / "manifest.json").unlink()
    for path in (tmp_path / "first").glob("rank*.safetensors"):
        tensors = load_file(path)
        del tensors["lm_head.weight"]
        save_file(tensors, path)
    code = convert("--checkpoint-dir", tmp_path / "first", tmp_path / "second", "--tp-size", "2")
    if before == "hidden":
        assert code == 12 and "lacks tensor(s): lm_head.weight" in capsys.readouterr().err
    else:
        assert code == 0 and files(tmp_path / "second") == files(tmp_path / "direct")


def test_a_missing_rank_is_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "rank2.safetensors").unlink()
    assert convert("--checkpoint-dir", checkpoint, tmp_path / "out") == 12
    assert "lacks rank2.safetensors" in capsys.readouterr().err


def test_weights_changed_since_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = make_meta_dir(tmp_path / "meta", NAMED_SHAPES["tied"])
    assert convert("--meta-ckpt-dir", meta, tmp_path / "first", "--tp-size", "2") == 0
    path = tmp_path / "first" / "rank1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert convert("--checkpoint-dir", tmp_path / "first", tmp_path / "out") == 12
    assert "rank1.safetensors" in capsys.readouterr().err and not (tmp_path / "out").exists()
