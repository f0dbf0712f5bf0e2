"""The operations a model may use; a backend answers each with its own kind of tensor.

Activations have one row a token; backends choose how rows are laid out (packed `[tokens, ...]` in PyTorch,
padded `[batch, length, ...]` in TensorRT), so that a model only ever names the last dimension. Sizes marked
`/tp` are one rank's. Weights are named, not passed: a backend finds `NAME.weight` and, where the checkpoint has
it, `NAME.bias`.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class Ops(Protocol[T]):
    """What `Model.forward` is written in."""

    def embedding(self, name: str) -> T:
        """Rows of the embedding table for this step's tokens: `[..., hidden]`, whole on every rank."""

    def rms_norm(self, x: T, name: str) -> T:
        """Root-mean-square norm in float32, cast back, then times the weight (Meta's order)."""

    def linear(self, x: T, name: str) -> T:
        """`x @ weight.T (+ bias)`. Of a weight split along its input this is a partial sum: `all_reduce` it."""

    def linears(self, x: T, *names: str) -> tuple[T, ...]:
        """Several products of the same input, which a backend may compute as one."""

    def split_qkv(self, qkv: T) -> tuple[T, T, T]:
        """`[..., (heads + 2 kv_heads)/tp * head_size]` into queries, keys and values."""

    def rope(self, x: T) -> T:
        """Rotate queries or keys by their positions; pairs are `(i, i + head_size/2)`."""

    def attend(self, q: T, k: T, v: T, layer: int) -> T:
        """Store this step's keys and values in the layer's cache and attend, causally, to all of the sequence.

        Returns `[..., heads/tp * head_size]`. The cache's layout is the backend's own matter.
        """

    def silu(self, x: T) -> T:
        """`x * sigmoid(x)`."""

    def mul(self, a: T, b: T) -> T:
        """Elementwise product."""

    def add(self, a: T, b: T) -> T:
        """Elementwise sum."""

    def all_reduce(self, x: T) -> T:
        """Sum of a partial result over the tensor-parallel ranks; the identity on one rank."""

    def select_rows(self, x: T) -> T:
        """Of a step's rows only those whose logits are wanted: `[rows, …]`."""

    def vocab_logits(self, x: T, name: str) -> T:
        """`[rows, vocab]` float32 from a head split by vocabulary: gathered from all ranks, padding cut off."""
