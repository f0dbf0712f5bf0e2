"""Generation on one rank: what is asked for, what comes, and when it ends."""

import gc
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built import MAX_INPUT, MAX_SEQ, Build, Built, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import LLAMA2_MHA, LLAMA31_GQA, NAMED_SHAPES, transformers_model

from tpllm.answer import Completion, GenerationOutput, Job, TextStream
from tpllm.cli import main
from tpllm.demo import MODEL_DIR
from tpllm.distributed import World
from tpllm.engine.base import BuildConfig, Engine, StepInput
from tpllm.errors import TpllmError
from tpllm.runner import ModelRunner
from tpllm.sampling import SamplingParams
from tpllm.tokenizer import Tokenizer, load_tokenizer


@pytest.mark.parametrize("name", NAMED_SHAPES)
def test_greedy_of_ragged_prompts_is_the_references(name: str, build: Build) -> None:
    """More prompts than places, so sequences come and go at different times."""
    built = build(NAMED_SHAPES[name])
    prompts = random_ids(built, 1, 24, 7, 13, 2, 20, 5, seed=1)
    lengths = [9, 8, 16, 1, 12, 5, 3]
    outputs = built.runner.generate(prompts, [SamplingParams(max_output_len=n) for n in lengths])
    for output, prompt, length in zip(outputs, prompts, lengths, strict=True):
        best = built.reference.greedy_with_gaps(prompt, length)
        assert min(gap for _, gap in best) > 2e-4, "a tie: choose another seed"
        assert output.outputs[0].token_ids == [token for token, _ in best]
        assert (output.prompt, output.prompt_token_ids) == (None, prompt)
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == (None, "length")
    assert [output.id for output in outputs] == list(range(len(prompts)))


def test_long_prompts_in_chunks_generate_the_same(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(LLAMA31_GQA)
    prompts = random_ids(built, 24, 3, 17, 24, seed=2)
    params = SamplingParams(max_output_len=6)
    whole = built.runner.generate(prompts, params)
    for size in (1, 5, 25):
        monkeypatch.setattr(BuildConfig, "step_tokens", size)
        assert built.runner.generate(prompts, params) == whole


def test_a_step_has_as_many_tokens_as_the_build_says(build: Build, tmp_path: Path) -> None:
    built = build(LLAMA31_GQA)
    assert main(["build", "--checkpoint-dir", str(built.checkpoint), "--output-dir", str(tmp_path / "engine"),
                 "--backend", "eager", "--max-batch-size", "3", "--max-input-len", "24", "--max-seq-len", "32",
                 "--max-num-tokens", "7"]) == 0  # fmt: skip
    runner, sizes = ModelRunner.from_dir(tmp_path / "engine", world=World()), []
    own = runner.engine.step

    def step(given: StepInput) -> torch.Tensor:
        sizes.append(len(given.tokens))
        return own(given)

    runner.engine.step = step  # type: ignore[method-assign]
    prompts = random_ids(built, 24, 3, 17, seed=2)
    params = SamplingParams(max_output_len=6)
    assert runner.generate(prompts, params) == built.runner.generate(prompts, params)
    assert max(sizes) == 7


def test_sampled_answers_depend_on_their_own_seed_alone(build: Build) -> None:
    built = build(LLAMA31_GQA)
    prompts = random_ids(built, 5, 9, 3, 12, seed=3)
    params = [SamplingParams(max_output_len=8, temperature=1.2, top_k=40, seed=s) for s in (1, 2, 3, 4)]
    together = built.runner.generate(prompts, params)
    for i in (3, 0, 2):
        (alone,) = built.runner.generate([prompts[i]], params[i])
        assert alone.outputs == together[i].outputs
    assert built.runner.generate([prompts[0]], replace(params[0], seed=9))[0].outputs != together[0].outputs


def test_answers_do_not_depend_on_the_rest_of_the_batch(build: Build) -> None:
    """A hundred requests of all kinds, then the same in another order."""
    built, chance = build(LLAMA31_GQA), random.Random(11)
    prompts = random_ids(built, *(chance.randint(1, MAX_INPUT) for _ in range(100)), seed=11)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 5}, {"num_beams": 2}, {"repetition_penalty": 1.2}]
    jobs = [(prompt, SamplingParams(max_output_len=chance.randint(1, 8), **chance.choice(kinds))) for prompt in prompts]

    def answers(order: list[int]) -> list[list[int]]:
        outputs = built.runner.generate([jobs[i][0] for i in order], [jobs[i][1] for i in order])
        return [output.outputs[0].token_ids for _, output in sorted(
            zip(order, outputs, strict=True), key=lambda pair: pair[0])]

    shuffled = list(range(100))
    chance.shuffle(shuffled)
    assert answers(shuffled) == answers(list(range(100)))


class Ahead(Engine):
    """An engine as GPUs have it: the next step may begin before the host knows the last one's tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.config, self.capacity, self.unit, self.singles = engine.config, engine.capacity, engine.unit, 1
        self.ahead = True
        self._fed = np.zeros(0, np.int32)
        self.told: list[bool] = []  # of each batch of tokens, whether the host has asked for it
        self.early = 0  # steps begun with tokens that the host did not know

    def step(self, step: StepInput) -> torch.Tensor:
        tokens = step.tokens
        if step.fed is not None:
            assert ((step.fed >= 0) == (tokens < 0)).all()  # every token is known to one of the two
            tokens = np.where(step.fed >= 0, self._fed[step.fed.clip(0)], tokens)
            self.early += not self.told[-1]
        assert (tokens >= 0).all()
        return self._engine.step(replace(step, tokens=tokens.astype(np.int32)))

    def feed(self, count: int, tokens: torch.Tensor | None) -> Callable[[], list[int]]:
        assert tokens is not None and tokens.shape == (count,)
        self._fed, number = tokens.numpy().astype(np.int32), len(self.told)
        self.told.append(False)
        found = self._fed.tolist()

        def known() -> list[int]:
            self.told[number] = True
            return list(found)

        return known


def test_steps_begun_ahead_of_their_tokens_change_no_answer(build: Build) -> None:
    built, chance = build(LLAMA31_GQA), random.Random(3)
    prompts = random_ids(built, *(chance.randint(1, MAX_INPUT) for _ in range(80)), seed=3)
    kinds: list[dict[str, Any]] = [
        {}, {}, {"temperature": 0.9, "seed": 5}, {"num_return_sequences": 2, "temperature": 1.0}, {"logprobs": 2},
        {"prompt_logprobs": 1}, {"num_beams": 2}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}]  # fmt: skip
    jobs = [SamplingParams(max_output_len=chance.randint(1, 8), **chance.choice(kinds)) for _ in prompts]
    likely = Counter(t for o in built.runner.generate(prompts, jobs) for c in o.outputs for t in c.token_ids)
    ends = [token for token, _ in likely.most_common(20)]  # so that many answers stop while their next step runs
    jobs = [replace(job, end_id=chance.choice([None, *ends])) for job in jobs]
    expected = built.runner.generate(prompts, jobs)
    engine = Ahead(built.runner.engine)
    found = ModelRunner(World(), engine, None).generate(prompts, jobs)
    # Batches were others, so sums may be rounded otherwise.
    for output, other in zip(found, expected, strict=True):
        assert [(c.token_ids, c.finish_reason) for c in output.outputs] == [
            (c.token_ids, c.finish_reason) for c in other.outputs]
        for mine, theirs in zip([c.logprobs for c in output.outputs] + [output.prompt_logprobs],
                                [c.logprobs for c in other.outputs] + [other.prompt_logprobs], strict=True):
            assert (mine is None) == (theirs is None)
            for a, b in zip(mine or [], theirs or [], strict=True):
                assert (a or {}) == pytest.approx(b or {}, abs=1e-4)
    assert {c.finish_reason for o in expected for c in o.outputs} == {"stop", "length"}
    assert engine.early > 20 and all(engine.told)


def test_end_id_stops_and_ignore_eos_does_not(build: Build) -> None:
    built = build(LLAMA2_MHA)
    (prompt,) = random_ids(built, 6, seed=4)
    free = built.runner.generate([prompt], SamplingParams(max_output_len=12))[0].outputs[0].token_ids
    end = free[5]
    first = free.index(end)
    params = SamplingParams(max_output_len=12, end_id=end)
    (stopped,) = built.runner.generate([prompt], params)
    assert stopped.outputs[0].token_ids == free[:first + 1] and stopped.outputs[0].finish_reason == "stop"
    (full,) = built.runner.generate([prompt], replace(params, ignore_eos=True))
    assert full.outputs[0].token_ids == free and full.outputs[0].finish_reason == "length"


TEXTS = ["The capital of France is", "2 plus 3 is", "naïve €", "", "  two spaces"]


def test_text_is_the_decoded_continuation(demo: Built) -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    assert tokenizer is not None
    outputs = demo.runner.generate(TEXTS, SamplingParams(max_output_len=20))
    for text, output in zip(TEXTS, outputs, strict=True):
        ids, answer = tokenizer.encode(text), output.outputs[0]
        assert (output.prompt, output.prompt_token_ids) == (text, ids)
        assert answer.text == tokenizer.decode(ids + answer.token_ids)[len(tokenizer.decode(ids)):]
        expected = [token for token, _ in demo.reference.greedy_with_gaps(ids, len(answer.token_ids))]
        assert answer.token_ids == expected
        stopped = expected[-1] in tokenizer.end_ids
        assert answer.finish_reason == ("stop" if stopped else "length")
        assert not tokenizer.end_ids & set(expected[:-1]) and (stopped or len(expected) == 20)


@pytest.mark.parametrize("end", ["stop", "length"])
def test_an_answer_that_ends_inside_a_character_shows_what_was_held_back(end: str) -> None:
    tokenizer = load_tokenizer(MODEL_DIR)
    assert tokenizer is not None
    prompt, half = tokenizer.encode("a"), tokenizer.encode("€")[1:][-3:-1]  # two of its three bytes
    new = [*half, *tokenizer.end_ids] if end == "stop" else half
    job = Job(0, "a", prompt, SamplingParams(max_output_len=9 if end == "stop" else len(half)))
    completion = Completion(job, tokenizer, tokenizer.end_ids)
    pieces, reasons = [], []
    for token in new:
        pieces.append(completion.push(token) or "")
        reasons.append(completion.output.finish_reason)
    whole = tokenizer.decode(prompt + half)
    assert "\ufffd" in whole
    assert "".join(pieces) == whole[len(tokenizer.decode(prompt)):] == completion.output.text
    assert reasons == [None] * (len(new) - 1) + [end]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streaming_is_generation_bit_by_bit(temperature: float, demo: Built) -> None:
    params = [SamplingParams(max_output_len=n, temperature=temperature, seed=n) for n in (20, 3, 11, 1, 16)]
    outputs = demo.runner.generate(TEXTS, params)
    events = list(demo.runner.stream(TEXTS, params))
    for index, output in enumerate(outputs):
        mine = [event for event in events if event.index == index]
        answer = output.outputs[0]
        assert [event.token_id for event in mine] == answer.token_ids
        assert "".join(event.text or "" for event in mine) == answer.text
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [answer.finish_reason]
    # Really interleaved: a second sequence speaks before the first has ended.
    assert [e.index for e in events] != sorted(e.index for e in events)


@pytest.mark.parametrize("after", [0, 1, 4, 17])
def test_a_stream_left_early_leaves_the_runner_usable(after: int, demo: Built) -> None:
    params = SamplingParams(max_output_len=10)
    whole: list[GenerationOutput] = demo.runner.generate(TEXTS, params)
    for number, _ in enumerate(demo.runner.stream(TEXTS, params)):
        assert gc.get_freeze_count() > 10_000  # objects that the collector passes over
        if number == after:
            break
    assert gc.get_freeze_count() == 0
    assert demo.runner.generate(TEXTS, params) == whole


class Later:
    """A source whose second job comes when it has been asked for three times."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs, self.asked = jobs, 0

    def __iter__(self) -> "Later":
        return self

    def __next__(self) -> Job:
        self.asked += 1
        if not self.jobs or 1 < self.asked < 4:
            raise StopIteration
        return self.jobs.pop(0)


def test_a_job_that_comes_later_joins_those_that_run(build: Build) -> None:
    runner = build(LLAMA2_MHA).runner
    prompts, params = random_ids(build(LLAMA2_MHA), 5, 7, seed=6), SamplingParams(max_output_len=8)
    jobs = [runner.prepare(i, prompt, params) for i, prompt in enumerate(prompts)]
    events = list(runner.serve(Later(jobs)))
    assert [event.index for event in events].index(1) == 3  # after three tokens of the first
    answers = [[event.token_id for event in events if event.index == i] for i in range(2)]
    assert answers == [output.outputs[0].token_ids for output in runner.generate(prompts, params)]


def test_no_prompts_are_no_answers(demo: Built) -> None:
    assert demo.runner.generate([]) == [] and list(demo.runner.stream([])) == []


def generation_refusal(built: Built, code: int, prompts: list[Any], params: Any = None) -> str:
    with pytest.raises(TpllmError) as caught:
        built.runner.generate(prompts, params)
    assert caught.value.exit_code == code
    return str(caught.value)


def test_a_prompt_that_is_too_long_is_told_what_would_fit(build: Build) -> None:
    built = build(LLAMA2_MHA)
    params = SamplingParams(max_output_len=4)
    message = generation_refusal(built, 12, [[1], [1] * (MAX_INPUT + 1)], params)
    for words in (f"prompt 1 has {MAX_INPUT + 1} tokens", f"allows {MAX_INPUT}", f"--max-input-len {MAX_INPUT + 1}"):
        assert words in message
    room = MAX_SEQ - MAX_INPUT
    message = generation_refusal(built, 12, [[1] * MAX_INPUT], SamplingParams(max_output_len=room + 1))
    for words in ("prompt 0", f"--max-output-len {room} or less", f"--max-seq-len {MAX_SEQ + 1}"):
        assert words in message
    # Exactly what the messages advise is taken.
    (output,) = built.runner.generate([[1] * MAX_INPUT], SamplingParams(max_output_len=room))
    assert len(output.outputs[0].token_ids) == room


@pytest.mark.parametrize(("prompt", "code", "words"), [
    ([], 12, ["prompt 1 has no tokens"]),
    ([LLAMA2_MHA.vocab_size], 12, ["prompt 1", f"token id {LLAMA2_MHA.vocab_size}", f"to {LLAMA2_MHA.vocab_size - 1}"]),
    ([3, -1], 12, ["prompt 1", "token id -1"]),
    ("text", 2, ["no tokenizer", "--tokenizer-dir"]),
], ids=["empty", "beyond", "negative", "text"])  # fmt: skip
def test_prompts_that_cannot_be(prompt: Any, code: int, words: list[str], build: Build) -> None:
    message = generation_refusal(build(LLAMA2_MHA), code, [[1], prompt], SamplingParams(max_output_len=2))
    for word in words:
        assert word in message


@pytest.mark.parametrize("words", [{"stop_words": ("a",)}, {"bad_words": ("a",)}], ids=str)
def test_words_without_a_tokenizer_are_refused(words: dict[str, Any], build: Build) -> None:
    assert "need a tokenizer" in generation_refusal(build(LLAMA2_MHA), 2, [[1]], SamplingParams(**words))


def test_one_sampling_for_each_prompt_or_one_for_all(build: Build) -> None:
    message = generation_refusal(build(LLAMA2_MHA), 2, [[1], [2]], [SamplingParams(max_output_len=2)])
    assert "2 prompts and 1 sampling parameters" in message


def test_a_text_that_no_encoding_has_is_refused(demo: Built) -> None:
    """JSON can hold half of a surrogate pair, which is no character."""
    assert "prompt 1" in generation_refusal(demo, 12, ["fine", "\ud800"], SamplingParams(max_output_len=2))


def test_an_output_length_that_is_no_whole_number_is_refused(build: Build) -> None:
    """Such a sequence would never be full: it would grow past its cache rows into other sequences'."""
    built = build(LLAMA2_MHA)
    with pytest.raises(TpllmError, match="max-output-len"):
        for number, _ in enumerate(built.runner.stream([[1]], SamplingParams(max_output_len=2.5))):  # type: ignore
            assert number < 3, "more tokens than were asked for"


class Letters(Tokenizer):
    """A character a token."""

    vocab_size, bos_id, end_ids = 128, 0, frozenset({1})

    def encode(self, text: str) -> list[int]:
        return [self.bos_id, *map(ord, text)]

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids if i > 1)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_text_ends_before_the_first_stop_word(text: str, words: list[str], chunk: int) -> None:
    """Whatever tokens it comes in, and nothing is shown that is taken back."""
    class Chunks(Letters):
        def decode(self, ids: Any) -> str:
            return "".join(text[chunk * (i - 2):chunk * (i - 1)] for i in ids if i > 1)

    stream, shown, count = TextStream(Chunks(), [0], words), "", -(-len(text) // chunk)
    for number in range(count):
        piece, found = stream.push(number + 2, number == count - 1)
        shown += piece
        so_far = text[:chunk * (number + 1)]
        assert so_far.startswith(shown)
        places = [so_far.find(word) for word in words if word in so_far]
        assert found == bool(places)
        if found:
            assert shown == so_far[:min(places)]
            return
    assert shown == text


def test_stop_words_end_an_answer_across_tokens(demo: Built) -> None:
    (free,) = demo.runner.generate(["Count from three to seven:"], SamplingParams(max_output_len=40))
    text = free.outputs[0].text
    assert text is not None and "five, s" in text
    params = SamplingParams(max_output_len=40, stop_words=("nothing", "five, s"))
    outputs = demo.runner.generate(["Count from three to seven:"] * 2, [params, SamplingParams(max_output_len=40)])
    assert outputs[0].outputs[0].text == text[:text.index("five, s")]
    assert outputs[0].outputs[0].finish_reason == "stop"
    tokens = outputs[0].outputs[0].token_ids
    assert tokens == free.outputs[0].token_ids[:len(tokens)]
    assert outputs[1].outputs[0] == free.outputs[0]
    events = list(demo.runner.stream(["Count from three to seven:"], params))
    assert "".join(event.text or "" for event in events) == outputs[0].outputs[0].text


@pytest.mark.parametrize("size", [5, 2048])
def test_samples_forked_from_one_prompt_are_as_if_alone(size: int, build: Build, monkeypatch: pytest.MonkeyPatch,
                                                        ) -> None:
    monkeypatch.setattr(BuildConfig, "step_tokens", size)
    built = build(LLAMA31_GQA)
    prompts = random_ids(built, 5, 11, 24, seed=8)
    params = SamplingParams(max_output_len=7, temperature=1.5, seed=3)
    outputs = built.runner.generate(prompts, [replace(params, num_return_sequences=n) for n in (3, 1, 2)])
    assert [len(output.outputs) for output in outputs] == [3, 1, 2]
    seen = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        for number, sample in enumerate(output.outputs):
            (alone,) = built.runner.generate([prompt], replace(params, seed=3 + number))
            assert sample.token_ids == alone.outputs[0].token_ids
            seen.add(tuple(sample.token_ids))
    assert len(seen) == 6


def assert_logprobs(found: dict[int, float] | None, token: int, expected: torch.Tensor, top: int) -> None:
    assert found is not None and next(iter(found)) == token
    best = expected.topk(top) if top else None
    assert set(found) == {token} | set(best.indices.tolist() if best else [])
    for i, value in found.items():
        assert abs(value - float(expected[i])) < 1e-4


@pytest.mark.parametrize("size", [7, 2048])
@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_the_references(top: int, size: int, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prompt, in chunks too, and of what is generated, beside a request that asks for none."""
    monkeypatch.setattr(BuildConfig, "step_tokens", size)
    built = build(LLAMA31_GQA)
    prompts = random_ids(built, 20, 9, 1, seed=6)
    asks = SamplingParams(max_output_len=5, logprobs=top, prompt_logprobs=top)
    outputs = built.runner.generate(prompts, [asks, SamplingParams(max_output_len=5), asks])
    assert outputs[1].prompt_logprobs is None and outputs[1].outputs[0].logprobs is None
    assert "logprobs" not in str(outputs[1].to_json())
    for i in (0, 2):
        prompt, answer = prompts[i], outputs[i].outputs[0]
        expected = built.reference.logits(prompt + answer.token_ids).log_softmax(-1)
        scores = outputs[i].prompt_logprobs
        assert scores is not None and len(scores) == len(prompt) and scores[0] is None
        for place in range(1, len(prompt)):
            assert_logprobs(scores[place], prompt[place], expected[place - 1], top)
        assert answer.logprobs is not None and len(answer.logprobs) == 5
        for place, token in enumerate(answer.token_ids):
            assert_logprobs(answer.logprobs[place], token, expected[len(prompt) + place - 1], top)


@pytest.mark.parametrize(("beams", "options"), [
    (2, {}), (3, {"num_return_sequences": 3, "length_penalty": 0.5}),
    (3, {"num_return_sequences": 2, "early_stopping": True, "repetition_penalty": 1.3, "end_id": 7}),
], ids=str)
def test_beams_are_those_of_transformers(beams: int, options: dict[str, Any], build: Build) -> None:
    """Beside other requests, with rows of the cache copied as beams part and end."""
    built = build(LLAMA2_MHA)
    model = transformers_model(built.meta)
    prompts = random_ids(built, 5, 11, 2, 20, seed=9)
    params = SamplingParams(max_output_len=9, num_beams=beams, **options)
    others = SamplingParams(max_output_len=12)
    outputs = built.runner.generate([p for p in prompts for _ in (0, 1)], [params, others] * len(prompts))
    for prompt, output, greedy in zip(prompts, outputs[::2], outputs[1::2], strict=True):
        names = {name: value for name, value in options.items() if name != "end_id"}
        with torch.no_grad():
            found = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=9, num_beams=beams,
                do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0,
                eos_token_id=options.get("end_id"), **names)
        for answer, ids, score in zip(output.outputs, found.sequences, found.sequences_scores, strict=True):
            assert answer.token_ids == ids[len(prompt):len(prompt) + len(answer.token_ids)].tolist()
            assert answer.score == pytest.approx(float(score), abs=1e-4)
            assert answer.finish_reason == ("stop" if answer.token_ids[-1] == options.get("end_id") else "length")
        assert greedy.outputs[0].token_ids == built.reference.greedy(prompt, 12)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("texts", [["2 plus 3 is"], ["2 plus 3 is", "Count from three to seven:"]])
def test_run_prints_every_answer(texts: list[str], streaming: list[str], demo: Built, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-output-len", "6", "--num-beams", "3", "--num-return-sequences", "2", *streaming]
    assert main(["run", "--engine-dir", str(demo.engine), "--input-text", *texts, *options, "--output-json",
                 str(tmp_path / "out.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    expected = demo.runner.generate(texts, SamplingParams(max_output_len=6, num_beams=3, num_return_sequences=2))
    assert found == [output.to_json() for output in expected]
    for i, output in enumerate(found):
        assert len(output["outputs"]) == 2
        assert all(f'Output [Text {i} Seq {k}]: "{o["text"]}"' in printed for k, o in enumerate(output["outputs"]))
    assert f"{sum(len(o['token_ids']) for output in found for o in output['outputs'])} tokens in" in printed


def test_bad_words_do_not_come(demo: Built) -> None:
    prompt = "Count from three to seven:"
    (free,) = demo.runner.generate([prompt], SamplingParams(max_output_len=24))
    assert free.outputs[0].text is not None and "five" in free.outputs[0].text
    (output,) = demo.runner.generate([prompt], SamplingParams(max_output_len=24, bad_words=("five",)))
    assert output.outputs[0].text is not None and "five" not in output.outputs[0].text


def test_more_samples_than_places_are_refused(build: Build) -> None:
    message = generation_refusal(build(LLAMA2_MHA), 12, [[1]], SamplingParams(
        max_output_len=2, temperature=1.0, num_return_sequences=4))
    assert "asks for 4 sequences" in message and "--max-batch-size 4" in message


def drained(built: Built, drain_seconds: float, after: int,
            lookahead: int) -> tuple[list[int], list[GenerationOutput]]:
    """The jobs that were asked for, and the answers that ended, when SIGUSR1 comes after some events."""
    runner, asked, ended = built.runner, [], []

    def source() -> Any:
        for index in range(50):
            asked.append(index)
            yield runner.prepare(index, [1, 2, 3], SamplingParams(max_output_len=8))

    try:
        for number, event in enumerate(runner.serve(source(), drain_seconds, lookahead)):
            runner.world.draining = runner.world.draining or number == after
            if event.last:
                ended.append(event.answer)
    finally:
        runner.world.draining = False
    return asked, ended


@pytest.mark.parametrize("lookahead", [1, 20])
def test_a_drain_lets_what_runs_end_and_asks_for_no_more(lookahead: int, build: Build) -> None:
    asked, ended = drained(build(LLAMA2_MHA), 60.0, 10, lookahead)
    assert max(3, lookahead) <= len(asked) <= 4 + lookahead and 3 <= len(ended) <= 5
    assert all(output.outputs[0].finish_reason for output in ended)


def test_a_drain_without_time_ends_at_once(build: Build) -> None:
    asked, ended = drained(build(LLAMA2_MHA), 0.0, 10, 1)
    assert len(asked) <= 5 and ended == []
