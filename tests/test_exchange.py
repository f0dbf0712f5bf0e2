"""How the ranks share the rows of a large product, and which of a model's sums may be shared."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpllm.engine.torch.exchange import MAX_PARTS, PART_ROWS, Exchanged, Split
from tpllm.engine.torch.merge import survey


@given(st.integers(2 * PART_ROWS, 40000), st.integers(1, 16))
def test_every_row_is_one_ranks(rows: int, ranks: int) -> None:
    split = Split.of(rows, ranks)
    owner = split.rank_of(torch.arange(rows))
    covered = torch.zeros(rows, dtype=torch.int)
    assert 2 <= len(split.parts()) <= min(rows // PART_ROWS, MAX_PARTS)
    for part in split.parts():
        assert 0 < part.stop - part.start <= split.step
        for rank in range(ranks):
            share = split.of_rank(part, rank)
            covered[share] += 1
            assert (owner[share] == rank).all()
            # Where each rank finds the others' addends, one after the other from the part's first row on.
            assert 0 <= share.stop - share.start <= split.share
            assert part.start + ranks * split.share <= Exchanged.room(rows, ranks)
    assert (covered == 1).all()


class Model:
    """`forward` of verbs that are given; `layers` sums, each normed."""

    def __init__(self, uses: str, layers: int = 3) -> None:
        self.uses, self.layers = uses, layers

    def forward(self, ops: Any) -> Any:
        h = ops.embedding("table")
        for layer in range(self.layers):
            x = ops.linear(ops.rms_norm(h, f"norm{layer}"), f"linear{layer}")
            if self.uses and layer == 1:
                getattr(ops, self.uses)(h, *["second"] * (self.uses in ("linear", "rms_norm", "linears")))
            h = ops.add(h, ops.all_reduce(x))
        return ops.vocab_logits(ops.rms_norm(h, "last"), "head")


@pytest.mark.parametrize(("uses", "normed"), [
    ("", {0, 1, 2}), ("select_rows", {0, 1, 2}), ("rms_norm", {0, 1, 2}), ("linear", {1, 2}), ("linears", {1, 2}),
    ("silu", {1, 2}), ("split_qkv", {1, 2}), ("all_reduce", {1, 2})])
def test_sums_that_other_verbs_use_are_whole(uses: str, normed: set[int]) -> None:
    model: Any = Model(uses)
    assert set(survey(model).norms) == normed
