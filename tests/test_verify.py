"""tpllm verify and tpllm inspect: what is whole passes and is described as it is, whatever else is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import LLAMA31_GQA, NAMED_SHAPES, make_meta_dir, save_hf_dir
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_house import loaded

from tpllm.cli import main
from tpllm.demo import MODEL_DIR

QWEN = str(Path(__file__).with_name("qwen2_model.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as Meta's, Hugging Face's and, of four and two ranks, TensorRT-LLM's directory; and an engine."""
    root = tmp_path_factory.mktemp("made")
    meta = make_meta_dir(root / "meta", LLAMA31_GQA, 2, seed=9)
    paths = {"meta": meta, "hf": save_hf_dir(meta, root / "hf", max_shard_size="60KB"), "tp4": root / "tp4",
             "stages": root / "stages", "tp1": root / "tp1", "engine": root / "engine"}  # fmt: skip
    for name, options in (("tp4", ["--tp-size", "4"]), ("stages", ["--tp-size", "2", "--pp-size", "2", "--dtype",
                                                                   "bfloat16"]), ("tp1", [])):
        assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(paths[name]), *options]) == 0
    assert main(["build", "--checkpoint-dir", str(paths["tp1"]), "--output-dir", str(paths["engine"]), "--backend",
                 "eager", "--device", "cpu"]) == 0
    return paths


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


@pytest.mark.parametrize("source", ["meta", "hf", "tp1", "tp4"])
@pytest.mark.parametrize("name", ["tp4", "stages", "tp1"])
def test_a_checkpoint_is_what_it_was_made_from(name: str, source: str, made: dict[str, Path],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made[name]), "--against", str(made[source])]) == 0
    assert f"all 21 tensors are those of {made[source]}" in capsys.readouterr().out  # 2 layers of 9, and 3


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    meta = make_meta_dir(tmp_path / "meta", NAMED_SHAPES["qkv_bias"])
    model = ["--model-file", QWEN]
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(tmp_path / "out"), *model]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(meta), *model]) == 0


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "transformer.layers.1.mlp.fc.weight"


@pytest.mark.parametrize(("name", "row", "words"), [
    (NAME, 0, "feed_forward.w1.weight (mlp.gate_proj.weight) of layer 1"),
    ("transformer.layers.0.attention.qkv.weight", 7, "attention.wq.weight (self_attn.q_proj.weight) of layer 0"),
    ("transformer.ln_f.weight", 1, "transformer.ln_f.weight"),  # every rank has it: they disagree
])  # fmt: skip
def test_one_weight_of_another_value(name: str, row: int, words: str, made: dict[str, Path],
                                     copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Found by its digest; without a manifest only in comparison with the source."""
    directory = copy("tp4")
    path = directory / "rank2.safetensors"
    edit(path, lambda t: t[name][row].mul_(1.0001))
    assert main(["verify", str(directory)]) == 12
    assert "rank2.safetensors" in capsys.readouterr().err
    (directory / "manifest.json").unlink()
    assert main(["verify", str(directory)]) == 0
    assert "no manifest.json" in capsys.readouterr().out
    assert main(["verify", str(directory), "--against", str(made["meta"])]) == 12
    assert words in capsys.readouterr().err


def test_another_models_source(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_meta_dir(tmp_path / "other", LLAMA31_GQA, seed=10)
    assert main(["verify", str(made["tp4"]), "--against", str(other)]) == 12
    assert "tok_embeddings.weight (model.embed_tokens.weight) in" in capsys.readouterr().err
    smaller = make_meta_dir(tmp_path / "smaller", NAMED_SHAPES["tied"])
    assert main(["verify", str(made["tp4"]), "--against", str(smaller)]) == 12
    assert "hidden_size is 128 and 64" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(NAME), "lacks tensor(s)"),
    (lambda t: t.update(extra=torch.zeros(1)), "has unknown tensor(s): extra"),
    (lambda t: t.update({NAME: t[NAME][:-1].clone()}), f"{NAME} is F32"),
    (lambda t: t.update({NAME: t[NAME].half()}), f"{NAME} is F16"),
])  # fmt: skip
def test_the_schema(change: Any, words: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = copy("tp4")
    (directory / "manifest.json").unlink()
    for rank in (1, 3):
        edit(directory / f"rank{rank}.safetensors", change)
    assert main(["verify", str(directory)]) == 12
    message = capsys.readouterr().err
    assert words in message and "rank1.safetensors" in message and "rank3.safetensors" in message  # both are named


@pytest.mark.parametrize(("key", "value"), [("norm_epsilon", 1e-6), ("rotary_base", 10000.0), ("producer", "x")])
def test_config_json_is_the_one_that_was_written(key: str, value: Any, copy: Callable[[str], Path],
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """A field of another value would make another model of the same weights, without any sign of it."""
    directory = copy("tp4")
    path, manifest = directory / "config.json", directory / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(sorted(data.items()))))  # spacing and order mean nothing
    assert main(["verify", str(directory)]) == 0
    path.write_text(json.dumps(data | {key: value}))
    for verb in ("verify", "inspect"):
        assert main([verb, str(directory)]) == 12
        assert f'{path} is not what' in (message := capsys.readouterr().err) and 'remove "config"' in message
    written = json.loads(manifest.read_text())
    del written["config"]
    manifest.write_text(json.dumps(written))
    assert main(["verify", str(directory)]) == 0  # as the message says


def test_a_rank_too_few_and_one_too_many(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    directory = copy("tp4")
    (directory / "rank3.safetensors").rename(directory / "rank4.safetensors")
    assert main(["verify", str(directory)]) == 12
    message = capsys.readouterr().err
    assert "lacks rank3.safetensors" in message and "has rank4.safetensors" in message


@pytest.mark.parametrize("argv", [["verify", "nowhere"], ["inspect", "nowhere"]])
def test_a_missing_directory(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2 and "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_directory_of_another_kind(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, str(MODEL_DIR)]) == 12 and "config.json" in capsys.readouterr().err


def test_engines(made: dict[str, Path], copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(made["engine"])]) == 0
    assert str(made["tp1"]) in capsys.readouterr().out
    assert main(["verify", str(made["engine"]), "--against", str(made["meta"])]) == 2
    directory = copy("engine")
    file = directory / "rank0.engine"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(directory)]) in (11, 12) and "rank0.engine" in capsys.readouterr().err
    file.unlink()
    assert main(["verify", str(directory)]) == 12 and "lacks rank0.engine" in capsys.readouterr().err


# inspect


def inspect(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(directory), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


@pytest.mark.parametrize(("name", "ranks"), [("tp4", 4), ("stages", 4)])
def test_what_inspect_says_of_a_checkpoint(name: str, ranks: int, made: dict[str, Path],
                                           capsys: pytest.CaptureFixture[str]) -> None:
    facts, manifest = inspect(made[name], capsys), json.loads((made[name] / "manifest.json").read_text())
    config = json.loads((made[name] / "config.json").read_text())
    assert facts["mapping"] == config.pop("mapping") and facts["config"] == config
    assert facts["source"]["directory"] == str(made["meta"]) and facts["versions"]["tpllm"] == manifest["tpllm"]
    assert len(facts["ranks"]) == ranks
    for rank in facts["ranks"]:
        path = made[name] / rank["file"]
        assert rank["bytes"] == path.stat().st_size
        assert rank["fingerprint"] == manifest["ranks"][rank["file"]]["fingerprint"]
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        assert {k: (v["shape"], v["bytes"]) for k, v in rank["tensors"].items()} == {
            k: (list(t.shape), t.nbytes) for k, t in tensors.items()}
        assert {v["dtype"] for v in rank["tensors"].values()} == {"F32" if name == "tp4" else "BF16"}
    assert (facts["launch"] is None) == (name == "stages")


def test_what_inspect_says_of_an_engine(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts, checkpoint = inspect(made["engine"], capsys), inspect(made["tp1"], capsys)
    assert (facts["kind"], checkpoint["kind"]) == ("engine", "checkpoint")
    assert facts["ranks"][0]["fingerprint"] == checkpoint["ranks"][0]["fingerprint"]
    assert facts["build"]["backend"] == "eager" and facts["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["tp4", "engine"])
def test_the_launch_that_inspect_names(name: str, made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed as text too, and its arguments are ones that the verb takes."""
    from tpllm.cli import make_parser

    words = inspect(made[name], capsys)["launch"].split()
    assert words[:4] == ["mpirun", "-n", "4" if name == "tp4" else "1", "tpllm"]
    assert make_parser().parse_args(words[4:]).verb == ("build" if name == "tp4" else "run")
    assert main(["inspect", str(made[name])]) == 0
    printed = capsys.readouterr().out
    assert " ".join(words) in printed and "rank0" in printed


def test_inspect_of_a_torn_checkpoint(copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = copy("tp4") / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", str(path.parent)]) == 12 and str(path) in capsys.readouterr().err


def test_a_reader_of_inspect_that_has_had_enough(made: dict[str, Path]) -> None:
    with subprocess.Popen([sys.executable, "-m", "tpllm", "inspect", "--json", str(made["tp4"])], text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 141


def test_inspect_needs_no_torch(made: dict[str, Path]) -> None:
    for name in ("tp4", "engine"):
        modules = loaded(f"import sys\nfrom tpllm.cli import main\nassert main(['inspect', {str(made[name])!r}]) == 0")
        assert "tpllm" in modules and not modules & {"torch", "mpi4py"}
