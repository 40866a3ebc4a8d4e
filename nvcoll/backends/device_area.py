"""A communicator's area on a GPU: the part of every rank's heap through which its kernels talk.

    board  flags (2 halves)  cells (2 halves)  lines (2 halves)  data (2 halves)

Within a half, each block of a launch has a part of its own. Cells hold sentinels while they are empty, all else zeros.
Where some ranks are far, nothing arrives in cells: what goes to far ranks is staged there.
"""

import contextlib
import ctypes
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from nvcoll._plan import DeviceState, StreamOrder
from nvcoll.backends import driver
from nvcoll.backends.heap import Piece
from nvcoll.device.cuda.layout import BLOCKS, EPOCH, EPOCHS, FAILED, HISTORY, LINE, NEAR
from nvcoll.errors import ArgumentError, Error

WORD = 8
BOARD = 0
FLAGS = 4096
SCRATCH = 128 << 20
"""Least scratch memory of a rank: some 64 KiB for each block, protocol and parity."""
TOKEN = 256
"""Bytes of what is reduced where ranks only meet."""
REPORT = 64
"""Bytes of host memory for the report of an area, and for the mark that is copied to it."""
REPORTS = 64
"""Reports that are allocated at a time."""
LEAST_SLOTS = 4096
"""Least bytes of a block's part of a half."""


@dataclass(frozen=True)
class DeviceLayout:
    """Offsets and sizes in an area, in bytes.

    Parameters
    ----------
    ranks
        Ranks of the communicator.
    scratch
        Bytes to divide.
    """

    ranks: int
    scratch: int

    @property
    def flags_block(self) -> int:
        """Flags of a block: ring and two-shot take most, two a rank."""
        return (2 * self.ranks + 32) * LINE

    @property
    def flags_half(self) -> int:
        """Flags of all blocks."""
        return BLOCKS * self.flags_block

    @property
    def cells(self) -> int:
        """Offset of the cells, where floats arrive in the low-latency protocol."""
        return -(-(FLAGS + 2 * self.flags_half) // 4096) * 4096

    @cached_property
    def slots_block(self) -> int:
        """Bytes of a block's slots in each protocol and parity, or ArgumentError where scratch memory is too small."""
        each = (self.scratch - self.cells) // (6 * BLOCKS) // 1024 * 1024
        if each < LEAST_SLOTS:
            raise ArgumentError(
                f"NVCOLL_SCRATCH: {self.scratch} bytes are too few for {self.ranks} ranks on GPUs; raise it"
            )
        return each

    @property
    def slots_half(self) -> int:
        """Slots of all blocks."""
        return BLOCKS * self.slots_block

    @property
    def lines(self) -> int:
        """Offset of the lines, where integers arrive in the low-latency protocol."""
        return self.cells + 2 * self.slots_half

    @property
    def data(self) -> int:
        """Offset of the data of the simple protocol."""
        return self.lines + 2 * self.slots_half

    @property
    def nbytes(self) -> int:
        """Size of the area."""
        return self.data + 2 * self.slots_half


class Footing:
    """What all areas of a rank stand on: the order of its calls, and pinned host memory for what kernels report.

    To allocate either may wait for all that runs on the GPU, so it is done as the first area is made.

    Parameters
    ----------
    device
        The GPU.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._pages: list[int] = []
        self._free: list[tuple[int, int]] = []
        self._lock = threading.Lock()  # communicators may be made on several threads
        with device:
            context = driver.current_context()
            self._event = driver.event_create()
        self.order = StreamOrder(context, self._event)

    def take_report(self) -> tuple[int, int]:
        """Return the addresses, for the host and for the GPU, of zeroed memory for a report."""
        with self._lock:
            if not self._free:
                with self._device:
                    host, gpu = driver.host_allocate(REPORTS * REPORT)
                self._pages.append(host)
                self._free += [(host + at, gpu + at) for at in range(0, REPORTS * REPORT, REPORT)]
            host, gpu = self._free.pop()
        ctypes.memset(host, 0, REPORT)
        return host, gpu

    def give_report(self, host: int, gpu: int) -> None:
        """Take back the memory of a report."""
        self._free.append((host, gpu))

    def close(self) -> None:
        """Give everything back, after all areas."""
        self._free.clear()
        with self._device:
            driver.event_destroy(self._event)
            while self._pages:
                driver.host_free(self._pages.pop())


class DeviceArea:
    """A rank's area and what belongs to it in private memory: tables, epochs, accumulators, and a report on the host.

    `token` is the address of private memory that is reduced where ranks only meet. `history` is that of two words, a
    sum over the tags of all calls and the same negated, which are the same on all ranks if all calls match.

    Parameters
    ----------
    memory
        The backend's memory.
    piece
        The area in it.
    here
        The topology as kernels see it.
    layout
        How the area is divided.
    timeout
        Seconds that a wait may take.
    slices
        Ranks of the smallest node.
    device
        The GPU.
    footing
        What the rank's areas have in common.
    far
        Ranks that kernels are to reach through the network only, whether their memory could be stored to or not.
    """

    def __init__(
        self, memory: Any, piece: Piece, here: Any, layout: DeviceLayout, timeout: float, slices: int, device: Any,
        footing: Footing, far: Collection[int] = (),
    ) -> None:  # fmt: skip
        self.piece = piece
        self.layout = layout
        self._device = device
        self._memory = memory
        self._footing = footing
        with device:
            driver.memset(piece.address, 0, layout.nbytes)
            driver.memset(piece.address + layout.cells, 0xFF, 2 * layout.slots_half)
            tables = _tables(memory, piece, here, far)
            places, total = _places(_private_sizes(layout))
            # A part has room for it behind its area: to allocate more may wait for all that runs on the GPU.
            self._owned = piece.nbytes == layout.nbytes
            self._private = driver.allocate(private_size(layout)) if self._owned else piece.address + layout.nbytes
            try:
                driver.memset(self._private, 0, total)
                for table, place in zip(tables, places, strict=False):
                    words = (ctypes.c_int64 * len(table))(*table)
                    driver.copy(self._private + place, ctypes.addressof(words), ctypes.sizeof(words))
                self._host, report = footing.take_report()
            except BaseException:
                if self._owned:
                    driver.free(self._private)
                raise
            ctypes.c_int64.from_address(self._host + WORD).value = FAILED
        self._report = report
        peers, members, owners, state, self.token = (self._private + place for place in places)
        self._state, self.history = state, state + HISTORY
        values = {
            "rank": memory.place, "size": len(memory.members), "nodes": len(here.nodes), "node": here.node,
            "local_rank": here.local_rank, "node_size": len(here.members), "slices": slices, "members": members,
            "owners": owners, "peers": peers, "state": state, "report": report, "timeout": int(timeout * 1e9),
            "board": piece.address + BOARD, "flags": FLAGS, "flags_half": layout.flags_half,
            "flags_block": layout.flags_block, "cells": layout.cells, "lines": layout.lines, "data": layout.data,
            "slots_half": layout.slots_half, "slots_block": layout.slots_block,
            "workspace": self._private + total, "workspace_block": layout.slots_block,
            "heap": memory.address(memory.place), "heap_size": memory.extent,
        }  # fmt: skip
        values |= {f"peer{k}": address for k, address in enumerate(tables[0][:NEAR])}
        self.state = DeviceState(values, footing.order, self._host, self)

    def same_history(self, stream: int) -> bool:
        """Tell whether all ranks have made the same calls, once `token` is the greatest of each word of `history`.

        The second word's greatest is the first one's least, negated. Waits for the stream.
        """
        greatest = (ctypes.c_int64 * 2)()
        with self._device:
            driver.copy(ctypes.addressof(greatest), self.token, ctypes.sizeof(greatest), stream)
        return sum(greatest) % (1 << 64) == 0

    def counterpart(self, address: int, rank: int) -> int:
        """Return where another rank's counterpart of a symmetric address of mine is stored to, or 0 if it is not."""
        heap = int(self._memory.address(rank))
        return heap and heap + address - int(self._memory.address(self._memory.place))

    def fail(self) -> None:
        """Report a failure as kernels do."""
        ctypes.c_int64.from_address(self._host).value = 1

    def give_up(self) -> None:
        """Report a failure, and let this rank's kernels that wait end, as when one of them is over its deadline."""
        self.fail()
        thread = threading.Thread(target=self._mark)  # which no Ctrl-C cuts short
        thread.start()
        thread.join()

    def _mark(self) -> None:
        """Set the marks that kernels set: that of each block, by which queued calls know that they must send nothing.

        And then the one at which kernels look that wait. By copies from pinned memory, for which no multiprocessor need
        be free, on a stream of its own, since others may wait for those kernels.
        """
        with contextlib.suppress(Error), self._device:  # a context that is lost has none that wait
            stream = driver.stream_create()
            try:
                for at in (*range(EPOCHS + WORD, EPOCHS + EPOCH * BLOCKS, EPOCH), 0):
                    driver.copy(self._state + at, self._host + WORD, WORD, stream)
            finally:
                driver.stream_destroy(stream)

    def boards(self) -> list[int | None]:
        """Return the tag of every rank's latest call; None where this rank cannot look."""
        found: list[int | None] = []
        word = ctypes.c_int64()
        with self._device:
            stream = driver.stream_create()  # the default stream may wait for kernels that never end
            try:
                for place in range(len(self._memory.members)):
                    address = self._memory.address(place)
                    if address:
                        driver.copy(ctypes.addressof(word), address + self.piece.offset + BOARD, 8, stream)
                    found.append(word.value if address else None)
            finally:
                driver.stream_destroy(stream)
        return found

    def close(self) -> None:
        """Free the private memory, when no kernel uses it any more."""
        private, self._private = self._private, 0
        if private:
            self.state.keep_report()
            self._footing.give_report(self._host, self._report)
            if self._owned:
                with self._device:
                    driver.free(private)
            del self.state  # it refers to this area: so memory goes with the last reference to it, and at once


def _tables(memory: Any, piece: Piece, here: Any, far: Collection[int]) -> list[list[int]]:
    """Return what kernels look up: the ranks' areas, my node's ranks, and those at my place in each node."""
    heaps = [0 if place in far else memory.address(place) for place in range(len(memory.members))]
    areas = [heap + piece.offset if heap else -1 - pe for heap, pe in zip(heaps, memory.origins, strict=True)]
    return [areas, list(here.members), list(here.owners)]


def _private_sizes(layout: DeviceLayout) -> list[int]:
    """Return the bytes of the parts of private memory, but for the accumulators: three tables, epochs, a token."""
    return [8 * layout.ranks] * 3 + [EPOCHS + EPOCH * BLOCKS, TOKEN]


def private_size(layout: DeviceLayout) -> int:
    """Return the bytes of private memory that belong to an area."""
    return _places(_private_sizes(layout))[1] + BLOCKS * layout.slots_block


def _places(sizes: list[int]) -> tuple[list[int], int]:
    """Return where parts of these sizes lie, each on lines of its own, and where the last one ends."""
    ends = list(accumulate(-(-size // 256) * 256 for size in sizes))
    return [0, *ends[:-1]], ends[-1]
