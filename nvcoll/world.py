"""What stands behind a communicator: bytes among ranks, memory, kernels; opened on first use, closed by Finalize."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nvcoll import _bootstrap, _topology
from nvcoll import settings as settings_
from nvcoll._plan import Queue
from nvcoll.backends.area import Layout, open_area
from nvcoll.backends.choice import agree_on_backend
from nvcoll.backends.emulated import EmulatedMemory, Hub, LocalExchange, open_ranks, reserve
from nvcoll.backends.group import Member, Part, agree
from nvcoll.backends.heap import Heap, Piece
from nvcoll.backends.shm import SharedMemory
from nvcoll.errors import ArgumentError, BootstrapError
from nvcoll.jit import Compiler
from nvcoll.parts import Parted
from nvcoll.planning import Planner, read_rules

AGREED = ("backend", "timeout", "ranks_per_node", "scratch", "heap", "spin")
"""Settings on which ranks must not differ: those of rank 0 are in force on all."""


@dataclass(frozen=True)
class Common:
    """What the worlds of a rank have in common: that which was opened, and its parts.

    Attributes
    ----------
    settings, rules
        In force on all ranks.
    crowded
        Whether ranks share cores.
    backend
        ``"shm"``, ``"emulated"`` or ``"self"``.
    compiler
        Compiles kernels.
    """

    settings: Any
    rules: dict[str, Any]
    crowded: bool
    backend: str
    compiler: Compiler


class World(Parted):
    """One rank's part of a world.

    Parameters
    ----------
    exchange
        Byte exchange among all ranks.
    topology
        Nodes and ranks of the whole world.
    planner
        Makes plans for the ranks that share memory.
    heap
        Allocator of that memory.
    area
        What the kernels talk through, scratch memory included.
    common
        What it has in common with its parts.
    whole
        The world that was opened, if this is a part of it.
    """

    target = "host"

    def __init__(
        self, exchange: Any, topology: Any, planner: Planner, heap: Heap, area: Piece, common: Common,
        whole: "World | None" = None,
    ) -> None:  # fmt: skip
        self.exchange = exchange
        self.topology = topology
        self.planner = planner
        self.heap = heap
        self.area = area
        self.common = common
        self.backend = common.backend
        self.rank: int = exchange.rank
        self.size: int = exchange.size
        self.queue = Queue(planner.state)  # has no thread before the first nonblocking call
        super().__init__(whole)  # from here on, the whole ends it

    def finish(self) -> None:
        """Do nothing: calls have ended when they return, and those of the queue need not have."""

    def _part(self, exchange: Any, topology: Any, memory: Part, ranks: Sequence[int]) -> "World":
        return _build(exchange, topology, memory, self.common, self.whole or self)

    def leave(self) -> bool:
        """Take no more part, and tell the ranks that share memory. Returns whether no thread is in a call any more."""
        ended = self._leave_parts()
        self.queue.close()
        left: bool = self.planner.state.leave()
        if left:
            self.queue.join(1.0)  # it ends at once, but for what Python code it may be in
        return left and ended

    def close(self) -> None:
        """Leave, and give everything back; a part asks nobody, and its memory goes with that of the whole."""
        making = self._begin_end()
        failed = self.planner.state.failure is not None or self._failed or making
        left = self.leave() and not making
        self._end(failed, left)
        if left and self.opened:
            self.heap.close()
        else:  # perhaps a thread is in a call that does not end: then the memory goes with it
            self.heap.retire()
        self.exchange.close(failed)

    def free(self) -> bool:
        """Leave a part, and give its memory to the whole. Collective. Returns whether a call has failed."""
        kind, _ = self.planner.state.failure or ("", 0)
        left = agreed = False
        try:
            left = self.leave()
            if kind != "peer lost":  # who would not come, and the memory goes with that of the whole
                self.heap.give_back("Free", left)
                agreed = True
        finally:
            self._end(not agreed, left)
            self.heap.retire()
            self.exchange.close(not agreed)
        return not (agreed and left)

    def retire(self) -> None:
        """Leave, but keep the memory of Buffers, which goes with the last reference to them."""
        making = self._retire_parts()
        if self.leave() and not making:
            self.heap.memory.give(self.area.offset, self.area.nbytes)
        self.heap.retire()


def open_world() -> Any:
    """Find the other ranks and set everything up. Collective: every rank of the launch does it."""
    _fill_standard_streams()
    with contextlib.ExitStack() as undo:
        settings = settings_.read()
        exchange = _bootstrap.connect(settings)
        undo.callback(exchange.close)
        settings, rules = _agree_on_settings(exchange, settings)
        exchange.timeout = settings.timeout
        cores = exchange.allgather(_topology.usable_cpus())
        identities = _identities(exchange)
        topology = _topology.detect(exchange.rank, identities, settings.ranks_per_node, cores)
        backend, _ = agree_on_backend(exchange, settings.backend, topology.host_sizes)
        if backend == "nvshmem":
            from nvcoll.world_cuda import open_gpus  # on hosts, nothing of GPUs is loaded

            gpus = open_gpus(exchange, topology, identities, settings, rules)
            undo.pop_all()
            return gpus
        memory = SharedMemory(exchange, topology, settings.heap)
        undo.callback(memory.close)
        common = Common(settings, rules, topology.oversubscribed, backend, Compiler(settings.cache_dir))
        world = _build(exchange, topology, memory, common)
        undo.pop_all()
    return world


def _fill_standard_streams() -> None:
    """Open /dev/null where a standard stream is closed: what takes its number is written to by whoever reports there.

    That would be a connection, or the memory of all ranks.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest number, but for another thread
            if opened != number:
                os.close(opened)


def _identities(exchange: Any) -> list[bytes]:
    """Return what tells the hosts of the ranks apart; BootstrapError on all ranks if one cannot share memory."""
    mine, problem = b"", ""
    try:
        mine = _bootstrap.host_identity()
    except OSError as exc:
        problem = str(exc.strerror)
    return agree(exchange, mine, problem, "Init: ranks cannot share memory", BootstrapError)


def _agree_on_settings(exchange: Any, settings: Any) -> tuple[Any, dict[str, Any]]:
    """Return this rank's settings with rank 0's values where ranks must not differ, and rank 0's rules."""
    offer: dict[str, Any] = {}
    if exchange.rank == 0:
        try:
            offer = {name: getattr(settings, name) for name in AGREED} | {"rules": read_rules(settings.rules)}
        except ArgumentError as exc:
            offer = {"problem": str(exc)}
    told = json.loads(exchange.allgather(json.dumps(offer).encode())[0])
    if "problem" in told:
        raise ArgumentError(told["problem"])
    rules = told.pop("rules")
    return replace(settings, **told), rules


def open_self() -> World:
    """Set up a world of one rank, without asking anybody."""
    settings = settings_.read()
    exchange = LocalExchange(Hub(1, settings.timeout), 0)
    topology = _topology.detect(0, [b"self"])
    memory = EmulatedMemory(exchange, reserve(1, settings.heap))
    common = Common(settings, read_rules(settings.rules), False, "self", Compiler(settings.cache_dir))
    return _build(exchange, topology, memory, common)


def open_emulated(size: int, node_sizes: tuple[int, ...]) -> list[World]:
    """Set up a world of threads; its memory lives as long as anything refers to it."""
    settings = settings_.read()
    hub, segment = Hub(size, settings.timeout), reserve(size, settings.heap)
    crowded = _topology.detect(0, [b""] * size, None, [_topology.usable_cpus()] * size).oversubscribed
    common = Common(settings, read_rules(settings.rules), crowded, "emulated", Compiler(settings.cache_dir))

    def build(exchange: Any, topology: Any, memory: Any) -> World:
        return _build(exchange, topology, memory, common)

    return open_ranks(hub, segment, node_sizes, build)


def _build(
    exchange: Any,
    topology: Any,
    memory: Member,
    common: Common,
    whole: World | None = None,
) -> World:
    """Set up the area of the ranks that share memory. Collective."""
    here, settings = topology, common.settings
    if common.backend == "shm" and len(topology.nodes) > 1:
        # Kernels see the ranks of this node only; `nvcoll.hosts` joins the nodes.
        here = _topology.part(topology, topology.local_rank, topology.members)
    heap = Heap(memory)
    layout = Layout(max(len(memory.members), *topology.node_sizes), settings.scratch)  # what is too little is so on all
    piece = heap.allocate(settings.scratch, exchange.verb)
    slices = min(topology.node_sizes)
    state = open_area(memory, piece, here, layout, settings, slices)
    exchange.allgather(b"")  # nobody looks at the board of a rank that has none yet
    planner = Planner(state, layout, here, slices, common.rules, common.compiler, common.crowded, settings.timeout)
    return World(exchange, topology, planner, heap, piece, common, whole)
