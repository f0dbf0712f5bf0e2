"""The ranks' GPUs among each other: NCCL everywhere, peer memory where all reach it, the faster one at each size."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tpllm.distributed import World
from tpllm.engine.torch.exchange import Exchanged, Parts, Reduced, Split, in_parts, ranks_ahead
from tpllm.engine.torch.graphs import end_graphs, graph_seconds
from tpllm.engine.torch.private import symmetric_memory, two_shot_all_reduce
from tpllm.errors import PreflightError, RankError
from tpllm.heartbeat import own_addresses, reach
from tpllm.settings import choice

PUSH_BYTES = 4 << 20  # of one message through peer memory in one trip; above, every byte would cross too often
ROW_COUNTS = (1, 8, 32, 128, 512, 2048)  # of the messages that are measured
REPEATS, PER_GRAPH = 5, 8
PATHS = ("push", "two-shot", "nccl")


@dataclass(frozen=True)
class Path:
    """What answers messages of up to `rows` rows, and what one of that size took."""

    rows: int
    path: str
    us: float


class Communicator:
    """Sums over the ranks of activations `[rows, width]`. All of them call the same methods in the same order.

    There is room for `most` rows at once; more are summed too, but not in the fastest way.
    """

    def __init__(self, world: World, device: torch.device, width: int, dtype: torch.dtype, most: int) -> None:
        self.world, self.device, self.width, self.dtype, self._most = world, device, width, dtype, most
        start_group(world, device)
        self._ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"nccl": self._nccl}
        self._exchanged: Exchanged | None = None
        if reaches_peers(world):
            self._make_direct()
        self._paths = self._choose()
        if in_parts(most):
            self._choose_parts()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; on every rank the same bits."""
        return self._ways[self._name(x)](x)

    def all_reduce_add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: torch.Tensor,
                            epsilon: float) -> torch.Tensor:
        """`residual` plus the sum of `x`, and its root-mean-square norm times `norm`: `[2, rows, width]`.

        On the way of pushes `x` may also be a rank's own addends, `[parts, rows, width]`.
        """
        if self._name(residual) == "push":
            from tpllm.engine.torch.kernels.push import push_all_reduce_add_norm

            return push_all_reduce_add_norm(x.contiguous(), residual, norm, epsilon, self._buffers)
        from tpllm.engine.torch.kernels.norm import add_norm

        return add_norm(self.all_reduce(x), residual, norm, epsilon)

    def linear_all_reduce_add_norm(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None,
                                   residual: torch.Tensor, norm: torch.Tensor, epsilon: float) -> torch.Tensor:
        """The same of `x [rows, in]` times `weight [width, in]`: what is computed is sent while the rest is.

        Of the sum, not of its norm, a rank may then have only a share of the rows: the same of as many rows, so that
        the sum may be `residual` of the next call as it is. `select_rows` has whole ones. With `scale` the weight is
        quantized.
        """
        if x.shape[0] == 1:
            return self._row_all_reduce_add_norm(x, weight, scale, residual, norm, epsilon)
        if parts := self._parts(x.shape[0]):
            if scale is not None:
                from tpllm.engine.torch.kernels.few_quantized import dequantized

                weight = dequantized(weight, scale, x.shape[1], x.dtype)
            return parts.linear_add_norm(x, weight, residual, norm, epsilon)
        from tpllm.engine.torch.kernels.few import linear

        product = linear(x, weight, scale, divisible=self._name(residual) == "push")
        return self.all_reduce_add_norm(product, residual, norm, epsilon)

    def select_rows(self, total: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """These rows, or all, of a sum that `linear_all_reduce_add_norm` made."""
        rows = torch.arange(total.shape[0], device=total.device) if rows is None else rows
        found = total[rows]
        if not isinstance(self._parts(total.shape[0]), Exchanged):
            return found
        mine = Split.of(total.shape[0], self.world.size).rank_of(rows) == self.world.rank
        return self.all_reduce(torch.where(mine[:, None], found, 0))

    def _row_all_reduce_add_norm(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None,
                                 residual: torch.Tensor, norm: torch.Tensor, epsilon: float) -> torch.Tensor:
        from tpllm.engine.torch.kernels import gemv, gemv_quantized
        from tpllm.engine.torch.kernels.push import push_all_reduce_add_norm

        if scale is None and self._name(residual) == "push":
            product = gemv.gemv(x, weight, None, epsilon, None, False, self._buffers)
            return push_all_reduce_add_norm(product, residual, norm, epsilon, self._buffers, sent=True)
        product = (gemv.gemv(x, weight, None, epsilon, None, False) if scale is None
                   else gemv_quantized.gemv(x, weight, scale, None, epsilon, None, False))
        return self.all_reduce_add_norm(product, residual, norm, epsilon)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`: `[ranks, …]`."""
        out = x.new_empty((self.world.size, *x.shape))
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    def broadcast(self, x: torch.Tensor) -> None:
        """Rank 0's `x` on every rank, in place."""
        dist.broadcast(x, 0)

    def path(self, rows: int) -> Path:
        """What answers messages of that many rows."""
        return next((path for path in self._paths if rows <= path.rows), self._paths[-1])

    @property
    def parts_path(self) -> str | None:
        """What sums the products of the longest steps part by part; None where no step is long enough."""
        return ("exchange" if self._exchanged else "nccl") if in_parts(self._most) else None

    def _parts(self, rows: int) -> Parts | None:
        if not in_parts(rows):
            return None
        return self._exchanged if self._exchanged and rows <= self._exchanged.rows else Reduced()

    def _name(self, x: torch.Tensor) -> str:
        fits = x.dtype == self.dtype and x.shape[-1] == self.width and x.shape[0] <= ROW_COUNTS[-1]
        return self.path(x.shape[0]).path if fits else "nccl"

    def _nccl(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    def _make_direct(self) -> None:
        from tpllm.engine.torch.kernels.peers import SETS, make_buffers
        from tpllm.engine.torch.kernels.push import push_all_reduce

        rows = push_rows(self.width, self.dtype)
        places, peers = symmetric_memory((SETS, self.world.size, rows, self.width), self.dtype, self.device)
        theirs = [peers.buffer(rank, places) for rank in ranks_ahead(self.world.rank, self.world.size)]
        self._buffers = make_buffers((places, *theirs), self.world.rank)
        self._large, _ = symmetric_memory((ROW_COUNTS[-1], self.width), self.dtype, self.device)
        if in_parts(self._most) and forced_path() != "nccl":
            self._exchanged = Exchanged(self.world.rank, self.world.size, self._most, self.width, self.dtype,
                                        self.device)
        torch.cuda.synchronize(self.device)
        self.world.barrier()
        self._ways["push"] = lambda x: push_all_reduce(x.contiguous(), self._buffers)
        if self.dtype != torch.float16:  # for which PyTorch 2.11 has no such kernel
            self._ways["two-shot"] = self._two_shot

    def _two_shot(self, x: torch.Tensor) -> torch.Tensor:
        space = self._large[:x.shape[0]]
        space.copy_(x)
        two_shot_all_reduce(space)
        return space.clone()

    def _choose(self) -> list[Path]:
        """Check each way's sums and take the fastest at each size; all ranks take the same.

        It must be clearly faster than those before it in `PATHS`, so that hardly a launch takes another than the last
        one did: sums of 16-bit floats are rounded differently.
        """
        forced = forced_path()
        if forced != "auto" and forced not in self._ways:
            raise PreflightError(f"TPLLM_ALL_REDUCE={forced}, which these ranks' GPUs do not have for {self.dtype}; "
                                 f"they have {', '.join(self._ways)}")
        found = []
        for rows in ROW_COUNTS:
            names = [name for name in PATHS if name in self._ways and forced in ("auto", name)
                     and (name != "push" or rows <= self._buffers.rows)]
            took = {name: max(self.world.allgather(self._measure(name, rows))) for name in names or ["nccl"]}
            best = clearly_fastest(took)
            found.append(Path(rows, best, round(took[best] * 1e6, 1)))
        return found

    def _choose_parts(self) -> None:
        """Check and time a full step's product in parts; copy engines are kept where they are clearly faster."""
        ways: dict[str, Parts] = {"nccl": Reduced()}
        if self._exchanged:
            ways["exchange"] = self._exchanged
        took = {name: max(self.world.allgather(self._measure_parts(parts))) for name, parts in ways.items()}
        if forced_path() == "auto" and clearly_fastest(took) == "nccl":
            self._exchanged = None

    def _measure_parts(self, parts: Parts) -> float:
        """Median seconds of a product as attention's, its sum and norm in a CUDA graph, its value checked."""
        inner, ranks = max(1, self.width // self.world.size), self.world.size
        x, weight = (torch.full((rows, inner), value, dtype=self.dtype, device=self.device)
                     for rows, value in ((self._most, self.world.rank + 1.0), (self.width, 1.0 / inner)))
        residual, norm = x.new_zeros((self._most, self.width)), x.new_ones(self.width)
        total, normed = parts.linear_add_norm(x, weight, residual, norm, 0.0)
        mine = Split.of(self._most, ranks).rank_of(torch.arange(self._most, device=self.device)) == self.world.rank
        sums = total[mine] / (ranks * (ranks + 1) / 2)
        if not bool(((sums - 1).abs() < 0.01).all() and ((normed - 1).abs() < 0.01).all()):
            raise RankError("the GPUs' sums of a product in parts are wrong; `tpllm doctor` looks further")
        return graph_seconds(lambda: parts.linear_add_norm(x, weight, residual, norm, 0.0), REPEATS, ready=dist.barrier)

    def _measure(self, name: str, rows: int) -> float:
        """Median seconds of one sum of that many rows in a CUDA graph, its value checked."""
        way = self._ways[name]
        x = torch.full((rows, self.width), self.world.rank + 1.0, dtype=self.dtype, device=self.device)
        if not bool((way(x) == sum(range(1, self.world.size + 1))).all()):
            raise RankError(f"the GPUs' all-reduce through {name} gives wrong sums of {rows} rows; "
                            "`tpllm doctor` looks further")

        def sums() -> None:
            for _ in range(PER_GRAPH):
                way(x)

        return graph_seconds(sums, REPEATS, ready=dist.barrier) / PER_GRAPH


def push_rows(width: int, dtype: torch.dtype) -> int:
    """Of the largest message that goes through peer memory in one trip."""
    return max(1, PUSH_BYTES // (width * dtype.itemsize))


def clearly_fastest(took: dict[str, float]) -> str:
    """The first, or one behind it that takes less than nine tenths of the best one's seconds so far."""
    best, *others = took
    for name in others:
        if took[name] < 0.9 * took[best]:
            best = name
    return best


def forced_path() -> str:
    """The one of `PATHS` that was asked for, or `auto`."""
    return choice("TPLLM_ALL_REDUCE", "auto", *PATHS)


def host_name(world: World) -> str:
    """Of the machine, as NCCL knows it: ranks with another one are reached by the network only."""
    return os.environ.get("NCCL_HOSTID") or world.host


def reaches_peers(world: World) -> bool:
    """Whether every rank's GPU reaches all others' memory; collective."""
    hosts = world.allgather(host_name(world))
    here, *_ = [place.gpu for place in world.places if place.rank == world.rank]
    others = [place.gpu for place in world.places if place.rank != world.rank]
    mine = len(set(hosts)) == 1 and all(
        isinstance(gpu, int) and isinstance(here, int) and gpu != here
        and torch.cuda.can_device_access_peer(here, gpu) for gpu in others)
    return all(world.allgather(mine))


def start_group(world: World, device: torch.device) -> None:
    """PyTorch's process group of all ranks over NCCL; they find each other at an address of rank 0."""
    if dist.is_initialized():
        return
    several = len({place.host for place in world.places}) > 1
    server = socket.create_server(("" if several else "127.0.0.1", 0)) if world.is_first else None
    meeting = (own_addresses() if several else ("127.0.0.1",), server.getsockname()[1]) if server else None
    addresses, port = world.broadcast(meeting) or ((), 0)
    found = addresses[0] if server else reach(addresses, port)
    if missing := [rank for rank, address in enumerate(world.allgather(found)) if address is None]:
        raise PreflightError(f"rank(s) {missing} cannot reach port {port} of {', '.join(addresses)}, over which NCCL "
                             "begins; open it, or set NCCL_SOCKET_IFNAME's network up")
    store = TCPStore(str(found), port, world.size, world.is_first, timedelta(seconds=60), wait_for_workers=False,
                          master_listen_fd=server.detach() if server else None)
    hook = sys.excepthook
    dist.init_process_group("nccl", store=store, rank=world.rank, world_size=world.size, device_id=device)
    sys.excepthook = hook  # PyTorch's prints what ours says once that returns, which it never does
    atexit.register(end_group)  # before MPI's own end: the last registered comes first


def end_group() -> None:
    """NCCL would wait for all graphs that have its kernels (https://github.com/pytorch/pytorch/issues/115388), and a
    program may have its engine to the end."""
    end_graphs()
    dist.destroy_process_group()
