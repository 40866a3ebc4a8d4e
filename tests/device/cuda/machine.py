"""GPUs whose threads are threads of Python: kernels run as the text that they are, on stand-ins for the primitives.

    with machine() as gpus:
        world = World(gpus, "ring", "simple", (2, 1))
        results = world.run([(elements, elements of a piece, bytes between slots), ...], value)

Memory is made of words of 8 bytes, and an element is one, so that two make a pack. What Numba and the GPU's compiler
make of the text is not looked at here; who sends, waits, clears and reduces is, in whatever order threads come along.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest

from nvcoll._plan import DEVICE_FIELDS
from nvcoll.algorithms import ALGORITHMS
from nvcoll.device.common import log2
from nvcoll.device.cuda import common, packs, ptx, remote, verbs
from nvcoll.device.cuda.layout import EPOCH, EPOCHS, HISTORY
from tests.device.cuda.barrier import Barrier

WORD = 8
BLOCKS = 2
SPACE = 1 << 32
"""Bytes between the memories of ranks, and between what is laid out in one."""
SLOTS = 1 << 18
"""Bytes of a block's slots."""
FIRST_PE = 6  # what NVSHMEM calls rank 0: a communicator may have some of its ranks only
BEHIND = 0x0DDBA11
"""What lies behind every array: it may be loaded with the end of a message, but must not count, nor be stored to."""
FIELDS = {"flags": 4096, "cells": 1 << 20, "lines": 1 << 24, "data": 1 << 28}
"""Where parts of an area begin."""


class End(BaseException):
    """A thread ends by an instruction of its own."""


def same_stamp(call, rank):
    """Let all ranks make the same calls."""
    return 5


def signed(x):
    """Return 64 bits as the number that kernels see."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


class Gpus:
    """The memory that all share, and the primitives on it."""

    def __init__(self, clock):
        self.memory = {}
        self.tables = set()  # addresses of what nobody changes
        self.stored = []  # (rank, address) of every store, in order
        self.looked = {}  # thread -> how many stores there had been when it first looked for what others send
        self.me = threading.local()
        self.me.entered = True  # whether the launch before has ended for this thread
        self.clock = clock

    def load(self, at):
        assert at % WORD == 0
        assert self.me.entered or at in self.tables
        return signed(self.memory.get(at, 0))

    def store(self, at, value):
        assert at % WORD == 0
        assert self.me.entered
        self._delay()
        self.memory[at] = signed(value)
        self.stored.append((self.me.rank, at))

    def poll(self, at):
        time.sleep(2e-5)  # whoever is waited for runs meanwhile
        return self.load(at)

    def load_pack(self, at):
        assert at % (2 * WORD) == 0
        return self.load(at), self.load(at + WORD)

    def store_pack(self, at, pack):
        assert at % (2 * WORD) == 0
        self.store(at, pack[0])
        self.store(at + WORD, pack[1])

    def poll_pack(self, at):
        assert at % (2 * WORD) == 0
        self.looked.setdefault((self.me.rank, self.me.block, self.me.thread), len(self.stored))
        return self.poll(at), self.load(at + WORD)

    def add(self, at, value):
        self.store(at, self.load(at) + value)

    def store_all(self, at, end, step, value):
        for place in range(at, end, step):
            self.store(place, value)

    def meet(self, e):
        if self.me.barrier.wait(e >= 0) != self.me.threads:
            raise End

    def leave(self):
        raise End

    def take(self, at, nbytes):
        return tuple(self.load(at + WORD * k) if WORD * k < nbytes else 0 for k in range(2))

    def give(self, at, pack, nbytes):
        for k in range(min(2, nbytes // WORD)):
            self.store(at + WORD * k, pack[k])

    def mapped(self, to, pe):
        return self._there(to, pe) if pe % 2 else 0  # whether it is changes when stores are fenced, no more

    def begin_put(self, to, source, nbytes, pe):
        self.me.barrier.wait()
        if self.me.thread == 0:
            for k in range(0, nbytes, WORD):
                self.store(self._there(to, pe) + k, self.load(source + k))
        self.me.barrier.wait()

    def begin_put_signal(self, to, source, nbytes, flag, tag, pe):
        self.begin_put(to, source, nbytes, pe)
        if self.me.thread == 0:
            self.store(self._there(flag, pe), tag)

    def _there(self, to, pe):
        """Return another rank's counterpart of an address of mine."""
        return to + SPACE * (pe - FIRST_PE - self.me.rank)

    def _delay(self):
        if self.me.random.random() < 0.01:
            time.sleep(self.me.random.random() * self.me.slow)

    def primitives(self):
        """Return what takes the place of the names in `ptx`."""
        me = self.me
        return {
            "load": self.load, "load_relaxed": self.load, "load_acquire": self.poll, "load_pack": self.load_pack,
            "load_shared": self.poll_pack, "store": self.store, "store_relaxed": self.store,
            "store_pack": self.store_pack, "store_shared": self.store_pack,
            "store_all": self.store_all, "add": self.add, "fence": lambda: None, "prefetch": lambda at: None,
            "sync": lambda: me.barrier.wait() and None,
            "any_of": lambda flag: me.barrier.wait(flag) > 0, "meet": self.meet, "leave": self.leave,
            "thread": lambda: me.thread, "threads": lambda: me.threads, "block": lambda: me.block,
            "clock": self.clock, "field": lambda index: lambda c: c[index],
            "chosen": lambda indices: lambda c, k: c[indices[k]],
            "settled": lambda value: value, "pinned": lambda value: value, "log2": log2,
            "await_predecessor": lambda: setattr(me, "entered", True), "let_successor": lambda: None,
        }  # fmt: skip


@contextmanager
def machine(clock: Callable[[], int] = time.monotonic_ns) -> Iterator[Gpus]:
    """Let kernels that are made inside run on threads of Python; the clock counts nanoseconds."""
    gpus = Gpus(clock)
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in gpus.primitives().items():
            patch.setattr(ptx, name, stand_in)
        for name in ("mapped", "begin_put", "begin_put_signal"):
            patch.setattr(remote, name, getattr(gpus, name))
        patch.setattr(remote, "landed", lambda flag, tag: None)
        patch.setattr(packs, "partial", lambda unit: SimpleNamespace(take=gpus.take, give=gpus.give))
        yield gpus


def jit(function):
    """Leave a device function as it is."""
    function.py_func = function
    return function


def arithmetic(combine, *, widens):
    """Elements of a word, and accumulators of one or two, whose second stays 0."""

    def reduce(left, right):
        return tuple(0 if widens and k % 2 else combine(*pair) for k, pair in enumerate(zip(left, right, strict=True)))

    return SimpleNamespace(
        op="SUM", datatype="int64", accumulator="int64", itemsize=WORD, width=2 * WORD if widens else WORD,
        words=4 if widens else 2, unit=WORD, widens=widens, finishes=widens, ordered=True,
        reduce=reduce, reduce_pack=reduce, widen=lambda pack: (pack[0], 0, pack[1], 0) if widens else pack,
        finish=lambda acc, ranks: (acc[0], acc[2]) if widens else acc,
    )  # fmt: skip


class World:
    """Ranks with a kernel, which they call again and again.

    Parameters
    ----------
    gpus
        What `machine` gives.
    algorithm, protocol
        Names.
    node_sizes
        Ranks on each node.
    threads
        Of a block; a launch has `BLOCKS` blocks.
    deep, widens
        Whether threads have several packs under way, and whether accumulators are wider than elements.
    symmetric
        Whether buffers lie in the symmetric heap.
    far
        Whether ranks of other nodes are reached by puts only.
    combine
        What reduces two words; by default it adds them.
    timeout
        Nanoseconds of a wait.
    """

    def __init__(
        self, gpus, algorithm, protocol, node_sizes, *, threads=2, deep=False, widens=False,
        symmetric=False, far=False, combine=lambda left, right: signed(left + right), timeout=60 * 10**9,
    ):  # fmt: skip
        self.gpus, self.threads, self.ranks, self._symmetric = gpus, threads, range(sum(node_sizes)), symmetric
        self.node_sizes, one = node_sizes, ALGORITHMS[algorithm]
        a = arithmetic(combine, widens=widens)
        v = verbs.vocabulary(jit, a, protocol, deep, far)
        self._kernel = verbs.entry(jit, v, a, one.text_for("cuda"), one.rounds, overlap=True, opens=one.opens)
        self._fields = [self._lay_out(rank, node_sizes, timeout, far) for rank in self.ranks]
        self.ended = set()

    def _lay_out(self, rank, node_sizes, timeout, far):
        """Fill a rank's tables and return the fields of its calls that stay the same."""
        n = len(self.ranks)
        starts = list(accumulate(node_sizes, initial=0))
        node = max(b for b, start in enumerate(starts[:-1]) if start <= rank)
        inside = range(starts[node], starts[node + 1])
        areas = [remote.number_of(FIRST_PE + k) if far and k not in inside else self._place(0, k) for k in self.ranks]
        members, owners, peers, state, report, workspace = (self._place(1, rank) + (k << 20) for k in range(6))
        mine = rank - starts[node]
        alike = [start + mine if mine < end - start else -1 for start, end in pairwise(starts)]
        for at, table in ((members, inside), (owners, alike), (peers, areas)):
            for k, value in enumerate(table):
                self.gpus.memory[at + WORD * k] = value
                self.gpus.tables.add(at + WORD * k)
        fields = {
            "ranks": n, "rank": rank, "size": n, "nodes": len(node_sizes), "node": node,
            "local_rank": mine, "node_size": node_sizes[node], "slices": min(node_sizes),
            "members": members, "owners": owners, "peers": peers, "state": state, "report": report, "timeout": timeout,
            "board": areas[rank], "flags_half": 1 << 16, "flags_block": 1 << 14, "slots_half": 4 * SLOTS,
            "slots_block": SLOTS, "workspace": workspace, "workspace_block": SLOTS, "heap": self._place(3, rank),
            "heap_size": SPACE if self._symmetric else 0,
        }  # fmt: skip
        near = {f"peer{k}": areas[k] if k < n else 0 for k in range(8)}
        return FIELDS | fields | near

    @staticmethod
    def _place(kind, rank):
        return SPACE * (1 + 100 * kind + rank)

    def fail(self, rank):
        """Mark a rank as one that has given up, as its kernels do."""
        for block in range(BLOCKS):
            self.gpus.memory[self.epoch_at(rank, block) + WORD] = common.FAILED

    def histories(self):
        """Return, by rank, the two words that differ where calls did."""
        places = [self._fields[rank]["state"] + HISTORY for rank in self.ranks]
        return [(self.gpus.load(at), self.gpus.load(at + WORD)) for at in places]

    @staticmethod
    def part(count):
        """Return the elements of a block, in whole packs; the last one may have less."""
        return -(-count // (2 * BLOCKS)) * 2

    def epoch_at(self, rank, block):
        """Return where a block's epoch lies."""
        return self._fields[rank]["state"] + EPOCHS + EPOCH * block

    def epochs(self, rank):
        """Return the epochs of a rank's blocks."""
        return [self.gpus.load(self.epoch_at(rank, block)) for block in range(BLOCKS)]

    def sent(self):
        """Return what went to areas of other ranks, as often as it was stored: by whom, and where."""
        areas = {rank: range(self._place(0, rank), self._place(0, rank) + SPACE) for rank in self.ranks}
        return [(who, at) for who, at in self.gpus.stored if any(at in areas[p] for p in self.ranks if p != who)]

    def reached(self, stride):
        """Return how many slots of a block were stored to at most, if all calls had their slots at this stride."""
        areas = range(self._place(0, 0), self._place(0, len(self.ranks)))
        stored = [at for _, at in self.gpus.stored if at in areas and at % SPACE >= FIELDS["cells"]]
        return max(at % SLOTS for at in stored) // stride + 1

    def arrived(self, rank, first=0, last=SPACE):
        """Return what is not 0 in a rank's area, between two offsets, by its address."""
        area = range(self._place(0, rank) + first, self._place(0, rank) + last)
        return {at: word for at, word in self.gpus.memory.items() if word and at in area}

    def compare_histories(self):
        """Reduce the two words of all ranks, as a barrier does, and return the result of each."""
        places = {rank: (self._fields[rank]["state"] + HISTORY, self._place(4, rank)) for rank in self.ranks}
        self._start([(2, 100, 1024)], {(0, rank): place for rank, place in places.items()}, self.ranks, 0, same_stamp)
        return [(self.gpus.load(to), self.gpus.load(to + WORD)) for _, to in places.values()]

    def run(self, calls, value, ranks=None, seed=0, stamp=same_stamp):
        """Make calls, one right after the other, and return the result of each on each rank that came to its end.

        Parameters
        ----------
        calls
            Elements, elements of a block in one piece, and bytes between slots of each call. Every other call is in
            place; buffers begin on boundaries of packs, or in the middle of one, by turns. Now and then those of the
            first rank do not lie in the symmetric heap.
        value
            ``value(call, rank, i)`` gives the elements of contributions.
        ranks
            Who takes part; all by default.
        seed
            Of the threads' delays.
        stamp
            ``stamp(call, rank)`` gives what says which call it is.
        """
        buffers = {}
        for call, (count, _, _) in enumerate(calls):
            for rank in self.ranks:
                elsewhere = rank == 0 and call % 8 == 5
                at = self._place(4 if elsewhere else 3, rank) + (call << 20) + WORD * (call // 2 % 2)
                buffers[call, rank] = at, at if call % 2 else at + (1 << 19) + WORD * (call // 4 % 2)
                ends = [place + WORD * (count + k) for place in buffers[call, rank] for k in range(2)]
                self.gpus.memory |= dict.fromkeys(ends, BEHIND)
                self.gpus.memory |= {at + WORD * i: value(call, rank, i) for i in range(count)}
        self._start(calls, buffers, self.ranks if ranks is None else ranks, seed, stamp)
        for (call, _), places in buffers.items():
            for place in places:
                assert [self.gpus.memory[place + WORD * (calls[call][0] + k)] for k in range(2)] == [BEHIND] * 2
        return {
            key: [self.gpus.memory.get(to + WORD * i) for i in range(calls[key[0]][0])]
            for key, (_, to) in buffers.items()
        }

    def _start(self, calls, buffers, ranks, seed, stamp):
        """Let threads make calls between buffers, given by call and rank, and wait for them."""
        self.ended.clear()
        crew = []
        for rank in ranks:
            for block in range(BLOCKS):
                barrier = Barrier(self.threads)
                for thread in range(self.threads):
                    place = rank, block, thread
                    job = threading.Thread(
                        target=self._work, args=(calls, buffers, barrier, place, seed, stamp), daemon=True
                    )
                    crew.append(job)
        for job in crew:
            job.start()
        for job in crew:
            job.join(60)
            assert not job.is_alive(), "a thread hangs"

    def _work(self, calls, buffers, barrier, place, seed, stamp):
        """Be one thread of one rank in all calls."""
        rank, block, thread = place
        me = self.gpus.me
        me.rank, me.thread, me.threads, me.block, me.barrier = rank, thread, self.threads, block, barrier
        me.random = random.Random(f"{seed} {place}")
        me.slow = random.Random(f"{seed} {rank}").choice((1e-4, 1e-3, 3e-3))
        try:
            for call, (count, capacity, stride) in enumerate(calls):
                send, recv = buffers[call, rank]
                own = {"send": send, "recv": recv, "count": count, "part": self.part(count), "stamp": stamp(call, rank)}
                fields = self._fields[rank] | own | {"capacity": capacity, "stride": stride}
                me.entered = False
                self._kernel(*(fields[name] for name in DEVICE_FIELDS))
                barrier.wait()  # the next launch of a stream begins when all of this one have ended
        except End:
            self.ended.add(place)
        finally:
            barrier.leave()
