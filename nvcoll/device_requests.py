"""Requests on GPUs: a call that was queued on a stream, and the event that tells its end."""

import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Any

from nvcoll.backends import driver
from nvcoll.errors import Error

IMPATIENT = 1000
"""Looks at an event, a microsecond or two each, before a wait begins to sleep between them."""
NAP = 0.0001
"""Seconds of sleep between looks."""


class OnStream:
    """What was queued on a stream until now, as a `nvcoll.requests.Pending`.

    Parameters
    ----------
    device
        The GPU.
    stream
        Where it was queued.
    check
        Raises what went wrong on the GPU, if anything did.
    owners
        Objects whose memory the call uses.
    """

    def __init__(self, device: Any, stream: int, check: Callable[[], None], owners: tuple[Any, ...]) -> None:
        self._device = device
        self._check = check
        self._owners = owners
        with device:
            self._event = driver.event_create()
            weakref.finalize(self, _destroy, device, self._event).atexit = False  # the driver may have ended before
            driver.event_record(self._event, stream)

    def done(self) -> bool:
        """Tell at once whether the GPU has come to its end, well or not."""
        with self._device:
            return driver.event_query(self._event)

    def wait(self) -> None:
        """Wait for its end, and raise what went wrong.

        The event is looked at again and again, since the driver's own wait would not let Ctrl-C through.
        """
        looks = 0
        while not self.done():
            looks += 1
            if looks > IMPATIENT:
                time.sleep(NAP)
        self._owners = ()
        self._check()


def _destroy(device: Any, event: int) -> None:
    with contextlib.suppress(Error), device:
        driver.event_destroy(event)
