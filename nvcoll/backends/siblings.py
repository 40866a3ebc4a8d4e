"""Emulated ranks that share a GPU: a kernel is loaded while no kernel of theirs waits for one that is not there yet.

To load a kernel may stop the context until all that runs has ended, and keeps away what is launched meanwhile. So a
rank first waits for its own calls. If all ranks call the same communicator, those of its siblings have all they need
then. But ranks of other parts may be in the middle of a call: some kernels wait, and others are still to be launched.
"""

import contextlib
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

GRACE = 1.0
"""Seconds to wait for such a moment. It may never come: a call may be begun whose other ranks have to load first."""

_worlds: defaultdict[int, "weakref.WeakSet[Any]"] = defaultdict(weakref.WeakSet)
_lock = threading.Lock()  # a set must not grow while another thread looks through it


def join(world: Any) -> None:
    """Let a rank's part of a communicator be looked at, by the others on its GPU."""
    with _lock:
        _worlds[world.device.ordinal].add(world)


@contextlib.contextmanager
def quiet(ordinal: int) -> Iterator[None]:
    """Hold back launches on a GPU, from a moment on at which every call has been launched by all of its ranks.

    One thread at a time does it. What graphs launch is not known, and not held back.
    """
    deadline = time.monotonic() + GRACE
    while True:
        with _lock:
            worlds = list(_worlds[ordinal])
        orders = {id(world.footing): world.footing.order for world in worlds}.values()
        for order in orders:
            order.hold()
        try:
            if _level(worlds) or time.monotonic() > deadline:
                yield
                return
        finally:
            for order in orders:
                order.release()
        time.sleep(0.001)


def _level(worlds: list[Any]) -> bool:
    """Tell whether in each communicator all ranks that take part have launched equally many calls."""
    launched = defaultdict(set)
    for world in worlds:
        if not world.planner.state.over:
            launched[world.exchange.group].add(world.planner.state.sequence)
    return all(len(counts) == 1 for counts in launched.values())
