"""How the host waits for a GPU, or a library, whose own wait would not do: no Ctrl-C ends it, or no deadline."""

import threading
import time
from collections.abc import Callable

from nvcoll.errors import TimeoutError

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


def within(seconds: float, what: str, act: Callable[[], None]) -> None:
    """Run a function on a thread of its own, and wait for it no longer than that.

    Raises
    ------
    TimeoutError
        It takes longer; its thread stays behind.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as exc:  # raised again by the caller's thread
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True, name=f"nvcoll: {what}")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{what}: expected an answer within {seconds:g} s, none came; raise NVCOLL_TIMEOUT")
    if raised:
        raise raised[0]
