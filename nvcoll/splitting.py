"""Communicators made from others: of all their ranks again, or of some of them."""

import re
from typing import Any, ClassVar, Self

from nvcoll.allocation import Allocating
from nvcoll.arguments import integer, judge_info, same_handle
from nvcoll.buffers import refuse_capture
from nvcoll.errors import AllocationError, ArgumentError, DeviceError, MismatchError, StateError
from nvcoll.lifecycle import gone
from nvcoll.ops import mpi_module
from nvcoll.requests import UNDEFINED

AGREED = (AllocationError, DeviceError, MismatchError)
"""What is raised on all ranks together, which are in step then."""
COMM_TYPE_SHARED = 1
"""What `Comm.Split_type` divides by: ranks of a node, which share memory."""
IDENT, CONGRUENT, SIMILAR, UNEQUAL = range(4)
"""What `Comm.Compare` tells; mpi4py's values."""
DUPLICATE = re.compile(r"\.Dup\(\)(#\d+)?$")
"""The end of the name of a communicator that `Comm.Dup` made."""


class Splitting(Allocating):
    """The part of a communicator that makes others."""

    _none: ClassVar[Any]
    """`COMM_NULL`."""

    def __bool__(self) -> bool:
        """Whether it can be used: not `COMM_NULL`, and not freed."""
        return self._opener is not None or self.alive

    def __eq__(self, other: object) -> bool:
        """Whether it is the same; what was freed is equal to `COMM_NULL`, and that to mpi4py's."""
        return same_handle(self, other, Splitting, "Comm")

    __hash__ = object.__hash__

    def __copy__(self) -> Self:
        return self  # what a program keeps it in may be copied: to make another one takes all ranks, and `Dup`

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            f"pickle: {self.name} is a communicator of this process, expected data; leave it out of what is pickled, "
            "and take nvcoll.COMM_WORLD, or make the same one, in the process that gets the rest"
        )

    def Dup(self, info: Any = None) -> Self:
        """Make another communicator of the same ranks, whose calls do not match those of this one. Collective.

        Parameters
        ----------
        info
            mpi4py's hints, of which none concerns nvcoll.

        Returns
        -------
        Comm

        Raises
        ------
        ArgumentError
            `info` is none; nothing was sent.
        AllocationError
            On all ranks, if one of them has no room for the new communicator's scratch memory.
        StateError
            An earlier call on this communicator failed; or, on GPUs, torch or CuPy captures a graph on its current
            stream.
        TimeoutError, PeerLostError, BootstrapError, MismatchError
            A rank did not come, has ended, found no way to the others, or called something else.

        Notes
        -----
        The new communicator uses the same memory: buffers of either are symmetric to both. It lasts until `Free`, or
        until the communicator from which all were made ends. Its `name` is ``"COMM_WORLD.Dup()"``, that of the next
        one ``"COMM_WORLD.Dup()#2"``; a duplicate of a duplicate counts as one of the first communicator.
        """
        judge_info("Dup", info)
        # without the names of those before it, which would grow from generation to generation
        return self._made("Dup", 0, self.rank, f"{DUPLICATE.sub('', self.name)}.Dup()")

    def Clone(self) -> Self:
        """Do as `Dup`; mpi4py has both.

        Returns
        -------
        Comm
        """
        return self.Dup()

    def Split(self, color: int = 0, key: int = 0) -> Self:
        """Make communicators of the ranks that give the same color. Collective over all ranks of this one.

        Parameters
        ----------
        color
            Which of the new communicators this rank is in: 0 or more, or `UNDEFINED` for none of them.
        key
            Ranks of the new communicator are in the order of their keys; of equal ones, as they are here.

        Returns
        -------
        Comm
            `COMM_NULL` where `color` is `UNDEFINED`.

        Raises
        ------
        ArgumentError
            `color` or `key` is no such number; nothing was sent.
        AllocationError, StateError, TimeoutError, PeerLostError, BootstrapError, MismatchError
            As for `Dup`. Other colors may have got theirs.

        Notes
        -----
        Buffers of this communicator are symmetric to the new ones too, and theirs to this one where all of its ranks
        have them at the same place.
        """
        number = integer("Split", "color", color)
        if number < 0 and number != UNDEFINED:
            raise ArgumentError(f"Split: color is {color!r}, expected 0 or more, or UNDEFINED for no communicator")
        return self._made("Split", number, integer("Split", "key", key), f"{self.name}.Split({number})")

    def Split_type(self, split_type: int, key: int = 0, info: Any = None) -> Self:
        """Make communicators of the ranks that share a node, and with it memory. Collective over all ranks.

        Parameters
        ----------
        split_type
            `COMM_TYPE_SHARED`, ours or mpi4py's, or `UNDEFINED`.
        key
            As for `Split`.
        info
            As for `Dup`.

        Returns
        -------
        Comm
            `COMM_NULL` where `split_type` is `UNDEFINED`.

        Raises
        ------
        ArgumentError
            There is no such type, or `info` is none; nothing was sent.
        AllocationError, StateError, TimeoutError, PeerLostError, BootstrapError, MismatchError
            As for `Split`.
        """
        judge_info("Split_type", info)
        theirs = getattr(mpi_module(), "COMM_TYPE_SHARED", COMM_TYPE_SHARED)
        if split_type not in (COMM_TYPE_SHARED, theirs, UNDEFINED):
            raise ArgumentError(f"Split_type: split_type is {split_type!r}, expected COMM_TYPE_SHARED or UNDEFINED")
        number = integer("Split_type", "key", key)
        color = UNDEFINED if split_type == UNDEFINED else self._world.topology.node
        return self._made("Split_type", color, number, f"{self.name}.Split_type()")

    def Compare(self, comm: "Splitting") -> int:
        """Tell how this communicator is like another one. Not collective, and nothing is sent.

        Parameters
        ----------
        comm
            Another communicator of nvcoll.

        Returns
        -------
        int
            `IDENT` if it is the same; `CONGRUENT` if it has the same ranks in the same order; `SIMILAR` if in another
            order; else `UNEQUAL`.

        Raises
        ------
        ArgumentError
            `comm` is no communicator of nvcoll.
        StateError
            One of them was freed, or is `COMM_NULL`.
        """
        if not isinstance(comm, Splitting):
            raise ArgumentError(
                f"Compare: comm is of type {type(comm).__name__}, expected nvcoll.Comm; to compare what is mpi4py's, "
                "take its own"
            )
        mine: Any = self._world
        its: Any = comm._world
        if self is comm:
            return IDENT
        if mine.size == its.size == 1:  # this process, from whichever it was made
            return CONGRUENT
        if (mine.whole or mine) is not (its.whole or its):
            return UNEQUAL
        if mine.origins == its.origins:
            return CONGRUENT
        return SIMILAR if sorted(mine.origins) == sorted(its.origins) else UNEQUAL

    def Free(self) -> None:
        """End this communicator and give its memory back; its buffers are gone. Collective.

        What is under way on it is completed; requests may be waited for afterwards, too. Destroy CUDA graphs with its
        calls before. What was made from it lives on.

        Raises
        ------
        StateError
            It was made from no other (call `nvcoll.Finalize`), or is freed already; or, on GPUs, torch or CuPy captures
            a graph on its current stream.
        TimeoutError, PeerLostError, MismatchError
            A rank did not come, or has ended; or, on GPUs, a call has failed. It is freed all the same, but for its
            memory, which goes with `Finalize`.
        """
        if self._opener is not None:
            raise StateError(f"Free: {self.name} was made from no other communicator; call Finalize")
        if not self.alive:
            if self._ended:  # in a `__del__`, as the program ends: it is freed
                return
            raise StateError(f"Free: {gone(self.name)}")
        calls, exchange = self._calls, self._world.exchange
        if calls is not None:
            refuse_capture("Free")
        else:
            self._world.planner.state.drain()
        with self._world.making("Free"):
            exchange.verb = "Free"
            world, between = self._part_from_world()
            if world is None:
                raise StateError(f"Free: {gone(self.name)}")
            failed = True
            try:
                failed = world.free()
            finally:
                if between is not None:
                    between.close(agreed=not failed)
        if calls is not None and failed and not world.raised:
            from nvcoll.device_failures import failure  # as for `DeviceCalls`

            raise failure(world, "Free")

    def _made(self, verb: str, color: int, key: int, name: str) -> Self:
        """Make the communicator of the ranks of a color."""
        world: Any = self._world
        numbers = self._numbers  # looked up now: should another thread finalize, it would begin anew
        if self._calls is not None:
            refuse_capture(verb)
        world.finish()  # what a GPU is told to prepare may have to wait for calls that run there
        if self._calls is not None:
            self._calls.check(verb)
        world.planner.state.demand()
        with world.making(verb):
            world.exchange.verb = verb
            found = world.exchange.split(None if color == UNDEFINED else color, key)
            number = next(numbers[verb])  # of calls that all ranks have come through, so they count alike
            name += f"#{number}" if number > 1 else ""
            if found is None:
                return self._none  # type: ignore[no-any-return]
            exchange, ranks = found
            exchange.verb, exchange.of = verb, f" making {name}"
            try:
                part = world.part(exchange, ranks)
            except BaseException as exc:
                exchange.close(not isinstance(exc, AGREED))
                raise
            part.of = exchange.of = f" of {name}"
            first: Any = self if self._first is None else self._first()
            made = type(self)(None, name, first)
            made._emulated = self._emulated
            made._enter(part)
            if verb == "Dup":
                made._numbers[verb] = numbers[verb]
            first._derived.append(made)
        return made
