"""The kernels that are loaded on a GPU."""

import contextlib
import threading
from pathlib import Path
from typing import Any

from nvcoll.backends import driver, nvshmem, siblings
from nvcoll.jit import ENTRY
from nvcoll.jit_cuda import CubinCache


class Kernels:
    """The kernels of a GPU that are loaded; ranks that are threads share them.

    They stay until the context ends: graphs of the program that hold them may live longer than a communicator.

    Parameters
    ----------
    device
        The GPU.
    cache_dir
        Where cubins are kept between processes; None: nowhere.
    remote
        Whether they reach far ranks.
    together
        Whether ranks run side by side on the GPU. Then other work of a rank, such as a kernel of torch, must be able to
        begin while those of other ranks wait for it. That costs a few per cent of the speed of large messages.
    """

    def __init__(self, device: Any, cache_dir: Path | None, remote: bool = False, together: bool = False) -> None:
        self.device = device
        self.remote = remote
        self.together = together
        self._cubins = CubinCache(cache_dir)
        self._loaded: dict[tuple[Any, ...], int] = {}
        self._turn = threading.Condition()
        self._loading = False  # whether a thread loads one
        self._asking = 0  # threads that have to wait until then

    def get(self, algorithm: str, protocol: str, op: str, datatype: str, deep: bool) -> int:
        """Return the handle of a kernel."""
        key = (algorithm, protocol, op, datatype, deep)
        with self._turn:
            # Not for a lock that who loads holds: whose kernel is there must launch it, however many others are loaded.
            self._asking += 1
            try:
                self._turn.wait_for(lambda: key in self._loaded or not self._loading)
            finally:
                self._asking -= 1
            if key in self._loaded:
                return self._loaded[key]
            self._loading = True
        try:
            self._loaded[key] = self._load(*key)
            return self._loaded[key]
        finally:
            with self._turn:
                self._loading = False
                self._turn.notify_all()

    def _load(self, algorithm: str, protocol: str, op: str, datatype: str, deep: bool) -> int:
        """Load a kernel."""
        cubin = self._cubins.get(algorithm, protocol, op, datatype, self.device.arch, deep, self.remote)
        with self._quiet(), self.device:
            module = driver.load_module(cubin)
            if self.remote:
                nvshmem.introduce(module.handle)
            function = module.function(ENTRY)
            if self.together:
                driver.share_multiprocessors(function)
            return function

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        if not self.together:
            return contextlib.nullcontext()
        return siblings.quiet(self.device.ordinal, lambda: self._asking > 0)

    def occupancy(self, function: int, threads: int) -> int:
        """Return how many blocks of a kernel a multiprocessor holds at the same time."""
        with self.device:
            return driver.occupancy(function, threads)
