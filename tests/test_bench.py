"""`tpllm bench`: the arithmetic of its records from hand-made times, and a small engine measured for real."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built import Build
from makers import LLAMA2_MHA

from tpllm import bench, nvml
from tpllm.answer import TokenEvent
from tpllm.bench import Load
from tpllm.cli import main
from tpllm.devices import Device
from tpllm.distributed import Place, World
from tpllm.errors import DataError, UsageError
from tpllm.records import append_record, read_records

# Each field's types; design of the run records.
FIELDS = {"kind": str, "model": str, "weights": str, "tp_size": int, "dtype": str, "backend": str, "device": str,
          "peak_memory_bytes": int, "cores_per_host": int, "hosts": int, "versions": dict, "command": str, "date": str}


class Runner:
    """As much of one as the arithmetic needs."""

    world = World()
    max_batch_size = 0


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
    record = bench.decode(Runner(), 2, 10, 4, 3)  # type: ignore[arg-type]
    assert record["tokens_per_s"] == 8.0 and record["spread"] == [4.0, 8.0]  # 4 tokens in 1 s, in half a second
    assert record["ms_per_token"] == 250.0 and record["ttft_ms"] == 1000.0
    # Gaps after the last first token: four of 500 ms, eight of 250.
    assert (record["ms_per_token_p50"], record["ms_per_token_p90"]) == (250.0, 500.0)


def test_throughput_is_output_tokens_over_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    # Requests 0 and 1 have their first tokens at 0.5 and 1.5 s; the gaps are 1, 2 and 2.5 s.
    fake_times(monkeypatch, [], [(0.5, 0), (1.5, 0), (1.5, 1), (3.5, 0), (4.0, 1)])
    record = bench.throughput(runner, Load(6, 10, 8), 3)  # type: ignore[arg-type]
    assert runner.max_batch_size == 3
    assert (record["tokens_per_s"], record["seconds"], record["output_tokens"]) == (12.0, 4.0, 48)
    assert (record["requests_per_s"], record["request_rate"], record["ttft_ms"]) == (1.5, None, 1000.0)
    assert (record["ms_per_token_p50"], record["ms_per_token_p90"]) == (2000.0, 2400.0)
    fake_times(monkeypatch, [], [(4.0, 1)])
    mixed = bench.throughput(runner, Load(200, 100, 40, mixed=True), 3)  # type: ignore[arg-type]
    assert mixed["kind"] == "mixed" and 32 * 200 <= mixed["input_tokens"] <= 100 * 200
    assert 16 * 200 <= mixed["output_tokens"] <= 40 * 200
    assert mixed["tokens_per_s"] == round(mixed["output_tokens"] / 4.0, 1)


def test_prefill_is_the_prompts_tokens_over_the_time_to_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, [(9.0, 0)], [(0.5, 0)], [(0.2, 0)], [(0.25, 0)])
    record = bench.prefill(Runner(), 100, 3)  # type: ignore[arg-type]
    assert (record["tokens_per_s"], record["ttft_ms"], record["spread"]) == (400.0, 250.0, [200.0, 500.0])


def test_requests_come_at_their_rate_and_always_at_the_same_times() -> None:
    times = bench.poisson(4000, 8.0, 1)
    assert times[0] == 0.0 and times == sorted(times) == bench.poisson(4000, 8.0, 1) != bench.poisson(4000, 8.0, 2)
    gaps = np.diff(times)
    # Of an exponential distribution: mean 1/8 s, as much standard deviation; e**-1 of the gaps are longer than that.
    assert gaps.mean() == pytest.approx(0.125, rel=0.05) and gaps.std() == pytest.approx(0.125, rel=0.1)
    assert (gaps > 0.125).mean() == pytest.approx(math.exp(-1), abs=0.03)


def test_a_request_is_given_out_no_sooner_than_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    source = bench.Arrivals(["a", "b", "c"], [0.0, 1.0, 5.0])  # type: ignore[list-item]
    assert (next(source), now[0]) == ("a", 0.0)
    assert next(source, None) is None and now[0] == 0.0  # b comes later, a runs: nobody waits
    now[0] = 1.5
    assert next(source) == "b" and source.left == 1

    def token(last: bool) -> TokenEvent:
        return TokenEvent(0, 0, 0, None, None, None, last)  # type: ignore[arg-type]

    assert source.take(token(False)) == (1.5, 0)
    for _ in range(2):
        source.take(token(True))
    assert (next(source), now[0], source.left) == ("c", 5.0, 0)  # nothing runs: waited for
    assert next(source, None) is None


def test_time_to_the_first_token_counts_from_the_requests_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, [])
    monkeypatch.setattr(bench, "poisson", lambda *_: [0.0, 2.0])
    monkeypatch.setattr(bench, "arriving_times", lambda *_: [(0.5, 0), (1.0, 0), (2.25, 1), (4.0, 1)])
    record = bench.throughput(Runner(), Load(2, 10, 2, rate=0.5), 3)  # type: ignore[arg-type]
    assert (record["ttft_ms"], record["ttft_ms_p90"], record["tokens_per_s"]) == (375.0, 475.0, 1.0)
    assert (record["request_rate"], record["requests_per_s"]) == (0.5, 0.5)


class FakeNvml:
    """pynvml with two GPUs: handles are their numbers, energy grows by 300 and 500 mJ a question."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_NVLINK_MAX_LINKS = "sm", "memory", 18

    def __init__(self) -> None:
        self.asked = [0, 0]

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-0", "GPU-1"):
            raise RuntimeError("no such GPU")
        return int(uuid[-1])

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
        self.asked[gpu] += 1
        return self.asked[gpu] * (300, 500)[gpu]

    def nvmlDeviceGetClockInfo(self, gpu: int, kind: str) -> int:
        return {"sm": 1980, "memory": 3201}[kind] + gpu

    def nvmlDeviceGetNvLinkState(self, gpu: int, link: int) -> int:
        if link == 6:
            raise RuntimeError("no such link")
        return 1


class OneRank:
    """A world of one rank, whose GPU has this UUID."""

    rank = 0

    def __init__(self, uuid: str | None) -> None:
        self.places = [Place(0, "h", None if uuid is None else 0, uuid, 1)]

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def test_energy_clocks_and_links_are_those_of_the_ranks_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    world = OneRank("GPU-1")
    before = nvml.joules(world)  # type: ignore[arg-type]
    assert before == 0.5
    assert bench.used_since(before, world, 10) == 0.05  # type: ignore[arg-type]
    assert nvml.clocks(world) == {"sm_mhz": [1981], "memory_mhz": [3202]}  # type: ignore[arg-type]
    monkeypatch.setattr(nvml, "inventory", lambda: [Device(0, "X", "GPU-1", 1, (1, 2, 3))])
    assert nvml.topology(world) == {  # type: ignore[arg-type]
        "hosts": ["h"], "gpus": ["GPU-1"], "numa": [1], "peers": [3], "nvlinks": [6]}


@pytest.mark.parametrize("uuid", [None, "GPU-9"])
def test_where_nvml_does_not_tell_there_is_nothing(uuid: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    world = OneRank(uuid)
    assert nvml.joules(world) is None and nvml.clocks(world) is None  # type: ignore[arg-type]
    assert bench.used_since(None, world, 10) is None  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert nvml.joules(OneRank("GPU-1")) is None  # type: ignore[arg-type]


def test_records_that_processes_add_and_one_that_a_kill_has_torn(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert read_records(path) == []
    append_record(path, {"kind": "load"})
    with path.open("ab") as file:
        file.write(b'{"kind": "dec')
    assert read_records(path) == [{"kind": "load"}]
    append_record(path, {"kind": "decode"})
    assert [json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines()] == ["load", "decode"]
    path.write_text('{"kind": "load"}\n[]\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        read_records(path)
    with pytest.raises(UsageError, match="cannot write"):
        append_record(tmp_path / "none" / "r.jsonl", {})


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_small_engine_measured(tmp_path: Path) -> None:
    argv = ["bench", "--engine-dir", str(tmp_path / "e"), "--model", "tiny", "--backend", "eager", "--device", "cpu",
            "--dtype", "float32", "--batch-sizes", "1", "3", "--input-len", "40", "--output-len", "20", "--repeats",
            "2", "--num-requests", "5", "--mixed", "--request-rate", "20", "--prefill-lens", "50", "--check-tokens",
            "2", "--output-file", str(tmp_path / "r.jsonl")]  # fmt: skip
    assert main(argv) == 0
    found = records(tmp_path / "r.jsonl")
    kinds = ["load", "tokens", "decode", "decode", "prefill", "mixed"]
    assert [record["kind"] for record in found] == ["build", *kinds]
    for record in found:
        assert {name: type(record[name]) for name in FIELDS} == FIELDS
        assert (record["model"], record["weights"], record["tp_size"]) == ("tiny", "random", 1)
        assert record["sums_in_parts"] is None  # which is only where several GPUs are
    for record, batch in zip(found[3:5], (1, 3), strict=True):
        assert record["tokens_per_s"] * record["ms_per_token"] / 1000 == pytest.approx(batch, rel=0.01)
        assert record["spread"][0] <= record["tokens_per_s"] <= record["spread"][1]
        assert 0 < record["bandwidth_share"] and record["all_reduce"] is None and record["ttft_ms"] > 0
    assert found[6]["batch_size"] == 3 and found[6]["request_rate"] == 20 and found[6]["ttft_ms_p99"] > 0
    assert found[5]["tokens_per_s"] * found[5]["ttft_ms"] / 1000 == pytest.approx(50, rel=0.01)
    assert [len(ids) for ids in found[2]["token_ids"]] == [20, 20] and min(map(min, found[2]["logit_gaps"])) >= 0
    # The engine is there now: it is measured, not built again.
    assert main(argv[:-2] + ["--output-file", str(tmp_path / "again.jsonl")]) == 0
    assert [record["kind"] for record in records(tmp_path / "again.jsonl")] == kinds


def test_an_engine_of_a_checkpoint_is_measured_with_its_weights(build: Build, tmp_path: Path) -> None:
    built = build(LLAMA2_MHA)
    assert main(["bench", "--engine-dir", str(built.engine), "--batch-sizes", "1", "--input-len", "4", "--output-len",
                 "4", "--repeats", "1", "--output-file", str(tmp_path / "r.jsonl")]) == 0
    assert {record["weights"] for record in records(tmp_path / "r.jsonl")} == {str(built.checkpoint)}


@pytest.mark.parametrize(("options", "words"), [
    (["--batch-sizes", "0"], "start at 1"), (["--output-len", "1"], "--output-len at 2"),
    (["--repeats", "0"], "start at 1"), (["--prefill-lens", "0"], "start at 1"),
    (["--num-requests", "2", "--request-rate", "-1"], "above 0"), (["--request-rate", "2"], "needs --num-requests"),
    (["--model", "llama-9"], "no shape 'llama-9'"),
])
def test_what_cannot_be_measured_is_refused(options: list[str], words: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--engine-dir", str(tmp_path / "e"), *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "e").exists()
