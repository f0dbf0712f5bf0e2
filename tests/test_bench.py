"""`tpllm bench`: the arithmetic of its records from hand-made times, and a small engine measured for real."""

import json
from pathlib import Path
from typing import Any

import pytest
from built import Build
from makers import LLAMA2_MHA

from tpllm import bench
from tpllm.cli import main

# Each field's types; design of the run records.
FIELDS = {"kind": str, "model": str, "weights": str, "tp_size": int, "dtype": str, "backend": str, "device": str,
          "peak_memory_bytes": int, "hosts": int, "versions": dict, "command": str, "date": str}


def fake_times(monkeypatch: pytest.MonkeyPatch, *runs: list[tuple[float, int]]) -> None:
    waiting = list(runs)
    monkeypatch.setattr(bench, "event_times", lambda *_: waiting.pop(0))
    monkeypatch.setattr(bench, "random_prompts", lambda *_: [])


def test_decode_counts_from_the_first_token_of_the_last_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequence 0 is a token ahead: at 1 s; from 2 s on both have one every half second."""
    warm_up = [(9.0, 0), (9.5, 1)]
    slow = [(1.0, 0), (2.0, 0), (2.0, 1), (2.5, 0), (2.5, 1), (3.0, 0), (3.0, 1)]
    fast = [(t / 2, i) for t, i in slow]
    fake_times(monkeypatch, warm_up, slow, fast, fast)
    record = bench.decode(None, 2, 10, 4, 3)  # type: ignore[arg-type]
    assert record["tokens_per_s"] == 8.0 and record["spread"] == [4.0, 8.0]  # 4 tokens in 1 s, in half a second
    assert record["ms_per_token"] == 250.0 and record["ttft_ms"] == 1000.0
    # Gaps after the last first token: four of 500 ms, eight of 250.
    assert (record["ms_per_token_p50"], record["ms_per_token_p90"]) == (250.0, 500.0)


def test_throughput_is_output_tokens_over_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        max_batch_size = 0

    runner = Runner()
    fake_times(monkeypatch, [], [(0.5, 0), (4.0, 1)])
    record = bench.throughput(runner, 6, 10, 8, False, 3)  # type: ignore[arg-type]
    assert runner.max_batch_size == 3
    assert (record["tokens_per_s"], record["seconds"], record["output_tokens"]) == (12.0, 4.0, 48)
    fake_times(monkeypatch, [], [(4.0, 1)])
    mixed = bench.throughput(runner, 200, 100, 40, True, 3)  # type: ignore[arg-type]
    assert mixed["kind"] == "mixed" and 32 * 200 <= mixed["input_tokens"] <= 100 * 200
    assert 16 * 200 <= mixed["output_tokens"] <= 40 * 200
    assert mixed["tokens_per_s"] == round(mixed["output_tokens"] / 4.0, 1)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_small_engine_measured(tmp_path: Path) -> None:
    argv = ["bench", "--engine-dir", str(tmp_path / "e"), "--model", "tiny", "--backend", "eager", "--device", "cpu",
            "--dtype", "float32", "--batch-sizes", "1", "3", "--input-len", "40", "--output-len", "20", "--repeats",
            "2", "--num-requests", "5", "--mixed", "--output-file", str(tmp_path / "r.jsonl")]  # fmt: skip
    assert main(argv) == 0
    found = records(tmp_path / "r.jsonl")
    assert [record["kind"] for record in found] == ["build", "load", "decode", "decode", "mixed"]
    for record in found:
        assert {name: type(record[name]) for name in FIELDS} == FIELDS
        assert (record["model"], record["weights"], record["tp_size"]) == ("tiny", "random", 1)
    for record, batch in zip(found[2:4], (1, 3), strict=True):
        assert record["tokens_per_s"] * record["ms_per_token"] / 1000 == pytest.approx(batch, rel=0.01)
        assert record["spread"][0] <= record["tokens_per_s"] <= record["spread"][1]
        assert 0 < record["bandwidth_share"] and record["all_reduce"] is None and record["ttft_ms"] > 0
    assert found[4]["batch_size"] == 3
    # The engine is there now: it is measured, not built again.
    assert main(argv[:-2] + ["--output-file", str(tmp_path / "again.jsonl")]) == 0
    assert [record["kind"] for record in records(tmp_path / "again.jsonl")] == ["load", "decode", "decode", "mixed"]


def test_an_engine_of_a_checkpoint_is_measured_with_its_weights(build: Build, tmp_path: Path) -> None:
    built = build(LLAMA2_MHA)
    assert main(["bench", "--engine-dir", str(built.engine), "--batch-sizes", "1", "--input-len", "4", "--output-len",
                 "4", "--repeats", "1", "--output-file", str(tmp_path / "r.jsonl")]) == 0
    assert {record["weights"] for record in records(tmp_path / "r.jsonl")} == {str(built.checkpoint)}


@pytest.mark.parametrize(("options", "words"), [
    (["--batch-sizes", "0"], "start at 1"), (["--output-len", "1"], "--output-len at 2"),
    (["--repeats", "0"], "start at 1"), (["--model", "llama-9"], "no shape 'llama-9'"),
])
def test_what_cannot_be_measured_is_refused(options: list[str], words: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--engine-dir", str(tmp_path / "e"), *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "e").exists()
