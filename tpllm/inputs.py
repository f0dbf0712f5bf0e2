"""Prompts from files: text, JSON lines, and token ids as .csv or .npy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tpllm.chat import Message
from tpllm.errors import DataError, TpllmError, UsageError
from tpllm.sampling import SamplingParams
from tpllm.tokenizer import Tokenizer

SAMPLING_FIELDS = {f.name for f in fields(SamplingParams)}
OPENAI_URLS = ("/v1/chat/completions", "/v1/completions")
OPENAI_NAMES = {"max_tokens": "max_output_len", "max_completion_tokens": "max_output_len", "stop": "stop_words",
                "n": "num_return_sequences"}
OPENAI_IGNORED = ("model", "user", "metadata")


@dataclass(frozen=True)
class Request:
    """One prompt, as text, as token ids or as a chat, and the sampling fields that its line sets."""

    id: int | str
    prompt: str | list[int]
    sampling: dict[str, Any]
    place: str = field(default="", compare=False)  # "FILE line N", for messages
    messages: list[Message] | None = None  # in place of the prompt, until it is known how to write them

    def templated(self, tokenizer: Tokenizer | None) -> Request:
        """The same with messages as the prompt that the tokenizer's chat template makes of them."""
        if self.messages is None:
            return self
        place = f"{self.place}: " if self.place else ""
        if tokenizer is None:
            raise UsageError(f"{place}a chat needs a tokenizer: give --tokenizer-dir DIR")
        try:
            return replace(self, prompt=tokenizer.chat(self.messages), messages=None)
        except TpllmError as e:
            raise DataError(f"{place}{e}") from None


def read_requests(path: Path) -> list[Request]:
    """All prompts of a file; its suffix says the form. A bad line is refused by its number."""
    readers = {".txt": read_txt, ".csv": read_csv, ".jsonl": read_jsonl, ".npy": read_npy}
    if path.suffix not in readers:
        raise UsageError(f"--input-file {path}: the suffix must be one of {', '.join(readers)}")
    if not path.is_file():
        raise UsageError(f"no such --input-file: {path}")
    try:
        requests = readers[path.suffix](path)
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8: {e}") from None
    if not requests:
        raise DataError(f"{path} has no prompts")
    return requests


def read_txt(path: Path) -> list[Request]:
    # Not splitlines(): it also splits at characters that may stand in a prompt.
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [Request(i, line, {}) for i, line in enumerate(lines)]


def read_csv(path: Path) -> list[Request]:
    requests: list[Request] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                ids = [int(word) for word in line.rstrip(", ").split(",")]
            except ValueError:
                raise DataError(f"{path} line {number} is not token ids separated by commas: {line[:60]!r}") from None
            requests.append(Request(len(requests), ids, {}))
    return requests


def read_npy(path: Path) -> list[Request]:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise DataError(f"{path} is not a .npy file: {e}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{path} must hold a 2-D array of token ids, it holds {found}")
    return [Request(i, [int(t) for t in row if t != -1], {}) for i, row in enumerate(array)]


def read_jsonl(path: Path) -> list[Request]:
    requests: list[Request] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                requests.append(parse_line(json.loads(line), len(requests), f"{path} line {number}"))
            except (ValueError, RecursionError) as e:
                raise DataError(f"{path} line {number}: {e}") from None
    return requests


def parse_line(data: Any, number: int, place: str) -> Request:
    """One JSON object: `id`, one of `prompt`, `messages` and `token_ids`, optional sampling fields; or OpenAI's."""
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    if "body" in data:
        data = from_openai(data)
    given = [key for key in ("prompt", "messages", "token_ids") if key in data]
    if len(given) != 1:
        raise ValueError("exactly one of 'prompt', 'messages' and 'token_ids' is needed")
    if unknown := data.keys() - SAMPLING_FIELDS - {"id", *given}:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    prompt = data[given[0]]
    if given[0] == "prompt" and not isinstance(prompt, str):
        raise ValueError("'prompt' must be a string")
    if given[0] == "token_ids" and not (isinstance(prompt, list) and all(type(t) is int for t in prompt)):
        raise ValueError("'token_ids' must be a list of whole numbers")
    if given[0] == "messages" and not (isinstance(prompt, list) and prompt and all(map(is_message, prompt))):
        raise ValueError("'messages' must be a list of objects with 'role' and 'content', both strings")
    identity = data.get("id", number)
    if type(identity) not in (int, str):
        raise ValueError("'id' must be a string or a whole number")
    sampling = {k: v for k, v in data.items() if k in SAMPLING_FIELDS}
    if given[0] == "messages":
        return Request(identity, "", sampling, place, prompt)
    return Request(identity, prompt, sampling, place)


def is_message(data: Any) -> bool:
    return isinstance(data, dict) and data.keys() == {"role", "content"} and all(
        isinstance(text, str) for text in data.values())


def from_openai(data: dict[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batch files in our fields; what it does not set has this program's default, not OpenAI's."""
    body = data["body"]
    if unknown := data.keys() - {"custom_id", "method", "url", "body"}:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r} beside 'body'")
    if data.get("url") not in OPENAI_URLS or not isinstance(body, dict):
        raise ValueError(f"a line with an object 'body' has a 'url' out of {', '.join(OPENAI_URLS)}")
    fields: dict[Any, Any] = {
        OPENAI_NAMES.get(k, k): v for k, v in body.items() if v is not None and k not in OPENAI_IGNORED}
    if isinstance(fields.get("stop_words"), str):
        fields["stop_words"] = [fields["stop_words"]]
    if isinstance(wanted := fields.get("logprobs"), bool):  # of chats; the number is a field of its own
        number = fields.pop("top_logprobs", 0)
        fields["logprobs"] = number if wanted else None
    if isinstance(fields.get("prompt"), list):
        fields["token_ids"] = fields.pop("prompt")
    return {**fields, "id": data.get("custom_id")}
