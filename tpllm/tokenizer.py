"""Text ↔ token ids: Meta's sentencepiece and tiktoken files, and decoding a token at a time."""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tpllm.chat import Message, Template, check_messages, jinja, llama2, llama3
from tpllm.errors import DataError, UsageError

# Meta's pattern and special tokens of Llama 3 (llama-models, tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = {
    "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6,
    "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
}
LLAMA3_RESERVED = 256


class Tokenizer(ABC):
    """What the runner needs of a tokenizer; `exact` ones have as many tokens as their model, others may have fewer."""

    exact = False
    vocab_size: int
    bos_id: int
    end_ids: frozenset[int]
    control: Mapping[str, int]  # the control tokens' ids by their text
    directory: Path | None = None  # where the model may have a chat template of its own
    meta_template: Template | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the beginning-of-text token first."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens have none, half characters become U+FFFD."""

    def chat(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins; control tokens in its text stay text.

        Raises `DataError` for messages that the model's template does not take, `UsageError` if it has none.
        """
        if self._template is None:
            raise UsageError(f"{self.directory} has no chat template (chat_template.jinja, or in "
                             "tokenizer_config.json): give prompts without --chat")
        check_messages(messages)
        return [i for piece in self._template(messages, self.control)
                for i in ([piece] if isinstance(piece, int) else self._text_ids(piece))]

    @cached_property
    def _template(self) -> Template | None:
        return (jinja(self.directory) if self.directory else None) or self.meta_template

    def _text_ids(self, text: str) -> list[int]:
        """Ids of `text` inside of a sequence."""
        ids = self.encode(text)
        return ids[1:] if ids[:1] == [self.bos_id] else ids


class SentencePieceTokenizer(Tokenizer):
    """Llama 1 and 2: a sentencepiece model."""

    meta_template = staticmethod(llama2)

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise DataError(f"{path} is not a sentencepiece model: {e}") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        self.end_ids = frozenset({self._model.eos_id()} - {-1})
        self.control = {"<s>": self.bos_id, "</s>": self._model.eos_id()}

    def encode(self, text: str) -> list[int]:
        return [self.bos_id, *self._model.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([i for i in ids if 0 <= i < self.vocab_size])
        return text


class TiktokenTokenizer(Tokenizer):
    """Llama 3: a text file of `base64(token) rank` lines, after which the special tokens are numbered."""

    exact = True
    meta_template = staticmethod(llama3)

    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise DataError(f"{path} line {number} is not 'base64 rank'") from None
        base = len(ranks)
        special = {f"<|reserved_special_token_{i}|>": base + i for i in range(LLAMA3_RESERVED)}
        taken = {base + offset for offset in LLAMA3_SPECIAL.values()}
        special = {name: i for name, i in special.items() if i not in taken}
        special |= {name: base + offset for name, offset in LLAMA3_SPECIAL.items()}
        self._model = tiktoken.Encoding(path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks,
                                        special_tokens=special)
        self._base, self.control = base, special
        self.vocab_size = base + LLAMA3_RESERVED
        self.bos_id = special["<|begin_of_text|>"]
        self.end_ids = frozenset(special[name] for name in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"))

    def encode(self, text: str) -> list[int]:
        # Text of a prompt is text: "<|eot_id|>" typed by a user is not the control token.
        return [self.bos_id, *self._model.encode(text, disallowed_special=())]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self._base])


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer that lies in a directory, or None; the file's content tells its kind."""
    path = directory / "tokenizer.model"
    if not path.is_file():
        return None
    head = path.read_bytes()[:4096].split(b"\n")[0]
    is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\r?", head)
    tokenizer = TiktokenTokenizer(path) if is_tiktoken else SentencePieceTokenizer(path)
    tokenizer.directory = directory
    return tokenizer


class Detokenizer:
    """Decodes a growing sequence piece by piece, holding back characters whose bytes are not all there yet."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A few tokens of the prompt come along: decoded alone, a first token would lose its leading space.
        self._ids = list(prompt[-8:])
        # A prompt of ids may end inside a character; the token that completes it shows it.
        self._shown = len(tokenizer.decode(self._ids).rstrip("\ufffd"))

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What was held back, however incomplete."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[self._shown:]
        # The window stays short, so that a long answer costs no more a token than a short one.
        self._ids = self._ids[-8:]
        self._shown = len(self._tokenizer.decode(self._ids))
        return piece
