"""Sampling: refused settings, greedy, the filters against transformers' own, draws that depend on the seed alone."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpllm.errors import UsageError
from tpllm.sampling import Sampler, SamplingParams


@pytest.mark.parametrize(("fields", "words"), [
    ({"max_output_len": 0}, ["--max-output-len is 0", "starts at 1"]),
    ({"temperature": -0.5}, ["--temperature is -0.5", "0 (greedy)"]),
    ({"temperature": math.inf}, ["--temperature is inf"]),
    ({"temperature": math.nan}, ["--temperature is nan"]),
    ({"top_k": -1, "temperature": 1.0}, ["--top-k is -1", "0 (off)"]),
    ({"top_p": 0.0, "temperature": 1.0}, ["--top-p is 0.0", "above 0"]),
    ({"top_p": 1.5, "temperature": 1.0}, ["--top-p is 1.5", "up to 1"]),
    ({"top_p": math.nan, "temperature": 1.0}, ["--top-p is nan"]),
    ({"top_k": 5}, ["--top-k", "--temperature"]),
    ({"top_p": 0.9}, ["--top-p", "--temperature"]),
])  # fmt: skip
def test_refusals_name_the_option(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**fields)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_defaults_are_greedy() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(SamplingParams())
    for _ in range(20):
        logits = torch.randn(50, generator=generator)
        assert sampler.choose(logits) == max(range(50), key=lambda i: float(logits[i]))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The probabilities of every draw, as they are given to torch.multinomial."""
    probabilities: list[Tensor] = []
    multinomial = torch.multinomial

    def record(weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        probabilities.append(weights.clone())
        return multinomial(weights, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", record)
    return probabilities


def transformers_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    ids, scores = torch.zeros(1, 1, dtype=torch.long), logits[None]
    for warper in warpers:
        scores = warper(ids, scores)
    result: Tensor = scores[0].softmax(-1)
    return result


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 63, 64, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_distribution_is_transformers(temperature: float, top_k: int, top_p: float, spread: float,
                                          seen: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    for _ in range(4):
        logits = spread * torch.randn(64, generator=generator)
        token = sampler.choose(logits)
        expected = transformers_probabilities(logits, temperature, top_k, top_p)
        assert torch.equal(seen[-1] > 0, expected > 0)
        torch.testing.assert_close(seen[-1], expected, rtol=1e-5, atol=1e-7)
        assert expected[token] > 0


@given(logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40), top_k=st.integers(0, 45),
       top_p=st.floats(0.01, 1.0), temperature=st.floats(0.05, 5.0), seed=st.integers(0, 2**31))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_draw_is_always_among_the_best(logits: list[float], top_k: int, top_p: float, temperature: float,
                                         seed: int) -> None:
    tensor = torch.tensor(logits)
    token = Sampler(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)).choose(tensor)
    better = int((tensor > tensor[token]).sum())
    if top_k:
        assert better < top_k
    # What is strictly more likely than the drawn token does not yet reach top_p.
    probabilities = (tensor.double() / temperature).softmax(-1)
    assert float(probabilities[tensor > tensor[token]].sum()) < top_p + 1e-5


def test_equal_logits_at_the_edge_of_top_k_all_stay(seen: list[Tensor]) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    Sampler(SamplingParams(temperature=1.0, top_k=2)).choose(logits)
    assert torch.equal(seen[-1] > 0, transformers_probabilities(logits, 1.0, 2, 1.0) > 0)


def draws(sampler: Sampler, n: int = 40) -> list[int]:
    logits = torch.linspace(-1, 1, 100)
    return [sampler.choose(logits) for _ in range(n)]


def test_the_seed_decides_the_draws() -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    first = draws(Sampler(params))
    assert draws(Sampler(params)) == first
    assert len(set(first)) > 5  # really random …
    assert draws(Sampler(SamplingParams(temperature=1.5, seed=12))) != first  # … and really from the seed


def test_draws_are_independent_of_other_requests_and_of_the_global_seed() -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    alone = draws(Sampler(params))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    sampler, greedy = Sampler(params), Sampler(SamplingParams())
    other = Sampler(SamplingParams(temperature=0.7, seed=3))
    logits = torch.linspace(-1, 1, 100)
    mixed = []
    for _ in range(40):
        other.choose(logits.flip(0))
        mixed.append(sampler.choose(logits))
        greedy.choose(logits)
        torch.rand(3)
    assert mixed == alone
    torch.set_rng_state(state)
    before = torch.rand(1)
    torch.set_rng_state(state)
    draws(Sampler(params))
    assert torch.equal(torch.rand(1), before)  # and takes nothing from the program's own generator


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5))
    n = 4000
    counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(n)]), minlength=4)
    expected = logits.softmax(-1)
    deviation = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt()
    assert float(deviation.max()) < 4  # standard deviations


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(32, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    Sampler(SamplingParams(temperature=0.5, top_k=3, top_p=0.5)).choose(logits)
    assert torch.equal(logits, before)
