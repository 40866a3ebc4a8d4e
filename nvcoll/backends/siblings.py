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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PATIENCE = 10.0
"""Most seconds to wait for such a moment: ranks may compute meanwhile, but some may never come."""
GRACE = 1.0
"""The same where one that is waited for is itself to load a kernel: then there is no such moment."""
LOOK = 0.001
"""Seconds between two looks at what has been launched."""
STALLED = 20
"""After so many looks at which nothing was launched, ranks that are ahead are let go for as many."""


@dataclass(eq=False)
class Sibling:
    """What a rank that shares a GPU has of a communicator.

    Attributes
    ----------
    ordinal : int
        The GPU.
    group : int
        A number that the ranks of the communicator have in common, and no others.
    state : DeviceState
        Counts the calls; its `StreamOrder` stands for the rank.
    timeout : float
        Seconds after which kernels give up.
    whole : Sibling or None
        What the rank has of the communicator that was opened, if this is a part of it.
    left : bool
        Whether nothing of it is under way any more.
    """

    ordinal: int
    group: int
    state: Any
    timeout: float
    whole: "Sibling | None" = None
    left: bool = False

    @property
    def ends(self) -> bool:
        """Whether the rank launches nothing more there."""
        return bool(self.state.over or (self.whole is not None and self.whole.state.over))


_siblings: "weakref.WeakSet[Sibling]" = weakref.WeakSet()
_lock = threading.Lock()  # the set must not grow while another thread looks through it


def join(one: Sibling) -> Sibling:
    """Let it be looked at by those on its GPU: before any rank of its communicator can launch anything."""
    with _lock:
        _siblings.add(one)
    return one


@contextlib.contextmanager
def quiet(ordinal: int, asking: Callable[[], Sequence[Any]] = tuple) -> Iterator[None]:
    """Hold back launches on a GPU, from a moment on at which every call has been launched by all of its ranks.

    Ranks that have launched all that others have are held back first, and the others let be until they have it too. If
    that takes too long, it is given up, and those are held back no more than before. What graphs launch is not known.

    Parameters
    ----------
    ordinal
        The GPU.
    asking
        Gives the `DeviceState` of who is to load a kernel, and of those who do so as soon as this is over.
    """
    held: dict[int, Any] = {}
    begun = time.monotonic()
    total = same = 0
    try:
        while not _steer(ordinal, held) and time.monotonic() - begun < _patience(ordinal, asking()):
            last, total = total, sum(one.state.sequence for one in _present(ordinal))
            same = same + 1 if total == last else 0
            if same >= STALLED:  # the others may wait for them, where no launch is seen: to make a communicator, or end
                same = 0
                _release(held, held.keys())
                time.sleep(STALLED * LOOK)
            time.sleep(LOOK)
        yield
    finally:
        _release(held, held.keys())


def _steer(ordinal: int, held: dict[int, Any]) -> bool:
    """Hold back the ranks that are ahead, and no others; tell whether nobody is behind any more."""
    orders, behind = _orders(ordinal), _behind(ordinal)
    _release(held, held.keys() & behind | held.keys() - orders.keys())
    _hold(held, {number: order for number, order in orders.items() if number not in behind})
    # All are held, if nobody was behind. But some may have launched until then, and one may be about to.
    return not (behind or any(one.state.order.busy for one in _present(ordinal)) or _behind(ordinal))


def _hold(held: dict[int, Any], orders: dict[int, Any]) -> None:
    for number in orders.keys() - held.keys():
        held[number] = orders[number]
        orders[number].hold()


def _release(held: dict[int, Any], numbers: Any) -> None:
    for number in [*numbers]:
        held.pop(number).release()


def _present(ordinal: int) -> list[Sibling]:
    """Return what ranks have of communicators, as long as something may be under way there."""
    with _lock:
        return [one for one in _siblings if one.ordinal == ordinal and not one.left]


def _orders(ordinal: int) -> dict[int, Any]:
    """Return the order of launches of every rank that may launch something."""
    return {id(one.state.order): one.state.order for one in _present(ordinal) if not one.ends}


def _behind(ordinal: int) -> set[int]:
    """Return the ranks that have yet to launch what others of a communicator have launched.

    One that has failed does not count: whom its kernels wait for, until their deadline, will not come.
    """
    present = _present(ordinal)
    failed = {one.group for one in present if one.state.reported}
    latest: defaultdict[int, int] = defaultdict(int)
    for one in present:
        latest[one.group] = max(latest[one.group], one.state.sequence)
    return {
        id(one.state.order)
        for one in present
        if one.group not in failed and not one.ends and one.state.sequence < latest[one.group]
    }


def _patience(ordinal: int, asking: Sequence[Any]) -> float:
    """Return how long to wait: not so long that a kernel that waits meanwhile would be over its deadline."""
    half = min((one.timeout for one in _present(ordinal)), default=0.0) / 2
    stuck = _behind(ordinal) & {id(state.order) for state in asking if state is not None}
    return min(half, GRACE if stuck else PATIENCE)
