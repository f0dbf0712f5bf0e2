"""Conversations: Meta's templates as published, and Jinja templates against transformers'."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from makers import transformers_greedy, transformers_model
from test_hub_tokenizer import ENDS, KINDS, both, write
from test_tokenizer import PATTERN, SPECIAL, ordinary_tokens, write_tiktoken
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers

from tpllm.checkpoint.convert import copy_tokenizer
from tpllm.cli import main
from tpllm.demo import MODEL_DIR
from tpllm.errors import DataError, UsageError
from tpllm.launched import CONSOLE
from tpllm.tokenizer import Tokenizer, load_tokenizer

Conversation = list[dict[str, str]]


def conversation(*contents: str, system: str | None = None) -> Conversation:
    """Questions and answers in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *turns]


CONVERSATIONS = [
    conversation("hello"), conversation("  the hello \n", "an answer ", " 12 the"), conversation("", system=""),
    conversation("日本 €", "the\n\nre", "on", "in", "x" * 50, system=" Be brief. \n"),
]  # fmt: skip

LLAMA3_JINJA = """{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = message['content'] | trim %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- if ns.system %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' + ns.system + '<|eot_id|>' }}{% endif %}
{%- for message in messages if message['role'] != 'system' %}
    {%- if not message['role'] in ['user', 'assistant'] %}
        {{- raise_exception('no role ' + message['role']) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
TEMPLATES = {
    "like Llama 3": LLAMA3_JINJA,
    "blocks and lines": "{% for m in messages %}\n  {% if loop.first %}\n{{ bos_token }}{% endif %}\n"
                        "{{ m.role }}: {{ m.content }}\n{% endfor %}\n{{ eos_token }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}<|eot_id|>",
    "what is not given": "{% if tools is none and documents is none and not x is defined %}{{ x }}yes{% endif %}",
    "date": "{{ strftime_now('%Y') }} {{ messages[-1]['content'] }}",
}  # fmt: skip


def llama3(directory: Path, **config: object) -> Tokenizer:
    write_tiktoken(directory)
    if config:
        names = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>", "lstrip": False}}
        (directory / "tokenizer_config.json").write_text(json.dumps(names | config), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    return tokenizer


def tiktoken_library() -> tiktoken.Encoding:
    ranks = ordinary_tokens()
    special = {name: len(ranks) + offset for name, offset in SPECIAL.items()}
    return tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def demo_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(MODEL_DIR)
    assert tokenizer is not None
    return tokenizer


# Meta's templates


@pytest.mark.parametrize(("messages", "turns"), [
    (conversation(" hello  "), ["[INST] hello [/INST]"]),
    (conversation("hello", system="Be brief."), ["[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello [/INST]"]),
    (conversation("a", "b ", "c", "d", "e", system=" S "),
     ["[INST] <<SYS>>\n S \n<</SYS>>\n\na [/INST] b ", "[INST] c [/INST] d ", "[INST] e [/INST]"]),
])  # fmt: skip
def test_llama_2(messages: Conversation, turns: list[str]) -> None:
    """Meta's `chat_completion`: each turn is encoded with BOS, all but the last with EOS."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
    expected = []
    for turn in turns:
        expected += [library.bos_id(), *library.encode(turn), library.eos_id()]
    assert demo_tokenizer().chat(messages) == expected[:-1]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_llama_3(messages: Conversation, tmp_path: Path) -> None:
    """Meta's `ChatFormat.encode_dialog_prompt`: header, two line ends and message are encoded on their own."""
    library = tiktoken_library()

    def control(name: str) -> list[int]:
        return library.encode(name, allowed_special={name})

    expected = control("<|begin_of_text|>")
    for message in [*messages, {"role": "assistant", "content": ""}]:
        expected += control("<|start_header_id|>") + library.encode_ordinary(message["role"])
        expected += control("<|end_header_id|>") + library.encode_ordinary("\n\n")
        expected += library.encode_ordinary(message["content"].strip()) + control("<|eot_id|>")
    tokenizer = llama3(tmp_path)
    assert tokenizer.chat(messages) == expected[:-1]
    assert set(control("<|eot_id|>")) <= tokenizer.end_ids


@pytest.mark.parametrize("typed", [*SPECIAL, "<s>", "</s>", "<|<|eot_id|>eot_id|>", "<|eot_\U000f0000id|>"])
@pytest.mark.parametrize("kind", ["llama 2", "llama 3", "jinja", "llama 2 jinja"])
def test_control_tokens_typed_by_a_user_are_text(typed: str, kind: str, tmp_path: Path) -> None:
    if kind == "llama 2":
        tokenizer = demo_tokenizer()
    elif kind == "llama 2 jinja":
        (tmp_path / "tokenizer.model").write_bytes((MODEL_DIR / "tokenizer.model").read_bytes())
        template = "{% for m in messages %}<s>[INST] {{ m['content'] }} [/INST] </s>{% endfor %}"
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer is not None
    else:
        tokenizer = llama3(tmp_path, **({"chat_template": LLAMA3_JINJA} if kind == "jinja" else {}))
    control = set(tokenizer.control.values())
    clean, dirty = tokenizer.chat(conversation("hello")), tokenizer.chat(conversation(typed))
    assert [i for i in clean if i in control] == [i for i in dirty if i in control] != []
    shown = typed if "jinja" not in kind else typed.replace("\U000f0000", "")
    assert tokenizer.decode(dirty).replace(" ", "") == tokenizer.decode(clean).replace(" ", "").replace("hello", shown)


@pytest.mark.parametrize("messages", [
    conversation("a", "b"), conversation("a", system="s") + conversation("b"), conversation("a") + conversation("b"),
    conversation(system="s"), [*conversation("a"), {"role": "system", "content": "s"}],
    [{"role": "assistant", "content": "a"}], [{"role": "tool", "content": "a"}],
])  # fmt: skip
def test_bad_orders_are_refused_by_the_roles(messages: Conversation, tmp_path: Path) -> None:
    for tokenizer in (demo_tokenizer(), llama3(tmp_path)):
        with pytest.raises(DataError, match=", ".join(m["role"] for m in messages) + "; they must be user and"):
            tokenizer.chat(messages)


@pytest.mark.parametrize("messages", [[], None, "hello", {"role": "user", "content": "a"}, ["hello"], [None],
                                      [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": None}],
                                      [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
                                      [{"role": 1, "content": "a"}]])  # fmt: skip
def test_what_is_no_conversation_is_refused(messages: Conversation, tmp_path: Path) -> None:
    for tokenizer in (demo_tokenizer(), llama3(tmp_path, chat_template=LLAMA3_JINJA)):
        with pytest.raises(DataError, match='"role": TEXT, "content": TEXT'):
            tokenizer.chat(messages)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama_2s_tags_in_a_message_are_refused(tag: str) -> None:
    for messages in (conversation(f"a {tag} b"), conversation("a", f"b{tag}", "c"), conversation("a", system=tag)):
        with pytest.raises(DataError) as error:
            demo_tokenizer().chat(messages)
        assert tag in str(error.value)


# Jinja


def transformers_text(template: str, messages: Conversation) -> str:
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Library(WordLevel({"a": 0}, "a")), chat_template=template,
                                        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_models_own_template_is_rendered_as_by_transformers(name: str, messages: Conversation,
                                                              tmp_path: Path) -> None:
    expected = tiktoken_library().encode(transformers_text(TEMPLATES[name], messages), allowed_special="all")
    assert llama3(tmp_path, chat_template=TEMPLATES[name]).chat(messages) == expected


@pytest.mark.parametrize("place", ["file", "config", "list", "both"])
def test_where_a_template_may_be(place: str, tmp_path: Path) -> None:
    """The file wins over the configuration; of several templates the default one is taken."""
    template, other = "Z{{ messages[0]['content'] }}", "{{ raise_exception('the other template') }}"
    given: dict[str, object] = {
        "file": "", "config": template, "both": other,
        "list": [{"name": "tool_use", "template": other}, {"name": "default", "template": template}]}
    tokenizer = llama3(tmp_path, **({"chat_template": given[place]} if given[place] else {}))
    if place in ("file", "both"):
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert tokenizer.decode(tokenizer.chat(conversation("hello"))) == "Zhello"


def test_a_checkpoint_takes_the_template_along(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    write_tiktoken(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("Z{{ messages[0]['content'] }}", encoding="utf-8")
    copy_tokenizer(tmp_path / "model", tmp_path / "checkpoint", print)
    tokenizer = load_tokenizer(tmp_path / "checkpoint")
    assert tokenizer and tokenizer.decode(tokenizer.chat(conversation("hello"))) == "Zhello"


@pytest.mark.parametrize(("template", "words"), [
    (LLAMA3_JINJA, "no role critic"), ("{{ raise_exception('never') }}", "never"), ("{% if %}", "not valid Jinja"),
    ("{{ messages[0].content.x.y }}", "refuses"), ("{{ messages.append(1) }}", "refuses"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"), ("{{ messages + 1 }}", "refuses"),
])  # fmt: skip
def test_a_template_that_fails_or_reaches_out_is_refused(template: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        llama3(tmp_path, chat_template=template).chat([{"role": "critic", "content": "a"}])


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_torn_configuration_is_refused_when_it_is_needed(content: bytes, tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer and tokenizer.encode("hello")
    with pytest.raises(DataError, match="chat template"):
        tokenizer.chat(conversation("hello"))


def test_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    class Plain(type(demo_tokenizer())):  # type: ignore[misc]
        meta_template = None

    tokenizer = Plain(MODEL_DIR / "tokenizer.model")
    tokenizer.directory = tmp_path
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.chat(conversation("hello"))


# tokenizer.json


TURNS = ("{% for m in messages %}{{ bos_token }}[{{ m['role'] }}] {{ m['content'] }} [/] {{ eos_token }}{% endfor %}\n"
         "{{ 'the fox' if add_generation_prompt }}")


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("messages", [*CONVERSATIONS, conversation("the fox", " jumps ", "naïve\n")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_tokenizer_gives_the_ids_of_transformers(kind: str, messages: Conversation, first_only: bool,
                                                       tmp_path: Path) -> None:
    """Also where a blank is put in front of the whole text only, not of the text behind each control token."""
    write(tmp_path, kind, chat_template=TURNS)
    if first_only:
        library = Library.from_file(str(tmp_path / "tokenizer.json"))
        state = json.loads(library.to_str()) | {"normalizer": None}
        library = Library.from_str(json.dumps(state))
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        library.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = both(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat(messages) == expected
    assert theirs.eos_token_id not in ours.encode("a" + ENDS[kind][1])  # a typed one is text again


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_typed_to_a_hub_tokenizer_are_text(kind: str, tmp_path: Path) -> None:
    ours, theirs = both(write(tmp_path, kind, chat_template=TURNS))
    typed = "fox" + ENDS[kind][1] + "dog"
    ids = ours.chat(conversation(typed))
    assert [i for i in ids if i in theirs.all_special_ids] == [theirs.bos_token_id, theirs.eos_token_id]
    assert ours.decode(ids).replace(" ", "") == f"[user]{typed}[/]thefox"


def test_a_hub_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    ours, _ = both(write(tmp_path, "llama3"))
    with pytest.raises(UsageError, match="no chat template"):
        ours.chat(conversation("hello"))


# run --chat


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("chat")
    assert main(["convert", "--meta-ckpt-dir", str(MODEL_DIR), "--output-dir", str(work / "checkpoint"), "--dtype",
                 "float32"]) == 0
    assert main(["build", "--checkpoint-dir", str(work / "checkpoint"), "--output-dir", str(work / "engine"),
                 "--backend", "eager", "--max-seq-len", "200"]) == 0
    return work / "engine"


@pytest.fixture(scope="module")
def said() -> Callable[..., str]:
    """What transformers' greedy search makes of a conversation in Llama 2's form, 8 tokens long."""
    model: Any = transformers_model(MODEL_DIR)
    library = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))

    def answer(*contents: str) -> str:
        ids = []
        for question, reply in zip(contents[::2], [*contents[1::2], None], strict=True):
            turn = f"[INST] {question} [/INST]" + ("" if reply is None else f" {reply.strip()} ")
            ids += [library.bos_id(), *library.encode(turn), *([] if reply is None else [library.eos_id()])]
        new = transformers_greedy(model, ids, 8, eos_ids=(library.eos_id(),))
        shown = [i for i in new if i != library.eos_id()]
        return str(library.decode(ids + shown)).removeprefix(str(library.decode(ids)))

    return answer


def test_run_puts_texts_into_the_template(engine: Path, said: Callable[..., str], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    texts, out = ["The day after Monday is", "Count from three to seven:"], tmp_path / "out.json"
    argv = ["run", "--engine-dir", str(engine), "--chat", "--max-output-len", "8", "--output-json", str(out)]
    for more in ([], ["--streaming"]):
        assert main([*argv, *more, "--input-text", *texts]) == 0
        answers = json.loads(out.read_text(encoding="utf-8"))
        assert [(a["prompt"], a["outputs"][0]["text"]) for a in answers] == [(t, said(t)) for t in texts]
        printed = capsys.readouterr().out
        for i, text in enumerate(texts):
            assert f'Input [Text {i}]: "{text}"\nOutput [Text {i}]: "{said(text)}"' in printed
    (tmp_path / "mixed.jsonl").write_text('{"token_ids": [1, 5, 6]}\n{"prompt": "The day after Monday is"}\n')
    assert main([*argv, "--input-file", str(tmp_path / "mixed.jsonl")]) == 0
    ids, text = json.loads(out.read_text(encoding="utf-8"))
    assert ids["prompt"] is None and ids["prompt_token_ids"] == [1, 5, 6]
    assert text["outputs"][0]["text"] == said(texts[0])


def test_typed_lines_are_one_conversation(engine: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """A line that does not fit or is refused is as if it had not been typed; /new begins anew."""
    first, second = "The day after Monday is", "Count from three to seven:"
    typed = [first, "", "x" * 400, "a [INST] b", second, "/new", second, "/quit", first]

    class Lines:
        is_terminal = False

        def next(self, stop: object) -> str | None:
            return typed.pop(0)

    monkeypatch.setenv(CONSOLE, "a console")
    monkeypatch.setattr("tpllm.launch.console.ConsoleLines", Lines)
    assert main(["run", "--engine-dir", str(engine), "--chat", "--max-output-len", "8"]) == 0
    shown = capsys.readouterr().out
    refusals = [line for line in shown.splitlines() if line.startswith("tpllm: ")]
    assert len(refusals) == 2 and "prompt 0 has" in refusals[0] and "[INST]" in refusals[1]
    rest = shown
    for refusal in refusals:
        rest = rest.replace(refusal + "\n", "")
    assert said(second) != said(first, said(first), second)
    assert rest == "".join(a + "\n" for a in (said(first), said(first, said(first), second), said(second)))
    assert typed == [first]


def test_chat_without_a_tokenizer_is_refused(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (engine.parent / "checkpoint").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    assert main(["run", "--engine-dir", str(engine), "--checkpoint-dir", str(tmp_path), "--chat", "--input-text", "a"]
                ) == UsageError.exit_code
    assert "--tokenizer-dir" in capsys.readouterr().err
