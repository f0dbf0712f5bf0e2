"""The collectives as operators, so that they are nodes of an exported graph and survive its compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tpllm.distributed import World

if TYPE_CHECKING:
    from tpllm.engine.torch.communicator import Communicator

library = torch.library.Library("tpllm", "DEF")
library.define("all_reduce(Tensor x) -> Tensor")
library.define("all_gather(Tensor x, int ranks) -> Tensor")
# On GPUs what follows an all-reduce in a layer is done in the same kernel. One result: the sum and its norm, stacked.
library.define("all_reduce_add_norm(Tensor x, Tensor residual, Tensor norm, float epsilon) -> Tensor")
# The product before it too, so that of many rows some are summed while others are computed. Of such a sum every rank
# has the norm, but maybe not all rows, so that these are asked for by an operator of their own.
library.define("linear_all_reduce_add_norm(Tensor x, Tensor weight, Tensor? scale, Tensor residual, Tensor norm, "
               "float epsilon) -> Tensor")
library.define("select_summed_rows(Tensor total, Tensor? rows) -> Tensor")

# A compiled graph calls its operators by name, so the ranks they speak to cannot be passed as an argument.
_bound: list[World] = [World()]
_gpus: list[Communicator] = []


def bind(world: World, communicator: Communicator | None = None) -> None:
    """Let the operators speak to the ranks of `world`, those on CUDA through their GPUs' communicator."""
    _bound[0] = world
    if communicator:
        _gpus[:] = [communicator]


def communicator() -> Communicator | None:
    """The one that is bound."""
    return _gpus[0] if _gpus else None


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


@torch.library.impl(library, "all_reduce", "CUDA")
def _all_reduce_gpus(x: torch.Tensor) -> torch.Tensor:
    return _gpus[0].all_reduce(x)


@torch.library.impl(library, "all_gather", "CUDA")
def _all_gather_gpus(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return _gpus[0].all_gather(x).movedim(0, -2).reshape(*x.shape[:-1], -1)


@torch.library.impl(library, "all_reduce_add_norm", "CUDA")
def _all_reduce_add_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                         epsilon: float) -> torch.Tensor:
    return _gpus[0].all_reduce_add_norm(x, residual, norm, epsilon)


@torch.library.impl(library, "linear_all_reduce_add_norm", "CUDA")
def _linear_all_reduce_add_norm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None,
                                residual: torch.Tensor, norm: torch.Tensor, epsilon: float) -> torch.Tensor:
    return _gpus[0].linear_all_reduce_add_norm(x, weight, scale, residual, norm, epsilon)


@torch.library.impl(library, "select_summed_rows", "CUDA")
def _select_summed_rows(total: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return _gpus[0].select_rows(total, rows)


@torch.library.register_fake("tpllm::all_reduce", lib=library)
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("tpllm::all_gather", lib=library)
def _(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], ranks * x.shape[-1]))


@torch.library.register_fake("tpllm::all_reduce_add_norm", lib=library)
def _(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x.new_empty((2, *x.shape))


@torch.library.register_fake("tpllm::linear_all_reduce_add_norm", lib=library)
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, residual: torch.Tensor, norm: torch.Tensor,
      epsilon: float) -> torch.Tensor:
    return x.new_empty((2, *residual.shape))


@torch.library.register_fake("tpllm::select_summed_rows", lib=library)
def _(total: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(total) if rows is None else total.new_empty((rows.shape[0], total.shape[1]))


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks; same shape and dtype."""
    result: torch.Tensor = torch.ops.tpllm.all_reduce(x)
    return result


def all_gather(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Every rank's `[..., n]` side by side along the last dimension: `[..., ranks * n]`."""
    result: torch.Tensor = torch.ops.tpllm.all_gather(x, ranks)
    return result


def all_reduce_add_norm(x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                        epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual` plus the sum of `x` over the ranks, and that sum's root-mean-square norm times `norm`."""
    total, normed = torch.ops.tpllm.all_reduce_add_norm(x, residual, norm, epsilon).unbind(0)
    return total, normed


def linear_all_reduce_add_norm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None,
                               residual: torch.Tensor, norm: torch.Tensor,
                               epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`all_reduce_add_norm` of `x [T, in]` times `weight [width, in]`; a rank may have only some rows of the sum.

    It may be `residual` of the next as it is, else `select_summed_rows` must find its rows. With `scale` the weight is
    quantized.
    """
    total, normed = torch.ops.tpllm.linear_all_reduce_add_norm(x, weight, scale, residual, norm, epsilon).unbind(0)
    return total, normed


def select_summed_rows(total: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """These rows, or all, of a sum of `linear_all_reduce_add_norm`."""
    result: torch.Tensor = torch.ops.tpllm.select_summed_rows(total, rows)
    return result
