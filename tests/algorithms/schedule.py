"""Schedules run by plain Python on verbs that only take notes: who sends what to whom, and what is waited for."""

from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from types import SimpleNamespace

from nvcoll.algorithms import ALGORITHMS, Shape
from nvcoll.device import common
from nvcoll.device.common import BLOCK, around, everyone, fold, log2, unfold, without
from nvcoll.device.cuda import common as cuda_common
from nvcoll.device.groups import puts_in_turn, sharing, waits_in_turn

SEND, RECV, WORK, MEMBERS, OWNERS = (k << 40 for k in range(1, 6))  # addresses that nobody looks at


@dataclass
class Notes:
    """What one rank did in a call.

    Attributes
    ----------
    sent : list of (epoch, receiver, slot, bytes)
        Data it put into slots of others.
    sources : list of (address, changes)
        Where what was put at once lay, and how often accumulators had been changed by then.
    awaited : list of (epoch, sender or None, slot, bytes)
        Data it waited for in slots of its own; None where any sender will do.
    told, heard : list of (epoch, receiver, slot) and of (epoch, slot)
        Signals it gave and waited for.
    written : list of (first, last) bytes
        Parts of the result that it wrote itself.
    kept, changes : int
        Bytes of accumulators that it kept in its workspace, and how often it has changed accumulators.
    counted : int
        How often it counted the epoch.
    parts : dict
        Bytes put into slots that are not full yet.
    """

    sent: list = field(default_factory=list)
    sources: list = field(default_factory=list)
    awaited: list = field(default_factory=list)
    told: list = field(default_factory=list)
    heard: list = field(default_factory=list)
    written: list = field(default_factory=list)
    kept: int = 0
    changes: int = 0
    counted: int = 0
    parts: dict = field(default_factory=dict)

    def put(self, c, e, p, slot, source, nbytes):
        """Note data that are sent at once."""
        self.sent.append((e, p, slot, nbytes))
        self.sources.append((source, self.changes))

    def put_part(self, c, e, p, slot, offset, source, nbytes):
        """Note a part of what is sent."""
        assert offset == self.parts.get((e, p, slot), 0), "a part is left out, or sent twice"
        self.parts[e, p, slot] = offset + nbytes

    def put_end(self, c, e, p, slot):
        """Note that all parts were sent."""
        self.sent.append((e, p, slot, self.parts.pop((e, p, slot), 0)))

    def count_epoch(self, c, e):
        """Note that the epoch is counted."""
        self.counted += 1

    def keep(self, acc, nbytes):
        """Note that accumulators are changed, and how many there are, unless they are part of the result."""
        self.changes += 1
        if WORK <= acc < MEMBERS:
            self.kept = max(self.kept, acc - WORK + nbytes)


def run(name, rank, shape, capacity=1 << 62, direct=False, target="host", asks=True):
    """Run an algorithm's schedule for one rank and return its notes.

    `direct` if buffers are on the symmetric heap; `asks` if the protocol is one with which GPUs ask whether they are.
    """
    notes = Notes()
    vocabulary = SimpleNamespace(**verbs(rank, shape, capacity, direct, notes, target, asks))
    vocabulary.shallow = vocabulary
    kernel = ALGORITHMS[name].text_for(target)(vocabulary)
    kernel(None, SEND, RECV, shape.count)
    return notes


@dataclass
class Epochs:
    """Epochs as a target counts them: GPUs end one by a verb of its own."""

    target: str
    number: int = 0

    def begin(self, c):
        self.number += self.target == "host"
        return self.number + (self.target == "cuda")

    def advance(self, c, e):
        self.number += 1


@cache
def cuts(target, itemsize):
    """How a target cuts messages: its ``part_at`` and ``middle``, run by Python."""
    if target == "host":
        return {"part_at": common.part_at, "middle": common.middle}

    def jit(function):
        function.py_func = function
        return function

    facts = {"itemsize": itemsize, "width": itemsize, "words": 2, "widens": False, "finishes": False}
    nothing = dict.fromkeys(("widen", "reduce_pack", "finish"))
    found = cuda_common.verbs(jit, SimpleNamespace(**facts, **nothing), SimpleNamespace(take=None, give=None), True)
    return {"part_at": found.part_at, "middle": found.middle}


def verbs(rank, shape, capacity, direct, notes, target, asks):
    """What a schedule may use."""
    starts = list(accumulate(shape.node_sizes, initial=0))
    node = max(b for b, start in enumerate(starts[:-1]) if start <= rank)
    local_rank = rank - starts[node]
    members = range(starts[node], starts[node + 1])
    owners = [start + local_rank if local_rank < end - start else -1 for start, end in pairwise(starts)]
    tables = {MEMBERS: members, OWNERS: owners}
    epochs = Epochs(target)

    def load(address):
        return next((values[(address - at) // 8] for at, values in tables.items() if 0 <= address - at < 1 << 40), 0)

    def write(to, nbytes):
        if RECV <= to < WORK:
            notes.written.append((to - RECV, to - RECV + nbytes))

    def wait_all(c, e, k, me, slot, mine, n):
        notes.awaited.extend((e, None, slot + without(me, j), n * shape.itemsize) for j in range(k) if j != me)

    def wait_reduce_all(c, e, k, me, slot, mine, acc, n):
        wait_all(c, e, k, me, slot, mine, n)
        notes.keep(acc, n * shape.width)

    def wait_reduce_partials(c, e, k, me, slot, acc, n):
        notes.awaited.extend((e, None, slot + without(me, j), n * shape.width) for j in range(k) if j != me)
        notes.keep(acc, n * shape.width)

    def wait_reduce(c, e, lower, slot, acc, n):
        notes.awaited.append((e, None, slot, n * shape.width))
        notes.keep(acc, n * shape.width)

    def wait_reduce_finish(c, e, k, me, slot, mine, recv, n):
        wait_all(c, e, k, me, slot, mine, n)
        write(recv, n * shape.itemsize)

    def wait_copy(c, e, slot, to, nbytes):
        notes.awaited.append((e, None, slot, nbytes))
        write(to, nbytes)

    def wait_signal(c, e, slot):
        notes.heard.append((e, slot))
        return (0, 0) if direct else (-1, -1)

    constants = {
        "rank": rank,
        "size": shape.size,
        "nodes": len(shape.node_sizes),
        "node": node,
        "local_rank": local_rank,
        "node_size": len(members),
        "slices": shape.slices,
        "itemsize": shape.itemsize,
        "width": shape.width,
        "capacity": capacity,
        "widen": int(shape.width != shape.itemsize),
        "members": MEMBERS,
        "owners": OWNERS,
        "table": WORK,
        "blocks": WORK,
        "error": 0,
        "finish": int(shape.width != shape.itemsize),
    }
    found = {
        **{name: lambda c, value=value: value for name, value in constants.items()},
        "BLOCK": BLOCK,
        **cuts(target, shape.itemsize),
        "log2": log2,
        "around": around,
        "everyone": everyone,
        "fold": fold,
        "unfold": unfold,
        "without": without,
        "jit": lambda function: function,
        "begin": epochs.begin,
        "renew": epochs.advance,
        "load": load,
        "store": lambda address, value: None,
        "copy": lambda to, source, nbytes: None,
        "combine": lambda c, *_: None,
        "heap_of": lambda c, p: 0,
        "offset": lambda c, address, nbytes: 0 if direct else -1,
        "accumulators": lambda c, recv: recv if shape.width == shape.itemsize else WORK,
        "fill": lambda c, acc, source, n: notes.keep(acc, n * shape.width),
        "finish_to": lambda c, to, acc, n: write(to, n * shape.itemsize),
        "put": notes.put,
        "put_own": notes.put,
        "count_epoch": notes.count_epoch,
        "wait_copy": wait_copy,
        "wait_reduce": wait_reduce,
        "wait_all": wait_all,
        "wait_reduce_partials": wait_reduce_partials,
        "wait_reduce_finish": wait_reduce_finish,
        "reduce_direct": lambda c, *_: None,
        "private": lambda c: WORK,
        "meet": lambda e: None,
        "wait_reduce_all": wait_reduce_all,
        "ask": lambda c, e, p, source, nbytes: notes.sent.append((e, p, rank, nbytes)),
        "wait_asked": lambda c, e, k, me, mine, n: notes.awaited.extend(
            (e, j, j, n * shape.itemsize) for j in range(k) if j != me
        ),
        "answer_at": lambda c, e, p: 0,
        "answer_part": lambda c, e, p, *part: notes.put_part(c, e, p, shape.size + rank, *part),
        "answer_end": lambda c, e, p: notes.put_end(c, e, p, shape.size + rank),
        "wait_answer": lambda c, e, p, to, nbytes: wait_copy(c, e, shape.size + p, to, nbytes),
        "signal": lambda c, e, p, slot, *values: notes.told.append((e, p, slot)),
        "signal_all": lambda c, e, slot, *values: notes.told.extend(
            (e, p, slot + without(p, rank)) for p in range(shape.size) if p != rank
        ),
        "wait_signals": lambda c, e, slot: notes.heard.extend((e, slot + k) for k in range(shape.size - 1)),
        "told": lambda c, e, slot: (0, 0) if direct else (-1, -1),
        "thread": lambda: 0,
        "threads": lambda: 1,
        "any_of": lambda flag: flag,
        "signals": asks,
        "wait_signal": wait_signal,
    }
    known = SimpleNamespace(**found)
    group_of, wait_slices = puts_in_turn(known.jit, known, notes.put), waits_in_turn(known.jit, known, wait_copy)
    share, reduce_shared = sharing(known.jit, known, group_of(everyone)[1], wait_reduce_finish)
    own = {"group_of": group_of, "anywhere_of": group_of, "wait_slices": wait_slices}
    return found | own | {"share": share, "reduce_shared": reduce_shared}


def world(node_sizes, count=1, itemsize=4, width=None):
    """The shape of a call in a world of nodes of given sizes."""
    return Shape(tuple(node_sizes), count, itemsize, width or itemsize, min(node_sizes))
