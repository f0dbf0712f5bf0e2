"""Spoilt checkpoints, engines and sources: each case is found and named or changes nothing, and none crashes."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import LLAMA31_GQA, make_meta_dir, save_hf_dir

from tpllm.checkpoint.hf import HfCheckpoint
from tpllm.checkpoint.meta import MetaCheckpoint
from tpllm.checkpoint.rank import CheckpointConfig, RankCheckpoint
from tpllm.checkpoint.reshard import ShardedCheckpoint
from tpllm.checkpoint.source import all_sources
from tpllm.cli import main
from tpllm.cli.inspect import engine_ranks
from tpllm.errors import DataError, MismatchError, TpllmError, UsageError
from tpllm.mapping import Mapping
from tpllm.models.llama import Llama

SHORT, LONG = 300, 2000  # cases of each kind
FULL = int(os.environ.get("TPLLM_FUZZ_SEED", "0"))  # where the full suite's cases begin
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 8, 2**40, 10**30, 0.5, -0.5, 1e-6, float("nan"), "", "x", "2",
                     [], [1], ["x"], {}, {"x": 1}, [[]]]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def spoil_json(data: Any, rng: random.Random) -> Any:
    """One field gets another value, another's value, or is taken away; now and then the whole is something else."""
    data, paths = copy.deepcopy(data), list(places(data))
    if rng.random() < 0.03 or not paths:
        return rng.choice(VALUES)

    def parent(path: tuple[Any, ...]) -> Any:
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        return inner

    path = rng.choice(paths)
    kind = rng.choice(["value", "value", "near", "swap", "remove"])
    old = parent(path)[path[-1]]
    if kind == "remove":
        del parent(path)[path[-1]]
    elif kind == "swap":
        alike = [p for p in paths if len(p) == len(path) and p != path]
        if alike:
            other = rng.choice(alike)
            parent(path)[path[-1]], parent(other)[other[-1]] = parent(other)[other[-1]], old
    elif kind == "near" and type(old) in (int, float):
        parent(path)[path[-1]] = rng.choice([old + 1, old - 1, old * 2, -old, float(old), str(old)])
    elif kind == "near" and isinstance(old, str) and old:
        at = rng.randrange(len(old))
        parent(path)[path[-1]] = old[:at] + rng.choice("09afz./") + old[at + 1:]
    else:
        parent(path)[path[-1]] = rng.choice(VALUES)
    return data


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut off, flipped, exchanged, overwritten, repeated or appended to, more often near the beginning."""
    size = len(data)
    spot = rng.randrange(min(size, 4096) if rng.random() < 0.6 else size)
    other, length = rng.randrange(size), rng.choice([1, 1, 2, 8, 64, 1000])
    a, b = sorted((spot, other))
    length = min(length, b - a, size - b)
    return {
        "cut": lambda: data[:spot],
        "flip": lambda: data[:spot] + bytes([data[spot] ^ (1 << rng.randrange(8))]) + data[spot + 1:],
        "byte": lambda: data[:spot] + bytes([rng.randrange(256)]) + data[spot + 1:],
        "swap": lambda: (data[:a] + data[b:b + length] + data[a + length:b] + data[a:a + length] + data[b + length:]),
        "zero": lambda: data[:a] + bytes(b - a) + data[b:],
        "append": lambda: data + data[a:b],
        "insert": lambda: data[:a] + b"\0" + data[a:],
        "remove": lambda: data[:a] + data[a + 1:],
    }[rng.choice(["cut", "flip", "flip", "byte", "swap", "zero", "append", "insert", "remove"])]()


def spoil(directory: Path, rng: random.Random) -> tuple[str, bytes | None]:
    """Spoil one file; its name, and what it held."""
    files = sorted(path for path in directory.iterdir() if path.name != "generation_config.json")
    path = rng.choice(files)
    before = path.read_bytes()
    kind = rng.random()
    if kind < 0.02:
        path.unlink()
    elif kind < 0.05:  # another of the directory's files in its place
        path.write_bytes(rng.choice(files).read_bytes())
    elif path.suffix == ".json" and kind < 0.8:
        path.write_text(json.dumps(spoil_json(json.loads(before), rng)))
    else:
        path.write_bytes(spoil_bytes(before, rng))
    return path.name, before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    meta = make_meta_dir(root / "meta", LLAMA31_GQA)
    paths = {name: root / name for name in ("meta", "hf", "checkpoint", "foreign", "one", "engine")}
    save_hf_dir(meta, paths["hf"], max_shard_size="60KB")
    for name, tp in (("checkpoint", "2"), ("one", "1")):
        assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(paths[name]), "--tp-size", tp]) == 0
    shutil.copytree(paths["checkpoint"], paths["foreign"])
    (paths["foreign"] / "manifest.json").unlink()  # as another tool leaves it
    assert main(["build", "--checkpoint-dir", str(paths["one"]), "--output-dir", str(paths["engine"]), "--backend",
                 "eager", "--device", "cpu"]) == 0
    return paths


def fuzz(directory: Path, cases: range, check: Callable[[Path, str], None]) -> None:
    """Spoil the directory in each of the cases, check it, and mend it again."""
    for case in cases:
        name, before = spoil(directory, random.Random(case))
        try:
            check(directory, f"case {case}: {name}")
        except TpllmError as e:
            assert e.exit_code in (UsageError.exit_code, DataError.exit_code, MismatchError.exit_code), f"case {case}"
            assert str(e) and "\n" not in str(e).strip()[:200], f"case {case}: {e}"
        except Exception as e:
            raise AssertionError(f"case {case}, {name}: {type(e).__name__}: {e}") from e
        (directory / name).write_bytes(before)


def weights(directory: Path) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """What build and run read of a checkpoint."""
    checkpoint = CheckpointConfig.load(directory)
    model = Llama(checkpoint.model)
    ranks = [RankCheckpoint(directory, model, m) for m in Mapping.all_ranks(checkpoint.tp_size, checkpoint.pp_size)]
    for rank in ranks:
        rank.fingerprint()
    return checkpoint, [{name: tensor.clone() for name, tensor in rank.load()[0].items()} for rank in ranks]


def fuzz_checkpoint(source: Path, scratch: Path, cases: range, capsys: pytest.CaptureFixture[str]) -> None:
    config, original = weights(source)
    directory = Path(shutil.copytree(source, scratch / "spoilt"))
    found: list[bool] = []

    def check(directory: Path, case: str) -> None:
        code, name = main(["verify", str(directory)]), case.split()[-1]
        message = capsys.readouterr().err
        found.append(code != 0)
        # It says which file; of several that do not fit together, one.
        assert code == 0 or any(n in message for n in (name, "manifest.json")), f"{case}: {message}"
        try:
            now, tensors = weights(directory)
        except TpllmError:
            assert code != 0, f"{case}: passed tpllm verify but cannot be loaded"
            raise
        assert now == config, case
        for mine, theirs in zip(tensors, original, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs), case

    fuzz(directory, cases, check)
    assert 0.7 < sum(found) / len(found) < 1  # the rest: names of things that are not read


def fuzz_engine(source: Path, scratch: Path, cases: range, capsys: pytest.CaptureFixture[str]) -> None:
    config, original = engine_ranks(source)
    directory = Path(shutil.copytree(source, scratch / "spoilt"))
    found: list[bool] = []

    def check(directory: Path, case: str) -> None:
        code = main(["verify", str(directory)])
        message = capsys.readouterr().err
        found.append(code != 0)
        assert code == 0 or "config.json" in message or "engine" in message, f"{case}: {message}"
        now, ranks = engine_ranks(directory)
        assert (now.model, now.build, now.tp_size) == (config.model, config.build, config.tp_size), case
        assert ranks == original, case

    fuzz(directory, cases, check)
    assert 0.5 < sum(found) / len(found) < 1


def fuzz_source(read: Callable[[Path], Any], source: Path, scratch: Path, cases: range) -> None:
    """Sources carry no digests: a weight of another value is theirs to give. But nothing may crash."""
    directory = Path(shutil.copytree(source, scratch / "spoilt"))

    def check(directory: Path, case: str) -> None:
        checkpoint = read(directory)
        for part, layer in all_sources(checkpoint.model(checkpoint.config)):
            assert checkpoint.tensor(part, layer).dim() == len(part.axes), case

    fuzz(directory, cases, check)


def test_spoilt_checkpoints(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_checkpoint(made["checkpoint"], tmp_path, range(SHORT), capsys)


def test_spoilt_engines(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_engine(made["engine"], tmp_path, range(SHORT), capsys)


READERS: dict[str, Callable[[Path], Any]] = {
    "meta": lambda directory: MetaCheckpoint(directory, Llama), "hf": HfCheckpoint, "checkpoint": ShardedCheckpoint,
    "foreign": ShardedCheckpoint,
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_spoilt_sources(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    fuzz_source(READERS[kind], made[kind], tmp_path, range(SHORT))


@pytest.mark.full
def test_many_spoilt_checkpoints(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_checkpoint(made["checkpoint"], tmp_path, range(FULL + SHORT, FULL + LONG), capsys)


@pytest.mark.full
def test_many_spoilt_engines(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_engine(made["engine"], tmp_path, range(FULL + SHORT, FULL + LONG), capsys)


@pytest.mark.full
@pytest.mark.parametrize("kind", READERS)
def test_many_spoilt_sources(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    fuzz_source(READERS[kind], made[kind], tmp_path, range(FULL + SHORT, FULL + LONG))
