"""The symmetric heap: allocations at the same place on every rank, made and freed by all together.

Garbage collection never communicates: what a rank drops is queued, the queues travel with the next allocation or
free, and what every rank has dropped is freed then.
"""

import mmap
import struct
import threading
from collections.abc import Callable
from typing import Any

from nvcoll.backends.group import Member, agree
from nvcoll.buffers import invalidate
from nvcoll.errors import MismatchError, StateError

ALIGN = max(4096, mmap.PAGESIZE)
"""Allocations begin at pages, so that memory can be given back to the system one by one, and is of zeros afterwards."""
MOMENT = 0.2
"""Seconds that the end waits for threads which allocate or free, and may be about to be done."""
DOES = {"a": "allocates {} bytes", "f": "frees allocation {}", "e": "frees the communicator"}
"""What ranks tell each other here, by the letter with which it begins."""
OTHERS = {"c": "finalizes", "s": "makes communicators"}
"""What ranks may tell that are elsewhere meanwhile."""
SETTING_UP = ("Init", "Dup", "Split", "Split_type")
"""Verbs under which a communicator takes its scratch memory; all others are for buffers."""


class Piece:
    """An allocation: `address` and `nbytes` on this rank, at `offset` in the heaps of all."""

    def __init__(self, heap: "Heap", number: int, offset: int, nbytes: int) -> None:
        self._heap = heap
        self.number = number
        self.offset = offset
        self.nbytes = nbytes
        self.address = heap.memory.address(heap.memory.place) + offset

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._heap.free(self)

    def drop(self) -> None:
        """Queue the memory to be given back. Never communicates; safe in a finalizer."""
        self._heap.dropped.append(self.number)


class Heap:
    """The allocator of a communicator's memory. Deterministic: all ranks come to the same offsets.

    Parameters
    ----------
    memory
        The backend's memory.
    """

    def __init__(self, memory: Member) -> None:
        self.memory = memory
        self.dropped: list[int] = []  # appended to by finalizers, at any time, on any thread
        self.finish: Callable[[], None] | None = None  # waits for calls that may still use what was dropped
        self._pieces: dict[int, tuple[int, int]] = {}  # number -> (offset, bytes taken)
        self._count = 0
        self._closed = False
        self._lock = threading.Lock()
        self._mark = object()  # by which the room knows this heap: to refer to it would keep all memory alive

    def allocate(self, nbytes: int, verb: str = "empty") -> Piece:
        """Allocate memory on all ranks. Collective.

        Raises
        ------
        AllocationError
            On all ranks, if one of them has no room.
        MismatchError
            On all ranks, if they ask for different sizes.
        """
        with self._lock:
            what = self._begin(verb)
            taken = max(1, -(-nbytes // ALIGN)) * ALIGN
            offset = None
            while offset is None:
                offset = self._take(what, nbytes, taken, self._agree(what, "a", nbytes), _cures(verb))
            self._count += 1
            self._pieces[self._count] = (offset, taken)
            return Piece(self, self._count, offset, nbytes)

    def _take(
        self, verb: str, nbytes: int, taken: int, others: set[tuple[int, int]], cures: tuple[str, str]
    ) -> int | None:
        """Take the same range on all ranks, where what `others` have is on none; None if one of them was quicker.

        Raises AllocationError on all ranks if one of them has no room.
        """
        memory, offset, problem, mine = self.memory, self._place(taken, others), "", False
        more_heap, more_memory = cures
        if offset is None:
            problem = f"needs {nbytes} bytes, the heap of {memory.extent} bytes has no such room; {more_heap}"
        elif memory.room.take(offset, taken, self._mark):  # else another thread has, for another communicator
            mine = True
            try:
                memory.take(offset, taken)
            except OSError as exc:
                problem = f"needs {nbytes} bytes, the system says: {exc.strerror or exc}; {more_memory}"
        everyone: list[bytes] = []
        try:
            everyone = agree(memory.exchange, bytes([mine]), problem, f"{verb}: out of memory")
        finally:
            if mine and set(everyone) != {b"\1"}:
                self._give(offset, taken)
        return offset if set(everyone) == {b"\1"} else None

    def free(self, piece: Piece) -> None:
        """Free an allocation on all ranks. Collective."""
        with self._lock:
            self._agree(self._begin("free"), "f", piece.number)
            self._release(piece.number)

    def give_back(self, verb: str, done: bool = True) -> None:
        """Free everything on all ranks, and end: the memory stays with those who have it in common. Collective.

        Buffers are gone in any case. If a rank is not `done` with the memory, none gives it back.
        """
        with self._lock:
            what, address = self._begin(verb), self.memory.address(self.memory.place)
            self._closed, self.finish = True, None
            for offset, taken in self._pieces.values():
                invalidate(address + offset, taken)
            self._agree(what, "e", 0)
            if set(self.memory.exchange.allgather(bytes([done]))) == {b"\1"}:
                for number in [*self._pieces]:
                    self._release(number)

    def close(self) -> None:
        """Give everything back. Buffers become freed ones.

        While views of them live on, so does memory that can: to touch a view must not crash the process. So it does
        where another thread waits for the other ranks in here, which may be for long.
        """
        self.retire()
        if not self._lock.acquire(timeout=MOMENT):
            return
        try:
            self._pieces.clear()
            viewed = invalidate(self.memory.address(self.memory.place), self.memory.extent)
            if not (viewed and self.memory.lingers):
                self.memory.close()
        finally:
            self._lock.release()

    def retire(self) -> None:
        """Refuse to allocate and free from here on, but leave the memory where it is."""
        self._closed, self.finish = True, None

    def _begin(self, verb: str) -> str:
        """Return what the call is, for messages: the verb, and of which communicator if that was made from another."""
        if self._closed:
            raise StateError(f"{verb}: the heap was given back; its buffers are gone")
        exchange = self.memory.exchange
        exchange.verb = verb + exchange.of
        return str(exchange.verb)

    def _agree(self, verb: str, kind: str, value: int) -> set[tuple[int, int]]:
        """Check that all ranks do the same, and free what all of them have dropped.

        Returns (offset, bytes) of what other communicators have taken of the heap of any of the ranks.
        """
        mine = list(self.dropped)
        if mine and self.finish is not None:
            self.finish()
        beside = [number for taken in self.memory.room.beside(self._mark) for number in taken]
        data = struct.pack(f"<cqq{len(mine) + len(beside)}q", kind.encode(), value, len(mine), *mine, *beside)
        answers = [_read(answer) for answer in self.memory.exchange.allgather(data)]
        for rank, (its, number, _, _) in enumerate(answers):
            if (its, number) != (kind, value):
                raise MismatchError(
                    f"{verb}: rank {self.memory.exchange.rank} {_did(kind, value)}, rank {rank} {_did(its, number)}; "
                    "allocate and free in the same order on all ranks"
                )
        for number in sorted(set.intersection(*(dropped for _, _, dropped, _ in answers))):
            self.dropped.remove(number)
            self._release(number)
        return set().union(*(others for _, _, _, others in answers))

    def _release(self, number: int) -> None:
        self._give(*self._pieces.pop(number))

    def _give(self, offset: Any, taken: int) -> None:
        self.memory.give(offset, taken)
        self.memory.room.give(offset)

    def _place(self, nbytes: int, others: set[tuple[int, int]]) -> int | None:
        """Return the first gap that is large enough."""
        end = 0
        for offset, taken in sorted([*self._pieces.values(), *others]):
            if offset - end >= nbytes:
                return end
            end = max(end, offset + taken)  # those of several ranks may overlap
        return end if self.memory.extent - end >= nbytes else None


def _read(answer: bytes) -> tuple[str, Any, set[int], set[tuple[int, int]]]:
    """Return what a rank told: what it does, with which number, what it dropped, and what others have taken there."""
    if answer[:1] not in {kind.encode() for kind in DOES}:
        return answer[:1].decode(), 0, set(), set()
    kind, value, dropped, *numbers = struct.unpack(f"<cqq{(len(answer) - 17) // 8}q", answer)
    taken = numbers[dropped:]
    return kind.decode(), value, set(numbers[:dropped]), {*zip(taken[::2], taken[1::2], strict=True)}


def _cures(verb: str) -> tuple[str, str]:
    """Return what helps where the heap, and where the system, has no room."""
    if verb in SETTING_UP:
        return "raise NVCOLL_HEAP or lower NVCOLL_SCRATCH", "free some memory or lower NVCOLL_SCRATCH"
    return "free buffers or raise NVCOLL_HEAP", "free some memory"


def _did(kind: str, value: Any) -> str:
    """Describe what a rank asked of the heap."""
    return DOES[kind].format(value) if kind in DOES else OTHERS.get(kind, "calls something else")
