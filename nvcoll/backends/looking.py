"""How the host waits for a GPU where the driver's own wait would not do: that lets no Ctrl-C through."""

import time
from collections.abc import Callable

IMPATIENT = 1000
"""Looks, of some microseconds each, before a wait begins to sleep between them."""
NAP = 0.0001
"""Seconds of sleep between looks."""


def look_until(done: Callable[[], bool]) -> None:
    """Look until something is done; other threads may run between looks."""
    looks = 0
    while not done():
        looks += 1
        time.sleep(NAP if looks > IMPATIENT else 0)
