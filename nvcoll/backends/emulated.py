"""Ranks that are threads of this process: private memory, the same kernels, any number of ranks per node."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from nvcoll import _bootstrap, _topology
from nvcoll.backends import driver
from nvcoll.backends.group import Member, physical_memory
from nvcoll.errors import AllocationError, Error, PeerLostError, TimeoutError
from nvcoll.settings import PAGE

EXTENT = 1 << 30
"""Most address space an emulated rank gets by default."""


class Hub:
    """Where the threads of an emulated world exchange bytes.

    Parameters
    ----------
    size
        Number of ranks.
    timeout
        Seconds to wait for the others.
    first
        The hub of all ranks, if this is one of some of them.
    """

    def __init__(self, size: int, timeout: float, first: "Hub | None" = None) -> None:
        self.size = size
        self._first = first or self
        self.timeout = timeout
        self.abandoned = False
        self.barrier = threading.Barrier(size)
        self.slots: list[bytes] = [b""] * size
        self.arrivals = [0] * size
        self.late: list[int] = []  # ranks that were missed first: who comes later hears the same
        self._lock = threading.Lock()  # for those who come into a part
        self._guard = threading.Lock()  # for the set of parts, to which parts of parts add too
        self._parts: weakref.WeakSet[Hub] = weakref.WeakSet()  # that somebody still uses
        self._awaited: dict[bytes, tuple[Hub, int]] = {}  # token -> a part, and how many ranks have not found it yet

    def part(self, token: bytes, size: int) -> "Hub":
        """Return the hub of a part, which the first of its ranks that comes makes.

        Parameters
        ----------
        token
            The name of the part.
        size
            Number of its ranks; each comes once.
        """
        with self._lock:
            hub, missing = self._awaited.pop(token) if token in self._awaited else (self._begin(size), size)
            if missing > 1:
                self._awaited[token] = hub, missing - 1
        return hub

    def _begin(self, size: int) -> "Hub":
        hub = Hub(size, self.timeout, self._first)
        for holder in (self, self._first):  # this one may be gone before what it was divided into
            with holder._guard:
                holder._parts.add(hub)
                abandoned = holder.abandoned
            if abandoned:
                hub.abandon()
        return hub

    def abandon(self) -> None:
        """Let every rank that waits here or in a part, now or later, raise PeerLostError."""
        with self._guard:
            self.abandoned = True
            parts = list(self._parts)
        self.barrier.abort()
        for part in parts:
            part.abandon()


class LocalExchange:
    """One thread's end of a `Hub`, with the interface of the bootstrap's exchange."""

    kind = "emulated"
    of = ""  # for messages: which communicator's ranks they count
    mpi_comm = None
    verb = "Init"  # what the user called, for messages; who exchanges bytes for another call sets it before

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.size = hub.size

    @property
    def group(self) -> int:
        """A number that its ranks have in common, and no others."""
        return id(self._hub)

    def allgather(self, data: bytes) -> list[bytes]:
        """Exchange bytes with all ranks."""
        hub = self._hub
        hub.slots[self.rank] = data
        self._meet()
        found = list(hub.slots)
        self._meet()  # nobody overwrites a slot that another still reads
        return found

    def split(self, color: int | None, key: int) -> "tuple[LocalExchange, tuple[int, ...]] | None":
        """Divide the ranks into parts, as the bootstrap's exchange does.

        Parameters
        ----------
        color
            Ranks that give the same come into one part; None: this rank comes into none.
        key
            Ranks of a part are in the order of their keys, then in that of this exchange.

        Returns
        -------
        (LocalExchange, tuple of int) or None
            The exchange of this rank's part, and for each of its ranks the rank in this exchange.
        """
        members, token = _bootstrap.part_of(
            self.verb, self.rank, self.allgather(_bootstrap.wish(self.verb, color, key))
        )
        if not members:
            return None
        return LocalExchange(self._hub.part(token, len(members)), members.index(self.rank)), members

    def _meet(self) -> None:
        hub = self._hub
        hub.arrivals[self.rank] += 1
        try:
            hub.barrier.wait(hub.timeout)
        except threading.BrokenBarrierError:
            if hub.abandoned:
                raise PeerLostError(
                    f"{self.verb}: rank {self.rank} waits for a rank that failed; see its exception"
                ) from None
            here = hub.arrivals[self.rank]
            hub.late = hub.late or [rank for rank, arrived in enumerate(hub.arrivals) if arrived < here]
            who = hub.late or "a rank"  # it may come this very moment
            raise TimeoutError(_bootstrap.late(self.verb, who, hub.timeout)) from None

    def abandon(self) -> None:
        """Let every rank that waits here or in a part of this, now or later, raise PeerLostError."""
        self._hub.abandon()

    def close(self, failed: bool = False) -> None:
        """Let nobody wait for this rank after a failure; else nothing is to be closed."""
        if failed:
            self.abandon()


class EmulatedMemory(Member):
    """One rank's view of memory that all emulated ranks share.

    Parameters
    ----------
    exchange
        This rank's end of the hub.
    segment
        Memory of all ranks, from `reserve`.
    """

    def __init__(self, exchange: LocalExchange, segment: Any) -> None:
        self.segment = segment
        super().__init__(exchange, tuple(range(exchange.size)), exchange.rank, segment.size // exchange.size, -1)


def open_ranks(hub: Hub, segment: Any, node_sizes: tuple[int, ...], build: Callable[[Any, Any, Any], Any]) -> list[Any]:
    """Call ``build(exchange, topology, memory)`` for every rank, each on a thread of its own; return what it gave.

    Parameters
    ----------
    hub
        Where they exchange bytes.
    segment
        Memory of all ranks.
    node_sizes
        Ranks on each node.
    build
        Collective over the exchange it is given.
    """
    identities = [f"node {number}".encode() for number, ranks in enumerate(node_sizes) for _ in range(ranks)]
    built: list[Any] = [None] * hub.size
    problems: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            exchange = LocalExchange(hub, rank)
            built[rank] = build(exchange, _topology.detect(rank, identities), EmulatedMemory(exchange, segment))
        except BaseException as exc:  # raised by the caller's thread below
            problems.append(exc)
            hub.abandon()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(hub.size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # no more threads, or Ctrl-C: those that have begun wait for nobody
        hub.abandon()
        raise
    if problems:
        raise problems[0]
    return built


def reserve(size: int, extent: int | None) -> Any:
    """Reserve address space for the heaps of `size` emulated ranks, or raise AllocationError."""
    each = (extent or min(EXTENT, physical_memory())) // PAGE * PAGE
    try:
        return _bootstrap.anonymous(each * size)
    except OSError as exc:
        raise AllocationError(f"memory of {size} ranks: {exc.strerror}") from exc


class DeviceSegment:
    """Memory of a GPU for all emulated ranks, which lives as long as anything refers to it.

    Its end may come at any time, from the garbage collector; to free it then would wait for kernels that wait for the
    very thread which collects. So it is put aside, and freed when no emulation runs: see `on_gpu`.

    Parameters
    ----------
    device
        The GPU.
    size
        Bytes.
    """

    def __init__(self, device: Any, size: int) -> None:
        self.device = device
        self.size = size
        with device:
            self.address = driver.allocate(size)
        weakref.finalize(self, when_none_runs, partial(_free, device, self.address)).atexit = False

    def reserve(self, offset: int, nbytes: int) -> None:
        """Nothing to take: the memory is there."""

    def release(self, offset: int, nbytes: int) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to do: the last reference ends it."""


_ended: list[Callable[[], None]] = []  # what gives back memory that nothing refers to any more
_running: set[object] = set()  # emulations on GPUs
_lock = threading.Lock()


def when_none_runs(act: Callable[[], None]) -> None:
    """Call a function when no emulation runs on a GPU: it may wait for all that runs there."""
    _ended.append(act)


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Hold back, while emulations run on a GPU, what may wait for them; one that a rank of another runs is among them.

    Kernels of the other ranks may wait for that very rank.
    """
    this = object()
    with _lock:
        _catch_up()
        _running.add(this)
    try:
        yield
    finally:
        with _lock:
            _running.remove(this)
            _catch_up()


def _catch_up() -> None:
    while _ended and not _running:
        with contextlib.suppress(Error):
            _ended.pop()()


def _free(device: Any, address: int) -> None:
    with device:
        driver.free(address)


def reserve_on(device: Any, size: int, extent: int | None) -> DeviceSegment:
    """Take a GPU's memory for the heaps of emulated ranks: by default half of what is free, 1 GiB each at most."""
    with device:
        free, _ = driver.memory_info()
    each = (extent or min(EXTENT, free // (2 * size))) // PAGE * PAGE
    return DeviceSegment(device, each * size)
