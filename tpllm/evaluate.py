"""What `tpllm eval` measures on local data: perplexity, MMLU, and summaries by ROUGE."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpllm.engine.base import BuildConfig
from tpllm.errors import DataError, PreflightError, UsageError
from tpllm.sampling import SamplingParams
from tpllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tpllm.answer import GenerationOutput

LETTERS = "ABCD"
# The categories of MMLU's authors (hendrycks/test, categories.py); every other subject is in "other".
CATEGORIES = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
}


@dataclass(frozen=True)
class Settings:
    """Where the data is, and how much of it is used how; None leaves `stride` to the engine's window."""

    data_dir: Path
    limit: int | None = None
    stride: int | None = None
    max_output_len: int = 100

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}; it starts at 1")


@dataclass(frozen=True)
class Score:
    """A measure over `count` tokens, questions or summaries; no error of a single one is known."""

    name: str
    value: float
    standard_error: float | None
    count: int


def mean_score(name: str, values: Sequence[float]) -> Score:
    """The mean, with the standard error of independent values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(name, statistics.fmean(values), error, len(values))


class Task(ABC):
    """One evaluation: made, it has read its data; then it gives prompts, and scores the model's outputs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.details: dict[str, Any] = {}  # what else the result says

    @abstractmethod
    def prompts(self, tokenizer: Tokenizer, build: BuildConfig) -> tuple[list[list[int]], SamplingParams]:
        """Token ids that fit an engine of these limits. Raises `DataError` or `UsageError` when some cannot."""

    @abstractmethod
    def scores(self, outputs: Sequence[GenerationOutput]) -> list[Score]:
        """Scores of the outputs of all prompts, in their order."""


class Perplexity(Task):
    """Of text files, by a window that slides over each file's tokens; a token is scored once.

    A window of W tokens is the longest that the engine takes, and starts `stride` tokens after the one before: all
    but a file's first have W - stride tokens of context in front of those that they score. The first token of a
    file (BOS) is context only.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._texts = [read_text(path) for path in data_files(settings.data_dir, "*.txt")]
        self._first_scored: list[int] = []  # per window

    def prompts(self, tokenizer: Tokenizer, build: BuildConfig) -> tuple[list[list[int]], SamplingParams]:
        window = room(build, 1)
        stride = window // 2 if self.settings.stride is None else self.settings.stride
        if not 1 <= stride < window:
            raise UsageError(f"--stride is {stride}; it must be 1 to {window - 1}, less than the {window} tokens of a "
                             "window in this engine")
        limit, size = self.settings.limit or math.inf, 0
        prompts: list[list[int]] = []
        for text in self._texts:
            ids, begin, done = tokenizer.encode(text), 0, 1
            while done < len(ids) and len(prompts) < limit:
                prompts.append(ids[begin:begin + window])
                self._first_scored.append(done - begin)
                done = begin + len(prompts[-1])
                begin += stride
            size += len((text if done == len(ids) else tokenizer.decode(ids[:done])).encode()) if done > 1 else 0
        if not prompts:
            raise DataError(f"{self.settings.data_dir} holds no text to score")
        self.details = {"window": window, "stride": stride, "windows": len(prompts), "bytes": size}
        return prompts, SamplingParams(max_output_len=1, prompt_logprobs=0)

    def scores(self, outputs: Sequence[GenerationOutput]) -> list[Score]:
        nats = []
        for output, first in zip(outputs, self._first_scored, strict=True):
            assert output.prompt_logprobs is not None
            scored = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[first:]
            nats += [-logprobs[token] for token, logprobs in scored if logprobs is not None]
        mean = mean_score("nats per token", nats)
        per_byte = mean.count / self.details["bytes"] / math.log(2)
        perplexity = math.exp(mean.value)
        return [scaled(mean, "perplexity", perplexity, perplexity), mean,
                scaled(mean, "bits per byte", mean.value * per_byte, per_byte)]


class Mmlu(Task):
    """Multiple choice with five examples, in the words of its authors' harness (hendrycks/test, evaluate.py).

    The answer is the most likely of the four letters. Examples that do not fit the engine are left out, the first
    ones first.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._examples, self._questions = {}, []
        for path in data_files(settings.data_dir, "test/*_test.csv"):
            subject = path.name.removesuffix("_test.csv")
            self._examples[subject] = read_questions(settings.data_dir / "dev" / f"{subject}_dev.csv")[:5]
            self._questions += [(subject, row) for row in read_questions(path)[:settings.limit]]

    def prompts(self, tokenizer: Tokenizer, build: BuildConfig) -> tuple[list[list[int]], SamplingParams]:
        ends = [tokenizer.encode(f"Answer: {letter}") for letter in LETTERS]
        self._ids = [ids[-1] for ids in ends]
        if len(set(self._ids)) < len(LETTERS):
            raise UsageError(f"this tokenizer does not tell the letters A to D apart by their last tokens: {self._ids}")
        own = len(ends[0]) - len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(*ends, strict=False))))
        prompts, shots = [], Counter[int]()
        for subject, row in self._questions:
            examples = self._examples[subject]
            for first in range(len(examples) + 1):
                # Up to where the letters part, as some tokenizers have a token for the space before them.
                ids = tokenizer.encode(mmlu_prompt(subject, examples[first:], row) + " A")[:-own]
                if len(ids) <= room(build, 1):
                    break
            else:
                raise DataError(f"a question of {subject} has {len(ids)} tokens without examples, the engine allows "
                                f"{room(build, 1)}; build with a larger --max-input-len and --max-seq-len")
            prompts.append(ids)
            shots[len(examples) - first] += 1
        self.details = {"questions_by_shots": {str(n): shots[n] for n in sorted(shots, reverse=True)}}
        return prompts, SamplingParams(max_output_len=1, allowed_token_ids=tuple(self._ids))

    def scores(self, outputs: Sequence[GenerationOutput]) -> list[Score]:
        right: dict[str, list[float]] = {subject: [] for subject in self._examples}
        answers = dict.fromkeys(self._examples, "")
        for output, (subject, row) in zip(outputs, self._questions, strict=True):
            answer = LETTERS[self._ids.index(output.outputs[0].token_ids[0])]
            answers[subject] += answer
            right[subject].append(float(answer == row[5]))
        self.details["answers"] = answers
        groups: dict[str, list[float]] = {"average": []}  # of all questions: large subjects weigh more
        for subject, values in right.items():
            category = next((name for name, subjects in CATEGORIES.items() if subject in subjects), "other")
            groups.setdefault(category, []).extend(values)
            groups["average"] += values
        return [mean_score(name, values) for name, values in (right | groups).items()]


class Summaries(Task):
    """ROUGE (F1, stemmed) of greedy summaries; the prompt is the document and " TL;DR:".

    A document that does not fit the engine loses its end.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._params = SamplingParams(max_output_len=settings.max_output_len)
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise PreflightError("--task summarize needs the library rouge-score; type: pip install rouge-score"
                                 ) from None
        self._scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        files = data_files(settings.data_dir, "*.jsonl")
        self._pairs = [pair for path in files for pair in read_summaries(path)][:settings.limit]

    def prompts(self, tokenizer: Tokenizer, build: BuildConfig) -> tuple[list[list[int]], SamplingParams]:
        params, cut, prompts = self._params, 0, []
        size = room(build, params.max_output_len)
        for document, _ in self._pairs:
            ids = tokenizer.encode(document.rstrip() + " TL;DR:")
            if (over := len(ids) - size) > 0:
                end = len(tokenizer.encode(document.rstrip()))
                if end - over < 2:
                    raise UsageError(f"the engine has no room for a document and a summary of {params.max_output_len} "
                                     "tokens: give a lower --max-output-len, or build with a larger --max-seq-len")
                ids, cut = ids[:end - over] + ids[end:], cut + 1
            prompts.append(ids)
        self.details = {"documents_cut": cut, "max_output_len": params.max_output_len}
        return prompts, params

    def scores(self, outputs: Sequence[GenerationOutput]) -> list[Score]:
        answers = [(output.outputs[0].text or "").strip() for output in outputs]
        self.details["answers"] = answers
        found = [self._scorer.score(summary, answer)
                 for answer, (_, summary) in zip(answers, self._pairs, strict=True)]
        return [mean_score(name, [scores[name].fmeasure for scores in found]) for name in found[0]]


TASKS: dict[str, type[Task]] = {"perplexity": Perplexity, "mmlu": Mmlu, "summarize": Summaries}


def scaled(mean: Score, name: str, value: float, slope: float) -> Score:
    """What follows from a mean; `slope` is its derivative, by which the error grows."""
    error = mean.standard_error
    return Score(name, value, None if error is None else error * slope, mean.count)


def room(build: BuildConfig, output_len: int) -> int:
    """Tokens of the longest prompt that leaves the engine room for `output_len` more."""
    return min(build.max_input_len, build.max_seq_len - output_len)


def data_files(path: Path, pattern: str) -> list[Path]:
    """The files of a directory; a file stands for itself."""
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if not files:
        raise DataError(f"--data-dir {path} has no {pattern}")
    return files


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read {path}: {e}") from None


def read_questions(path: Path) -> list[list[str]]:
    """Rows of question, four choices and the right letter."""
    rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise DataError(f"{path} row {number} must hold a question, four choices and A, B, C or D: {str(row)[:80]}")
    if not rows:
        raise DataError(f"{path} has no questions")
    return rows


def mmlu_prompt(subject: str, examples: list[list[str]], question: list[str]) -> str:
    def lines(row: list[str]) -> str:
        return "\n".join([row[0], *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5], strict=True)),
                          "Answer:"])

    # Two spaces before the subject, as the authors' harness has them.
    head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
    return head + "".join(f"{lines(row)} {row[5]}\n\n" for row in examples) + lines(question)


def read_summaries(path: Path) -> list[tuple[str, str]]:
    """(document, summary) of every line."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                data = json.loads(line)
                document = data.get("document", data.get("article"))
                summary = data.get("summary", data.get("highlights"))
            except (ValueError, AttributeError):
                document = summary = None
            if not isinstance(document, str) or not isinstance(summary, str):
                raise DataError(f'{path} line {number} must be {{"document": TEXT, "summary": TEXT}}, or "article" and '
                                f'"highlights": {line[:60]}')
            pairs.append((document, summary))
    if not pairs:
        raise DataError(f"{path} has no documents")
    return pairs
