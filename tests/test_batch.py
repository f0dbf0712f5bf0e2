"""Batch jobs: every id answered once whatever happens to the job, every bad line reported, and nothing torn."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from built import MAX_BATCH, Build, Built, random_ids
from conftest import mpirun, mpirun_command
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import LLAMA2_MHA, make_meta_dir
from test_failures import processes_with

from tpllm.answer import CompletionOutput, GenerationOutput, Job, TokenEvent
from tpllm.batch import MAX_LINE, BatchJob, JsonLines, run_batch
from tpllm.cli import main
from tpllm.distributed import World
from tpllm.errors import PreflightError
from tpllm.inputs import Request, parse_line
from tpllm.sampling import SamplingParams

Lines = list[dict[str, Any]]


def read(path: Path) -> Lines:
    """The objects of a file whose lines are all whole."""
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def errors_of(output: Path) -> Lines:
    return read(output.with_name(output.name + ".errors.jsonl"))


def tokens(answers: Lines) -> dict[int | str, list[int]]:
    """The answers' tokens by id; an id that comes twice is an error."""
    found = {answer["id"]: answer["outputs"][0]["token_ids"] for answer in answers}
    assert len(found) == len(answers), "an id was answered twice"
    return found


# Under mpirun


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An engine over two ranks, an input of a second's work or more, and the answers of a run without interruption."""
    directory = tmp_path_factory.mktemp("two")
    meta = make_meta_dir(directory / "meta", LLAMA2_MHA, shards=2)
    assert main(["convert", "--meta-ckpt-dir", str(meta), "--output-dir", str(directory / "checkpoint"), "--tp-size",
                 "2"]) == 0
    mpirun(2, ["-m", "tpllm", "build", "--checkpoint-dir", str(directory / "checkpoint"), "--output-dir",
               str(directory / "engine"), "--backend", "eager", "--max-seq-len", "64", "--max-batch-size", "4"])
    chance = random.Random(0)
    lines = [{"id": f"q{i}", "token_ids": [chance.randrange(96) for _ in range(chance.randrange(1, 12))],
              "max_output_len": chance.randrange(5, 40)} for i in range(100)]
    bad: Lines = [{"id": "long", "token_ids": [1] * 65}, {"id": "q3", "token_ids": [1]}, {"id": "none"}]
    given = write(directory / "in.jsonl", [*lines[:50], *bad, *lines[50:]])
    whole = directory / "whole.jsonl"
    argv = ["-m", "tpllm", "batch", "--engine-dir", str(directory / "engine"), "--input-file", str(given)]
    mpirun(2, [*argv, "--output-file", str(whole)])
    answers = tokens(read(whole))
    assert answers.keys() == {line["id"] for line in lines}
    return SimpleNamespace(argv=argv, answers=answers, errors=errors_of(whole))


@contextlib.contextmanager
def started(command: list[str], mark: str) -> Iterator[subprocess.Popen[str]]:
    """A process that leaves nothing behind."""
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
           "TEST_MARK": mark}
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            for pid in processes_of(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def processes_of(mark: str, rank: int | None = None) -> list[int]:
    """Those with the mark in their environment: all, or a rank's."""
    words = [f"TEST_MARK={mark}".encode(), *([f"OMPI_COMM_WORLD_RANK={rank}".encode()] if rank is not None else [])]
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if set(words) <= set(environ.read_bytes().split(b"\0")):
                found.append(int(environ.parent.name))
    return found


def wait_for_lines(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Until the file has that many."""
    deadline = time.monotonic() + 90
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert process.poll() is None and process.stderr, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_moments(two: SimpleNamespace, tmp_path: Path, kills: int) -> None:
    """One rank or all of the job, by SIGKILL: after all the resumptions the answers are those of one calm run."""
    output, chance = tmp_path / "out.jsonl", random.Random(kills)
    command = mpirun_command(2, [*two.argv, "--output-file", str(output), "--resume"])
    done = 0
    for number in range(kills):
        mark = f"batch-{os.getpid()}-{number}"
        with started(command, mark) as process:
            wait_for_lines(process, output, done + chance.randrange(1, 60 // kills + 2))
            time.sleep(chance.random() * 0.02)
            victims = processes_of(mark, rank=chance.randrange(2)) if number % 2 else processes_of(mark)
            assert victims
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert process.wait(30) != 0
            assert processes_with(mark) == []
        content = output.read_bytes()
        before, done = done, content.count(b"\n")
        assert before < done < len(two.answers), "no partial file"
        last = content[:content.rindex(b"\n")].rpartition(b"\n")[2]
        with open(output, "ab") as file:  # a kill in the middle of a write is rare: help it along
            file.write(last[:chance.randrange(len(last))])
    ended = mpirun(2, command[command.index("-m"):])
    assert f"{len(two.answers) - done} answered, {done} had been before, 3 refused" in ended.stdout
    assert tokens(read(output)) == two.answers
    assert errors_of(output) == two.errors


def test_the_refused_lines_of_the_calm_run(two: SimpleNamespace) -> None:
    assert [(error["line"], error["id"]) for error in two.errors] == [(51, "long"), (52, "q3"), (53, "none")]
    assert "65 tokens, the engine allows 64" in two.errors[0]["error"] and "line 4" in two.errors[1]["error"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["mpirun", "launch"])
def test_a_signal_drains(two: SimpleNamespace, tmp_path: Path, number: int) -> None:
    """SIGUSR1 to mpirun, SIGTERM to launch: no new prompts, what runs is finished, exit code 75."""
    output, mark = tmp_path / "out.jsonl", f"drain-{os.getpid()}-{number}"
    command = (mpirun_command(2, two.argv) if number == signal.SIGUSR1
               else [sys.executable, "-m", "tpllm", "launch", "-n", "2", *two.argv[2:]])
    with started([*command, "--output-file", str(output)], mark) as process:
        wait_for_lines(process, output, 5)
        process.send_signal(number)
        begun = time.monotonic()
        _, console = process.communicate(timeout=60)
        assert process.returncode == 75, console
        assert time.monotonic() - begun < 30
        assert "--resume goes on" in console
    answers = tokens(read(output))
    assert 5 <= len(answers) < len(two.answers)
    assert answers.items() <= two.answers.items()


# On one rank


@pytest.fixture
def one(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`batch` on an engine for one rank; the exit code. The output is `out.jsonl`, or `output`."""
    built = build(LLAMA2_MHA)
    monkeypatch.setattr(World.start(), "draining", False)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}

    def batch(given: Path, *more: str, output: str = "out.jsonl") -> int:
        return main(["batch", "--engine-dir", str(built.engine), "--input-file", str(given), "--output-file", output,
                     "--max-output-len", "5", *more])

    yield batch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def prompts(build: Build, tmp_path: Path) -> tuple[Path, dict[int | str, list[int]]]:
    """An input with and without ids, and the reference's greedy tokens."""
    built = build(LLAMA2_MHA)
    ids = random_ids(built, *[1 + i % 9 for i in range(14)], seed=11)
    lines: Lines = [{"token_ids": ids, **({"id": f"é{i}"} if i % 2 else {})} for i, ids in enumerate(ids)]
    best = [built.reference.greedy_with_gaps(line["token_ids"], 5) for line in lines]
    assert min(gap for answer in best for _, gap in answer) > 2e-4, "a tie: choose another seed"
    expected = {line.get("id", i): [token for token, _ in best[i]] for i, line in enumerate(lines)}
    return write(tmp_path / "in.jsonl", lines), expected


Prompts = tuple[Path, dict[int | str, list[int]]]


def test_the_answers_are_the_references(one: Callable[..., int], prompts: Prompts) -> None:
    given, expected = prompts
    assert one(given, "--log-dir", "logs") == 0
    answers = read(Path("out.jsonl"))
    assert tokens(answers) == expected
    assert {tuple(answer) for answer in answers} == {("id", "prompt", "prompt_token_ids", "outputs")}
    assert not Path("out.jsonl.errors.jsonl").exists()
    (record,) = Path("logs").glob("batch-*/record.json")
    facts = json.loads(record.read_text(encoding="utf-8"))
    assert (facts["answered"], facts["skipped"], facts["errors"], facts["tokens"]) == (14, 0, 0, 14 * 5)
    assert facts["exit_code"] == 0 and facts["tokens_per_s"] > 0


def test_an_output_is_not_written_over_by_mistake(one: Callable[..., int], prompts: Prompts,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    given, expected = prompts
    assert one(given, "--resume") == 0, "nothing yet to resume"
    content = Path("out.jsonl").read_bytes()
    assert one(given) == 2
    assert "--resume goes on with it, --overwrite begins anew" in capsys.readouterr().err
    assert one(given, "--resume", "--engine-dir", "none") == 2
    assert one(given, "--overwrite", "--engine-dir", "none") == 2, "and nothing is lost before the engine is there"
    assert Path("out.jsonl").read_bytes() == content
    assert one(given, "--overwrite") == 0 and tokens(read(Path("out.jsonl"))) == expected
    assert one(given, "--resume") == 0 and tokens(read(Path("out.jsonl"))) == expected


def test_a_launch_that_fails_leaves_no_files(one: Callable[..., int], prompts: Prompts) -> None:
    assert one(prompts[0], "--engine-dir", "none") == 2
    assert not Path("out.jsonl").exists() and not Path("out.jsonl.errors.jsonl").exists()


def test_the_input_is_not_written_over(one: Callable[..., int], prompts: Prompts,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    content = prompts[0].read_bytes()
    errors = prompts[0].rename("x.errors.jsonl")
    for output in ("x.errors.jsonl", "./x.errors.jsonl", "x"):
        assert one(errors, "--overwrite", output=output) == 2
        assert "give another --output-file" in capsys.readouterr().err
    assert errors.read_bytes() == content


def test_what_is_no_file_is_no_output(one: Callable[..., int], prompts: Prompts) -> None:
    os.mkfifo("pipe")
    assert one(prompts[0], output="pipe") == 2 and one(prompts[0], "--overwrite", output="/dev/null") == 2
    assert Path("/dev/null").exists()


def test_an_output_of_something_else_is_not_resumed(one: Callable[..., int], prompts: Prompts,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.jsonl").write_text('{"id": 1, "outputs": []}\n{"name": "x"}\n', encoding="utf-8")
    assert one(prompts[0], "--resume") == 12
    assert "out.jsonl line 2 is no answer" in capsys.readouterr().err
    assert len(read(Path("out.jsonl"))) == 2


def test_two_jobs_do_not_write_one_file(one: Callable[..., int], prompts: Prompts,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    other = JsonLines(Path("out.jsonl"))
    assert one(prompts[0]) == 2
    assert "another process is writing out.jsonl" in capsys.readouterr().err
    other.close(keep_empty=False)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_input_without_prompts_is_refused(one: Callable[..., int], tmp_path: Path, content: str) -> None:
    (tmp_path / "in.jsonl").write_text(content, encoding="utf-8")
    assert one(tmp_path / "in.jsonl") == 12 and one(tmp_path / "none.jsonl") == 2
    assert not Path("out.jsonl").exists()


def test_a_torn_line_is_cut_off_wherever_it_was_torn(one: Callable[..., int], prompts: Prompts) -> None:
    given, expected = prompts
    assert one(given) == 0
    content = Path("out.jsonl").read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for length in (start, start + 1, (start + len(content)) // 2, len(content) - 1):
        Path("out.jsonl").write_bytes(content[:length])
        assert one(given, "--resume") == 0
        assert tokens(read(Path("out.jsonl"))) == expected


def test_shards_answer_everything_once(one: Callable[..., int], prompts: Prompts) -> None:
    """Also an id that comes twice in the input, in lines of different shards."""
    given, expected = prompts
    with open(given, "a", encoding="utf-8") as file:
        file.write('{"id": "é1", "token_ids": [1]}\n')
    found: dict[int | str, list[int]] = {}
    for i in range(3):
        assert one(given, "--shard", f"{i}/3", output=f"out-{i}.jsonl") == 0
        part = tokens(read(Path(f"out-{i}.jsonl")))
        assert len(part) in (4, 5) and not part.keys() & found.keys()
        found |= part
    assert found == expected
    (error,) = errors_of(Path("out-2.jsonl"))
    assert error["line"] == 15 and "line 2" in error["error"]


@pytest.mark.parametrize("bad", ["4/4", "1", "-1/2", "a/2", "0/0", "1/2/3"])
def test_a_wrong_shard_is_refused(bad: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["batch", "--engine-dir", "e", "--input-file", "i", "--output-file", "o", f"--shard={bad}"])
    assert caught.value.code == 2


SignalWhen = Callable[[Callable[[BatchJob, TokenEvent], bool], int], None]


@pytest.fixture
def signal_when(monkeypatch: pytest.MonkeyPatch) -> SignalWhen:
    """Has jobs get a signal after the tokens that a condition holds for; the one before is forgotten."""
    take = BatchJob.take

    def arm(condition: Callable[[BatchJob, TokenEvent], bool], number: int) -> None:
        def taking(job: BatchJob, event: TokenEvent) -> None:
            take(job, event)
            if condition(job, event):
                os.kill(os.getpid(), number)

        monkeypatch.setattr(World.start(), "draining", False)
        monkeypatch.setattr(BatchJob, "take", taking)

    return arm


def test_drained_within_its_time(one: Callable[..., int], prompts: Prompts, signal_when: SignalWhen) -> None:
    """At the signal at most a batch is running: all of it is answered, or nothing with no time for it."""
    given, expected = prompts
    signal_when(lambda job, event: job.counts["answered"] == 4, signal.SIGUSR1)
    assert one(given) == 75
    assert 4 < len(tokens(read(Path("out.jsonl")))) <= 4 + MAX_BATCH
    signal_when(lambda job, event: job.counts["answered"] == 4, signal.SIGUSR1)
    assert one(given, "--overwrite", "--drain-seconds", "0") == 75
    assert len(tokens(read(Path("out.jsonl")))) in range(4, 4 + MAX_BATCH)
    # No line is left to begin with, but the last answer is not whole.
    signal_when(lambda job, event: event.index == len(expected) - 1, signal.SIGTERM)
    assert one(given, "--resume", "--drain-seconds", "0") == 75
    signal_when(lambda job, event: False, 0)
    assert one(given, "--resume") == 0
    assert tokens(read(Path("out.jsonl"))) == expected


def test_a_signal_after_the_last_prompt_is_no_interruption(one: Callable[..., int], prompts: Prompts,
                                                          signal_when: SignalWhen) -> None:
    signal_when(lambda job, event: job.counts["answered"] == len(prompts[1]), signal.SIGTERM)
    assert one(prompts[0]) == 0


# Disks


@contextlib.contextmanager
def tmpfs(directory: Path, pages: int = 1) -> Iterator[Path]:
    """A file system of so many times 4096 bytes, where each file takes whole ones."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4096 * pages}", "tmpfs", str(directory)],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture(params=["tmpfs", "short writes"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that takes 4096 bytes."""
    directory = tmp_path / "small"
    directory.mkdir()
    if request.param == "tmpfs":
        with tmpfs(directory):
            yield directory
        return
    real = open

    class Small:
        """A file that is full at some size, in the middle of a line."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            room = 4096 - self.file.seek(0, 2)
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.file.write(data[:room]))

    def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        file = real(path, mode, *args, **more)
        return Small(file) if mode == "ab" and Path(path).parent == directory else file

    monkeypatch.setattr("tpllm.batch.open", opened, raising=False)
    yield directory


def test_a_full_disk_stops_the_job_with_nothing_torn(one: Callable[..., int], prompts: Prompts, small_disk: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    given = write(Path("long.jsonl"), lines := [{"id": f"{id}{'x' * 300}", "token_ids": [1, 2]} for id in prompts[1]])
    output = small_disk / "out.jsonl"
    assert one(given, output=str(output)) == 10
    console = capsys.readouterr().err
    assert console.count("tpllm: ") == 1 and "No space left on device" in console and "--resume" in console
    part = tokens(read(output))
    assert 0 < len(part) < len(lines)
    moved = Path("moved.jsonl")
    moved.write_bytes(output.read_bytes())
    assert one(given, "--resume", output="moved.jsonl") == 0
    assert tokens(read(moved)).keys() == {line["id"] for line in lines}


@pytest.mark.full
def test_a_full_disk_ends_all_ranks_in_order(two: SimpleNamespace, tmp_path: Path) -> None:
    with tmpfs(tmp_path, pages=2):  # one for the bad lines, of which the last is read before the first answer ends
        done = mpirun(2, [*two.argv, "--output-file", str(tmp_path / "out.jsonl")], timeout=60, check=False)
        assert done.returncode == 10, done.stderr
        assert done.stderr.count("tpllm: ") == 1 and "No space left on device" in done.stderr
        answers = tokens(read(tmp_path / "out.jsonl"))
    assert answers and answers.items() <= two.answers.items()


def test_all_ends_up_on_the_disk(one: Callable[..., int], prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    assert one(prompts[0]) == 0
    assert synced[-1] == Path("out.jsonl").stat().st_size
    assert len(synced) < len(prompts[1]), "in groups"
    monkeypatch.setattr("tpllm.batch.SYNC_SECONDS", 0.0)
    synced.clear()
    assert one(prompts[0], "--overwrite") == 0
    assert len(synced) > 1, "while it runs, too"


def test_a_disk_that_fails_late(one: Callable[..., int], prompts: Prompts, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    assert one(prompts[0]) == PreflightError.exit_code
    assert "cannot write out.jsonl: Input/output error" in capsys.readouterr().err


# Lines


def bad_lines(chance: random.Random, vocab: int) -> bytes:
    """A random line that no engine of `MAX_SEQ` tokens can answer."""
    good = {"id": chance.randrange(10**9), "prompt": "Count to " + chance.choice(["two", "é€", "\u2028"])}
    text = json.dumps(good, ensure_ascii=chance.random() < 0.5).encode()
    number = chance.choice([-1, -chance.randrange(1, 10**6), -0.5, float("nan"), float("-inf"), -10**30])
    field = chance.choice(["max_output_len", "temperature", "top_k", "top_p", "seed", "color", "\ud800", ""])
    cut = chance.randrange(1, len(text) - 1)
    return chance.choice([
        lambda: text[:cut],
        lambda: text[:cut].rstrip(b"\xc3\xe2\x82") + bytes([chance.randrange(128, 192)]) + text[cut:],
        lambda: text[:cut] + b"\0" + text[cut:],
        lambda: bytes(chance.randrange(33, 256) for _ in range(chance.randrange(1, 60))).replace(b"\n", b"?"),
        lambda: json.dumps({**good, field: number}).encode(),
        lambda: json.dumps({**good, chance.choice(["prompts", "stream", "n", "é"]): 1}).encode(),
        lambda: json.dumps({**good, "prompt": chance.choice([None, 1, ["a"], {}, True])}).encode(),
        lambda: json.dumps({**good, "id": chance.choice([None, 1.5, [1], {}, True])}).encode(),
        lambda: json.dumps({**good, "prompt": "\ud800"}).encode(),
        lambda: json.dumps({**good, "prompt": "Count. " * chance.randrange(500, 5000)}).encode(),
        lambda: json.dumps({"token_ids": chance.choice([[-1], [vocab], [10**40], [0.5], "1", [[1]], []])}).encode(),
        lambda: json.dumps({"token_ids": [1] * chance.randrange(129, 5000)}).encode(),
        lambda: json.dumps({**good, "token_ids": [1]}).encode(),
        lambda: json.dumps({"custom_id": "a", "url": chance.choice(["/v1/files", None, 3]), "body": good}).encode(),
        lambda: json.dumps({"custom_id": "a", "url": "/v1/completions", "body": chance.choice([1, [], "x"])}).encode(),
        lambda: json.dumps({"messages": chance.choice([[], [1], "x", [{}], [{"role": 1, "content": "a"}]])}).encode(),
        lambda: b"[" * chance.randrange(1, 10**5),
        lambda: chance.choice([b"null", b"1", b'"text"', b"[1]", b"{}", b"-", b'{"id": ' + b"1" * 5000 + b"}"]),
    ])()


def test_a_thousand_bad_lines(demo: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is reported by its number; good ones among them, and blank ones, are not."""
    chance = random.Random(1)
    lines = [bad_lines(chance, demo.config.model.vocab_size) for _ in range(1000)]
    lines[500] = b'{"prompt": "' + b"x" * MAX_LINE + b'"}'
    good = sorted(chance.sample(range(1030), 30))
    for place in good:
        lines.insert(place, json.dumps({"id": f"good {place}", "prompt": "Count"}).encode())
    lines.insert(700, b"  \r")
    good = [place + (place >= 700) for place in good]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    job = BatchJob(tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams(max_output_len=1))
    run_batch(demo.runner, job)
    job.close()
    assert len(read(tmp_path / "out.jsonl")) == 30
    found = errors_of(tmp_path / "out.jsonl")
    assert [error["line"] for error in found] == [
        n for n in range(1, 1032) if n - 1 not in good and n != 701]
    assert all(error["error"] and len(error["error"]) <= 500 for error in found)
    assert [f"longer than {MAX_LINE} bytes" in error["error"] for error in found].count(True) == 1
    console = capsys.readouterr().err
    assert console.count("\n") == 12 and "Traceback" not in console, "the first ones, and the progress"


class FakeRunner:
    """Answers every job at once with one token; for what does not depend on a model."""

    tokenizer: Any = None

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def prepare(self, index: int, prompt: Any, params: SamplingParams) -> Job:
        return Job(index, None, prompt, params)

    def serve(self, source: Iterator[Job], drain_seconds: float = 0.0) -> Iterator[TokenEvent]:
        for job in source:
            self.jobs.append(Job(job.index, None, job.ids[:3], job.params))
            answer = GenerationOutput(job.index, None, job.ids[:3], [CompletionOutput([1])])
            yield TokenEvent(job.index, 0, 1, None, "length", answer, True)


def serve(tmp_path: Path, lines: Lines, runner: Any, **options: Any) -> BatchJob:
    """A job that has ended."""
    job = BatchJob(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", SamplingParams(), **options)
    run_batch(runner, job)
    job.close()
    return job


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=20), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_resumed_anywhere(tmp_path_factory: pytest.TempPathFactory, ids: list[tuple[int, bool]], data: Any) -> None:
    """Ids that come twice and bad lines: whole or cut anywhere and resumed, the files say the same."""
    tmp_path = tmp_path_factory.mktemp("resumed")
    lines: Lines = [{"id": id, "token_ids": [id], **({} if good else {"x": 1})} for id, good in ids] + [
        {"id": "last", "token_ids": [1]}]
    output = tmp_path / "out.jsonl"
    serve(tmp_path, lines, FakeRunner())
    answers, errors = read(output), errors_of(output) if len(lines) > 1 + len({id for id, good in ids if good}) else []
    first = {id: n for n, (id, good) in reversed(list(enumerate(ids, 1))) if good}
    assert [a["id"] for a in answers] == [*sorted(first, key=lambda id: first[id]), "last"]
    assert [e["line"] for e in errors] == [n for n, (id, good) in enumerate(ids, 1) if not good or first[id] != n]
    content = output.read_bytes()
    output.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    job = serve(tmp_path, lines, FakeRunner(), resume=True)
    assert read(output) == answers and job.counts["skipped"] + job.counts["answered"] == len(answers)
    assert (errors_of(output) if errors else []) == errors


def test_a_large_input_is_not_held(tmp_path: Path) -> None:
    """Of 3,000 lines of 10 KB, the ids alone."""
    given = write(tmp_path / "in.jsonl", [{"id": f"line {i}", "prompt": "x" * 10_000} for i in range(3000)])
    assert given.stat().st_size > 30e6

    class Runner(FakeRunner):
        def serve(self, source: Iterator[Job], drain_seconds: float = 0.0) -> Iterator[TokenEvent]:
            for event in super().serve(source):
                self.jobs.clear()
                yield event

    tracemalloc.start()
    job = BatchJob(given, tmp_path / "out.jsonl", SamplingParams())
    run_batch(Runner(), job)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    job.close()
    assert job.counts["answered"] == 3000 and peak < 3e6


def test_chats_go_through_the_tokenizers_template(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    runner = FakeRunner()
    runner.tokenizer = SimpleNamespace(chat=lambda given: [len(given), 7])
    serve(tmp_path, [{"id": "a", "messages": messages}], runner)
    assert [job.ids for job in runner.jobs] == [[2, 7]]
    runner.tokenizer = None
    serve(tmp_path, [{"id": "a", "messages": messages}, {"token_ids": [1]}], runner, overwrite=True)
    (error,) = errors_of(tmp_path / "out.jsonl")
    assert (error["line"], error["id"]) == (1, "a") and "--tokenizer-dir" in error["error"]


def test_chats_of_run_too(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here of a model that has no tokenizer."""
    given = write(tmp_path / "in.jsonl", [{"token_ids": [1]}, {"messages": [{"role": "user", "content": "Hi"}]}])
    assert main(["run", "--engine-dir", str(build(LLAMA2_MHA).engine), "--input-file", str(given)]) == 2
    assert f"{given} line 2: " in capsys.readouterr().err


# Two lines of OpenAI's documentation of its batch files, and what its reference says of the fields.
CHAT = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {
    "model": "gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are a helpful assistant."},
                                                {"role": "user", "content": "Hello world!"}], "max_tokens": 1000}}
COMPLETION = {"custom_id": "request-2", "method": "POST", "url": "/v1/completions", "body": {
    "model": "m", "prompt": "Say", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "user": None}}


def test_lines_for_openai() -> None:
    assert parse_line(CHAT, 0, "") == Request(
        "request-1", "", {"max_output_len": 1000}, messages=CHAT["body"]["messages"])  # type: ignore[index]
    assert parse_line(COMPLETION, 0, "") == Request(
        "request-2", "Say", {"max_output_len": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3})
    body = {"prompt": [5, 6], "n": 2, "stop": "x", "logprobs": 2, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert parse_line({**COMPLETION, "body": body}, 0, "") == Request("request-2", [5, 6], {
        "num_return_sequences": 2, "stop_words": ["x"], "logprobs": 2, "presence_penalty": 0.5,
        "frequency_penalty": 0.25})
    for asked, ours in (({"logprobs": True, "top_logprobs": 3}, 3), ({"logprobs": True}, 0),
                        ({"logprobs": False}, None)):
        line = {**CHAT, "body": {"messages": CHAT["body"]["messages"], **asked}}  # type: ignore[index]
        assert parse_line(line, 0, "").sampling == {"logprobs": ours}


def test_lines_for_openai_are_answered(demo: Built, tmp_path: Path) -> None:
    """As the same prompts are in our own form; a chat is answered by its template's ids."""
    both = {"prompt": "Count", "logprobs": 1, "temperature": 1.0, "top_p": 0.9, "seed": 5, "presence_penalty": 0.5}
    theirs = {**both, "max_tokens": 6, "n": 2, "stop": ["zz"]}
    ours = {**both, "max_output_len": 6, "num_return_sequences": 2, "stop_words": ["zz"]}
    messages = [{"role": "user", "content": "Count."}]
    chat = {**CHAT, "body": {"messages": messages, "max_tokens": 3}}
    serve(tmp_path, [{**COMPLETION, "body": theirs}, chat, ours], demo.runner)
    answers = {answer["id"]: answer for answer in read(tmp_path / "out.jsonl")}
    assert answers.keys() == {"request-1", "request-2", 2}
    texts = [[output["text"] for output in answers[id]["outputs"]] for id in ("request-2", 2)]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    assert all(len(output["logprobs"]) == len(output["token_ids"]) for output in answers[2]["outputs"])
    assert demo.runner.tokenizer
    ids = demo.runner.tokenizer.chat(messages)
    (expected,) = demo.runner.generate([ids], SamplingParams(max_output_len=3))
    assert answers["request-1"]["prompt_token_ids"] == ids
    assert answers["request-1"]["outputs"][0]["token_ids"] == expected.outputs[0].token_ids


def test_progress_in_a_log(one: Callable[..., int], prompts: Prompts, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines with what is done of all, the time left and the rate."""
    monkeypatch.setattr("tpllm.batch.LINE_SECONDS", 0.0)
    assert one(prompts[0]) == 0
    shown = [line for line in capsys.readouterr().err.split("\n") if line.startswith("batch: ")]
    assert len(shown) > 10 and "\r" not in "".join(shown)
    assert "14/14" in shown[-1] and "100%" in shown[-1] and "tokens/s" in shown[-1] and "<" in shown[-1]


def test_an_array_job(capsys: pytest.CaptureFixture[str]) -> None:
    """Slurm's number of the task says which lines."""
    argv = ["sbatch", "--ntasks-per-node", "2", "--array", "0-3", "--requeue", "batch", "--engine-dir", "e",
            "--input-file", "in.jsonl", "--output-file", "out-$SLURM_ARRAY_TASK_ID.jsonl", "--shard",
            "$SLURM_ARRAY_TASK_ID/4"]
    assert main(argv) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    script = capsys.readouterr().out
    assert 'launch batch ' in script and '--shard "$SLURM_ARRAY_TASK_ID/4"' in script


def test_launch_starts_it(two: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """With as many ranks as the engine is for."""
    assert main(["launch", "--mpi", "openmpi", "--dry-run", *two.argv[2:], "--output-file", "out.jsonl"]) == 0
    assert " -n 2 " in capsys.readouterr().out
