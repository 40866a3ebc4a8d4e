"""Calls of Allreduce as data: made on emulated ranks, and judged against the reference.

``from tests.algorithms.calls import Call, judge``
"""

import time
from dataclasses import dataclass

import numpy as np

import nvcoll
from nvcoll.ops import DATATYPES, OPS
from tests.algorithms.orders import exact
from tests.oracle import assert_reduced, random_data

GUARD = 128
FILL = 0xA5
RING_ROUND = 560  # elements that a ring takes in one round with any scratch memory these tests give it


@dataclass(frozen=True)
class Place:
    """Where a rank has its arrays: on the symmetric heap or not, one array or two, so many bytes off alignment."""

    send: str
    recv: str | None = None  # None: in place
    shift: int = 0

    def __str__(self):
        return f"{self.send} {f'to {self.recv}' if self.recv else 'in place'}{' unaligned' if self.shift else ''}"


PLACES = (
    Place("plain", "plain"),
    Place("plain"),
    Place("symmetric", "symmetric"),
    Place("symmetric"),
    Place("symmetric", "plain"),
    Place("plain", "symmetric"),
    Place("plain", "plain", shift=1),
    Place("symmetric", shift=3),
)


@dataclass(frozen=True)
class Call:
    """A collective call. Rank r has its arrays at ``places[r % len(places)]``; `delays` are (rank, seconds)."""

    algorithm: str | None
    datatype: str
    op: str
    count: int
    places: tuple[Place, ...] = PLACES[:1]
    delays: tuple[tuple[int, float], ...] = ()

    def __str__(self):
        where = ", ".join(map(str, self.places))
        return f"{self.op} of {self.count} {self.datatype} by {self.algorithm}, {where}"

    @property
    def nbytes(self):
        return self.count * DATATYPES[self.datatype].itemsize


class Framed:
    """An array of `count` elements in `memory`, with guards before and behind it."""

    def __init__(self, memory, count, dtype, shift):
        first = GUARD + shift
        end = first + count * dtype.itemsize
        memory = memory[: end + GUARD]
        memory.fill(FILL)
        self.guards = memory[:first], memory[end:]
        self.array = memory[first:end].view(dtype)

    @staticmethod
    def size(nbytes):
        return nbytes + 3 * GUARD

    def intact(self):
        return all((guard == FILL).all() for guard in self.guards)


def inputs(call, seed, rank):
    """What a rank puts in; equal for equal arguments."""
    return random_data(np.random.default_rng([seed, rank]), call.datatype, call.op, call.count)


def make(comm, calls, seed):
    """Make the calls on one rank; return each result, or what went wrong on this rank, as a string."""
    room = Framed.size(max(call.nbytes for call in calls))
    room += -room % 64
    # Symmetric arrays lie at other offsets on every rank.
    heap = np.asarray(comm.empty(2 * room + 64 * 7, np.uint8))[64 * (comm.rank % 7) :]
    private = np.empty(2 * room, np.uint8)
    memory = {"symmetric": heap, "plain": private}
    outcome = []
    for number, call in enumerate(calls):
        try:
            outcome.append(make_one(comm, call, memory, room, inputs(call, seed + number, comm.rank)))
        except BaseException as exc:
            exc.add_note(f"in call {number}: {call}")
            raise
    return outcome


def make_one(comm, call, memory, room, data):
    place = call.places[comm.rank % len(call.places)]
    send = Framed(memory[place.send], call.count, data.dtype, place.shift)
    recv = Framed(memory[place.recv][room:], call.count, data.dtype, place.shift) if place.recv else send
    send.array[...] = data
    time.sleep(dict(call.delays).get(comm.rank, 0))
    arrays = (send.array, recv.array) if place.recv else (send.array,)
    comm.Allreduce(*arrays, op=OPS[call.op], algorithm=call.algorithm)
    if not (send.intact() and recv.intact()):
        return f"wrote beyond its array on rank {comm.rank}"
    if place.recv and send.array.tobytes() != data.tobytes():
        return f"changed its input on rank {comm.rank}"
    return recv.array.copy()


def judge(calls, size, nodes=None, seed=0):
    """Make calls on emulated ranks and fail with a list of those that went wrong."""
    outcomes = nvcoll.emulate(size, nodes).run(make, calls, seed)
    node_sizes = nvcoll.emulate(size, nodes).node_sizes
    faults = []
    for number, (call, *results) in enumerate(zip(calls, *outcomes, strict=True)):
        given = [inputs(call, seed + number, rank) for rank in range(size)]
        if found := fault(call, results, given, node_sizes):
            faults.append(f"call {number}, {call}: {found}")
    assert not faults, f"{len(faults)} of {len(calls)} calls on {node_sizes} ranks:\n" + "\n".join(faults[:20])


def fault(call, results, given, node_sizes, ordered=True):
    """What is wrong with the results of all ranks, or None; `ordered`: `orders` knows in which order they combined."""
    told = [result for result in results if isinstance(result, str)]
    if told:
        return told[0]
    if len({result.tobytes() for result in results}) > 1:
        return "ranks have different results"
    if len(given) == 1:  # nothing is combined: logical operators make no 1 of a 2 either
        return None if results[0].tobytes() == given[0].tobytes() else "not what the only rank put in"
    try:
        assert_reduced(results[0], given, call.op, call.datatype)
    except AssertionError as exc:
        return str(exc)
    if ordered and call.algorithm and not (call.algorithm.startswith("ring") and call.count > RING_ROUND):
        expected = exact(call, given, node_sizes)
        if expected is not None and expected.tobytes() != results[0].tobytes():
            return "not the bits that the documented order gives"
    return None
