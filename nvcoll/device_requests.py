"""Requests on GPUs: a call that was queued on a stream, and the event that tells its end."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from nvcoll.backends import driver
from nvcoll.backends.looking import look_until
from nvcoll.errors import DeviceError, Error


class OnStream:
    """What was queued on a stream until `record`, as a `nvcoll.requests.Pending`.

    It is made before the call is queued: if that cannot be, nothing is under way on the arrays, which may go.

    Parameters
    ----------
    device
        The GPU.
    check
        Raises what went wrong on the GPU, if anything did.
    over
        Tells whether the communicator has ended, and its work on the GPU with it.
    owners
        Objects whose memory the call uses.
    """

    def __init__(
        self, device: Any, check: Callable[[], None], over: Callable[[], bool], owners: tuple[Any, ...]
    ) -> None:
        sweep()
        self._device = device
        self._check = check
        self._over = over
        self._owners = list(owners)
        self._lost = ""
        with device:
            self._event = driver.event_create()
            finalizer = weakref.finalize(self, _let_go, device, self._event, self._owners)
            finalizer.atexit = False  # the driver may have ended before

    def record(self, stream: int) -> None:
        """Stand for all that was queued on a stream until now."""
        with self._device:
            driver.event_record(self._event, stream)

    def done(self) -> bool:
        """Tell at once whether the GPU has come to its end, well or not."""
        if not self._lost and not self._over():
            try:
                return _done(self._device, self._event)
            except Error as exc:  # the context is lost, and no later look would tell more
                self._lost = str(exc)
        return True

    def wait(self) -> None:
        """Wait for its end, and raise what went wrong.

        The event is looked at again and again, since the driver's own wait would not let Ctrl-C through.
        """
        look_until(self.done)
        self._owners.clear()
        if self._lost:
            raise DeviceError(self._lost)
        self._check()


_dropped: list[tuple[Any, int, list[Any]]] = []
"""Events of requests to which nobody refers any more, and the memory that their calls may still use."""


def _let_go(device: Any, event: int, owners: list[Any]) -> None:
    """Give an event back, unless nobody has waited for it: then the memory that goes with it is kept for now."""
    if owners:
        _dropped.append((device, event, owners))
    else:
        _destroy(device, event)


def sweep() -> None:
    """Let go of what dropped requests have left, where the GPU is done with it."""
    for _ in range(len(_dropped)):
        try:
            device, event, owners = _dropped.pop(0)
        except IndexError:  # another thread sweeps too
            return
        if device.is_open and not _surely_done(device, event):
            _dropped.append((device, event, owners))
        else:
            _destroy(device, event)


def _done(device: Any, event: int) -> bool:
    with device:
        return driver.event_query(event)


def _surely_done(device: Any, event: int) -> bool:
    try:
        return _done(device, event)
    except Error:  # which tells nothing of the call
        return False


def _destroy(device: Any, event: int) -> None:
    with contextlib.suppress(Error):
        if device.is_open:  # else it went with the context
            with device:
                driver.event_destroy(event)
