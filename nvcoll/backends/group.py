"""What backends share: agreement among ranks, a rank's view of symmetric memory, and of a part of its ranks."""

import os
import threading
from collections.abc import Sequence
from typing import Any

from nvcoll.errors import AllocationError, Error


def physical_memory() -> int:
    """Return the bytes of memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def agree(exchange: Any, data: bytes, problem: str, what: str, kind: type[Error] = AllocationError) -> list[bytes]:
    """Exchange bytes, and raise an error of `kind` on all ranks if any of them has a problem.

    The message names the first rank with a problem, and what it said.
    """
    found = exchange.allgather(bytes([bool(problem)]) + (problem.encode() if problem else data))
    for rank, answer in enumerate(found):
        if answer[0]:
            raise kind(f"{what}: rank {rank}: {answer[1:].decode(errors='replace')}")
    return [answer[1:] for answer in found]


class Room:
    """What is taken of a rank's heap, by whichever of the communicators that have it in common."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[int, object]] = {}  # offset -> (bytes, who)
        self._lock = threading.Lock()

    def take(self, offset: int, nbytes: int, who: object) -> bool:
        """Take a range, unless part of it is taken already."""
        with self._lock:
            free = all(offset + nbytes <= at or at + size <= offset for at, (size, _) in self._taken.items())
            if free:
                self._taken[offset] = nbytes, who
        return free

    def give(self, offset: int) -> None:
        """Give back what was taken at an offset."""
        with self._lock:
            del self._taken[offset]

    def beside(self, who: object) -> list[tuple[int, int]]:
        """Return (offset, bytes) of what all others have taken, in as few ranges as there can be."""
        with self._lock:
            taken = sorted((at, size) for at, (size, its) in self._taken.items() if its is not who)
        found: list[tuple[int, int]] = []
        for at, size in taken:
            first, before = found.pop() if found and sum(found[-1]) == at else (at, 0)
            found.append((first, before + size))
        return found


class Member:
    """A rank's memory in a node: `segment` holds the heaps of all members side by side.

    Parameters
    ----------
    exchange
        Byte exchange among all ranks of the world.
    members
        World ranks of the node, in the order of their heaps.
    place
        Which of them this is.
    extent
        Bytes of each heap.
    descriptor
        File descriptor whose record locks tell which members live, or -1.
    """

    segment: Any
    lingers = True
    """Whether `close` may be left out and all goes with the last view of it, at any time; else ranks close together."""

    def __init__(self, exchange: Any, members: tuple[int, ...], place: int, extent: int, descriptor: int) -> None:
        self.exchange = exchange
        self.members = members
        self.place = place
        self.extent = extent
        self.descriptor = descriptor
        self.room = Room()
        self.origins = tuple(range(len(members)))
        """Of each member, its place in the memory as it was opened: so record locks and NVSHMEM know it."""

    def address(self, place: int) -> int:
        """Return where the heap of a member begins."""
        return int(self.segment.address) + place * self.extent

    def take(self, offset: int, nbytes: int) -> None:
        """Take memory for a range of this rank's heap, or raise OSError."""
        self.segment.reserve(self.place * self.extent + offset, nbytes)

    def give(self, offset: int, nbytes: int) -> None:
        """Give the memory of a range back to the system."""
        self.segment.release(self.place * self.extent + offset, nbytes)

    def close(self) -> None:
        """Unmap everything."""
        self.segment.close()


class Part(Member):
    """The same memory for fewer ranks: what `memory` is to all of them.

    Parameters
    ----------
    memory
        The memory, or a part of it.
    exchange
        Byte exchange among the fewer ranks.
    ranks
        Of each of them, its rank in the world that `memory` belongs to.
    """

    def __init__(self, memory: Member, exchange: Any, ranks: Sequence[int]) -> None:
        places = {rank: place for place, rank in enumerate(memory.members)}
        mine = [(member, places[rank]) for member, rank in enumerate(ranks) if rank in places]
        members = tuple(member for member, _ in mine)
        super().__init__(exchange, members, members.index(exchange.rank), memory.extent, memory.descriptor)
        self._opened: Member = memory._opened if isinstance(memory, Part) else memory
        self.room = memory.room
        self.origins = tuple(memory.origins[place] for _, place in mine)

    def address(self, place: int) -> int:
        """Return where the heap of a member begins."""
        return self._opened.address(self.origins[place])

    def take(self, offset: int, nbytes: int) -> None:
        """Take memory for a range of this rank's heap, or raise OSError."""
        self._opened.take(offset, nbytes)

    def give(self, offset: int, nbytes: int) -> None:
        """Give the memory of a range back to the system."""
        self._opened.give(offset, nbytes)

    def close(self) -> None:
        """Nothing to do: the memory belongs to the world that was opened with it."""
