"""Sampling: refused settings, each filter against transformers' own, draws that depend on the seed alone."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import write_tiktoken
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpllm.cli import make_parser
from tpllm.cli.options import sampling_params
from tpllm.demo import MODEL_DIR
from tpllm.errors import UsageError
from tpllm.inputs import read_requests
from tpllm.sampling import RowState, SamplingParams, bad_word_ids, choose, process, token_logprobs, warp
from tpllm.tokenizer import load_tokenizer

# Refusals

FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
          "length_penalty"]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), [
    ({"max_output_len": 0}, ["--max-output-len is 0", "starts at 1"]),
    ({"temperature": -0.5}, ["--temperature is -0.5", "0 (greedy)"]),
    ({"temperature": 1e-40}, ["--temperature is 1e-40", "0 (greedy)"]),
    ({"top_k": -1, "temperature": 1.0}, ["--top-k is -1", "0 (off)"]),
    ({"top_p": 0.0, "temperature": 1.0}, ["--top-p is 0.0", "above 0"]),
    ({"top_p": 1.5, "temperature": 1.0}, ["--top-p is 1.5", "up to 1"]),
    ({"min_p": -0.1, "temperature": 1.0}, ["--min-p is -0.1"]),
    ({"min_p": 1.1, "temperature": 1.0}, ["--min-p is 1.1"]),
    ({"repetition_penalty": 0.0}, ["--repetition-penalty is 0.0", "above 0"]),
    ({"presence_penalty": 2.5}, ["--presence-penalty is 2.5", "-2 and 2"]),
    ({"frequency_penalty": -3}, ["--frequency-penalty is -3", "-2 and 2"]),
    ({"no_repeat_ngram_size": -1}, ["--no-repeat-ngram-size is -1"]),
    ({"min_length": -1}, ["--min-length is -1"]),
    ({"seed": -1}, ["--seed is -1"]),
    ({"seed": 2**64}, ["--seed is", "2**64"]),
    ({"stop_words": ["a", ""]}, ["--stop-words is", "one or more characters"]),
    ({"stop_words": "abc"}, ["--stop-words is 'abc'", "list"]),
    ({"bad_words": ["\ud800"]}, ["--bad-words is"]),
    ({"bad_words": [1]}, ["--bad-words is (1,)", "text"]),
    ({"allowed_token_ids": [3, -1]}, ["--allowed-token-ids is (3, -1)"]),
    ({"allowed_token_ids": [True]}, ["--allowed-token-ids is (True,)", "whole number"]),
    ({"logprobs": -1}, ["--logprobs is -1"]),
    ({"prompt_logprobs": 1.5}, ["--prompt-logprobs is 1.5", "whole number"]),
    ({"num_return_sequences": 0}, ["--num-return-sequences is 0"]),
    ({"num_beams": 0}, ["--num-beams is 0"]),
    ({"num_beams": 2, "early_stopping": "sometimes"}, ["--early-stopping is 'sometimes'", "never"]),
    ({"num_beams": 2, "early_stopping": 1}, ["--early-stopping is 1", "never"]),
    ({"num_beams": 2, "length_penalty": 1e9}, ["--length-penalty is 1000000000.0"]),
    ({"end_id": -1}, ["--end-id is -1"]),
    ({"top_k": 5}, ["--top-k", "--temperature"]),
    ({"top_p": 0.9}, ["--top-p", "--temperature"]),
    ({"min_p": 0.1}, ["--min-p", "--temperature"]),
    ({"num_beams": 3, "temperature": 0.7}, ["--num-beams 3", "--temperature 0.7"]),
    ({"num_beams": 3, "temperature": 0.7, "top_k": 4}, ["--num-beams 3", "--temperature 0.7"]),
    ({"num_beams": 3, "num_return_sequences": 4}, ["--num-return-sequences 4", "--num-beams 3"]),
    ({"num_beams": 3, "logprobs": 1}, ["--logprobs", "--num-beams 3"]),
    ({"num_beams": 3, "stop_words": ["x"]}, ["--stop-words", "--num-beams 3"]),
    ({"num_return_sequences": 2}, ["--num-return-sequences 2", "--temperature", "--num-beams"]),
    ({"length_penalty": 2.0}, ["--length-penalty", "--num-beams"]),
    ({"early_stopping": True}, ["--early-stopping", "--num-beams"]),
    ({"min_length": 9, "max_output_len": 8}, ["--min-length 9", "--max-output-len 8"]),
    *[({name: value}, ["--" + name.replace("_", "-") + f" is {value}"])
      for name in FLOATS for value in (math.nan, math.inf, -math.inf)],
])  # fmt: skip
def test_refusals_name_the_option(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**fields)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", [name for name in SamplingParams.__dataclass_fields__ if name != "end_id"])
@pytest.mark.parametrize("value", [{}, b"x", object(), 10**400], ids=["dict", "bytes", "object", "huge"])
def test_any_field_of_another_kind_is_refused_or_taken_without_a_traceback(name: str, value: Any) -> None:
    try:
        params = SamplingParams(**{name: value})
    except UsageError as e:
        assert name.replace("_", "-") in str(e)
    else:
        assert value == 10**400 and type(getattr(params, name)) is int


# The command line and JSON lines


OPTIONS = {
    "max_output_len": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "no_repeat_ngram_size": 3, "min_length": 2, "seed": 7,
    "stop_words": ["a b", "c"], "bad_words": ["d"], "allowed_token_ids": [4, 5], "logprobs": 2, "prompt_logprobs": 0,
    "num_return_sequences": 2, "ignore_eos": True, "end_id": 3,
}  # fmt: skip
BEAMS = {"num_beams": 3, "length_penalty": -0.5, "early_stopping": "never", "num_return_sequences": 3}


def argv(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True and name == "ignore_eos" else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def parse(words: list[str]) -> argparse.Namespace:
    return make_parser().parse_args(["run", "--input-text", "x", *words])


@pytest.mark.parametrize("options", [{}, OPTIONS, BEAMS], ids=["none", "sampling", "beams"])
def test_options_and_json_fields_say_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x", **options}), encoding="utf-8")
    (request,) = read_requests(path)
    expected = SamplingParams(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    assert sampling_params(parse(argv(options))) == replace(SamplingParams(), **request.sampling) == expected
    assert hash(expected) == hash(sampling_params(parse(argv(options))))


def test_every_field_has_been_an_option_above() -> None:
    assert OPTIONS.keys() | BEAMS.keys() == SamplingParams.__dataclass_fields__.keys()


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("false", False), ("never", "never")])
def test_early_stopping_is_spelled_in_words(word: str, value: bool | str) -> None:
    params = sampling_params(parse(["--num-beams", "2", "--early-stopping", word]))
    assert params.early_stopping is value or params.early_stopping == value == "never"


# Filters against transformers' own


def row_of(params: SamplingParams, prompt: Sequence[int] = (), new: Sequence[int] = (), **more: Any) -> RowState:
    row = RowState.start(params, list(prompt), **more)
    row.tokens += new
    return row


def ours(logits: Tensor, row: RowState) -> Tensor:
    """What the next token is drawn from, or the largest of for greedy: scores `[vocab]`."""
    scores = process(logits[None], [row])
    return (warp(scores, [row]) if row.params.temperature else scores)[0]


def of_transformers(logits: Tensor, row: RowState) -> Tensor:
    """The same from transformers' classes, in the order of its generate()."""
    import transformers as t

    p, ends = row.params, sorted(row.end_ids)
    processors: list[Any] = []
    if p.repetition_penalty != 1.0:
        processors.append(t.RepetitionPenaltyLogitsProcessor(float(p.repetition_penalty)))
    if p.no_repeat_ngram_size:
        processors.append(t.NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    # Sorted out here as transformers' class would, which does not take a list that is empty then.
    if words := [list(w) for w in row.bad_words if len(w) > 1 or w[0] not in ends]:
        processors.append(t.NoBadWordsLogitsProcessor(words, ends or None))
    if p.min_length and ends:
        processors.append(t.MinNewTokensLengthLogitsProcessor(row.prompt_len, p.min_length, ends))
    if p.allowed_token_ids:
        processors.append(t.PrefixConstrainedLogitsProcessor(lambda batch, ids: list(p.allowed_token_ids), 1))
    if p.temperature:
        processors.append(t.TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k:
        processors.append(t.TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        processors.append(t.TopPLogitsWarper(p.top_p))
    if p.min_p:
        processors.append(t.MinPLogitsWarper(p.min_p))
    scores = logits[None]
    for processor in processors:
        scores = processor(torch.tensor([row.tokens]), scores)
    result: Tensor = scores[0]
    return result


def same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a > -math.inf, b > -math.inf)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 63, 64, 1000])
@pytest.mark.parametrize(("temperature", "min_p"), [(0.3, 0.0), (1.0, 0.0), (2.5, 0.0), (1.0, 0.1), (1.0, 1.0)])
def test_what_is_drawn_from_is_transformers(temperature: float, top_k: int, top_p: float, min_p: float,
                                            spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    row = row_of(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p), [0])
    for _ in range(3):
        logits = spread * torch.randn(64, generator=generator)
        same(ours(logits, row), of_transformers(logits, row))


VOCAB = 12  # so few that texts repeat
TOKENS = st.integers(0, VOCAB - 1)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=3, unique=True).map(tuple)
# Logits with ties, or without.
LOGITS = st.one_of(
    st.lists(values, min_size=VOCAB, max_size=VOCAB).map(torch.tensor)
    for values in (st.integers(-3, 3).map(float), st.floats(-30, 30, width=32)))
EDITS: dict[str, Any] = {
    "repetition_penalty": st.floats(0.5, 2.0), "no_repeat_ngram_size": st.integers(1, 4),
    "min_length": st.integers(1, 6), "allowed_token_ids": st.lists(TOKENS, min_size=1, max_size=6, unique=True),
}  # fmt: skip
DRAWS: dict[str, Any] = {"top_k": st.integers(1, VOCAB + 3), "top_p": st.floats(0.01, 0.99),
                         "min_p": st.floats(0.01, 1.0)}  # fmt: skip


@st.composite
def rows(draw: Any, edits: Sequence[str] = (*EDITS, "bad_words"), penalties: bool = False) -> RowState:
    """A row with any of these fields set, with or without random draws."""
    fields = {name: draw(EDITS[name]) for name in edits if name in EDITS and draw(st.booleans())}
    if draw(st.booleans()):
        fields |= {name: draw(value) for name, value in DRAWS.items() if draw(st.booleans())}
        fields["temperature"] = draw(st.floats(0.1, 3.0))
    if penalties:
        fields |= {"presence_penalty": draw(st.floats(-2, 2)), "frequency_penalty": draw(st.floats(-2, 2))}
    bad_words = draw(WORDS) if "bad_words" in edits else ()
    return row_of(SamplingParams(seed=draw(st.integers(0, 2**64 - 1)), **fields),
                  draw(st.lists(TOKENS, min_size=1, max_size=8)), draw(st.lists(TOKENS, max_size=8)),
                  bad_words=bad_words, end_ids=draw(st.frozensets(TOKENS, max_size=3)))  # fmt: skip


def leaves_nothing(row: RowState) -> bool:
    """Whether the bans contradict each other: transformers has a way of its own out of that."""
    bans = replace(row.params, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, allowed_token_ids=())
    left = of_transformers(torch.zeros(VOCAB), replace(row, params=bans)) > -math.inf
    return not any(left[i] for i in row.params.allowed_token_ids or range(VOCAB))


def compare(row: RowState, logits: Tensor) -> None:
    if not leaves_nothing(row):
        same(ours(logits, row), of_transformers(logits, row))


@pytest.mark.parametrize("only", [*EDITS, "bad_words"])
def test_each_edit_alone_is_transformers(only: str) -> None:
    @given(row=rows(edits=(only,)), logits=LOGITS)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(row: RowState, logits: Tensor) -> None:
        compare(row, logits)

    check()


@given(row=rows(), logits=LOGITS)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_all_filters_together_are_transformers(row: RowState, logits: Tensor) -> None:
    compare(row, logits)


def test_filters_come_in_the_order_of_generate() -> None:
    """The scores that transformers' own generate() reports at every step, from the logits that it reports."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, initializer_range=0.5, eos_token_id=None, **shape)).eval()
    bad, ends, prompt = ((4,), (5, 6), (7,)), [7, 8], [3, 4, 3]
    fields: dict[str, Any] = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "temperature": 1.7, "top_k": 12,
                              "top_p": 0.8, "min_p": 0.05}  # fmt: skip
    config = GenerationConfig(do_sample=True, max_new_tokens=25, min_new_tokens=20, eos_token_id=ends, pad_token_id=0,
                              bad_words_ids=[list(w) for w in bad], return_dict_in_generate=True, output_scores=True,
                              output_logits=True, **fields)  # fmt: skip
    ids = torch.tensor([prompt])
    found = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    new = found.sequences[0, len(prompt):].tolist()
    for step, (logits, scores) in enumerate(zip(found.logits, found.scores, strict=True)):
        row = row_of(SamplingParams(min_length=20, **fields), prompt, new[:step], end_ids=frozenset(ends),
                     bad_words=bad)  # fmt: skip
        same(ours(logits[0], row), scores[0])
    assert len(new) >= 20


def test_equal_logits_at_the_edge_of_top_k_all_stay() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    row = row_of(SamplingParams(temperature=1.0, top_k=2), [0])
    assert (ours(logits, row) > -math.inf).tolist() == [False, True, True, True, False]


@given(row=rows(edits=(), penalties=True), logits=LOGITS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_presence_and_frequency_penalties_count_generated_tokens(row: RowState, logits: Tensor) -> None:
    p, counts = row.params, Counter(row.tokens[row.prompt_len:])
    expected = [float(logit) - counts[i] * p.frequency_penalty - (counts[i] > 0) * p.presence_penalty
                for i, logit in enumerate(logits)]
    torch.testing.assert_close(process(logits[None], [row]), torch.tensor([expected]), rtol=1e-5, atol=1e-5)


# Choices of a whole step


@given(batch=st.lists(st.tuples(rows(), LOGITS), min_size=1, max_size=6), data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_row_among_others_gets_what_it_gets_alone(batch: list[tuple[RowState, Tensor]], data: Any) -> None:
    def fresh(row: RowState) -> RowState:
        return replace(row)  # with a generator that has drawn nothing yet

    alone = [[choose(logits[None], [r]).item() for _ in range(3)] for r, logits in ((fresh(r), x) for r, x in batch)]
    order = data.draw(st.permutations(range(len(batch))))
    mixed, logits = [fresh(batch[i][0]) for i in order], torch.stack([batch[i][1] for i in order])
    before = logits.clone()
    together = [choose(logits, mixed).tolist() for _ in range(3)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == [alone[i] for i in order]
    assert torch.equal(logits, before)


@given(row=rows(), logits=LOGITS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_filtered_out_is_never_chosen(row: RowState, logits: Tensor) -> None:
    chosen = {choose(logits[None], [row]).item() for _ in range(20)}
    if leaves_nothing(row):
        assert chosen <= set(row.params.allowed_token_ids or range(VOCAB))
        return
    expected = of_transformers(logits, row)
    if row.params.temperature == 0:
        assert all(expected[token] == expected.max() for token in chosen)
    else:
        assert all(expected[token] > -math.inf for token in chosen)


class Operations(TorchDispatchMode):
    """Names of the tensor operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(params: SamplingParams, n: int) -> Counter[str]:
    states, logits = [row_of(params, [1, 2]) for _ in range(n)], torch.randn(n, 50)
    with Operations() as seen:
        choose(logits, states)
    return Counter(seen.names)


def test_rows_cost_no_operations_of_their_own() -> None:
    """On a GPU each would be a launch, and each look at a value a round trip."""
    assert operations(SamplingParams(), 1) == operations(SamplingParams(), 64)
    edits = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, no_repeat_ngram_size=2, min_length=3,
                           allowed_token_ids=(1, 2, 3))  # fmt: skip
    assert operations(edits, 1) == operations(edits, 64)
    params = SamplingParams(temperature=0.8, top_k=10, top_p=0.9, min_p=0.01)
    more = operations(params, 64) - operations(params, 1)
    assert set(more) == {"aten.rand.generator"}  # on the host, from the row's own generator
    assert not any("local_scalar" in name or "nonzero" in name for name in operations(params, 64))


# Draws


def draws(row: RowState, n: int = 40) -> list[int]:
    logits = torch.linspace(-1, 1, 100)[None]
    return [choose(logits, [row]).tolist()[0] for _ in range(n)]


def test_the_seed_decides_the_draws_and_each_sample_has_its_own() -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    first = draws(RowState.start(params, [1]))
    assert draws(RowState.start(params, [1])) == first
    assert len(set(first)) > 5  # really random …
    assert draws(RowState.start(replace(params, seed=12), [1])) != first  # … and really from the seed
    samples = [draws(RowState.start(params, [1], sample=i)) for i in range(4)]
    assert samples[0] == first and len(set(map(tuple, samples))) == 4
    assert draws(RowState.start(replace(params, seed=2**64 - 1), [1], sample=1))  # wraps round


def test_draws_take_nothing_from_the_programs_generator() -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    alone = draws(RowState.start(params, [1]))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    before = torch.rand(1)
    assert draws(RowState.start(params, [1])) == alone
    torch.set_rng_state(state)
    draws(RowState.start(params, [1]))
    assert torch.equal(torch.rand(1), before)


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.5}], ids=str)
def test_draws_follow_the_probabilities(fields: dict[str, Any]) -> None:
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5, 0.7]), 6000
    params = SamplingParams(**{"temperature": 1.0, "seed": 5, **fields})
    row = row_of(params, [0])
    counts = torch.zeros(6)
    for _ in range(n // 100):  # rows of one step and steps of one row
        states = [row, *(row_of(replace(params, seed=int(i)), [0]) for i in torch.randint(2**60, (99,)))]
        counts += torch.bincount(choose(logits.expand(100, -1), states), minlength=6)
    expected = of_transformers(logits, row).softmax(-1)
    deviation = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1e-9)
    assert float(deviation.max()) < 4.5  # standard deviations


def test_not_a_number_is_survived() -> None:
    logits = torch.full((2, 8), math.nan)
    tokens = choose(logits, [row_of(SamplingParams(), [0]), row_of(SamplingParams(temperature=1.0, top_p=0.5), [0])])
    assert all(0 <= token < 8 for token in tokens)


# Log-probabilities and bad words


@given(batch=st.lists(LOGITS, min_size=1, max_size=4), top=st.integers(0, VOCAB + 2), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_logprobs_are_the_models_own(batch: list[Tensor], top: int, data: Any) -> None:
    tokens = [data.draw(TOKENS) for _ in batch]
    for logits, token, found in zip(batch, tokens, token_logprobs(torch.stack(batch), tokens, top), strict=True):
        total = math.log(math.fsum(math.exp(float(x)) for x in logits))
        expected = {i: float(x) - total for i, x in enumerate(logits)}
        assert next(iter(found)) == token and min(top, VOCAB) <= len(found) <= top + 1
        assert all(value == pytest.approx(expected[i], abs=1e-4) for i, value in found.items())
        best = sorted(expected.values(), reverse=True)[:top]
        assert sorted(found.values(), reverse=True)[:len(best)] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
@pytest.mark.parametrize("word", ["Monday", "the", "day after", "é", "12", "naïve: x"])
@pytest.mark.parametrize("sentence", ["{}", "{} is it", "It is {} now", "x\n{}", "x\n {} y", "({})"])
def test_a_bad_word_is_found_where_a_tokenizer_writes_it(word: str, sentence: str, kind: str, tmp_path: Path) -> None:
    if kind == "llama3":
        write_tiktoken(tmp_path)
    tokenizer = load_tokenizer(tmp_path if kind == "llama3" else MODEL_DIR)
    assert tokenizer
    words = bad_word_ids([word], tokenizer.encode)
    ids = tokenizer.encode(sentence.format(word))
    assert any(tuple(ids[i:i + len(w)]) == w for w in words for i in range(len(ids)))
    other = tokenizer.encode("Some 34 cats.")
    assert not any(tuple(other[i:i + len(w)]) == w for w in words for i in range(len(other)))
