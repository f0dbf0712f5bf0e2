"""Text ↔ token ids: Meta's sentencepiece and tiktoken files, Hugging Face's, and decoding a token at a time."""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tpllm.chat import Message, Piece, Template, check_messages, jinja, llama2, llama3
from tpllm.errors import DataError, UsageError
from tpllm.files import read_json

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
        return self._pieces_ids(self._template(messages, self.control))

    @cached_property
    def _template(self) -> Template | None:
        return (jinja(self.directory) if self.directory else None) or self.meta_template

    def _pieces_ids(self, pieces: Sequence[Piece]) -> list[int]:
        return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else self._text_ids(piece))]

    def _text_ids(self, text: str) -> list[int]:
        """Ids of `text` inside of a sequence."""
        return self.encode(text)[1:]


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


class HubTokenizer(Tokenizer):
    """Hugging Face's `tokenizer.json`, which itself says whether a beginning-of-text token comes first."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library has no class of its own for a bad file
            raise DataError(f"{path} is not a tokenizer: {e}") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # "<|eot_id|>" typed by a user is not the control token

        added = self._model.get_added_tokens_decoder()
        self.control = {token.content: number for number, token in added.items() if token.special}
        # Control tokens are in no prompt's text: one beyond the model's table, for padding, does no harm.
        self.vocab_size = 1 + max({*self._model.get_vocab().values()} - {*self.control.values()}, default=-1)
        self.bos_id = next(iter(self.encode("")), -1)
        end = optional_json(path.with_name("tokenizer_config.json")).get("eos_token")
        end = self._model.token_to_id(str(end.get("content") if isinstance(end, dict) else end))
        self.end_ids = frozenset() if end is None else frozenset({end})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([i for i in ids if i >= 0])
        return text

    def _pieces_ids(self, pieces: Sequence[Piece]) -> list[int]:
        """As transformers encodes a template's text, at once: what precedes a piece may change its spelling."""
        if any(token in piece for piece in pieces if isinstance(piece, str) for token in self.control):
            return super()._pieces_ids(pieces)  # one that was typed
        texts = {number: text for text, number in self.control.items()}
        self._model.encode_special_tokens = False
        ids = self._text_ids("".join(piece if isinstance(piece, str) else texts[piece] for piece in pieces))
        self._model.encode_special_tokens = True
        return ids

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer that lies in a directory, or None; `tokenizer.json` is taken before `tokenizer.model`."""
    path = directory / "tokenizer.model"
    tokenizer: Tokenizer
    if (directory / "tokenizer.json").is_file():
        tokenizer = HubTokenizer(directory / "tokenizer.json")
    elif not path.is_file():
        return None
    elif re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\r?", path.read_bytes()[:4096].split(b"\n")[0]):
        tokenizer = TiktokenTokenizer(path)
    else:
        tokenizer = SentencePieceTokenizer(path)
    tokenizer.directory = directory
    tokenizer.end_ids = end_ids(directory) or tokenizer.end_ids
    return tokenizer


def end_ids(directory: Path) -> frozenset[int]:
    """What ends an answer by `generation_config.json`, else by a Hugging Face `config.json`; empty if neither says."""
    for name in ("generation_config.json", "config.json"):
        ids = optional_json(directory / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(i) is not int for i in ids):
            raise DataError(f"{directory / name}: eos_token_id is {ids}; a token id or a list of them is needed")
        if ids:
            return frozenset(ids)
    return frozenset()


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no file."""
    return read_json(path, "a tokenizer's directory") if path.is_file() else {}


class Detokenizer:
    """Decodes a growing sequence piece by piece, holding back characters whose bytes are not all there yet."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._begin(prompt)

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
        self._begin(self._ids)
        return piece

    def _begin(self, ids: Sequence[int]) -> None:
        """Go on from the last few tokens: decoded alone, the next one would lose its leading space.

        They begin with a whole character, as half a one spoils all bytes after it in Hugging Face's decoders.
        """
        for some in [ids[-n:] for n in range(8, 0, -1)] + [ids[-8:]]:
            text = self._tokenizer.decode(some)
            if not text.startswith("\ufffd"):
                break
        # A prompt of ids may end inside a character; the token that completes it shows it.
        self._ids, self._shown = list(some), len(text.rstrip("\ufffd"))
