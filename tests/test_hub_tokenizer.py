"""tokenizer.json: the ids and texts of transformers' AutoTokenizer, on small tokenizers trained here."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import LLAMA2_MHA, make_meta_dir, save_hf_dir
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

from tpllm.cli import main
from tpllm.demo import MODEL_DIR
from tpllm.errors import DataError
from tpllm.tokenizer import Detokenizer, HubTokenizer, SentencePieceTokenizer, load_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "naïve café, 日本語 and 12345 numbers",
          "def f(x):\n    return x"]
TEXTS = ["", " ", "the fox", " the fox", "  two  spaces ", "café 日本語 €", "line\n\n\ttab", "👍🏽 👨‍👩‍👧 x", "1+1=2"]
BOS, EOS, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def llama3_like() -> Library:
    """Byte-level pairs; a template puts BOS in front."""
    library = Library(BPE(ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    library.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, TURN)])
    library.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, library.token_to_id(BOS))])
    return library


def llama2_like() -> Library:
    """Sentencepiece's way: blanks become "▁", unknown characters their bytes."""
    control = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    library = Library(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    library.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=320, special_tokens=control,
                                                                show_progress=False))
    state = json.loads(library.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    library = Library.from_str(json.dumps(state))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


KINDS = {"llama3": llama3_like, "llama2": llama2_like}
ENDS = {"llama3": (BOS, EOS), "llama2": ("<s>", "</s>")}


def write(directory: Path, kind: str, **more: Any) -> Path:
    directory.mkdir(exist_ok=True)
    KINDS[kind]().save(str(directory / "tokenizer.json"))
    bos, eos = ENDS[kind]
    data = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
            "clean_up_tokenization_spaces": False, **more}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(data))
    return directory


@pytest.fixture(scope="module", params=KINDS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokenizer") / request.param, request.param)


def both(directory: Path) -> tuple[HubTokenizer, Any]:
    """Ours and transformers'."""
    from transformers import AutoTokenizer

    ours = load_tokenizer(directory)
    assert isinstance(ours, HubTokenizer)
    return ours, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_transformers(text: str, directory: Path) -> None:
    ours, theirs = both(directory)
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"] and ids[0] == ours.bos_id == theirs.bos_token_id
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.end_ids == {theirs.eos_token_id} and ours.vocab_size <= len(theirs)


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True},
                                   {"add_bos_token": True, "add_eos_token": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_added_where_transformers_adds_it(kind: str, template: bool, flags: dict[str, bool],
                                                 tmp_path: Path) -> None:
    write(tmp_path, kind, **flags)
    if not template:
        data = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"post_processor": None}))
    ours, theirs = both(tmp_path)
    assert ours.encode("the fox") == theirs("the fox")["input_ids"]
    assert (ours.encode("the fox")[0] == theirs.bos_token_id) == template  # whatever the flags say


def test_control_tokens_typed_by_a_user_are_text(directory: Path) -> None:
    ours, theirs = both(directory)
    for token in (*ENDS["llama2"], *ENDS["llama3"], TURN, f"a{TURN}b"):
        ids = ours.encode(token)
        assert ids == theirs(token, split_special_tokens=True)["input_ids"]
        assert ids.count(ours.bos_id) == 1 and not ours.end_ids & set(ids)
        assert ours.decode(ids) == token


def test_ids_without_text_decode_to_nothing(directory: Path) -> None:
    ours, _ = both(directory)
    assert ours.decode([]) == ours.decode([ours.bos_id, *ours.end_ids, 10**6, -1]) == ""


def test_it_comes_along_with_the_weights(directory: Path, tmp_path: Path) -> None:
    """A converted Hugging Face directory has the tokenizer, its end token and the chat's form."""
    meta = make_meta_dir(tmp_path / "meta", replace(LLAMA2_MHA, vocab_size=400))
    source = save_hf_dir(meta, tmp_path / "hf")
    for path in directory.iterdir():
        shutil.copyfile(path, source / path.name)
    (source / "generation_config.json").unlink(missing_ok=True)
    assert main(["convert", "--hf-model-dir", str(source), "--output-dir", str(tmp_path / "out")]) == 0
    ours, (_, theirs) = load_tokenizer(tmp_path / "out"), both(source)
    assert isinstance(ours, HubTokenizer) and ours.end_ids == {theirs.eos_token_id}
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


@given(prompt=st.text(max_size=20), answer=st.text(st.sampled_from(" \nabethéß日👍🏽€"), max_size=30))
@settings(max_examples=100, deadline=None, derandomize=True)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_whole_text(kind: str, prompt: str, answer: str,
                                    tokenizers_by_kind: dict[str, HubTokenizer]) -> None:
    tokenizer = tokenizers_by_kind[kind]
    head, new = tokenizer.encode(prompt), tokenizer.encode(answer)[1:]
    detokenizer = Detokenizer(tokenizer, head)
    text = "".join(detokenizer.push(token) for token in new) + detokenizer.finish()
    assert tokenizer.decode(head) + text == tokenizer.decode(head + new)


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HubTokenizer]:
    root = tmp_path_factory.mktemp("by_kind")
    return {kind: both(write(root / kind, kind))[0] for kind in KINDS}


@pytest.mark.parametrize(("generation", "config", "expected"), [
    (7, None, {7}), ([7, 9], 3, {7, 9}), (None, 3, {3}), (None, [3, 4], {3, 4}),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["llama3", "sentencepiece"])
def test_what_ends_an_answer(kind: str, generation: Any, config: Any, expected: set[int], tmp_path: Path) -> None:
    """generation_config.json is asked before config.json, as transformers does, whatever the tokenizer's file."""
    from transformers import GenerationConfig

    if kind == "llama3":
        write(tmp_path, kind)
    else:
        shutil.copyfile(MODEL_DIR / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        theirs = GenerationConfig.from_pretrained(tmp_path).eos_token_id
        assert expected == set(theirs if isinstance(theirs, list) else [theirs])
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HubTokenizer if kind == "llama3" else SentencePieceTokenizer)
    assert tokenizer.end_ids == expected


def test_a_padding_token_beyond_the_table_is_not_counted(tmp_path: Path) -> None:
    write(tmp_path, "llama3")
    size = both(tmp_path)[0].vocab_size
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens(["<pad>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert both(tmp_path)[0].vocab_size == size
    library.add_tokens(["wordlike"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert both(tmp_path)[0].vocab_size == library.get_vocab_size()


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", b""), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff"), ("tokenizer_config.json", b"[]"),
    ("generation_config.json", b'{"eos_token_id": "x"}'), ("generation_config.json", b"{"),
])  # fmt: skip
def test_a_file_that_is_none_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    write(tmp_path, "llama3")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_tokenizer(tmp_path)
