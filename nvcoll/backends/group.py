"""What the backends of the host share: agreement among ranks, and a rank's part of symmetric memory."""

import os
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
