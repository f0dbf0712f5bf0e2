"""Conversations → text and control tokens: Meta's templates of Llama 2 and 3, or the Jinja template of a model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from tpllm.errors import DataError

Message = dict[str, str]
Piece = str | int  # a text, or the id of a control token
Template = Callable[[list[Message], Mapping[str, int]], list[Piece]]

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
MARK = "\U000f0000"  # parts a control token that was typed in a message, for as long as the template renders it


def check_messages(messages: Any) -> None:
    """Refuse what is not a list of messages."""
    if not isinstance(messages, list) or not messages:
        raise DataError('a conversation must be a list of messages {"role": TEXT, "content": TEXT}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f'message {number} must be {{"role": TEXT, "content": TEXT}}, not {str(message)[:80]}')


def check_turns(messages: list[Message]) -> None:
    """Meta's templates know one order: perhaps a system message, then user and assistant in turn, user last."""
    roles = [message["role"] for message in messages]
    turns = roles[roles[0] == "system":]
    if len(turns) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise DataError(f"the roles of this conversation are {', '.join(roles)}; they must be user and assistant in "
                        "turn, the last one user, with at most one system message in front")


def llama2(messages: list[Message], control: Mapping[str, int]) -> list[Piece]:
    """As `chat_completion` of Meta's Llama 2: every question and answer between BOS and EOS."""
    check_turns(messages)
    if tag := next((tag for tag in LLAMA2_TAGS for message in messages if tag in message["content"]), None):
        raise DataError(f"a message holds {tag}, by which Llama 2 knows where a message ends; take it out")
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        contents[:2] = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"]
    pieces: list[Piece] = []
    for question, answer in zip(contents[:-1:2], contents[1::2], strict=True):
        pieces += [control["<s>"], f"[INST] {question.strip()} [/INST] {answer.strip()} ", control["</s>"]]
    return [*pieces, control["<s>"], f"[INST] {contents[-1].strip()} [/INST]"]


def llama3(messages: list[Message], control: Mapping[str, int]) -> list[Piece]:
    """As `ChatFormat` of Meta's Llama 3; ends with the header of the assistant's answer."""
    check_turns(messages)
    pieces: list[Piece] = [control["<|begin_of_text|>"]]
    for role, content in [*((m["role"], m["content"]) for m in messages), ("assistant", None)]:
        pieces += [control["<|start_header_id|>"], role, control["<|end_header_id|>"], "\n\n"]
        if content is not None:
            pieces += [content.strip(), control["<|eot_id|>"]]
    return pieces


def jinja(directory: Path) -> Template | None:
    """The template that a Hugging Face model directory has: chat_template.jinja, or in tokenizer_config.json."""
    path, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    except (ValueError, AttributeError) as e:
        raise DataError(f"cannot read the chat template in {directory}: {e}") from None
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if source is None:
        return None
    # "bos_token" and the like: a text, or an object that has it
    names = {name: value if isinstance(value, str) else value["content"] for name, value in settings.items()
             if name.endswith("_token") and isinstance(value, (str, dict))}
    return functools.partial(render, compile_template(source), names)


def compile_template(source: str) -> Any:
    """A Jinja template in transformers' environment: sandboxed, as it comes with a model from anywhere."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what to train on; it says nothing here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as e:
        raise DataError(f"the model's chat template is not valid Jinja: {e}") from None


def render(template: Any, names: dict[str, str], messages: list[Message], control: Mapping[str, int]) -> list[Piece]:
    """The pieces of a rendered template: its own control tokens are ids, the messages' stay text."""
    import jinja2

    tokens = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) or "(?!)"

    def mark(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        return re.sub(tokens, lambda found: found[0][0] + MARK + found[0][1:], text.replace(MARK, ""))

    marked = [{key: mark(value) for key, value in message.items()} for message in messages]
    try:
        text = template.render(messages=marked, tools=None, documents=None, add_generation_prompt=True, **names)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as e:
        raise DataError(f"the model's chat template refuses this conversation: {e}") from None
    parts = enumerate(re.split(f"({tokens})", text))
    return [control[part] if i % 2 else part.replace(MARK, "") for i, part in parts]
