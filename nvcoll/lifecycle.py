"""How a communicator comes to life, ends, and what becomes of it in a forked child."""

import contextlib
import os
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NoReturn

import numpy as np

from nvcoll._plan import Plan, Plans
from nvcoll.arguments import integer
from nvcoll.buffers import Spec, parse
from nvcoll.errors import ArgumentError, StateError, missing_name
from nvcoll.hosts import Between
from nvcoll.ops import mpi_module
from nvcoll.requests import Request
from nvcoll.world import World

LIVING = ("_world", "_between", "_plans", "_kept", "_token", "_calls", "_numbers")
"""Attributes of a communicator that is alive."""

_all: "weakref.WeakSet[Living]" = weakref.WeakSet()
_inherited: list[Any] = []  # what a forked child got of its parent: kept, since closing it would speak for the parent


class Living:
    """The life of a communicator: nothing happens when it is made; the first use opens its world.

    Parameters
    ----------
    opener
        Opens the world. None for a communicator that is made from another one: it lives from `_enter` on, once.
    name
        For messages.
    first
        The communicator which all were made from, this one included, and with which it ends.
    """

    _world: World
    _between: Between | None  # joins the nodes, where there are several
    _plans: dict[str | None, Plans]  # the fast route, for each algorithm asked for; None leaves the choice to the rules
    _kept: dict[Any, Plan]  # the long way
    _token: Spec  # what is sent where ranks only meet
    _calls: Any  # `DeviceCalls`, on GPUs
    _numbers: defaultdict[str, Iterator[int]]  # by verb: of the communicators that it makes of this one
    _emulated = False  # whether its ranks are threads of this process
    _used = _forked = False  # of the process: whether any was ever opened, and whether that was in a parent of it
    _ended = False  # of the process: whether all were ended as it exits

    def __init__(
        self, opener: Callable[[], World] | None = None, name: str = "", first: "Living | None" = None
    ) -> None:
        if not name:  # as a handle of mpi4py's is made of another one
            raise ArgumentError(
                f"{type(self).__name__}: called by a program, expected a verb that makes communicators; take the one "
                "that there is, or call its Dup, Split or Split_type"
            )
        self._opener = opener
        self._opening = threading.RLock()  # one thread opens it
        self._name = name
        self._first = None if first is None else weakref.ref(first)
        self._derived: list[Living] = []  # those that are alive, which end with this one
        _all.add(self)

    def __getattr__(self, attribute: str) -> Any:
        # Only reached while the attribute is absent: a communicator that is alive pays nothing for this.
        if attribute not in LIVING:
            raise missing_name(f"{type(self).__name__!r} object", attribute, type(self), Request)
        with self._opening:
            if attribute not in self.__dict__:
                self._open()
        return self.__dict__[attribute]

    @property
    def name(self) -> str:
        """What messages call it, and what is made from it from then on; may be set, on each rank for itself."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        if not isinstance(name, str):
            raise ArgumentError(f"Set_name: name is of type {type(name).__name__}, expected str; pass str() of it")
        if self._opener is None:
            if not self.alive:
                raise StateError(f"Set_name: {gone(self.name)}")
            self._world.of = self._world.exchange.of = f" of {name}"
        self._name = name

    @property
    def alive(self) -> bool:
        """Whether it is in use: opened, and not closed since."""
        return "_world" in self.__dict__

    def Abort(self, errorcode: int = 0) -> NoReturn:
        """End this process at once, and with it the program on all ranks: for an error that nothing can mend.

        Parameters
        ----------
        errorcode
            The exit status: its lower eight bits, or 1 where they are 0, which launchers take for success.

        Raises
        ------
        ArgumentError
            `errorcode` is no integer.
        SystemExit
            On emulated ranks, instead of ending the process: `Emulation.run` raises it.

        Notes
        -----
        Nothing is cleaned up, and what Python holds back of its output is lost. A line on standard error tells who
        called it. ``nvcoll run`` ends all other ranks, and has the exit status of this one; so does torchrun, which may
        start them anew. Where MPI runs, it is asked to abort, and ``mpiexec`` ends the whole job; it may not notice the
        end of a process that has not started MPI yet, as `Init` does. Until then it is as if this rank was killed:
        others that wait for it raise PeerLostError soon, on GPUs TimeoutError.
        """
        status = integer("Abort", "errorcode", errorcode) & 0xFF or 1
        if self._emulated:
            raise SystemExit(status)
        world = self.__dict__.get("_world")  # looked up as an attribute, it would wait for the other ranks to open it
        who = "a process" if world is None else f"rank {world.rank}"
        with contextlib.suppress(OSError):
            os.write(2, f"nvcoll: {who} of {self.name} calls Abort({errorcode})\n".encode())
        mpi = None if self._forked else mpi_module()
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
            mpi.COMM_WORLD.Abort(status)
        os._exit(status)

    def _open(self) -> None:
        if self._forked:
            raise StateError(
                f"{self.name}: this process was forked from a rank and is none itself; start ranks with a launcher, "
                "and helper processes that use nvcoll with the 'spawn' start method and NVCOLL_BOOTSTRAP=single"
            )
        if self._opener is None:
            raise StateError(gone(self.name))
        if sys.is_finalizing():  # in a `__del__`, where modules may be gone
            raise StateError(f"{self.name}: the interpreter ends; make calls before that")
        Living._used = True
        self._enter(self._opener())

    def _enter(self, world: Any) -> None:
        """Live on a world that was opened."""
        calls: Any = None
        try:
            between = Between(world) if len(world.topology.nodes) > 1 and world.backend == "shm" else None
            if world.target == "cuda":
                from nvcoll.device_calls import DeviceCalls  # on hosts, nothing of GPUs is loaded

                calls = DeviceCalls(world)
            token = parse("Barrier", "token", np.zeros(1, np.uint8), True)
            living: tuple[Any, ...] = (world, between, {}, {}, token, calls, defaultdict(partial(count, 1)))
            self.__dict__.update(zip(LIVING, living, strict=True))
        except BaseException:
            world.close()
            raise

    def _close(self) -> None:
        """Give back what `_open` took; a later use opens anew, but for those that were made from others."""
        with contextlib.ExitStack() as ends:  # the last goes first, and each does, whatever another one raises
            ends.callback(self._close_world)
            for derived in self._derived:
                ends.callback(derived._close)

    def _close_world(self) -> None:
        world, between = self._part_from_world()
        if world is None:
            return
        with contextlib.closing(world):
            if world.target == "cuda" and not hasattr(sys, "last_value"):  # else the program ends by an exception
                from nvcoll.device_failures import raise_unheard

                world.leave()
                raise_unheard(world, "Finalize")
            if between is not None:
                world.queue.close()
                between.close()

    def _part_from_world(self) -> tuple[Any, Between | None]:
        """Be alive no more; return the world, and what joins its nodes, for their end. None, if it was not alive."""
        world = self.__dict__.pop("_world", None)  # one thread gets it, if several end this
        if world is None:
            return None, None
        first = None if self._first is None else self._first()
        if first is not None:
            first._derived.remove(self)
        between = self.__dict__.pop("_between")
        for name in LIVING:
            self.__dict__.pop(name, None)
        return world, between


def gone(name: str) -> str:
    """Return what to say of a communicator that does not live, and cannot come to life by itself."""
    if name == "COMM_NULL":
        return "COMM_NULL is what ranks get that gave UNDEFINED to Split, expected a communicator; test it before use"
    return f"{name} was freed, or has ended with the communicator that it was made from; make another"


def _in_child() -> None:
    """In a forked child the parent's ranks are strangers: forget them, and say so on use."""
    Living._forked = Living._used
    for one in list(_all):
        one._opening = threading.RLock()  # a thread that held it is not in this process
        if one.alive and one._world.target == "host":
            one._world.queue.close(
                "this process was forked from a rank and is none itself; its requests are the rank's"
            )
        _inherited.extend(one.__dict__.pop(name) for name in LIVING if name in one.__dict__)


os.register_at_fork(after_in_child=_in_child)
