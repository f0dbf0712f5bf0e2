"""Tokenizers against the libraries themselves, and decoding token by token without losing or breaking a character."""

import base64
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpllm.demo import MODEL_DIR
from tpllm.errors import DataError
from tpllm.tokenizer import Detokenizer, SentencePieceTokenizer, TiktokenTokenizer, Tokenizer, load_tokenizer

MERGES = ["th", "he", " t", " th", " the", "in", "er", "an", "re", "hello", "ell", "llo", "  ", "    ", "é", "ü", "€",
          "日", "日本", "\n\n", " a", "on", "12", "123", "<|", "|>", "eot", "_id"]  # fmt: skip
# Llama 3's special tokens by their distance from the last ordinary one, as the published tokenizer numbers them.
SPECIAL = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7,
           "<|eot_id|>": 9}  # fmt: skip
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
TEXTS = ["", " ", "hello", " hello", "  two  spaces ", "the €, the 日本語, naïve café", "line\nline\n\n\ttab",
         "👍🏽 👨‍👩‍👧 x", "123456 1+1=2", "'S 'll don't", "\x00\x01", "İ ﬁ ①"]  # fmt: skip


def ordinary_tokens() -> dict[bytes, int]:
    """A vocabulary as byte-pair merging needs it: bytes first, and each merge after both of its halves."""
    ranks = {bytes([i]): i for i in range(256)}
    for text in MERGES:
        word = text.encode()
        for length in range(2, len(word) + 1):
            ranks.setdefault(word[:length], len(ranks))
    return ranks


def write_tiktoken(directory: Path, newline: str = "\n") -> dict[bytes, int]:
    ranks = ordinary_tokens()
    directory.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}{newline}" for token, rank in ranks.items()]
    (directory / "tokenizer.model").write_bytes("".join(lines).encode())
    return ranks


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("llama3")
    write_tiktoken(directory)
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, TiktokenTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    tokenizer = load_tokenizer(MODEL_DIR)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_is_the_library_with_bos_in_front(text: str, llama2: Tokenizer) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
    ids = library.encode(text)
    assert llama2.encode(text) == [library.bos_id(), *ids]
    assert llama2.decode(llama2.encode(text)) == llama2.decode(ids) == library.decode(ids)
    assert (llama2.vocab_size, llama2.bos_id) == (library.vocab_size(), library.bos_id())
    assert llama2.end_ids == {library.eos_id()}


@pytest.mark.parametrize("text", TEXTS)
def test_tiktoken_is_the_library_with_bos_in_front(text: str, llama3: Tokenizer) -> None:
    ranks = ordinary_tokens()
    library = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids = library.encode_ordinary(text)
    assert llama3.encode(text) == [llama3.bos_id, *ids]
    assert llama3.decode(llama3.encode(text)) == llama3.decode(ids) == library.decode(ids) == text


def test_llama3_special_tokens_follow_the_ordinary_ones(llama3: Tokenizer) -> None:
    count = len(ordinary_tokens())
    assert llama3.vocab_size == count + 256
    assert llama3.bos_id == count + SPECIAL["<|begin_of_text|>"]
    assert {count + SPECIAL["<|end_of_text|>"], count + SPECIAL["<|eot_id|>"]} <= llama3.end_ids
    assert all(count <= i < count + 256 for i in llama3.end_ids) and llama3.bos_id not in llama3.end_ids


@pytest.mark.parametrize("text", [*SPECIAL, "a<|eot_id|>b", "<|begin_of_text|><|reserved_special_token_5|>", "<s>",
                                  "</s>", "x</s>y", "<unk>", "<0x41>"])  # fmt: skip
def test_control_tokens_typed_by_a_user_are_text(text: str, tokenizer: Tokenizer) -> None:
    bos, *ids = tokenizer.encode(text)
    assert bos == tokenizer.bos_id
    assert tokenizer.bos_id not in ids and not tokenizer.end_ids & set(ids)
    assert all(0 <= i < tokenizer.vocab_size - (256 if isinstance(tokenizer, TiktokenTokenizer) else 0) for i in ids)
    assert tokenizer.decode(ids) == text


def test_ids_without_text_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([]) == ""
    extra = [tokenizer.bos_id, *tokenizer.end_ids, tokenizer.vocab_size, tokenizer.vocab_size + 7, -1]
    assert tokenizer.decode(extra) == ""
    assert tokenizer.decode(ids + extra) == "hello"


def test_a_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_windows_line_ends_are_still_a_tiktoken_file(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, newline="\r\n")
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, TiktokenTokenizer) and tokenizer.decode(tokenizer.encode("hello")) == "hello"


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"{}", b"hello world\n", b"YQ==\n"])
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("line", ["half a line", "YQ==", "YQ== x", "a 1", "\xe9 1"])
def test_a_bad_line_of_a_tiktoken_file_is_named(line: str, tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    path = tmp_path / "tokenizer.model"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:9], line.encode(), *lines[9:]]))
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


# Detokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> tuple[list[str], str]:
    """What each token pushed out, and what finish() added."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token) for token in new], detokenizer.finish()


def continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text of `new` after `prompt`: the whole decoded at once, less the prompt's own."""
    head, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
    assert whole.startswith(head)
    return whole[len(head):]


MIXED = st.text(st.one_of(
    st.sampled_from(" \n\tabe.1"), st.sampled_from("éüßλж€日本語한"), st.sampled_from("👍🏽👨‍👩‍👧🇩🇪𝄞"),
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")), max_size=40)  # fmt: skip


@given(prompt=MIXED, answer=MIXED)
@example(prompt="", answer=" " * 40)
@example(prompt="x" + " " * 30, answer=" " * 30 + "y")
@example(prompt="Q:", answer=" 👨‍👩‍👧👨‍👩‍👧👨‍👩‍👧 end")
@example(prompt="日" * 20, answer="日" * 20)
@example(prompt="", answer="\n\n\n")
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_pieces_make_the_whole_text(kind: str, prompt: str, answer: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    prompt_ids = tokenizer.encode(prompt)
    # The answer's own ids, not those of the joined text: a model may continue in any way.
    new = tokenizer.encode(answer)[1:]
    pushed, rest = pieces(tokenizer, prompt_ids, new)
    assert "".join(pushed) + rest == continuation(tokenizer, prompt_ids, new)
    assert not any("\ufffd" in piece for piece in [*pushed, rest])
    assert not rest  # a whole text holds nothing back


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_any_tokens_at_all_are_decoded_as_one_text(kind: str, data: st.DataObject,
                                                   request: pytest.FixtureRequest) -> None:
    """Random ids: broken characters, control tokens and ids beyond the vocabulary among them."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    new = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    prompt = tokenizer.encode("Say")
    pushed, rest = pieces(tokenizer, prompt, new)
    assert "".join(pushed) + rest == continuation(tokenizer, prompt, new)


@pytest.mark.parametrize("text", ["€", "👍", "日本"])
def test_a_character_is_held_back_until_its_bytes_are_there(text: str, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("a")
    bytes_of = text.encode()
    if isinstance(tokenizer, TiktokenTokenizer):
        new = list(bytes_of)  # the first 256 tokens are the bytes
    else:
        library = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
        new = [library.piece_to_id(f"<0x{byte:02X}>") for byte in bytes_of]
    pushed, rest = pieces(tokenizer, prompt, new)
    expected = ["" for _ in bytes_of]
    position = 0
    for character in text:
        position += len(character.encode())
        expected[position - 1] = character
    assert pushed == expected and rest == ""
    # Cut off in the middle, finish() says so with a replacement character instead of dropping it.
    cut, rest = pieces(tokenizer, prompt, new[:-1])
    assert "".join(cut) == text[:-1] and rest and set(rest) == {"\ufffd"}


def test_the_space_before_the_first_word_is_kept(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the hello the")
    for cut in range(2, len(whole)):
        pushed, rest = pieces(tokenizer, whole[:cut], whole[cut:])
        assert tokenizer.decode(whole[:cut]) + "".join(pushed) + rest == "the hello the"


def test_a_long_answer_costs_no_more_a_token_than_a_short_one(llama2: Tokenizer) -> None:
    lengths: list[int] = []

    class Counting(Tokenizer):
        def encode(self, text: str) -> list[int]:
            return llama2.encode(text)

        def decode(self, ids: object) -> str:
            assert isinstance(ids, list)
            lengths.append(len(ids))
            return llama2.decode(ids)

    pieces(Counting(), llama2.encode("x " * 200), llama2.encode("hello world " * 200))
    assert max(lengths) <= 16


def test_a_character_begun_in_the_prompt_is_shown_when_it_is_whole() -> None:
    """Only prompts of token ids can end inside a character."""
    tokenizer = load_tokenizer(MODEL_DIR)
    assert tokenizer is not None
    ids = tokenizer.encode("a€")
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd"), "the demo tokenizer spells it in bytes"
    assert Detokenizer(tokenizer, ids[:-1]).push(ids[-1]) == "€"
