"""A block's barrier, of threads of Python.

``from tests.device.cuda.barrier import Barrier``
"""

import threading


class Barrier:
    """A block's barrier: threads that have ended are not waited for. `wait` gives the sum of what each has brought."""

    def __init__(self, threads):
        self._changed = threading.Condition()
        self._threads, self._waiting, self._round = threads, 0, 0
        self._sum = self._result = 0

    def wait(self, brought=0):
        with self._changed:
            self._sum += brought
            self._waiting += 1
            mine = self._round
            self._release_if_complete()
            while self._round == mine:
                self._changed.wait()
            return self._result

    def leave(self):
        with self._changed:
            self._threads -= 1
            self._release_if_complete()

    def _release_if_complete(self):
        if 0 < self._threads <= self._waiting:
            self._result, self._sum, self._waiting = self._sum, 0, 0
            self._round += 1
            self._changed.notify_all()
