"""How a communicator comes to life on first use, ends, and what becomes of it in a forked child."""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from nvcoll._plan import Plan, Plans
from nvcoll.buffers import Spec, parse
from nvcoll.errors import StateError, missing_name
from nvcoll.hosts import Between
from nvcoll.world import World

LIVING = ("_world", "_between", "_plans", "_kept", "_token", "_calls")
"""Attributes of a communicator that is alive."""

_all: "weakref.WeakSet[Living]" = weakref.WeakSet()
_inherited: list[Any] = []  # what a forked child got of its parent: kept, since closing it would speak for the parent


class Living:
    """The life of a communicator: nothing happens when it is made; the first use opens its world.

    Parameters
    ----------
    opener
        Opens the world.
    name
        For messages.
    """

    _world: World
    _between: Between | None  # joins the nodes, where there are several
    _plans: dict[str | None, Plans]  # the fast route, for each algorithm asked for; None leaves the choice to the rules
    _kept: dict[Any, Plan]  # the long way
    _token: Spec  # what is sent where ranks only meet
    _calls: Any  # `DeviceCalls`, on GPUs
    _opening = threading.RLock()  # one opens at a time
    _used = _forked = False  # of the process: whether any was ever opened, and whether that was in a parent of it

    def __init__(self, opener: Callable[[], World], name: str) -> None:
        self._opener = opener
        self.name = name
        _all.add(self)

    def __getattr__(self, attribute: str) -> Any:
        # Only reached while the attribute is absent: a communicator that is alive pays nothing for this.
        if attribute not in LIVING:
            raise missing_name(f"{type(self).__name__!r} object", attribute, type(self))
        with self._opening:
            if attribute not in self.__dict__:
                self._open()
        return self.__dict__[attribute]

    @property
    def alive(self) -> bool:
        """Whether it is in use: opened, and not closed since."""
        return "_world" in self.__dict__

    def _open(self) -> None:
        if self._forked:
            raise StateError(
                f"{self.name}: this process was forked from a rank and is none itself; start ranks with a launcher, "
                "and use the 'spawn' start method for helper processes"
            )
        Living._used = True
        world: Any = self._opener()
        try:
            between = Between(world) if len(world.topology.nodes) > 1 and world.backend == "shm" else None
        except BaseException:
            world.close()
            raise
        calls: Any = None
        if world.target == "cuda":
            from nvcoll.device_calls import DeviceCalls  # on hosts, nothing of GPUs is loaded

            calls = DeviceCalls(world)
        token = parse("Barrier", "token", np.zeros(1, np.uint8), True)
        living: tuple[Any, ...] = (world, between, {}, {}, token, calls)
        self.__dict__.update(zip(LIVING, living, strict=True))

    def _close(self) -> None:
        """Give back what `_open` took; a later use opens anew."""
        world, between = self.__dict__.get("_world"), self.__dict__.get("_between")
        for name in LIVING:
            self.__dict__.pop(name, None)
        if between is not None and world is not None:
            world.queue.close()
            between.close()
        if world is not None:
            world.close()


def _in_child() -> None:
    """In a forked child the parent's ranks are strangers: forget them, and say so on use."""
    Living._opening = threading.RLock()  # a thread that held it is not in this process
    Living._forked = Living._used
    for one in list(_all):
        if one.alive and one._world.target == "host":
            one._world.queue.close(
                "this process was forked from a rank and is none itself; its requests are the rank's"
            )
        _inherited.extend(one.__dict__.pop(name) for name in LIVING if name in one.__dict__)


os.register_at_fork(after_in_child=_in_child)
