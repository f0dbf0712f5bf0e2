"""Hugging Face directories: rank files bit for bit as from Meta's, tokens as transformers', and every refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mpirun
from makers import (
    LLAMA2_MHA,
    LLAMA31_GQA,
    NAMED_SHAPES,
    QKV_BIAS,
    make_meta_dir,
    save_hf_dir,
    transformers_greedy,
    transformers_model,
)
from reference import Reference
from safetensors.torch import load_file, save_file

from tpllm.checkpoint.hf import HfCheckpoint
from tpllm.cli import main
from tpllm.errors import DataError, UsageError
from tpllm.models.rope import inverse_frequencies

SEVERAL = "60KB"  # makes several files of the small models
CONTEXT = {"llama31_gqa": "131072"}  # of transformers_model; 4096 for the others
TIE = 1e-3


def rank_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("rank*"))}


def edit_config(directory: Path, change: dict[str, Any]) -> Path:
    """Set keys of config.json, or remove them where the value is None."""
    path = directory / "config.json"
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """The same random model in Meta's and in transformers' form."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def pair(name: str, size: str) -> tuple[Path, Path]:
        if (name, size) not in made:
            root = tmp_path_factory.mktemp(name)
            meta = make_meta_dir(root / "meta", NAMED_SHAPES[name], seed=3)
            made[name, size] = meta, save_hf_dir(meta, root / "hf", max_shard_size=size)
        return made[name, size]

    return pair


@pytest.fixture
def source(pairs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    """A Hugging Face directory of several files to spoil."""
    return Path(shutil.copytree(pairs("llama31_gqa", SEVERAL)[1], tmp_path / "hf"))


@pytest.mark.parametrize("size", ["5GB", SEVERAL])
@pytest.mark.parametrize("name", ["llama2_mha", "llama31_gqa", "tied"])
def test_rank_files_are_those_from_metas_directory(name: str, size: str, pairs: Callable[..., tuple[Path, Path]],
                                                   tmp_path: Path) -> None:
    meta, hf = pairs(name, size)
    assert (len(list(hf.glob("*.safetensors"))) > 1) == (size == SEVERAL)
    for tp in (1, 2, 4):
        options = ["--tp-size", str(tp)]
        for kind, directory, more in (("meta", meta, ["--max-position-embeddings", CONTEXT.get(name, "4096")]),
                                      ("hf", hf, [])):
            option = "--meta-ckpt-dir" if kind == "meta" else "--hf-model-dir"
            assert main(["convert", option, str(directory), "--output-dir", str(tmp_path / f"{kind}{tp}"), *options,
                         *more]) == 0
        ours, theirs = tmp_path / f"hf{tp}", tmp_path / f"meta{tp}"
        assert len(rank_files(ours)) == tp and rank_files(ours) == rank_files(theirs)
        assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()


def test_a_model_of_ones_own_reads_hugging_face_names(pairs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    meta, hf = pairs("qkv_bias", SEVERAL)
    file = str(Path(__file__).with_name("qwen2_model.py"))
    for option, directory in (("--meta-ckpt-dir", meta), ("--model-dir", hf)):
        assert main(["convert", option, str(directory), "--output-dir", str(tmp_path / directory.name), "--tp-size",
                     "2", "--model-file", file]) == 0
    assert QKV_BIAS.qkv_bias and rank_files(tmp_path / "hf") == rank_files(tmp_path / "meta")


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(4, marks=pytest.mark.full)])
def test_run_gives_transformers_tokens(tp: int, pairs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    meta, hf = pairs("llama31_gqa", SEVERAL)
    prompts = [[5, 77, 3], list(range(100)), [9] * 17]
    (tmp_path / "ids.csv").write_text("".join(",".join(map(str, p)) + "\n" for p in prompts))
    out = tmp_path / "out.json"
    mpirun(tp, ["-m", "tpllm", "run", "--hf-model-dir", str(hf), "--backend", "eager", "--input-file",
                str(tmp_path / "ids.csv"), "--max-output-len", "12", "--ignore-eos", "--output-json", str(out)],
           env={"TPLLM_CACHE": str(tmp_path / "cache")})  # fmt: skip
    reference, model = Reference(meta), transformers_model(meta)
    for prompt, answer in zip(prompts, json.loads(out.read_text()), strict=True):
        assert min(gap for _, gap in reference.greedy_with_gaps(prompt, 12)) > TIE, "a tie: choose another prompt"
        assert answer["outputs"][0]["token_ids"] == transformers_greedy(model, prompt, 12)


# Spellings of config.json


def old_spelling(data: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    rope = dict(data["rope_parameters"])
    return {"rope_parameters": None, "rope_theta": rope.pop("rope_theta"), "dtype": None, "torch_dtype": "float32",
            "head_dim": None, "rope_scaling": rope if rope["rope_type"] == "llama3" else None,
            "pretraining_tp": 1}  # fmt: skip


@pytest.mark.parametrize("name", ["llama2_mha", "llama31_gqa", "tied"])
def test_old_and_new_spelling_say_the_same(name: str, pairs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    new = pairs(name, "5GB")[1]
    old = Path(shutil.copytree(new, tmp_path / "old"))
    data = json.loads((old / "config.json").read_text())
    assert "rope_parameters" in data and "dtype" in data  # transformers 5 writes the new one
    edit_config(old, old_spelling(data))
    config = HfCheckpoint(old).config
    assert config == HfCheckpoint(new).config
    for directory in (old, new):
        theirs = AutoConfig.from_pretrained(directory)
        np.testing.assert_allclose(inverse_frequencies(config), LlamaRotaryEmbedding(theirs).inv_freq, rtol=1e-6)
        assert (config.vocab_size, config.max_position_embeddings, config.norm_epsilon, config.head_size) == (
            theirs.vocab_size, theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.head_dim)


def test_a_head_size_of_its_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=48, intermediate_size=64, num_hidden_layers=1, head_dim=32,
                                 num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    assert HfCheckpoint(tmp_path).config.head_size == 32


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype", None])
def test_the_dtype_is_that_of_config_json_or_of_the_weights(spelling: str | None, source: Path) -> None:
    edit_config(source, {"dtype": None} | ({spelling: "bfloat16"} if spelling else {}))
    assert HfCheckpoint(source).config.dtype == ("bfloat16" if spelling else "float32")


@pytest.mark.parametrize("change", [{"sliding_window": 131072}, {"sliding_window": 8, "use_sliding_window": False},
                                    {"pretraining_tp": 2}, {"attention_bias": False}, {"use_cache": False},
                                    {"rope_scaling": None, "partial_rotary_factor": 1.0}], ids=str)  # fmt: skip
def test_what_changes_nothing_is_accepted(change: dict[str, Any], source: Path) -> None:
    expected = HfCheckpoint(source).config
    assert HfCheckpoint(edit_config(source, change)).config == expected


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 1e4}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not in the package"),
    ({"architectures": ["LlamaModel"]}, "'LlamaModel'"),
    ({"architectures": None, "model_type": "gpt2"}, "'gpt2'"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"sliding_window": 4096}, "sliding_window 4096"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {k: v for k, v in ROPE.items() if k != "factor"}}, "lacks factor"),
    ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
    ({"hidden_size": None}, "'hidden_size'"), ({"rms_norm_eps": "small"}, "norm_epsilon is 'small'"),
    ({"max_position_embeddings": "long"}, "max_position_embeddings"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"vocab_size": 129}, "embed_tokens.weight is F32 [128, 128]"),
    ({"intermediate_size": 447}, "gate_proj"), ({"num_hidden_layers": 3}, "lacks 9 tensor(s): model.layers.2"),
    ({"num_hidden_layers": 1}, "has 9 tensor(s) that LlamaForCausalLM does not have: model.layers.1"),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"), ({"rope_parameters": [1]}, "config.json"),
])  # fmt: skip
def test_configurations_that_are_refused(change: dict[str, Any], words: str, source: Path) -> None:
    with pytest.raises(DataError) as caught:
        HfCheckpoint(edit_config(source, change))
    assert words in str(caught.value)


# Files


def test_a_missing_directory_and_one_without_weights(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        HfCheckpoint(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no config\.json"):
        HfCheckpoint(tmp_path)
    for path in source.glob("model*"):
        path.unlink()
    with pytest.raises(DataError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json.*\.bin"):
        HfCheckpoint(source)


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = directory / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"] = change(data["weight_map"])
    path.write_text(json.dumps(data))
    return directory


@pytest.mark.parametrize("name", ["../stolen.safetensors", "sub/stolen.safetensors", "/stolen.safetensors", "..",
                                  "link.safetensors", "", "a\0b"])  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(name: str, source: Path) -> None:
    file = sorted(source.glob("*.safetensors"))[0]
    (source / "sub").mkdir()
    for path in (source.parent / "stolen.safetensors", source / "sub" / "stolen.safetensors"):
        shutil.copyfile(file, path)
    (source / "link.safetensors").symlink_to(source.parent / "stolen.safetensors")
    edit_index(source, lambda m: {key: name if value == file.name else value for key, value in m.items()})
    with pytest.raises(DataError) as caught:
        HfCheckpoint(source)
    assert "lies outside" in str(caught.value) or "lacks" in str(caught.value)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"], ids=str)
def test_an_index_without_files(weight_map: Any, source: Path) -> None:
    with pytest.raises(DataError, match="weight_map"):
        HfCheckpoint(edit_index(source, lambda _: weight_map))


def test_a_snapshot_of_the_hub_cache_is_read(source: Path, tmp_path: Path) -> None:
    """Files there are links to ../../blobs."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1234", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert len(HfCheckpoint(snapshot).files) > 1
    assert main(["convert", "--hf-model-dir", str(snapshot), "--output-dir", str(tmp_path / "out")]) == 0


def spoil(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the file that holds the first layer's q_proj."""
    name = "model.layers.0.self_attn.q_proj.weight"
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(change(tensors), path)
            return
    raise AssertionError(name)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: {k: v for k, v in t.items() if k != f"{Q}.weight"}, f"lacks 1 tensor(s): {Q}.weight"),
    (lambda t: t | {f"{Q}.bias": torch.zeros(128)}, f"has 1 tensor(s) that LlamaForCausalLM does not have: {Q}.bias"),
    (lambda t: t | {f"{Q}.weight": t[f"{Q}.weight"][:64].clone()}, f"{Q}.weight is F32 [64, 128]"),
    (lambda t: t | {f"{Q}.weight": t[f"{Q}.weight"].to(torch.int8)}, f"{Q}.weight is I8 [128, 128]"),
    (lambda t: t | {"model.embed_tokens.weight": torch.zeros(1), "model.norm.weight": torch.zeros(128)}, "so does"),
])  # fmt: skip
def test_weights_that_are_not_the_models(change: Any, words: str, source: Path) -> None:
    spoil(source, change)
    with pytest.raises(DataError) as caught:
        HfCheckpoint(source)
    assert words in str(caught.value)


def test_rotary_frequencies_in_old_files_are_left_out(source: Path) -> None:
    spoil(source, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    assert HfCheckpoint(source).config


def test_a_head_is_needed_unless_embeddings_are_tied(pairs: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    tied = Path(shutil.copytree(pairs("tied", "5GB")[1], tmp_path / "tied"))
    with pytest.raises(DataError, match=r"lacks 1 tensor\(s\): lm_head\.weight"):
        HfCheckpoint(edit_config(tied, {"tie_word_embeddings": False}))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_torn_file_is_named(keep: int, source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"{path.name} \(\d+ bytes\) is torn"):
        HfCheckpoint(source)
    path.unlink()
    with pytest.raises(DataError, match=f"lacks {path.name}"):
        HfCheckpoint(source)


# The command line


@pytest.mark.parametrize(("argv", "words"), [
    (["convert", "--output-dir", "o", "--hf-model-dir", "x", "--rope-scaling-factor", "8"], "--rope-scaling-factor"),
    (["run", "--hf-model-dir", "x", "--meta-ckpt-dir", "y"], "--meta-ckpt-dir and --hf-model-dir"),
    (["run", "--hf-model-dir", "x", "--engine-dir", "y"], "--engine-dir"),
])  # fmt: skip
def test_options_that_exclude_each_other(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", [LLAMA2_MHA.n_heads, LLAMA31_GQA.n_heads])
def test_the_end_of_an_answer_comes_along(size: int, source: Path, tmp_path: Path) -> None:
    """From generation_config.json, or, where there is none, from the source's config.json."""
    (source / "generation_config.json").unlink(missing_ok=True)
    edit_config(source, {"eos_token_id": [size, 7]})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["convert", "--hf-model-dir", str(source), "--output-dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == sorted([size, 7])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_p": 0.5}))
    assert main(["convert", "--hf-model-dir", str(source), "--output-dir", str(tmp_path / "second")]) == 0
    assert json.loads((tmp_path / "second" / "generation_config.json").read_text()) == {"eos_token_id": 5,
                                                                                        "top_p": 0.5}
