"""`tpllm scale`: which commands a sweep runs, what it does about points that fail, and how it goes on."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tpllm.bench import random_engine
from tpllm.cli import dashed, main, make_parser
from tpllm.cli.options import quant_algo
from tpllm.cli.scale import PASSED, RESULTS, Done, Sweep
from tpllm.distributed import World
from tpllm.engine.base import BuildConfig
from tpllm.errors import UsageError
from tpllm.launch.machine import program
from tpllm.records import append_record, read_records

SWEEP = ["scale", "--model", "tiny", "--backend", "eager", "--device", "cpu", "--dtype", "float32", "--tp-sizes", "1,2",
         "--batch-sizes", "1,4", "--input-len", "8", "--output-len", "8", "--repeats", "1", "--check-tokens", "2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TPLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tpllm.report.page.have_matplotlib", lambda: False)
    return tmp_path / "cache"


class Machine:
    """In place of the commands: writes the records that bench would, up to a case that is told to fail."""

    def __init__(self, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results, self.commands = results, list[list[str]]()
        self.fails: dict[tuple[str, int | None], int] = {}  # (kind, batch size) → exit code
        monkeypatch.setattr(Sweep, "call", lambda _, tp, words: self.call(tp, words))

    def call(self, tp: int, words: list[str]) -> Done:
        self.commands.append(words)
        args = make_parser().parse_args(words)
        if words[0] != "convert":
            assert args.ranks == tp
            args = make_parser().parse_args([args.ranked_verb, *args.rest])
        if code := self.fails.get((args.verb, tp)):
            return Done(code, "tpllm: it broke")
        if args.verb in ("convert", "build"):
            args.output_dir.mkdir()
            return Done(0, "")
        common = {"model": args.model, "tp_size": tp, "backend": args.backend, "dtype": "float32",
                  "quant_algo": quant_algo(args)}
        lengths = {"input_len": args.input_len, "output_len": args.output_len}
        append_record(self.results, common | {"kind": "load", "seconds": 1})
        cases: list[dict[str, Any]] = [{"kind": "tokens", "batch_size": args.check_tokens}] * bool(args.check_tokens)
        cases += [{"kind": "decode", "batch_size": batch} for batch in args.batch_sizes]
        cases += [{"kind": "prefill", "input_len": length} for length in args.prefill_lens]
        cases += [{"kind": "mixed" if args.mixed else "throughput", "num_requests": args.num_requests,
                   "concurrency": args.concurrency, "request_rate": args.request_rate}] * bool(args.num_requests)
        for case in cases:
            if code := self.fails.get((case["kind"], case.get("batch_size"))):
                return Done(code, "tpllm: it broke")
            append_record(self.results, common | lengths | case)
        return Done(0, "")

    def benches(self) -> list[argparse.Namespace]:
        """The arguments of each bench."""
        return [make_parser().parse_args(words[words.index("bench"):]) for words in self.commands if "bench" in words]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr("tpllm.cli.scale.report", lambda args: 0)
    return Machine(tmp_path / "out" / RESULTS, monkeypatch)


def sweep(tmp_path: Path, *more: str) -> int:
    return main([*SWEEP, "--output-dir", str(tmp_path / "out"), *more])


def errors(machine: Machine) -> list[tuple[int, str, int | None, int]]:
    return [(r["tp_size"], r["case"]["kind"], r["case"].get("batch_size"), r["exit_code"])
            for r in read_records(machine.results) if r["kind"] == "error"]


def test_every_tp_size_is_measured_once(tmp_path: Path, machine: Machine) -> None:
    assert sweep(tmp_path, "--num-requests", "5", "--request-rate", "2", "--mixed") == 0
    one, two = machine.benches()
    assert (one.model, one.batch_sizes, one.prefill_lens, one.check_tokens) == ("tiny", [1, 4], [8], 2)
    assert (one.num_requests, one.concurrency, one.request_rate, one.mixed) == (5, 4, 2.0, True)
    assert (one.max_batch_size, one.max_input_len, one.max_seq_len, one.output_file) == (4, 8, 16, machine.results)
    assert one.engine_dir != two.engine_dir
    assert sweep(tmp_path, "--num-requests", "5", "--request-rate", "2", "--mixed") == 0
    assert len(machine.commands) == 2  # all is there
    assert sweep(tmp_path, "--batch-sizes", "1,2,4") == 0  # a new point
    assert [bench.batch_sizes for bench in machine.benches()[2:]] == [[2], [2]]
    assert [bench.prefill_lens for bench in machine.benches()[2:]] == [[], []]
    assert sweep(tmp_path, "--use-weight-only", "--tp-sizes", "1") == 0  # other weights: all is to be measured
    assert machine.benches()[4].use_weight_only and machine.benches()[4].batch_sizes == [1, 4]
    assert machine.benches()[4].engine_dir != one.engine_dir
    assert machine.benches()[2].num_requests == 0


def test_a_point_that_fails_is_recorded_and_the_sweep_goes_on(tmp_path: Path, machine: Machine,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    machine.fails = {("decode", 4): 22}
    assert sweep(tmp_path) == 22
    assert errors(machine) == [(1, "decode", 4, 22), (2, "decode", 4, 22)]
    assert "tp 2: decode of batch 4 failed with exit code 22: tpllm: it broke" in capsys.readouterr().err
    # The first launch stops at batch 4; the second one of a tp size measures what comes after it.
    assert [(b.batch_sizes, b.prefill_lens) for b in machine.benches()[:2]] == [([1, 4], [8]), ([], [8])]
    kinds = [record["kind"] for record in read_records(machine.results) if record["tp_size"] == 2]
    assert kinds == ["load", "tokens", "decode", "error", "load", "prefill"]
    machine.fails = {}
    assert sweep(tmp_path) == 0  # what failed is tried again, and nothing else
    assert [(b.batch_sizes, b.prefill_lens, b.check_tokens) for b in machine.benches()[4:]] == [([4], [], 0)] * 2


def test_an_engine_that_does_not_load_fails_its_tp_size_alone(tmp_path: Path, machine: Machine) -> None:
    machine.fails = {("bench", 1): 11, ("prefill", None): 21}
    assert sweep(tmp_path) == 20  # they failed for different reasons
    assert errors(machine) == [(1, "load", None, 11), (2, "prefill", None, 21)]
    assert len(machine.commands) == 2


def test_weights_are_converted_and_built_once_for_each_tp_size(tmp_path: Path, machine: Machine, cache: Path) -> None:
    weights = tmp_path / "llama-x"
    weights.mkdir()
    options = ["--meta-ckpt-dir", str(weights), "--dtype", "auto", "--model", "x", "--launch", "--timeout 60"]
    machine.fails = {("build", 2): 10}
    assert sweep(tmp_path, *options) == 10
    verbs = [[word for word in words if word in ("convert", "build", "bench")] for words in machine.commands]
    assert verbs == [["convert"], ["build"], ["bench"], ["convert"], ["build"]]
    assert machine.commands[1][:5] == ["launch", "-n", "1", "--timeout", "60"]
    convert = make_parser().parse_args(machine.commands[0])
    assert (convert.meta_ckpt_dir, convert.tp_size, convert.dtype) == (weights, 1, "auto")
    assert errors(machine) == [(2, "build", None, 10)] and convert.output_dir.parent == cache / "scale"
    assert [r["kind"] for r in read_records(machine.results)][:3] == ["convert", "build", "load"]
    assert {r["model"] for r in read_records(machine.results)} == {"x"}
    machine.fails = {}
    assert sweep(tmp_path, *options) == 0
    assert [word for words in machine.commands[5:] for word in words if word in ("convert", "build", "bench")] == [
        "build", "bench"]  # the checkpoint is there
    (weights / "more").touch()  # other weights
    (tmp_path / "out" / RESULTS).unlink()
    assert sweep(tmp_path, *options) == 0 and machine.commands[7][0] == "convert"


def test_an_array_job_has_a_task_for_each_tp_size(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TPLLM_SITE", str(tmp_path / "site.toml"))
    assert sweep(tmp_path, "--launch", "--mpi srun", "--mixed", "--sbatch", "--time 30 --account my_account") == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for line in ("--array=0-1", "--ntasks-per-node=2", "--time=30", "--account=my_account"):
        assert f"#SBATCH {line}\n" in script
    assert not machine.commands
    [command] = [line for line in script.splitlines() if line.endswith(" &")]
    words = shlex.split(command.removesuffix(" &").replace("$SLURM_ARRAY_TASK_ID", "1"))
    assert words[:len(program())] == program() and words[len(program())] == "scale"
    words = words[len(program()):]
    task = make_parser().parse_args(dashed(words))
    asked = make_parser().parse_args([*SWEEP, "--output-dir", str(tmp_path / "out"), "--launch", "--mpi srun",
                                      "--mixed", "--prefill-lens", "8", "--concurrency", "4"])
    assert {name: getattr(task, name) for name in PASSED} == {name: getattr(asked, name) for name in PASSED}
    assert main(words) == 0
    assert [words[2] for words in machine.commands] == ["2"]  # task 1 is tp 2


def test_a_report_of_results_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path / "out" / RESULTS, monkeypatch)
    machine.fails = {("bench", 2): 11}
    argv = ["scale", "--report-only", "--output-dir", str(tmp_path / "out")]
    assert main(argv) == 2  # nothing is there yet
    assert main([*argv, "--against", str(tmp_path)]) == 2  # nor there
    monkeypatch.setattr("tpllm.cli.scale.report", lambda args: 0)
    assert sweep(tmp_path) == 11
    monkeypatch.undo()
    monkeypatch.setattr("tpllm.report.page.have_matplotlib", lambda: False)
    assert main(argv) == 0
    assert "it broke" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("options", "words"), [
    (["--tp-sizes", "1,x"], "no list of numbers"), (["--batch-sizes", "0"], "start at 1"),
    (["--model", "llama-9"], "no shape 'llama-9'"), (["--output-len", "1"], "--output-len at 2"),
    (["--check-tokens", "-1"], "start at 0"),
])
def test_what_cannot_be_swept_is_refused(options: list[str], words: str, tmp_path: Path, machine: Machine,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = sweep(tmp_path, *options)
    except SystemExit as e:  # argparse's own
        code = int(e.code or 0)
    assert code == 2 and words in capsys.readouterr().err and not machine.commands


def test_a_source_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--output-dir", str(tmp_path / "out")]) == 2
    assert "--model NAME" in capsys.readouterr().err


def test_a_shape_that_cannot_be_split_is_refused_by_name() -> None:
    world = World()
    world.size = 3
    with pytest.raises(UsageError, match="4 attention heads are not divisible by 3; it can over 1, 2, 4"):
        random_engine("tiny", "float32", None, BuildConfig(), world)


def test_a_real_sweep_with_a_point_that_fails(tmp_path: Path) -> None:
    """One and two ranks are measured, with the same random weights; three cannot share the heads. Then the sweep goes
    on where it was."""
    options = [*SWEEP, "--tp-sizes", "1,2,3", "--batch-sizes", "1", "--output-dir", str(tmp_path / "out")]
    assert main(options) == 2
    records = read_records(tmp_path / "out" / RESULTS)
    assert [record["kind"] for record in records] == ["build", "load", "tokens", "decode", "prefill"] * 2 + ["error"]
    assert "not divisible by 3" in records[-1]["error"] and records[-1]["tp_size"] == 3
    one, two = (record for record in records if record["kind"] == "tokens")
    assert (one["tp_size"], two["tp_size"]) == (1, 2) and one["token_ids"] == two["token_ids"]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"| 1 | 1 | 8 / 8 | {records[3]['tokens_per_s']:.4g}" in text and "not divisible by 3" in text
    before = json.dumps(records)
    assert main([*options, "--tp-sizes", "1,2"]) == 0
    assert json.dumps(read_records(tmp_path / "out" / RESULTS)) == before
