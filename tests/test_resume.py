"""tpllm convert after a kill, and by several ranks: always the result of one uninterrupted process, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HERE, mpirun
from makers import LLAMA2_MHA, LLAMA31_GQA, make_meta_dir

from tpllm.checkpoint.meta import MetaCheckpoint
from tpllm.cli import main
from tpllm.demo import MODEL_DIR

DISK = namedtuple("DISK", "total used free")
PROGRAM = str(HERE / "slow_convert.py")
OPTIONS = ("--tp-size", "2", "--workers", "2", "--max-position-embeddings", "64")


def argv(source: Path, out: Path, *options: str) -> list[str]:
    return ["convert", "--meta-ckpt-dir", str(source), "--output-dir", str(out), *(options or OPTIONS)]


def tree(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; a conversion leaves no directories."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_meta_dir(tmp_path_factory.mktemp("source") / "meta", replace(LLAMA31_GQA, n_layers=3), shards=2,
                         tokenizer=MODEL_DIR / "tokenizer.model")


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What one process makes of it without a pause."""
    out = source.with_name("whole")
    assert main(argv(source, out)) == 0
    files = tree(out)
    assert files.keys() == {"rank0.safetensors", "rank1.safetensors", "config.json", "manifest.json",
                            "tokenizer.model"}
    return files


def start(words: list[str], kill_after: float = 2.0) -> subprocess.Popen[str]:
    """The slow program once it is about to convert; it kills itself after this share of the weights is written."""
    process = subprocess.Popen([sys.executable, PROGRAM, str(kill_after), *words], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def killed(words: list[str], kill_after: float = 0.5) -> None:
    process = start(words, kill_after)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -9, error


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.full)])
def test_killed_at_random_moments(kills: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Each run goes on where the one before was killed; some end before they can be, and the next begins anew."""
    out, chance = tmp_path / "out", random.Random()
    process, started = start(argv(source, out)), time.monotonic()
    process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert process.returncode == 0 and tree(out) == whole
    done = 0
    for _ in range(5 * kills):
        if out.exists():
            assert tree(out) == whole
            shutil.rmtree(out)
        process = start(argv(source, out))
        try:
            process.wait(chance.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            done += process.wait() == -9
        process.communicate()
        assert process.returncode in (0, -9)
        if done == kills:
            break
    assert done == kills
    assert out.exists() or main(argv(source, out)) == 0
    assert tree(out) == whole and not out.with_name("out.partial").exists()


def test_going_on_writes_only_what_is_missing(source: Path, whole: dict[str, bytes], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed(argv(source, out), 0.5)
    assert partial.is_dir() and not out.exists()
    total = sum(len(data) for name, data in whole.items() if name.startswith("rank"))
    pwrite, written = os.pwrite, []
    tensor, read = MetaCheckpoint.tensor, []

    def counted(fd: int, data: Any, offset: int) -> int:
        written.append(pwrite(fd, data, offset))
        return written[-1]

    def counted_tensor(self: MetaCheckpoint, part: Any, layer: int | None) -> torch.Tensor:
        read.append((part, layer))
        return tensor(self, part, layer)

    monkeypatch.setattr(os, "pwrite", counted)
    monkeypatch.setattr(MetaCheckpoint, "tensor", counted_tensor)
    # What is allocated already is not asked of the disk again.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DISK(total, total, 0))
    capsys.readouterr()
    assert main(argv(source, out)) == 0
    assert f"goes on in {partial}" in capsys.readouterr().out
    assert tree(out) == whole
    # Each of the two threads was in the middle of a tensor, the largest of which is an eighth of all.
    assert 0.4 * total < sum(written) < 0.8 * total
    assert 0 < len(read) < 3 * 9 + 3


def test_what_a_loss_of_power_spoilt_is_written_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The journal came to the disk before the weights did, and its own end did not."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed(argv(source, out), 0.9)
    for rank in range(2):
        path = partial / f"rank{rank}.safetensors"
        data = bytearray(path.read_bytes())
        for place in range(0, len(data), 65536):
            data[place:place + 512] = bytes(len(data[place:place + 512]))
        path.write_bytes(data[:len(data) - 1000])
    [journal] = partial.glob(".journal*")
    journal.write_bytes(journal.read_bytes()[:-20] + b"\xff\0")
    assert main(argv(source, out)) == 0
    assert tree(out) == whole


@pytest.mark.parametrize("change", ["options", "source", "lock"])
def test_what_another_conversion_left_is_cleared(change: str, source: Path, tmp_path: Path) -> None:
    shape = replace(LLAMA31_GQA, n_layers=3)
    own, out, options = tmp_path / "meta", tmp_path / "out", list(OPTIONS)
    make_meta_dir(own, shape)
    killed(argv(own, out), 0.6)
    (tmp_path / "out.partial" / "old").mkdir()
    if change == "options":
        options = ["--tp-size", "2", "--dtype", "bfloat16"]
    elif change == "source":
        make_meta_dir(own, shape, seed=1)
    else:  # of an interrupted start
        (tmp_path / "out.partial" / ".lock").write_text("")
    assert main(argv(own, out, *options)) == 0
    assert main(argv(own, tmp_path / "plain", *options)) == 0
    assert tree(out) == tree(tmp_path / "plain")


def test_two_at_once(source: Path, whole: dict[str, bytes], tmp_path: Path,
                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    process = start(argv(source, out))
    while not list(tmp_path.glob("out.partial/.journal*")) and process.poll() is None:
        time.sleep(0.01)
    assert main(argv(source, out)) == 2
    message = capsys.readouterr().err
    assert f"{out} is in use: process {process.pid} on" in message and "--output-dir" in message
    process.communicate(timeout=60)
    assert process.returncode == 0 and tree(out) == whole


# By several ranks


@pytest.mark.parametrize("ranks", [2, pytest.param(5, marks=pytest.mark.full)])
def test_ranks_share_the_work(ranks: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = mpirun(ranks, [PROGRAM, "2", *argv(source, tmp_path / "out")])
    assert tree(tmp_path / "out") == whole
    assert done.stdout.count("convert: takes up to") == done.stdout.count("rank file(s) in") == 1
    wrote = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("wrote ")]
    total = sum(len(data) for name, data in whole.items() if name.startswith("rank"))
    assert len(wrote) == ranks and sum(wrote) == total  # nothing twice …
    assert min(wrote) > total / ranks / 2  # … and every rank its part


def test_an_error_of_one_rank_is_reported_once(tmp_path: Path) -> None:
    source = make_meta_dir(tmp_path / "meta", LLAMA31_GQA, shards=8)
    path = source / "consolidated.02.pth"
    state = torch.load(path)
    state["layers.1.attention.wk.weight"] += 1  # which the shard before repeats
    torch.save(state, path)
    done = mpirun(3, ["-m", "tpllm", *argv(source, tmp_path / "out", "--tp-size", "2")], check=False)
    assert done.returncode != 0
    assert done.stderr.count("tpllm: ") == 1 and "Traceback" not in done.stderr
    assert "layers.1.attention.wk.weight: shards 0 to 3 should hold the same key/value head" in done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.full
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 1), (1, 3)])
def test_another_number_of_ranks_goes_on(before: int, after: int, source: Path, whole: dict[str, bytes],
                                         tmp_path: Path) -> None:
    """One rank kills itself, which ends the others."""
    out = tmp_path / "out"
    if before == 1:
        killed(argv(source, out))
    else:
        done = mpirun(before, [PROGRAM, str(0.5 / before), *argv(source, out)], check=False)
        assert done.returncode != 0 and not out.exists()
    assert len(list(tmp_path.glob("out.partial/.journal*"))) >= 1
    if after == 1:
        assert main(argv(source, out)) == 0
    else:
        done = mpirun(after, ["-m", "tpllm", *argv(source, out)])
        assert "goes on in" in done.stdout
    assert tree(out) == whole


BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
                "SLURM_NPROCS": "4", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("variables", [
    BATCH_SCRIPT, {**BATCH_SCRIPT, "SLURM_STEP_ID": "batch"},
    {**BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {"PMI_SIZE": "1", "PMI_RANK": "0"}],
    ids=["batch script", "batch step", "step of one task", "mpirun -n 1", "PMI of one"])
def test_alone_in_a_batch_script_without_mpi(variables: dict[str, str], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> int:
        raise AssertionError("it looked for other ranks")

    monkeypatch.setattr("tpllm.cli.convert.with_world", asked)
    monkeypatch.setattr("tpllm.distributed._mpi", asked)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(argv(make_meta_dir(tmp_path / "meta", LLAMA2_MHA), tmp_path / "out")) == 0
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["ranks"]) == 2
