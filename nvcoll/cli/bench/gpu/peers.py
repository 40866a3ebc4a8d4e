"""The libraries that nvcoll is compared with on GPUs, all of them through torch.

`invite` sets up those that were asked for. One that is missing on any rank is left out on all of them, with a reason.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from nvcoll.cli.bench.gpu.clock import ExchangingRanks
from nvcoll.cli.bench.gpu.contestants import OnGpu
from nvcoll.cli.bench.gpu.stage import Stage
from nvcoll.errors import ArgumentError
from nvcoll.ops import Op

TIMEOUT = timedelta(seconds=120)
REDUCTIONS = {"SUM", "AVG", "PROD", "MIN", "MAX"}  # what NCCL has of our operators, by the same names


class ProcessGroup:
    """torch's default process group, over a store that the ranks found by way of nvcoll's exchange.

    Parameters
    ----------
    ranks
        They exchange the store's address.
    stage
        The GPU of this rank; None: a group of the host's memory (gloo).
    """

    def __init__(self, ranks: ExchangingRanks, stage: Stage | None) -> None:
        from torch import distributed

        self.distributed = distributed
        self.stage = stage
        rank, size = ranks.comm.rank, ranks.comm.size
        device = {"backend": "gloo"} if stage is None else {"backend": "nccl", "device_id": stage.device}
        distributed.init_process_group(
            store=connect_store(ranks), rank=rank, world_size=size, timeout=TIMEOUT, **device
        )
        self.closers: list[Callable[[], object]] = []

    def close(self) -> None:
        """Take leave of the other ranks; collective."""
        for closer in reversed(self.closers):
            closer()
        self.distributed.destroy_process_group()


def connect_store(ranks: ExchangingRanks) -> Any:
    """Return a store of torch's on rank 0, which is told to the others whatever started them."""
    from torch.distributed import TCPStore

    rank, size = ranks.comm.rank, ranks.comm.size
    alone = len(set(ranks.exchange(socket.gethostname()))) == 1
    host = "127.0.0.1" if alone else socket.gethostname()
    store = None
    if rank == 0:  # it must not wait for ranks that do not know its port yet
        store = TCPStore(host, 0, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    host, port = ranks.exchange([host, store.port] if store else None)[0]
    return store or TCPStore(host, port, size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)


class Peer(OnGpu):
    """A contestant that may refuse a datatype or a size; all ranks ask for the same, and are refused together."""

    may_refuse = True

    def _checked(self) -> None:
        try:
            super()._checked()
        except (RuntimeError, TypeError, ValueError) as exc:
            raise ArgumentError(f"{self.name}: {first_line(exc)}") from exc


class Nccl(Peer):
    """``torch.distributed.all_reduce`` over NCCL, in place on an ordinary tensor."""

    name = "nccl"

    def __init__(self, group: ProcessGroup, stage: Stage, op: Op) -> None:
        self.stage = stage
        self.distributed = group.distributed
        self.version = ".".join(map(str, stage.torch.cuda.nccl.version()))
        self.op = getattr(self.distributed.ReduceOp, op.name)
        self.tensor = stage.plain()
        self.group = group.distributed.group.WORLD

    def prepare(self, count: int) -> None:
        """Make `enqueue` reduce the first `count` elements."""
        tensor = self.tensor[:count]
        self._set(count, tensor, tensor, partial(self.distributed.all_reduce, tensor, op=self.op, group=self.group))


class NcclSymmetric(Nccl):
    """NCCL on memory of its own that is registered as a symmetric window, with a communicator of its own."""

    name = "nccl_symmetric"

    def __init__(self, group: ProcessGroup, stage: Stage, op: Op) -> None:
        super().__init__(group, stage, op)
        torch = stage.torch
        # A communicator that has windows may treat other memory differently: the peer `nccl` keeps its own.
        self.group = group.distributed.new_group(backend="nccl")
        group.distributed.all_reduce(torch.zeros(1, device=stage.device), group=self.group)  # makes the communicator
        backend = self.group._get_backend(stage.device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            self.tensor = torch.zeros(stage.count, dtype=self.tensor.dtype, device=stage.device)
        stage.synchronize()
        backend.register_mem_pool(pool, symm=True)
        # A window that outlives its registration is complained about when the communicator goes.
        group.closers.append(partial(backend.deregister_mem_pool, pool))


class SymmMem(Peer):
    """One of torch's own all-reduce kernels on its symmetric memory, without multicast.

    Parameters
    ----------
    variant
        ``one_shot`` reads all of the other ranks' data; ``two_shot`` reduces a part and spreads it, in place.
    """

    def __init__(self, group: ProcessGroup, stage: Stage, op: Op, variant: str) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.stage = stage
        self.name = f"symm_mem/{variant}"
        self.version = stage.torch.__version__
        if op.name != "SUM":
            raise ArgumentError(f"torch's kernels know SUM only, not {op.name}")
        self.variant = variant
        self.group = group.distributed.group.WORLD.group_name
        self.out = stage.plain()
        self.tensor = symmetric.empty(stage.count, dtype=self.out.dtype, device=stage.device)
        symmetric.rendezvous(self.tensor, self.group)

    def prepare(self, count: int) -> None:
        """Make `enqueue` reduce the first `count` elements."""
        tensor, out = self.tensor[:count], self.out[:count]
        operators = self.stage.torch.ops.symm_mem
        if self.variant == "one_shot":
            kernel = partial(operators.one_shot_all_reduce_out, tensor, "sum", self.group, out)
        else:
            kernel = partial(operators.two_shot_all_reduce_, tensor, "sum", self.group)
            out = tensor
        self._set(count, tensor, out, kernel)


Maker = Callable[[ProcessGroup, Stage, Op], list[Any]]
PEERS: dict[str, Maker] = {
    "nccl": lambda group, stage, op: [Nccl(group, stage, op)],
    "nccl_symmetric": lambda group, stage, op: [NcclSymmetric(group, stage, op)],
    "symm_mem": lambda group, stage, op: [SymmMem(group, stage, op, kind) for kind in ("one_shot", "two_shot")],
}
"""Name for ``--compare`` -> what makes its contestants; the best of several counts."""


def invite(
    ranks: ExchangingRanks, stage: Stage, op: Op, names: Sequence[str], gpus: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], dict[str, str], ProcessGroup | None]:
    """Set up peers; collective.

    Parameters
    ----------
    ranks, stage, op
        Who takes part, where, and in what.
    names
        Names of `PEERS`.
    gpus
        `Stage.facts` of all ranks.

    Returns
    -------
    tuple
        The contestants, why others were left out by name, and the process group to close in the end.
    """
    if not names:
        return [], {}, None
    group: list[ProcessGroup] = []
    reason = unusable(stage, op, gpus) or agreed(ranks, lambda: group.append(ProcessGroup(ranks, stage)))
    if reason:
        return [], dict.fromkeys(names, reason), None
    peers: list[Any] = []
    left_out = {}
    for name in names:
        made: list[Any] = []
        reason = agreed(ranks, partial(_make, made, PEERS[name], group[0], stage, op))
        if reason:
            left_out[name] = reason
        else:
            peers += made
    return peers, left_out, group[0]


def _make(made: list[Any], maker: Maker, group: ProcessGroup, stage: Stage, op: Op) -> None:
    made += maker(group, stage, op)


def unusable(stage: Stage, op: Op, gpus: Sequence[Mapping[str, Any]]) -> str:
    """Return why no peer can take part, as all ranks see it, or nothing."""
    distributed = stage.torch.distributed
    if not distributed.is_available() or not distributed.is_nccl_available():
        return f"torch {stage.torch.__version__} was built without NCCL; install one of NVIDIA's wheels"
    owners: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        first = owners.setdefault(gpu["uuid"], rank)
        if first != rank:
            return f"needs a GPU for each rank, ranks {first} and {rank} share one; start fewer ranks"
    if op.name not in REDUCTIONS:
        return f"NCCL and torch have no {op.name}; choose another --op"
    return ""


def agreed(ranks: ExchangingRanks, setup: Callable[[], object]) -> str:
    """Try something on every rank; return the reason of the first on which it failed, or nothing."""
    reason = ""
    try:
        setup()
    except (ArgumentError, AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as exc:
        reason = first_line(exc) or type(exc).__name__
    failed = {rank: told for rank, told in enumerate(ranks.exchange(reason)) if told}
    return next((f"rank {rank}: {told}" for rank, told in failed.items()), "")


def first_line(exc: BaseException) -> str:
    """Return the first line of an error's message; torch appends the C++ stack."""
    return (str(exc).strip().splitlines() or [""])[0]
