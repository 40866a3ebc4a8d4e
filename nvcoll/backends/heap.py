"""The symmetric heap: allocations at the same place on every rank, made and freed by all together.

Garbage collection never communicates: what a rank drops is queued, the queues travel with the next allocation or
free, and what every rank has dropped is freed then.
"""

import struct
import threading
from collections.abc import Callable
from typing import Any

from nvcoll.backends.group import Member, agree
from nvcoll.buffers import invalidate
from nvcoll.errors import AllocationError, MismatchError, StateError

ALIGN = 4096
"""Allocations begin at pages, so that memory can be given back to the system one by one."""
INIT = "Init"
"""The verb under which a communicator takes its scratch memory, before there are buffers that could be freed."""


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
            self._begin(verb)
            self._agree(verb, "a", nbytes)
            taken = max(1, -(-nbytes // ALIGN)) * ALIGN
            offset, problem = self._place(taken), ""
            more_heap, more_memory = _cures(verb)
            if offset is None:
                problem = f"needs {nbytes} bytes, the heap of {self.memory.extent} bytes has no such room; {more_heap}"
            else:
                try:
                    self.memory.take(offset, taken)
                except OSError as exc:
                    problem = f"needs {nbytes} bytes, the system says: {exc.strerror or exc}; {more_memory}"
            try:
                agree(self.memory.exchange, b"", problem, f"{verb}: out of memory")
            except AllocationError:
                if offset is not None:
                    self.memory.give(offset, taken)
                raise
            assert offset is not None
            self._count += 1
            self._pieces[self._count] = (offset, taken)
            return Piece(self, self._count, offset, nbytes)

    def free(self, piece: Piece) -> None:
        """Free an allocation on all ranks. Collective."""
        with self._lock:
            self._begin("free")
            self._agree("free", "f", piece.number)
            self._release(piece.number)

    def close(self) -> None:
        """Give everything back. Buffers become freed ones.

        While views of them live on, so does memory that can: to touch a view must not crash the process.
        """
        with self._lock:
            self._closed, self.finish = True, None
            self._pieces.clear()
            viewed = invalidate(self.memory.address(self.memory.place), self.memory.extent)
            if not (viewed and self.memory.lingers):
                self.memory.close()

    def retire(self) -> None:
        """Refuse to allocate and free from here on, but leave the memory where it is."""
        with self._lock:
            self._closed, self.finish = True, None

    def _begin(self, verb: str) -> None:
        if self._closed:
            raise StateError(f"{verb}: the heap was finalized; its buffers are gone")
        self.memory.exchange.verb = verb

    def _agree(self, verb: str, kind: str, value: int) -> None:
        """Check that all ranks do the same, and free what all of them have dropped."""
        mine = list(self.dropped)
        if mine and self.finish is not None:
            self.finish()
        data = struct.pack(f"<cq{len(mine)}q", kind.encode(), value, *mine)
        answers = [struct.unpack(f"<cq{(len(a) - 9) // 8}q", a) for a in self.memory.exchange.allgather(data)]
        for rank, answer in enumerate(answers):
            if answer[:2] != (kind.encode(), value):
                raise MismatchError(
                    f"{verb}: rank {self.memory.exchange.rank} {_did(kind.encode(), value)}, rank {rank} "
                    f"{_did(*answer[:2])}; allocate and free in the same order on all ranks"
                )
        for number in sorted(set.intersection(*(set(answer[2:]) for answer in answers))):
            self.dropped.remove(number)
            self._release(number)

    def _release(self, number: int) -> None:
        offset, taken = self._pieces.pop(number)
        self.memory.give(offset, taken)

    def _place(self, nbytes: int) -> int | None:
        """Return the first gap that is large enough."""
        end = 0
        for offset, taken in sorted(self._pieces.values()):
            if offset - end >= nbytes:
                return end
            end = offset + taken
        return end if self.memory.extent - end >= nbytes else None


def _cures(verb: str) -> tuple[str, str]:
    """Return what helps where the heap, and where the system, has no room."""
    if verb == INIT:
        return "raise NVCOLL_HEAP or lower NVCOLL_SCRATCH", "free some memory or lower NVCOLL_SCRATCH"
    return "free buffers or raise NVCOLL_HEAP", "free some memory"


def _did(kind: bytes, value: Any) -> str:
    """Describe what a rank asked of the heap."""
    if kind == b"c":  # what backends say when they close
        return "finalizes"
    return f"allocates {value} bytes" if kind == b"a" else f"frees allocation {value}"
