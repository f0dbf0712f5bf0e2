"""Mapping: the order of ranks, and pipeline stages that hold every layer once."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpllm.mapping import Mapping, divide, padded

SIZES = st.integers(1, 9)


@given(tp=SIZES, pp=SIZES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tensor_parallel_rank_varies_fastest(tp: int, pp: int) -> None:
    ranks = Mapping.all_ranks(tp, pp)
    assert len(ranks) == tp * pp
    for number, mapping in enumerate(ranks):
        assert mapping.rank == number and mapping.world_size == tp * pp
        assert (mapping.tp_size, mapping.pp_size) == (tp, pp)
        assert (mapping.tp_rank, mapping.pp_rank) == (number % tp, number // tp)


def test_world_of_8_as_4_by_2_has_consecutive_tensor_parallel_groups() -> None:
    ranks = Mapping.all_ranks(4, 2)
    groups = [[m.rank for m in ranks if m.pp_rank == stage] for stage in range(2)]
    pipelines = [[m.rank for m in ranks if m.tp_rank == t] for t in range(4)]
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pipelines == [[0, 4], [1, 5], [2, 6], [3, 7]]


@given(layers=st.integers(0, 130), pp=st.integers(1, 20), tp=st.integers(1, 4))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_stages_hold_all_layers_once_in_order_and_first_ones_the_extra(layers: int, pp: int, tp: int) -> None:
    for tp_rank in range(tp):
        stages = [Mapping(tp, tp_rank, pp, stage).layers(layers) for stage in range(pp)]
        assert [layer for stage in stages for layer in stage] == list(range(layers))
        sizes = [len(stage) for stage in stages]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
        for before, after in pairwise(stages):
            assert before.stop == after.start


@pytest.mark.parametrize("bad", [(0, 0), (2, 2), (2, -1), (4, 99)])
def test_a_rank_outside_its_world_is_refused(bad: tuple[int, int]) -> None:
    size, rank = bad
    with pytest.raises(ValueError, match="no such rank"):
        Mapping(size, rank)
    with pytest.raises(ValueError, match="no such rank"):
        Mapping(1, 0, size, rank)


@given(size=st.integers(1, 10**6), multiple=st.integers(1, 512))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_padded_is_the_least_multiple_that_holds_the_size(size: int, multiple: int) -> None:
    result = padded(size, multiple)
    assert result % multiple == 0 and 0 <= result - size < multiple


def test_divide_is_exact_or_names_both_numbers() -> None:
    assert divide(40, 8, "heads") == 5
    with pytest.raises(ValueError, match=r"heads \(40\) cannot be divided evenly by 3"):
        divide(40, 3, "heads")
