"""`tpllm eval` at tp 1 and 2 against the same measures through transformers on the demo model; and its data's forms."""

import csv
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_jobs
from makers import transformers_logits, transformers_model
from reference import Reference
from rouge_score.rouge_scorer import RougeScorer
from sentencepiece import SentencePieceProcessor

from tpllm.cli import main
from tpllm.demo import DEMO_PROMPTS, MODEL_DIR
from tpllm.engine.base import BuildConfig
from tpllm.errors import DataError, PreflightError, UsageError
from tpllm.evaluate import TASKS, Mmlu, Perplexity, Settings, Summaries
from tpllm.tokenizer import load_tokenizer

WINDOW, CONTEXT, STRIDE = 320, 400, 100  # --max-input-len, --max-seq-len, --stride
SUMMARY, EOS = 12, 2
TIE = 1e-3  # logits closer than this are a tie: either is right
STORY = ("Once upon a time, there was a clever girl named Mia. Mia had a red ball and a kitten. One day, the kitten "
         "ran away. Mia looked for it in the garden, and found it under the apple tree.\n")
LIMITS = BuildConfig(max_input_len=WINDOW, max_seq_len=CONTEXT)
LIBRARY = SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))


def encode(text: str) -> list[int]:
    return [LIBRARY.bos_id(), *LIBRARY.encode(text)]


@dataclass(frozen=True)
class Data:
    """The three layouts, made once."""

    directory: Path

    def texts(self) -> list[str]:
        return [STORY * 7 + "Grüße: 5 €", "42 - 18 = 24\n" * 3, ""]

    def questions(self) -> dict[str, tuple[list[list[str]], list[list[str]]]]:
        """Sums, by subject: examples and questions; the longest leave no room for five examples."""
        rng, made = random.Random(1), {}
        for subject, size in {"astronomy": 0, "international_law": 40, "cooking": 10}.items():
            rows = []
            for _ in range(9):
                a, b = rng.randrange(2, 25), rng.randrange(2, 25)
                choices = rng.sample(range(4, 50), 4)
                right = rng.randrange(4)
                choices[right] = a + b
                rows.append([f"What is {a} plus {b}?" + ' "so" ' * (size // 10), *map(str, choices), "ABCD"[right]])
            rows[7][0] += " Add, please, as you like," * size
            made[subject] = (rows[:5], rows[5:])
        made["international_law"][1][2][0] = "What is 2 plus 3?"
        return made

    def pairs(self) -> list[tuple[str, str]]:
        return [(prompt.text, STORY.partition(".")[0] if i % 2 else f"{prompt.expected} he said.")
                for i, prompt in enumerate(DEMO_PROMPTS[:5])]

    def write(self) -> None:
        for name in ("perplexity", "mmlu/dev", "mmlu/test", "summarize"):
            (self.directory / name).mkdir(parents=True)
        for i, text in enumerate(self.texts()):
            (self.directory / f"perplexity/{i}.txt").write_text(text, encoding="utf-8")
        for subject, parts in self.questions().items():
            for part, rows in zip(("dev", "test"), parts, strict=True):
                path = self.directory / "mmlu" / part / f"{subject}_{part}.csv"
                with path.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows(rows)
        names = (("document", "summary"), ("article", "highlights"))
        lines = [json.dumps(dict(zip(names[i % 2], pair, strict=True)) | {"id": i}, ensure_ascii=False)
                 for i, pair in enumerate(self.pairs())]
        (self.directory / "summarize/all.jsonl").write_text("\n\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    made = Data(tmp_path_factory.mktemp("data"))
    made.write()
    return made


Results = dict[str, dict[str, Any]]


def measure(ranks: int, data: Data, directory: Path) -> tuple[Results, str]:
    """The demo model at one tp: every task's JSON, and what was printed."""
    assert main(["convert", "--meta-ckpt-dir", str(MODEL_DIR), "--output-dir", str(directory / "checkpoint"),
                 "--dtype", "float32", "--tp-size", str(ranks)]) == 0
    engine = str(directory / "engine")
    jobs: list[dict[str, Any]] = [
        {"tpllm": ["build", "--checkpoint-dir", str(directory / "checkpoint"), "--output-dir", engine, "--backend",
                   "eager", "--max-input-len", str(WINDOW), "--max-seq-len", str(CONTEXT)]}]
    more = {"perplexity": ["--stride", str(STRIDE)], "mmlu": [], "summarize": ["--max-output-len", str(SUMMARY)]}
    for task, options in more.items():
        jobs.append({"tpllm": ["eval", "--task", task, "--data-dir", str(data.directory / task), "--engine-dir", engine,
                               "--output-json", str(directory / f"{task}.json"), *options]})
    printed = run_jobs(ranks, jobs, directory, timeout=200)
    return {task: json.loads((directory / f"{task}.json").read_text(encoding="utf-8")) for task in more}, printed


@pytest.fixture(scope="module")
def one(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str, Path]:
    directory = tmp_path_factory.mktemp("tp1")
    return *measure(1, data, directory), directory / "engine"


@pytest.fixture(scope="module")
def results(one: tuple[Results, str, Path]) -> Results:
    return one[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers_model(MODEL_DIR)


def scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["name"]: score for score in result["scores"]}


def check_mean(score: dict[str, Any], values: list[float]) -> None:
    assert score["count"] == len(values)
    assert score["value"] == pytest.approx(np.mean(values), rel=1e-5)
    assert score["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-4)


def sliding_nats(model: Any, ids: list[int], window: int, stride: int) -> list[float]:
    """Of every token but the first, by the strided window of transformers' page on perplexity."""
    nats: list[float] = []
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        logprobs = transformers_logits(model, ids[begin:end]).log_softmax(-1)
        new = range(len(nats) + 1, end)
        nats += [-float(logprobs[i - 1 - begin, ids[i]]) for i in new]
        if end == len(ids):
            break
    return nats


def test_perplexity_is_that_of_transformers(results: Results, data: Data, model: Any) -> None:
    streams = [encode(text) for text in data.texts()]
    assert len(streams[0]) > WINDOW + 2 * STRIDE and len(streams[1]) < WINDOW and len(streams[2]) == 1
    nats = [n for ids in streams if len(ids) > 1 for n in sliding_nats(model, ids, WINDOW, STRIDE)]
    assert len(nats) == sum(len(ids) - 1 for ids in streams)  # every token once
    found = scores(results["perplexity"])
    check_mean(found["nats per token"], nats)
    error = float(np.std(nats, ddof=1)) / math.sqrt(len(nats))
    perplexity, size = math.exp(np.mean(nats)), len("".join(data.texts()).encode())
    assert found["perplexity"] == {"name": "perplexity", "value": pytest.approx(perplexity, rel=1e-5),
                                   "standard_error": pytest.approx(perplexity * error, rel=1e-4), "count": len(nats)}
    assert found["bits per byte"] == {
        "name": "bits per byte", "value": pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5),
        "standard_error": pytest.approx(error * len(nats) / math.log(2) / size, rel=1e-4), "count": len(nats)}
    assert results["perplexity"]["window"] == WINDOW and results["perplexity"]["stride"] == STRIDE


def harness_prompt(subject: str, examples: list[list[str]], question: list[str]) -> str:
    """The published harness's format_subject, format_example and gen_prompt, without pandas."""
    prompt = "The following are multiple choice questions (with answers) about {}.\n\n".format(
        "".join(" " + word for word in subject.split("_")))
    for row in [*examples, question]:
        prompt += row[0]
        for j in range(4):
            prompt += "\n{}. {}".format("ABCD"[j], row[j + 1])
        prompt += "\nAnswer:"
        if row is not question:
            prompt += f" {row[5]}\n\n"
    return prompt


def test_mmlu_is_that_of_transformers(results: Results, data: Data, model: Any) -> None:
    letters = [encode("Answer: " + letter)[-1] for letter in "ABCD"]
    right: dict[str, list[float]] = {}
    shots: dict[str, int] = {}
    for subject, (examples, questions) in data.questions().items():
        answers = ""
        for row in questions:
            first = 0
            while len(ids := encode(harness_prompt(subject, examples[first:], row) + " A")[:-1]) > WINDOW:
                first += 1
            shots[str(5 - first)] = shots.get(str(5 - first), 0) + 1
            logits = transformers_logits(model, ids)[-1][letters]
            assert float(logits.topk(2).values.diff().abs()) > TIE, "a tie: choose another seed"
            answers += "ABCD"[int(logits.argmax())]
            right.setdefault(subject, []).append(float(answers[-1] == row[5]))
        assert results["mmlu"]["answers"][subject] == answers
    assert results["mmlu"]["questions_by_shots"] == shots and len(shots) > 1 and "5" in shots
    found = scores(results["mmlu"])
    everything = [value for values in right.values() for value in values]
    check_mean(found["average"], everything)
    assert 0 < found["average"]["value"] < 1
    for subject, category in {"astronomy": "STEM", "international_law": "humanities", "cooking": "other"}.items():
        check_mean(found[subject], right[subject])
        check_mean(found[category], right[subject])
    assert len(found) == 7


def test_the_prompt_of_mmlu_in_full(data: Data) -> None:
    row = ["Is it?", "yes", "no", "maybe", "both", "B"]
    (data.directory / "small/dev").mkdir(parents=True)
    (data.directory / "small/test").mkdir()
    for part in ("dev", "test"):
        path = data.directory / f"small/{part}/us_foreign_policy_{part}.csv"
        path.write_text("Is it?,yes,no,maybe,both,B\n", encoding="utf-8")
    tokenizer = load_tokenizer(MODEL_DIR)
    assert tokenizer
    ids, params = Mmlu(Settings(data.directory / "small")).prompts(tokenizer, LIMITS)
    text = ("The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
            "Is it?\nA. yes\nB. no\nC. maybe\nD. both\nAnswer: B\n\nIs it?\nA. yes\nB. no\nC. maybe\nD. both\nAnswer:")
    assert tokenizer.decode(ids[0]).rstrip(" ") == text == harness_prompt("us_foreign_policy", [row], [*row])
    assert [tokenizer.decode([i]) for i in params.allowed_token_ids] == ["A", "B", "C", "D"]


def test_rouge_is_that_of_transformers(results: Results, data: Data) -> None:
    """The reference's greedy tokens, which test_ranks.py compares with transformers', and the library's scores."""
    reference, scorer = Reference(MODEL_DIR), RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    answers, values = [], []
    for document, summary in data.pairs():
        found = reference.greedy_with_gaps(encode(document + " TL;DR:"), SUMMARY)
        tokens = [token for token, _ in found]
        used = found[:tokens.index(EOS) + 1 if EOS in tokens else None]
        assert min(gap for _, gap in used) > TIE, "a tie: choose other documents"
        # As a continuation: the first token's leading space is no part of it.
        answers.append(LIBRARY.decode([token for token, _ in used if token != EOS]).strip())
        values.append(scorer.score(summary, answers[-1]))
    assert results["summarize"]["answers"] == answers
    assert any(answers) and results["summarize"]["documents_cut"] == 0
    for name, score in scores(results["summarize"]).items():
        check_mean(score, [value[name].fmeasure for value in values])
    assert list(scores(results["summarize"])) == ["rouge1", "rouge2", "rougeL"]


def test_two_ranks_give_the_same(one: tuple[Results, str, Path], data: Data, tmp_path: Path) -> None:
    two, _ = measure(2, data, tmp_path)
    for task, result in two.items():
        assert result["tp_size"] == 2 and one[0][task]["tp_size"] == 1
        assert result.get("answers") == one[0][task].get("answers")
        for score, other in zip(result["scores"], one[0][task]["scores"], strict=True):
            assert (score["name"], score["count"]) == (other["name"], other["count"])
            assert score["value"] == pytest.approx(other["value"], rel=1e-5)


def test_the_table_has_every_score(one: tuple[Results, str, Path]) -> None:
    found, printed, _ = one
    for result in found.values():
        for score in result["scores"]:
            line = next(line for line in printed.splitlines() if line.startswith(score["name"] + " "))
            assert f"{score['value']:.4f}" in line and line.endswith(f"of {score['count']}")


# What does not need an engine


def demo_tokenizer() -> Any:
    return load_tokenizer(MODEL_DIR)


@pytest.mark.parametrize("stride", [None, 1, 7, 99])
@pytest.mark.parametrize("length", [1, 2, 99, 100, 101, 350])
def test_windows_score_every_token_once(stride: int | None, length: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * length, encoding="utf-8")
    task, build = Perplexity(Settings(tmp_path, stride=stride)), BuildConfig(max_input_len=100, max_seq_len=200)
    windows, params = task.prompts(demo_tokenizer(), build)
    ids, seen = encode("x" * length), 1
    assert len(ids) > length / 4
    for number, window in enumerate(windows):
        begin = number * (stride or 50)
        assert window == ids[begin:begin + 100]
        context = task._first_scored[number]
        assert begin + context == seen and context >= (1 if number == 0 else 100 - (stride or 50))
        seen = begin + len(window)
    assert seen == len(ids)
    assert params.prompt_logprobs == 0 and task.details["bytes"] == length


def test_a_limit_of_windows_counts_their_bytes_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(STORY * 9, encoding="utf-8")
    task = Perplexity(Settings(tmp_path, limit=2, stride=STRIDE))
    windows, _ = task.prompts(demo_tokenizer(), LIMITS)
    assert len(windows) == 2
    assert task.details["bytes"] == len(LIBRARY.decode(encode(STORY * 9)[:WINDOW + STRIDE]).encode())


def test_limits_of_the_other_tasks(data: Data) -> None:
    questions, _ = Mmlu(Settings(data.directory / "mmlu", limit=2)).prompts(demo_tokenizer(), LIMITS)
    assert len(questions) == 2 * len(data.questions())
    documents, params = Summaries(Settings(data.directory / "summarize", limit=3)).prompts(demo_tokenizer(), LIMITS)
    assert [LIBRARY.decode(ids) for ids in documents] == [d + " TL;DR:" for d, _ in data.pairs()[:3]]
    assert params.max_output_len == 100


def test_a_long_document_loses_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"document": STORY * 9, "summary": "a"}), encoding="utf-8")
    task = Summaries(Settings(tmp_path, max_output_len=150))
    (ids,), _ = task.prompts(demo_tokenizer(), LIMITS)
    assert len(ids) == CONTEXT - 150 < WINDOW
    text = LIBRARY.decode(ids)
    assert text.endswith(" TL;DR:") and (STORY * 9).startswith(text.removesuffix(" TL;DR:")) and len(text) > 300
    assert task.details["documents_cut"] == 1
    with pytest.raises(UsageError, match="--max-output-len"):
        Summaries(Settings(tmp_path, max_output_len=CONTEXT - 3)).prompts(demo_tokenizer(), LIMITS)


BAD = [
    ("perplexity", {"a.txt": b"\xff\xfe"}, "a.txt"), ("perplexity", {}, "has no"),
    ("mmlu", {}, "has no"), ("mmlu", {"test/x_test.csv": b"q,a,b,c,d,A\n"}, "x_dev.csv"),
    ("mmlu", {"test/x_test.csv": b"q,a,b,c,d,A\n", "dev/x_dev.csv": b""}, "no questions"),
    *(("mmlu", {"test/x_test.csv": b"q,a,b,c,d,A\n" + row, "dev/x_dev.csv": b"q,a,b,c,d,A\n"}, "row 2")
      for row in (b"q,a,b,c,d\n", b"q,a,b,c,d,E\n", b"q,a,b,c,d,AB\n", b"q,a,b,c,d,\n", b"q,a,b,c,d,e,A\n", b"\n")),
    *(("summarize", {"a.jsonl": b'{"document": "a", "summary": "b"}\n' + line}, "line 2")
      for line in (b"{", b"[]", b'{"document": "a"}', b'{"document": "a", "summary": 3}', b'"x"')),
    ("summarize", {"a.jsonl": b"\n\n"}, "no documents"), ("summarize", {}, "has no"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "files", "words"), BAD)
def test_bad_data_is_refused_before_the_engine_is_looked_for(
        task: str, files: dict[str, bytes], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert main(["eval", "--task", task, "--data-dir", str(tmp_path), "--engine-dir", "none"]) == DataError.exit_code
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_bad_options_are_refused(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "--task", "summarize", "--data-dir", str(data.directory / "summarize"), "--engine-dir", "none"]
    for more, words in ((["--limit", "0"], "--limit is 0"), (["--max-output-len", "0"], "--max-output-len is 0"),
                        (["--output-json", "no/such/file"], "no/such")):
        assert main([*argv, *more]) == UsageError.exit_code
        assert words in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    assert main(argv) == PreflightError.exit_code
    assert "pip install rouge-score" in capsys.readouterr().err


@pytest.mark.parametrize("stride", [0, WINDOW, WINDOW + 1, -3])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride: int, data: Data) -> None:
    task = Perplexity(Settings(data.directory / "perplexity", stride=stride))
    with pytest.raises(UsageError, match=f"--stride is {stride}; it must be 1 to {WINDOW - 1}"):
        task.prompts(demo_tokenizer(), LIMITS)


def test_what_does_not_fit_the_engine_is_refused(data: Data, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no text"):
        Perplexity(Settings(tmp_path)).prompts(demo_tokenizer(), LIMITS)
    with pytest.raises(DataError, match="build with a larger --max-input-len"):
        Mmlu(Settings(data.directory / "mmlu")).prompts(demo_tokenizer(), BuildConfig(max_input_len=20))
    assert set(TASKS) == {"perplexity", "mmlu", "summarize"}


def test_letters_that_are_no_single_tokens_are_refused(data: Data) -> None:
    class Spelling(type(demo_tokenizer())):  # type: ignore[misc]
        def encode(self, text: str) -> list[int]:
            return [*super().encode(text), 7]

    with pytest.raises(UsageError, match="letters A to D"):
        Mmlu(Settings(data.directory / "mmlu")).prompts(Spelling(MODEL_DIR / "tokenizer.model"), LIMITS)


def test_a_model_without_tokenizer_is_refused(one: tuple[Results, str, Path], data: Data, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in (one[2].parent / "checkpoint").iterdir():
        if not path.name.startswith("tokenizer"):
            (checkpoint / path.name).symlink_to(path)
    assert main(["eval", "--task", "mmlu", "--data-dir", str(data.directory / "mmlu"), "--engine-dir", str(one[2]),
                 "--checkpoint-dir", str(checkpoint)]) == UsageError.exit_code
    assert "--tokenizer-dir" in capsys.readouterr().err
