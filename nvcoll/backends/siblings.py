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
from collections.abc import Callable, Iterator
from typing import Any

GRACE = 1.0
"""Seconds to wait for such a moment if others are to load as well: they may be those whose launches are waited for."""
MOMENT = 0.001
"""Seconds between two looks at what has been launched."""

_worlds: defaultdict[int, "weakref.WeakSet[Any]"] = defaultdict(weakref.WeakSet)
_lock = threading.Lock()  # a set must not grow while another thread looks through it


def join(world: Any) -> None:
    """Let a rank's part of a communicator be looked at, by the others on its GPU."""
    with _lock:
        _worlds[world.device.ordinal].add(world)


@contextlib.contextmanager
def quiet(ordinal: int, contended: Callable[[], bool] = bool) -> Iterator[None]:
    """Hold back launches on a GPU, from a moment on at which every call has been launched by all of its ranks.

    Ranks that have launched all that others have are held back first, and the others let be until they have it too. One
    thread at a time does it. What graphs launch is not known, and not held back.

    Parameters
    ----------
    ordinal
        The GPU.
    contended
        Tells whether other threads wait until this is over.
    """
    held: dict[int, Any] = {}
    begun = time.monotonic()
    try:
        while not _steer(ordinal, held) and time.monotonic() - begun < _patience(ordinal, contended()):
            time.sleep(MOMENT)
        for number, order in _ranks(ordinal).items():
            _hold(held, number, order)
        yield
    finally:
        for order in held.values():
            order.release()


def _steer(ordinal: int, held: dict[int, Any]) -> bool:
    """Hold back the ranks that are ahead, and no others; tell whether nobody is behind any more."""
    ranks, behind = _ranks(ordinal), _behind(ordinal)
    for number in [*held]:
        if number in behind or number not in ranks:
            held.pop(number).release()
    for number in ranks.keys() - behind:
        _hold(held, number, ranks[number])
    return not behind and not _behind(ordinal)  # all are held, and nobody has launched until they were


def _hold(held: dict[int, Any], number: int, order: Any) -> None:
    if number not in held:
        order.hold()
        held[number] = order


def _present(ordinal: int) -> list[Any]:
    """Return what ranks have of communicators, as long as something may be under way there."""
    with _lock:
        return [world for world in _worlds[ordinal] if not world.left]


def _ends(world: Any) -> bool:
    """Tell whether a rank launches nothing more there; to hold it back would keep it from ending."""
    return world.planner.state.over or (world.whole is not None and world.whole.planner.state.over)


def _ranks(ordinal: int) -> dict[int, Any]:
    """Return the order of launches of every rank that may launch something."""
    return {id(world.footing): world.footing.order for world in _present(ordinal) if not _ends(world)}


def _behind(ordinal: int) -> set[int]:
    """Return the ranks that have yet to launch what others of a communicator have launched.

    Kernels of a communicator that has failed do not wait, so it does not count.
    """
    worlds = _present(ordinal)
    latest: defaultdict[int, int] = defaultdict(int)
    failed = {world.exchange.group for world in worlds if world.planner.state.reported}
    for world in worlds:
        latest[world.exchange.group] = max(latest[world.exchange.group], world.planner.state.sequence)
    return {
        id(world.footing)
        for world in worlds
        if world.exchange.group not in failed and not _ends(world)
        if world.planner.state.sequence < latest[world.exchange.group]
    }


def _patience(ordinal: int, contended: bool) -> float:
    """Return how long to wait: not so long that a kernel that waits meanwhile would be over its deadline."""
    half = min((world.planner.timeout for world in _present(ordinal)), default=0.0) / 2
    return min(GRACE, half) if contended else half
