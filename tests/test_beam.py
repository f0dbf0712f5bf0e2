"""Beam search against transformers' `generate` on small random models: the same sequences and scores."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tpllm.beam import BeamSearch, Hypothesis
from tpllm.sampling import RowState, SamplingParams

VOCAB, PAD = 48, 47


def random_model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None,
                         eos_token_id=None, pad_token_id=None, initializer_range=(0.15, 0.4)[seed % 2])  # fmt: skip
    return LlamaForCausalLM(config).eval()


@dataclass
class Case:
    prompt: list[int]
    ends: list[int]
    params: SamplingParams
    bad_words: tuple[tuple[int, ...], ...] = ()


@torch.no_grad()
def search(case: Case, logits: Any) -> tuple[list[Hypothesis], int]:
    """Drive a BeamSearch as a runner would, with `logits(tokens [k, n]) -> [k, vocab]`; also the steps it took."""
    p = case.params
    row = RowState.start(p, case.prompt, frozenset(case.ends), case.bad_words)
    beams, steps = [list(case.prompt)], 1
    beam_search = BeamSearch(row, len(case.prompt) + p.max_output_len)
    while live := beam_search.step(logits(torch.tensor(beams)), beams):
        assert len(live) == p.num_beams and steps < p.max_output_len
        beams, steps = [[*beams[parent], token] for parent, token in live], steps + 1
    return beam_search.best(), steps


def of_transformers(model: Any, case: Case) -> tuple[Tensor, list[float]]:
    from transformers import GenerationConfig

    p = case.params
    config = GenerationConfig(
        max_new_tokens=p.max_output_len, num_beams=p.num_beams, num_return_sequences=p.num_return_sequences,
        length_penalty=p.length_penalty, early_stopping=p.early_stopping, do_sample=False, use_cache=False,
        repetition_penalty=p.repetition_penalty, min_new_tokens=p.min_length or None,
        no_repeat_ngram_size=p.no_repeat_ngram_size, bad_words_ids=[list(w) for w in case.bad_words] or None,
        eos_token_id=case.ends or None, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    prompt = torch.tensor([case.prompt])
    found = model.generate(prompt, generation_config=config, attention_mask=torch.ones_like(prompt))
    return found.sequences[:, len(case.prompt):], found.sequences_scores.tolist()


def random_case(rng: random.Random, model: Any) -> Case:
    prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 6))]
    # Tokens that the model likes after the prompt, so that searches do end before their greatest length.
    with torch.no_grad():
        best = model(torch.tensor([prompt])).logits[0, -1].topk(30).indices.tolist()
    liked = [token for token in best if token != PAD]
    ends = rng.choice([[], rng.sample(liked, 1), rng.sample(liked, 2), rng.sample(liked, 6), liked[:24]])
    beams, length = rng.randint(2, 5), rng.randint(1, 16)
    params = SamplingParams(
        max_output_len=length, num_beams=beams, num_return_sequences=rng.randint(1, beams),
        length_penalty=rng.choice([1.0, 0.0, 0.5, 2.0, -0.1, -1.0]), early_stopping=rng.choice([False, True, "never"]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]), min_length=rng.choice([0, 0, rng.randint(0, length)]),
        no_repeat_ngram_size=rng.choice([0, 0, 2, 3]))  # fmt: skip
    bad_words = tuple((rng.choice(liked),) for _ in range(rng.choice([0, 0, 2])))
    return Case(prompt, ends, params, bad_words)


def check(seed: int, cases: int) -> dict[str, int]:
    """Compare random cases on one random model; count what they were."""
    model, rng = random_model(seed), random.Random(seed)
    seen = {"stop": 0, "length": 0, "ended early": 0}
    for _ in range(cases):
        case = random_case(rng, model)
        ours, steps = search(case, lambda tokens: model(tokens).logits[:, -1].float())
        theirs, scores = of_transformers(model, case)
        assert len(ours) == len(scores) == case.params.num_return_sequences
        for hypothesis, expected, score in zip(ours, theirs.tolist(), scores, strict=True):
            n = len(hypothesis.tokens)
            assert hypothesis.tokens == expected[:n], case
            assert set(expected[n:]) <= {PAD}, case
            assert hypothesis.score == pytest.approx(score, rel=1e-5, abs=1e-5), case
            stop = hypothesis.tokens[-1] in case.ends
            assert hypothesis.finish_reason == ("stop" if stop else "length")
            assert stop or n == case.params.max_output_len
            seen[hypothesis.finish_reason] += 1
        seen["ended early"] += steps < case.params.max_output_len
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_sequences_and_scores_are_transformers(seed: int) -> None:
    seen = check(seed, 40)
    assert min(seen.values()) >= 3, "the cases leave something out"


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 120))
def test_sequences_and_scores_are_transformers_in_many_more_cases(seed: int) -> None:
    check(seed, 100)


def test_the_prompt_of_a_search_is_left_as_it_was() -> None:
    model = random_model(9)
    case = Case([1, 2, 3], [5], SamplingParams(max_output_len=6, num_beams=3))
    search(case, lambda tokens: model(tokens).logits[:, -1])
    assert case.prompt == [1, 2, 3]


def fixed(probabilities: dict[int, float]) -> Any:
    """The same next-token probabilities after every text."""
    row = torch.full((VOCAB,), float("-inf"))
    for token, probability in probabilities.items():
        row[token] = torch.tensor(probability).log()
    return lambda tokens: row.expand(len(tokens), -1).clone()


def test_fewer_continuations_than_beams_still_fill_all_beams_and_find_every_answer() -> None:
    """Two tokens, three steps: eight texts in all, of which the eight beams find each once."""
    case = Case([1], [], SamplingParams(max_output_len=3, num_beams=8, num_return_sequences=8))
    found, _ = search(case, fixed({4: 0.75, 5: 0.25}))
    assert len({tuple(h.tokens) for h in found}) == 8
    for hypothesis in found:
        log_probabilities = [math.log({4: 0.75, 5: 0.25}[token]) for token in hypothesis.tokens]
        assert hypothesis.score == pytest.approx(sum(log_probabilities) / 3, rel=1e-5)


def test_a_search_that_runs_out_of_continuations_returns_what_it_found() -> None:
    case = Case([1], [7], SamplingParams(max_output_len=5, num_beams=4, num_return_sequences=4))
    found, steps = search(case, fixed({7: 1.0}))
    assert [h.tokens for h in found] == [[7]] and steps == 1 and found[0].finish_reason == "stop"


def test_bans_that_leave_nothing_give_way() -> None:
    params = SamplingParams(max_output_len=2, num_beams=2, min_length=2, allowed_token_ids=(7,))
    found, _ = search(Case([1], [7], params), fixed({7: 0.9, 8: 0.1}))
    assert found
