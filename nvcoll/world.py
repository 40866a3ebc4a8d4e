"""What stands behind a communicator: bytes among ranks, memory, kernels; opened on first use, closed by Finalize."""

import contextlib
import json
from dataclasses import replace
from typing import Any

from nvcoll import _bootstrap, _topology
from nvcoll import settings as settings_
from nvcoll._plan import Queue
from nvcoll.backends.area import Layout, open_area
from nvcoll.backends.choice import agree_on_backend
from nvcoll.backends.emulated import EmulatedMemory, Hub, LocalExchange, open_ranks, reserve
from nvcoll.backends.heap import INIT, Heap, Piece
from nvcoll.backends.shm import SharedMemory
from nvcoll.errors import ArgumentError
from nvcoll.jit import Compiler
from nvcoll.planning import Planner, read_rules

AGREED = ("backend", "timeout", "ranks_per_node", "scratch", "heap", "spin")
"""Settings on which ranks must not differ: those of rank 0 are in force on all."""


class World:
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
    backend
        ``"shm"``, ``"emulated"`` or ``"self"``.
    """

    target = "host"

    def __init__(self, exchange: Any, topology: Any, planner: Planner, heap: Heap, area: Piece, backend: str) -> None:
        self.exchange = exchange
        self.topology = topology
        self.planner = planner
        self.heap = heap
        self.area = area
        self.backend = backend
        self.rank: int = exchange.rank
        self.size: int = exchange.size
        self.queue = Queue(planner.state)  # has no thread before the first nonblocking call

    def leave(self) -> bool:
        """Take no more part, and tell the ranks that share memory. Returns whether no thread is in a call any more."""
        self.queue.close()
        left: bool = self.planner.state.leave()
        if left:
            self.queue.join(1.0)  # it ends at once, but for what Python code it may be in
        return left

    def close(self) -> None:
        """Leave, and give everything back."""
        failed = self.planner.state.failure is not None
        if self.leave():
            self.heap.close()
        else:  # a thread is in a call that does not end: the memory goes with it
            self.heap.retire()
        self.exchange.close(failed)

    def retire(self) -> None:
        """Leave, but keep the memory of Buffers, which goes with the last reference to them."""
        if self.leave():
            self.heap.memory.give(self.area.offset, self.area.nbytes)
        self.heap.retire()


def open_world() -> Any:
    """Find the other ranks and set everything up. Collective: every rank of the launch does it."""
    with contextlib.ExitStack() as undo:
        settings = settings_.read()
        exchange = _bootstrap.connect(settings)
        undo.callback(exchange.close)
        settings, rules = _agree_on_settings(exchange, settings)
        cores = exchange.allgather(_topology.usable_cpus())
        identities = exchange.allgather(_bootstrap.host_identity())
        topology = _topology.detect(exchange.rank, identities, settings.ranks_per_node, cores)
        backend, _ = agree_on_backend(exchange, settings.backend, topology.host_sizes)
        if backend == "nvshmem":
            from nvcoll.world_cuda import open_gpus  # on hosts, nothing of GPUs is loaded

            gpus = open_gpus(exchange, topology, identities, settings, rules)
            undo.pop_all()
            return gpus
        memory = SharedMemory(exchange, topology, settings.heap)
        undo.callback(memory.close)
        here = topology
        if len(topology.nodes) > 1:  # kernels see the ranks of this node only; `nvcoll.hosts` joins the nodes
            members = topology.members
            here = _topology.detect(topology.local_rank, [identities[rank] for rank in members])
        world = _build(exchange, topology, here, memory, settings, rules, topology.oversubscribed, backend)
        undo.pop_all()
    return world


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
    return _build(exchange, topology, topology, memory, settings, read_rules(settings.rules), False, "self")


def open_emulated(size: int, node_sizes: tuple[int, ...]) -> list[World]:
    """Set up a world of threads; its memory lives as long as anything refers to it."""
    settings = settings_.read()
    rules = read_rules(settings.rules)
    hub, segment = Hub(size, settings.timeout), reserve(size, settings.heap)
    crowded = _topology.detect(0, [b""] * size, None, [_topology.usable_cpus()] * size).oversubscribed
    compiler = Compiler(settings.cache_dir)

    def build(exchange: Any, topology: Any, memory: Any) -> World:
        return _build(exchange, topology, topology, memory, settings, rules, crowded, "emulated", compiler)

    return open_ranks(hub, segment, node_sizes, build)


def _build(
    exchange: Any,
    topology: Any,
    here: Any,
    memory: Any,
    settings: Any,
    rules: dict[str, Any],
    crowded: bool,
    backend: str,
    compiler: Compiler | None = None,
) -> World:
    """Set up the area of the ranks that share memory; `here` is the topology as their kernels see it."""
    heap = Heap(memory)
    layout = Layout(max(len(memory.members), *topology.node_sizes), settings.scratch)  # what is too little is so on all
    piece = heap.allocate(settings.scratch, INIT)
    slices = min(topology.node_sizes)
    state = open_area(memory, piece, here, layout, settings, slices)
    exchange.allgather(b"")  # nobody looks at the board of a rank that has none yet
    compiler = compiler or Compiler(settings.cache_dir)
    planner = Planner(state, layout, here, slices, rules, compiler, crowded, settings.timeout)
    return World(exchange, topology, planner, heap, piece, backend)
