"""`tpllm sbatch`: the script's text, the site's profile, what is refused, and the script run by a plain bash."""

from __future__ import annotations

import builtins
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_launch import alive, executable

from tpllm.cli import main
from tpllm.launch.sbatch import shell_word

RUN = ["run", "--engine-dir", "engine", "--input-text", "a b"]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile of this test's own, which is not there yet; this Python is a name."""
    monkeypatch.setenv("TPLLM_SITE", str(tmp_path / "site.toml"))
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "site.toml"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(["sbatch", *argv])
    text, errors = capsys.readouterr()
    assert (code, errors) == (0, "")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    return text


def directives(text: str) -> list[str]:
    """What #SBATCH says, as far as Slurm reads: up to the first line that is no comment."""
    head = text.split("\n\n")[0].splitlines()
    assert head[0] == "#!/usr/bin/env bash" and "#SBATCH" not in text.split("\n\n", 1)[1]
    return [line.removeprefix("#SBATCH ") for line in head[1:] if line.startswith("#SBATCH ")]


def command(text: str) -> str:
    [line] = [line for line in text.splitlines() if line.endswith(" &")]
    return line.removesuffix(" &")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(["sbatch", *argv])
    text, errors = capsys.readouterr()
    assert code and not text and errors.startswith("tpllm: ")
    return code, errors


def test_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *RUN)
    assert directives(text) == [
        "--job-name=tpllm-run", "--nodes=1", "--ntasks-per-node=1", "--mem=0", "--time=01:00:00",
        "--output=logs/%x-%j.out", "--open-mode=append", "--signal=B:USR1@120", "--no-requeue"]
    assert command(text) == "/venv/bin/python -m tpllm launch run --engine-dir engine --input-text 'a b'"
    assert "set -euo pipefail" in text and "scontrol" not in text


def test_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "--nodes", "2", "--ntasks-per-node", "4", "--gpus_per_node", "4", "--cpus-per-task=8", "--mem", "100G",
        "--time", "2-00", "--partition", "gpu", "--account", "a1", "--qos", "low", "--constraint", "h100&ib", "--array",
        "0-3%2", "--requeue", "--signal", "R:TERM@60", "--launcher", "srun", "--job-name", "my job", "--setup",
        "module load mpi", "--setup", "ulimit -l unlimited", "--directives=--exclusive", *RUN)
    assert directives(text) == [
        "--job-name='my job'", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8",
        "--mem=100G", "--time=2-00", "--partition=gpu", "--account=a1", "--qos=low", "--constraint='h100&ib'",
        "--array=0-3%2", "--output=logs/%x-%A_%a.out", "--open-mode=append", "--signal=R:TERM@60", "--requeue",
        "--exclusive"]
    assert "\nmodule load mpi\nulimit -l unlimited\n\nset -euo pipefail\n" in text
    assert command(text).startswith("/venv/bin/python -m tpllm launch --mpi srun run ") and "scontrol requeue" in text


def test_a_verb_without_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "convert", "--meta-ckpt-dir", "it's", "--output-dir", "o", "--tp-size", "8")
    assert "--ntasks-per-node=1" in directives(text)
    assert command(text) == "/venv/bin/python -m tpllm " + shlex.join(
        ["convert", "--meta-ckpt-dir", "it's", "--output-dir", "o", "--tp-size", "8"])


def test_ranks_of_a_host(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As many as GPUs, else the model's ranks spread over the nodes."""
    (tmp_path / "engine").mkdir()
    model = {"pretrained_config": {"mapping": {"tp_size": 4}}}
    (tmp_path / "engine" / "config.json").write_text(json.dumps(model), encoding="utf-8")
    for argv, tasks in (([], 4), (["--nodes", "2"], 2), (["--nodes", "2", "--gpus-per-node", "8"], 8),
                        (["--ntasks-per-node", "3"], 3)):  # fmt: skip
        assert f"--ntasks-per-node={tasks}" in directives(printed(capsys, *argv, *RUN))
    assert "the model is for 4 ranks, which --nodes 3 cannot share evenly" in refused(capsys, "--nodes", "3", *RUN)[1]


def test_containers(capsys: pytest.CaptureFixture[str]) -> None:
    """Their srun has no launch around it: that would be outside of the container."""
    srun = "srun --kill-on-bad-exit=1 --cpu-bind=none "
    run = "tpllm run --engine-dir engine --input-text 'a b'"
    assert command(printed(capsys, "--container", "nvcr.io#nvidia/x:1", *RUN)) == (
        srun + "--mpi=pmix --container-image='nvcr.io#nvidia/x:1' --container-mounts=\"$PWD:$PWD\" "
        f'--container-workdir="$PWD" {run}')
    assert command(printed(capsys, "--container", "x.sif", "--gpus-per-node", "2", "--container-mounts", "/a:/b",
                           *RUN)) == srun + f'--mpi=pmix apptainer exec --nv --bind /a:/b --pwd "$PWD" x.sif {run}'
    convert = ["convert", "--meta-ckpt-dir", "m", "--output-dir", "o"]
    assert command(printed(capsys, "--container", "x.sif", *convert)).startswith(srun + "--ntasks=1 apptainer exec --b")


def test_slurms_variables_are_filled_in_by_the_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed(capsys, "--array", "1-2", *RUN, "$HOME", "--seed", "$SLURM_ARRAY_TASK_ID")
    assert command(text).endswith("--input-text 'a b' '$HOME' --seed \"$SLURM_ARRAY_TASK_ID\"")
    words = {'${SLURM_JOB_ID}-"$x" `y` \\': '7-"$x" `y` \\', "$HOME": "$HOME", "a'b": "a'b", "": ""}
    for word, expected in words.items():
        done = subprocess.run(["bash", "-c", f"printf %s {shell_word(word)}"], env={"SLURM_JOB_ID": "7"}, text=True,
                              capture_output=True, check=True)
        assert done.stdout == expected


def test_the_profile(capsys: pytest.CaptureFixture[str], site: Path, tmp_path: Path) -> None:
    """A flag beats the profile, which beats the defaults; keys in either spelling."""
    site.write_text('partition = "gpu"\ngpus_per_node = 4\ncpus-per-task = 2\nrequeue = true\n'
                    'setup = ["module load mpi"]\n', encoding="utf-8")
    text = printed(capsys, "--partition", "cpu", "--no-requeue", *RUN)
    found = directives(text)
    assert {"--partition=cpu", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=2",
            "--no-requeue"} <= set(found)
    assert "\nmodule load mpi\n" in text
    (tmp_path / "other.toml").write_text('partition = "other"\n', encoding="utf-8")
    assert "--partition=other" in directives(printed(capsys, "--profile", "other.toml", *RUN))


@pytest.mark.parametrize(("profile", "why"), [
    ("partiton = 'gpu'", "unknown key 'partiton'; known are nodes, ntasks-per-node,"),
    ("nodes = '2'", "nodes is '2'; it must be a whole number"),
    ("nodes = true", "nodes is True; it must be a whole number"),
    ("requeue = 1", "requeue is 1; it must be true or false"),
    ("setup = 'module load mpi'", "setup is 'module load mpi'; it must be a list of strings"),
    ("setup = [1]", "setup is [1]; it must be a list of strings"),
    ("[slurm]\nnodes = 2", "unknown key 'slurm'"),
    ("nodes = ", "is not TOML: "),
])  # fmt: skip
def test_a_wrong_profile(capsys: pytest.CaptureFixture[str], site: Path, profile: str, why: str) -> None:
    site.write_text(profile, encoding="utf-8")
    code, errors = refused(capsys, *RUN)
    assert code == 2 and f"tpllm: {site}" in errors and why in errors


@pytest.mark.parametrize(("argv", "why"), [
    (["--nodes", "0", *RUN], "nodes is 0; it starts at 1"),
    (["--partition", "a\n#SBATCH --uid=0", *RUN], "it must be one line"),
    (["--signal", "usr1 at end", *RUN], "--signal usr1 at end: expected NAME@SECONDS, as in USR1@120"),
    (["--launcher", "prun", *RUN], "--launcher prun: it is mpirun or srun"),
    (["--container", "x", "--launcher", "mpirun", *RUN], "--container goes with --launcher srun"),
    (["--profile", "none.toml", *RUN], "no such --profile: none.toml"),
    (["launch", "-n", "2", "run"], "sbatch starts the ranks itself; type: tpllm sbatch run"),
    (["sbatch"], "type: tpllm sbatch VERB"),
    (["walk"], "no such verb: walk"),
])  # fmt: skip
def test_refusals(capsys: pytest.CaptureFixture[str], argv: list[str], why: str) -> None:
    code, errors = refused(capsys, *argv)
    assert code == 2 and why in errors


def test_the_verbs_own_options_are_checked() -> None:
    with pytest.raises(SystemExit) as e:
        main(["sbatch", "run", "--no-such-option"])
    assert e.value.code == 2


def test_python_3_10_needs_tomli(capsys: pytest.CaptureFixture[str], site: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tomli":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    site.write_text("nodes = 2\n", encoding="utf-8")
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("tpllm.launch.sbatch.sys.version_info", (3, 10, 0))
    code, errors = refused(capsys, *RUN)
    assert code == 10 and f"reading {site} needs Python 3.11, or on 3.10: pip install tomli" in errors


def test_submit(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's number alone on stdout, the script to sbatch, and the log's directory made."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert refused(capsys, "--submit", *RUN) == (
        10, "tpllm: no sbatch on this machine: leave out --submit to have the script printed\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    executable(tmp_path / "bin" / "sbatch", 'echo "$*" >args; cat >script; echo "17;cluster"')
    text = printed(capsys, *RUN)
    assert main(["sbatch", "--submit", *RUN]) == 0 and capsys.readouterr().out == "17\n"
    assert (tmp_path / "args").read_text() == "--parsable\n" and (tmp_path / "script").read_text() == text
    assert (tmp_path / "logs").is_dir()
    executable(tmp_path / "bin" / "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    assert "sbatch refused the script: sbatch: error: invalid partition" in refused(capsys, "--submit", *RUN)[1]


class Job:
    """The script under bash, as Slurm would start it, with a program in tpllm's place that notes its signals."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, directory: Path, body: str,
                 *options: str, **variables: str) -> None:
        self.notes = directory / "notes"
        note = f"note() {{ echo $* >>{self.notes}; }}\n"
        monkeypatch.setattr(sys, "executable", str(executable(directory / "python", note + body)))
        executable(directory / "bin" / "scontrol", note + 'note scontrol "$@"')
        bash, text = shutil.which("bash"), printed(capsys, *options, *RUN)
        assert bash is not None
        self.process = subprocess.Popen(
            [bash, "-c", text], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**os.environ, "PATH": f"{directory}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
                 "SLURM_JOB_NODELIST": "node1", **variables})  # fmt: skip

    def noted(self) -> list[str]:
        return self.notes.read_text(encoding="utf-8").splitlines() if self.notes.exists() else []

    def send(self, number: int, after: str = "ready") -> None:
        until = time.monotonic() + 30
        while not any(note.startswith(after) for note in self.noted()):
            assert time.monotonic() < until and self.process.poll() is None
            time.sleep(0.02)
        self.process.send_signal(number)

    def end(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


WAITS = "note ready; i=0; while [ $((i += 1)) -lt 300 ]; do sleep 0.1; done\n"
Args = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch, Path]


@pytest.fixture
def args(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Args:
    return capsys, monkeypatch, tmp_path


def test_the_exit_code_is_the_verbs(args: Args) -> None:
    job = Job(*args, "note $*; exit 12")
    assert job.end() == 12
    assert job.noted() == ["-m tpllm launch run --engine-dir engine --input-text a b"]


def test_the_warning_drains_and_requeues(args: Args) -> None:
    job = Job(*args, 'trap "note USR1; sleep 0.5; exit 75" USR1\n' + WAITS, "--requeue")
    job.send(signal.SIGUSR1)
    assert job.end() == 75 and job.noted() == ["ready", "USR1", "scontrol requeue 7"]


def test_an_array_task_is_requeued_by_its_own_name(args: Args) -> None:
    """The job's number alone could mean the whole array."""
    job = Job(*args, "exit 75", "--requeue", "--array", "0-3", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    assert job.end() == 75 and job.noted() == ["scontrol requeue 5_3"]


def test_a_cancelled_job_is_not_requeued(args: Args) -> None:
    job = Job(*args, 'trap "note TERM; exit 75" TERM\n' + WAITS, "--requeue")
    job.send(signal.SIGTERM)
    assert job.end() == 75 and job.noted() == ["ready", "TERM"]


@pytest.mark.parametrize(("options", "code", "restarts"), [
    ([], 75, "0"), (["--requeue"], 20, "0"), (["--requeue"], 0, "0"), (["--requeue"], 75, "10")])  # fmt: skip
def test_what_is_not_requeued(args: Args, options: list[str], code: int, restarts: str) -> None:
    job = Job(*args, f"exit {code}", *options, SLURM_RESTART_COUNT=restarts)
    assert job.end() == code and job.noted() == []


def test_the_job_goes_on_after_a_warning_that_the_verb_ignores(args: Args) -> None:
    job = Job(*args, 'trap "note USR1" USR1\ntrap "note TERM; exit 3" TERM\n' + WAITS)
    job.send(signal.SIGUSR1)
    job.send(signal.SIGUSR1, after="USR1")
    job.send(signal.SIGTERM, after="USR1")
    assert job.end() == 3 and job.noted()[-1] == "TERM" and not alive(job.process.pid)
