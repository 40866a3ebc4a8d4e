"""The kernels that are loaded on a GPU."""

import contextlib
import threading
from pathlib import Path
from typing import Any

from nvcoll._plan import DeviceState
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
        self._loader = 0  # the thread that loads one, or 0
        self._asking: list[Any] = []  # for whom threads load, or wait for their turn

    def get(
        self, algorithm: str, protocol: str, op: str, datatype: str, deep: bool, state: DeviceState | None = None
    ) -> int:
        """Return the handle of a kernel. `state` is that of who is to launch it."""
        key = (algorithm, protocol, op, datatype, deep)
        if key in self._loaded:
            return self._loaded[key]
        me, before = threading.get_ident(), None
        with self._turn:
            self._asking.append(state)
        try:
            with self._turn:
                # Not for a lock that who loads holds: whose kernel is there must launch it, others are loaded or not.
                self._turn.wait_for(lambda: key in self._loaded or self._loader in (0, me))
                if key in self._loaded:
                    return self._loaded[key]
                before, self._loader = self._loader, me  # it was this thread, if a handler of a signal interrupts it
            self._loaded[key] = self._load(*key)
            return self._loaded[key]
        finally:
            with self._turn:
                self._asking.remove(state)
                if before is not None:
                    self._loader = before
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
        return siblings.quiet(self.device.ordinal, lambda: [*self._asking])

    def occupancy(self, function: int, threads: int) -> int:
        """Return how many blocks of a kernel a multiprocessor holds at the same time."""
        with self.device:
            return driver.occupancy(function, threads)
