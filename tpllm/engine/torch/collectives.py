"""The collectives as operators, so that they are nodes of an exported graph and survive its compilation."""

from __future__ import annotations

import torch

from tpllm.distributed import World

library = torch.library.Library("tpllm", "DEF")
library.define("all_reduce(Tensor x) -> Tensor")
library.define("all_gather(Tensor x, int ranks) -> Tensor")

# A compiled graph calls its operators by name, so the ranks they speak to cannot be passed as an argument.
_bound: list[World] = [World()]


def bind(world: World) -> None:
    """Let the operators speak to the ranks of `world`."""
    _bound[0] = world


@torch.library.impl(library, "all_reduce", "CPU")
def _all_reduce(x: torch.Tensor) -> torch.Tensor:
    # MPI knows no 16-bit floats; float32 sums are also more exact.
    send = x.contiguous().float()
    out = torch.empty_like(send)
    _bound[0].comm.Allreduce(send.numpy(), out.numpy())
    return out.to(x.dtype)


@torch.library.impl(library, "all_gather", "CPU")
def _all_gather(x: torch.Tensor, ranks: int) -> torch.Tensor:
    out = x.new_empty((ranks, *x.shape))
    _bound[0].comm.Allgather(x.contiguous().view(torch.uint8).numpy(), out.view(torch.uint8).numpy())
    return out.movedim(0, -2).reshape(*x.shape[:-1], -1)


@torch.library.register_fake("tpllm::all_reduce", lib=library)
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("tpllm::all_gather", lib=library)
def _(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], ranks * x.shape[-1]))


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks; same shape and dtype."""
    result: torch.Tensor = torch.ops.tpllm.all_reduce(x)
    return result


def all_gather(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Every rank's `[..., n]` side by side along the last dimension: `[..., ranks * n]`."""
    result: torch.Tensor = torch.ops.tpllm.all_gather(x, ranks)
    return result
