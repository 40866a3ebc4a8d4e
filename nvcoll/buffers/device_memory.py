"""What holds a piece of a GPU's symmetric heap for the arrays on it, and moves bytes to and from it."""

import sys
from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np

from nvcoll._plan import DeviceMemory

from .array import Allocation, remember

BLOCK = 1 << 20
"""Bytes of a pattern that are sent from the host; the rest is copied on the GPU."""


class Gpu(Protocol):
    """A GPU: ``nvcoll.backends.driver.Device``."""

    @property
    def ordinal(self) -> int:
        """Which one."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: object) -> None: ...


class Driver(Protocol):
    """What moves bytes: ``nvcoll.backends.driver``, handed in because backends are built on buffers."""

    def copy(self, to: int, source: int, nbytes: int, stream: int = 0) -> None:
        """Copy between hosts and GPUs in the order of a stream, and wait until it is done."""

    def memset(self, address: int, byte: int, nbytes: int, stream: int = 0) -> None:
        """Fill memory of a GPU in the order of a stream, and wait until it is done."""


class DeviceOwner(DeviceMemory):
    """Holds an allocation for the arrays on it and the exports of them; its end is the end of the last of these.

    Parameters
    ----------
    allocation
        The memory.
    gpu
        Where it is.
    driver
        What copies.
    stream
        Where copies go that name no stream.
    precede
        ``precede(stream)`` lets what is queued on a stream from now on begin after the latest call that may use the
        memory.
    check
        ``check(verb)`` raises what has failed in a call that may have used the memory, unless somebody has heard of it.
    """

    allocation: Allocation
    gpu: Gpu
    driver: Driver
    stream: int
    precede: Callable[[int], None]
    check: Callable[[str], None]

    def __new__(  # noqa: D102
        cls,
        allocation: Allocation,
        gpu: Gpu,
        driver: Driver,
        stream: int,
        precede: Callable[[int], None],
        check: Callable[[str], None],
    ) -> Self:
        self = super().__new__(cls, allocation.address, allocation.nbytes, gpu.ordinal)
        self.allocation, self.gpu, self.driver, self.stream = allocation, gpu, driver, stream
        self.precede, self.check = precede, check
        remember(self)
        return self

    def __del__(self) -> None:
        # At exit the communicator gives everything back; its parts may be gone by now.
        if not self.freed and not sys.is_finalizing():
            self.allocation.drop()

    def copy(self, to: int, source: int, nbytes: int, stream: int, verb: str) -> None:
        """Copy bytes between two addresses, one of which is here, after the calls made so far."""
        if nbytes:
            self.precede(stream)
            with self.gpu:
                self.driver.copy(to, source, nbytes, stream)
            self.check(verb)  # now these calls have ended, too

    def fill(self, address: int, value: np.ndarray[Any, Any], count: int, stream: int) -> None:
        """Write an array without axes `count` times from an address on."""
        pattern, nbytes = value.tobytes(), count * value.itemsize
        if not nbytes:
            return
        if len(set(pattern)) == 1:
            self.precede(stream)
            with self.gpu:
                self.driver.memset(address, pattern[0], nbytes, stream)
            self.check("fill")
            return
        block = np.full(min(count, BLOCK // value.itemsize), value)
        self.copy(address, block.ctypes.data, block.nbytes, stream, "fill")
        done = block.nbytes
        while done < nbytes:
            part = min(done, nbytes - done)
            self.copy(address + done, address, part, stream, "fill")
            done += part
