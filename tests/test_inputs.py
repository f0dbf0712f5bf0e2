"""Prompts from files: every form read right, every bad line refused by its number and never with a traceback."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tpllm.cli import main
from tpllm.errors import DataError, TpllmError, UsageError
from tpllm.inputs import Request, read_requests
from tpllm.sampling import SamplingParams

Write = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_requests(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def prompts(requests: list[Request]) -> list[str | list[int]]:
    return [request.prompt for request in requests]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_txt_has_a_prompt_a_line_and_skips_blank_ones(newline: str, write: Write) -> None:
    requests = read_requests(write("a.txt", newline.join(["  first ", "", "   ", "second é €", ""])))
    assert prompts(requests) == ["  first ", "second é €"]
    assert all(request.sampling == {} for request in requests) and len({r.id for r in requests}) == 2


@pytest.mark.parametrize("character", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c"], ids=ascii)
def test_only_newlines_end_a_txt_prompt(character: str, write: Write) -> None:
    assert prompts(read_requests(write("a.txt", f"one{character}prompt\ntwo\n"))) == [f"one{character}prompt", "two"]


def test_csv_has_token_ids(write: Write) -> None:
    requests = read_requests(write("a.csv", "1, 2,3\n\n4\r\n5,6,,\n"))
    assert [(r.id, r.prompt) for r in requests] == [(0, [1, 2, 3]), (1, [4]), (2, [5, 6])]


@pytest.mark.parametrize(("bad", "line"), [("1,2\nx,3\n", 2), ("\n\n1.5\n", 3), ("1,,2\n", 1), ("1 2\n", 1),
                                           ("1\n2\n,\n", 3), ("0x10\n", 1)])  # fmt: skip
def test_a_bad_csv_line_is_named(bad: str, line: int, write: Write) -> None:
    assert f"line {line} " in refusal(write("a.csv", bad))


def test_jsonl_has_an_object_a_line(write: Write) -> None:
    lines = [{"prompt": "hi\u2028there"}, {"id": "x", "token_ids": [1, 2]},
             {"id": 7, "prompt": "", "temperature": 0.5, "top_k": 3, "seed": 1, "max_output_len": 4}]  # fmt: skip
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert read_requests(write("a.jsonl", text + "\n")) == [
        Request(0, "hi\u2028there", {}), Request("x", [1, 2], {}),
        Request(7, "", {"temperature": 0.5, "top_k": 3, "seed": 1, "max_output_len": 4})]  # fmt: skip


BAD_JSON_LINES = [
    "{", "[1]", "null", '"text"', "{}", '{"prompt": 1}', '{"prompt": "a", "token_ids": [1]}', '{"token_ids": "1"}',
    '{"token_ids": [1, "2"]}', '{"token_ids": [1.5]}', '{"token_ids": [true]}', '{"prompt": "a", "tempreature": 1}',
    '{"prompt": "a", "id": null}', '{"prompt": "a", "id": [1]}', '{"prompt": "a"} x', "nonsense", "\ufeff{}",
    '{"token_ids": [' + "1" * 5000 + "]}", "[" * 100_000, '{"prompt": ' * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_JSON_LINES, ids=lambda line: line[:30])
def test_a_bad_json_line_is_named(bad: str, write: Write) -> None:
    good = '{"prompt": "fine"}\n'
    assert "line 3:" in refusal(write("a.jsonl", good + "\n" + bad + "\n" + good))


def test_unknown_fields_are_named(write: Write) -> None:
    assert "'tempreature'" in refusal(write("a.jsonl", '{"prompt": "a", "tempreature": 1}'))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(["id", "prompt", "token_ids", *SamplingParams.__dataclass_fields__, "other"])
LINES = st.one_of(st.text(max_size=40), st.text(string.punctuation + string.digits + " ", max_size=40),
                  st.dictionaries(FIELDS, JSON_VALUES, max_size=5).map(json.dumps))  # fmt: skip


@given(lines=st.lists(LINES, max_size=4))
@example(lines=['{"prompt": "\\ud800"}'])
@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_jsonl_file_is_read_or_refused(lines: list[str], write: Write) -> None:
    path = write("a.jsonl", "\n".join(lines).encode("utf-8", "replace"))
    try:
        requests = read_requests(path)
    except TpllmError as e:
        assert str(path) in str(e)
    else:
        assert requests
        for request in requests:
            assert isinstance(request.prompt, str) or all(type(i) is int for i in request.prompt)
            assert isinstance(request.id, (int, str))
            assert request.sampling.keys() <= SamplingParams.__dataclass_fields__.keys()


@given(content=st.binary(max_size=60))
@settings(max_examples=80, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".npy"])
def test_any_bytes_are_read_or_refused(suffix: str, content: bytes, write: Write) -> None:
    path = write("a" + suffix, content)
    try:
        assert read_requests(path)
    except TpllmError as e:
        assert str(path) in str(e)


# A sampling field of a line reaches SamplingParams only in `run`, so these go through its reader.


def run_with(path: Path, tmp_path: Path) -> int:
    return main(["run", "--engine-dir", str(tmp_path / "no-engine"), "--input-file", str(path)])


BAD_FIELDS = [
    ("max_output_len", 1.5), ("max_output_len", "10"), ("max_output_len", 0), ("max_output_len", None),
    ("temperature", "hot"), ("temperature", -1), ("temperature", float("nan")), ("top_k", 1.5), ("top_k", "5"),
    ("top_p", [0.5]), ("top_p", 2), ("seed", 1.5), ("seed", "x"), ("seed", 2**70), ("ignore_eos", "no"),
    ("end_id", "x"), ("end_id", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("field", "bad"), BAD_FIELDS, ids=str)
def test_a_bad_sampling_field_of_a_line_is_refused_before_anything_runs(
        field: str, bad: Any, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = {"temperature": 1.0, field: bad} if field in ("top_k", "top_p") else {field: bad}
    lines = [{"prompt": "fine"}, {"prompt": "a", **sampling}]
    path = write("a.jsonl", "\n".join(map(json.dumps, lines)))
    assert run_with(path, tmp_path) in (2, 12)
    message = capsys.readouterr().err
    assert field in message.replace("-", "_") and "Traceback" not in message
    assert "no such engine" not in message, "the field was taken"


def test_a_bad_sampling_field_names_its_file_and_line(write: Write, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a.jsonl", '{"prompt": "fine"}\n\n{"prompt": "a", "temperature": -1}\n')
    run_with(path, tmp_path)
    message = capsys.readouterr().err
    assert str(path) in message and "line 3" in message


def test_good_sampling_fields_pass(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"max_output_len": 3, "temperature": 1, "top_k": 5, "top_p": 0.5, "seed": 3, "ignore_eos": True,
              "end_id": 7}  # fmt: skip
    assert run_with(write("a.jsonl", json.dumps({"token_ids": [1], **fields})), tmp_path) == 2
    assert "no such engine directory" in capsys.readouterr().err


# .npy


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
def test_npy_has_a_prompt_a_row_padded_with_minus_one(dtype: type, tmp_path: Path) -> None:
    array = np.array([[5, 6, 7], [8, -1, -1], [-1, 9, 9]], dtype=dtype)
    requests = read_requests(save(tmp_path / "a.npy", array))
    assert [(r.id, r.prompt) for r in requests] == [(0, [5, 6, 7]), (1, [8]), (2, [9, 9])]
    assert all(type(token) is int for request in requests for token in request.prompt)


@pytest.mark.parametrize("array", [np.zeros(3, np.int32), np.zeros((2, 2, 2), np.int32), np.zeros((2, 2)),
                                   np.array(5), np.array([["a"]]), np.zeros((1, 2), bool)], ids=str)  # fmt: skip
def test_npy_of_another_shape_or_kind_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "a.npy", array))
    assert "2-D array of token ids" in message and str(array.dtype) in message and str(list(array.shape)) in message


def test_npy_that_is_none_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.arange(40).reshape(4, 10))
    data = path.read_bytes()
    for length in (0, 5, 10, 60, len(data) - 1):
        path.write_bytes(data[:length])
        refusal(path)


def test_npy_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)
    refusal(path)


def test_an_npz_under_the_name_of_an_npy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.savez(file, ids=np.zeros((2, 2), np.int32))
    refusal(path)


# All forms


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_a_file_without_prompts_is_refused(name: str, content: str, write: Write) -> None:
    assert "has no prompts" in refusal(write(name, content))


def test_an_empty_npy_is_refused(tmp_path: Path) -> None:
    assert "has no prompts" in refusal(save(tmp_path / "a.npy", np.zeros((0, 4), np.int32)))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused(name: str, write: Write) -> None:
    assert "not UTF-8" in refusal(write(name, b"\xff\xfe1\x00"))


def test_an_unknown_suffix_lists_the_known_ones(write: Write) -> None:
    with pytest.raises(UsageError, match=r"\.txt, \.csv, \.jsonl, \.npy"):
        read_requests(write("a.json", "{}"))


@pytest.mark.parametrize("name", ["gone.txt", "gone.npy"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=name):
        read_requests(tmp_path / name)
