"""Processes of one host: POSIX shared memory, mapped by all, unlinked as soon as they have it.

One segment holds the heaps of a node's ranks side by side, so a peer's memory is at a constant distance. It is
address space only; pages are taken when memory is allocated, so that a full /dev/shm is an error and not a crash.
"""

import contextlib
import secrets
from typing import Any

from nvcoll import _bootstrap
from nvcoll.backends.group import Member, agree, physical_memory
from nvcoll.settings import PAGE

SPACE = 1 << 45
"""Most bytes of address space for the heaps of a node: a quarter of what a process has."""


class SharedMemory(Member):
    """One rank's view of the heaps of its node.

    Collective over `exchange`, which spans all nodes, so that a failure on one is an error on all.

    Parameters
    ----------
    exchange
        Byte exchange among all ranks.
    topology
        Which of them share a node.
    extent
        Bytes of address space for each rank; None for as much as there is physical memory, if all find room.
    """

    def __init__(self, exchange: Any, topology: Any, extent: int | None) -> None:
        members = topology.members
        size = (extent or min(physical_memory(), SPACE // len(members))) // PAGE * PAGE
        self.segment = _map(exchange, topology.local_rank, members, size * len(members))
        super().__init__(exchange, members, topology.local_rank, size, self.segment.fd)


def _map(exchange: Any, local_rank: int, members: tuple[int, ...], nbytes: int) -> Any:
    """Create the node's segment on its first rank, map it on all, and remove its name."""
    name, problem = f"/nvcoll-{secrets.token_hex(12)}", ""
    segment: Any = None
    if local_rank == 0:
        try:
            segment = _bootstrap.Segment.create(name, nbytes)
        except OSError as exc:
            problem = str(exc)
    try:
        names = agree(exchange, name.encode(), problem, "shared memory cannot be created")
        try:
            segment = segment or _bootstrap.Segment.open(names[members[0]].decode(), nbytes)
            segment.lock(local_rank)
        except OSError as exc:
            problem = str(exc)
        agree(exchange, b"", problem, "shared memory cannot be mapped")
    except BaseException:
        if segment is not None:
            segment.close()
        raise
    finally:
        if segment is not None:
            with contextlib.suppress(FileNotFoundError):  # who comes first does it: the rank that made it may be gone
                segment.unlink()
    return segment
