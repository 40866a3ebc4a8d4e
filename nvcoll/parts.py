"""What worlds on hosts and on GPUs have in common: one that was opened may have parts, of some of its ranks.

A part has an exchange, a scratch area and an end of its own; memory, kernels and GPU are those of the whole. Parts of a
part belong to the whole, too.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from nvcoll import _topology
from nvcoll.backends.group import Part
from nvcoll.errors import StateError


class Parted:
    """A world, as far as parts are concerned.

    Parameters
    ----------
    whole
        The world that was opened, if this is a part of it.
    """

    heap: Any
    topology: Any
    size: int

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.opened = whole is None  # false for a part that has ended with its whole, too, and refers to it no more
        self.origins = tuple(range(self.size))  # of each rank, its rank in the whole
        self.of = ""  # for messages: by which name ranks are counted, if not those of the whole
        self._parts: list[Any] = []
        self._failed = self._stuck = False  # whether a part that has ended had failed, or still had a call under way
        self._over = False
        self._making = 0  # parts that threads are about to make or free
        self._lock = threading.Lock()  # for the two
        if whole is not None:
            whole._parts.append(self)

    def part(self, exchange: Any, ranks: Sequence[int]) -> Any:
        """Set up a world of some of the ranks, on the same memory. Collective over them.

        Parameters
        ----------
        exchange
            Byte exchange among them.
        ranks
            Of each of them, its rank here.
        """
        memory = Part(self.heap.memory, exchange, ranks)
        topology = _topology.part(self.topology, exchange.rank, ranks)
        made = self._part(exchange, topology, memory, ranks)
        made.origins = tuple(self.origins[rank] for rank in ranks)
        return made

    def _part(self, exchange: Any, topology: Any, memory: Part, ranks: Sequence[int]) -> Any:
        """Build what `part` returns."""
        raise NotImplementedError

    def leave(self) -> bool:
        """Take no more part, here and in parts. Returns whether no call is under way any more."""
        raise NotImplementedError

    def retire(self) -> None:
        """Leave, but keep the memory of buffers, which goes with the last reference to them."""
        raise NotImplementedError

    @contextlib.contextmanager
    def making(self, verb: str) -> Iterator[None]:
        """Let a part be made or freed in here; memory stays meanwhile, even if another thread ends the whole."""
        whole = self.whole or self
        with whole._lock:
            whole._demand_whole(verb)
            whole._making += 1
        try:
            yield
            whole._demand_whole(verb)
        finally:
            with whole._lock:
                whole._making -= 1

    def _demand_whole(self, verb: str) -> None:
        if self._over:
            raise StateError(f"{verb}: the communicator has ended, with its run or by another thread; make a new one")

    def _begin_end(self) -> bool:
        """Make and free no more parts; tell whether a thread is about to, which may use memory yet."""
        with self._lock:
            self._over = True
            return self._making > 0

    def _leave_parts(self) -> bool:
        """Let all parts leave; tell whether nothing is under way any more in them, and in those that have ended."""
        left = [part.leave() for part in self._parts]
        return all(left) and not self._stuck

    def _retire_parts(self) -> bool:
        """Retire all parts; tell what `_begin_end` does."""
        making = self._begin_end()
        while self._parts:
            part = self._parts.pop()
            part.retire()
            part.whole = None  # now neither refers to the other
        return making

    def _end(self, failed: bool, left: bool) -> None:
        """Let the whole know how this part has ended."""
        if self.whole is not None and self in self.whole._parts:
            self.whole._parts.remove(self)
            self.whole._failed |= failed
            self.whole._stuck |= not left
