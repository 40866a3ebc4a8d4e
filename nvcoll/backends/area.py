"""A communicator's area: the part of every rank's heap through which its kernels talk.

    board  doorbell  epoch  flags (2 halves)  lines (2 halves)  data (2 halves)

The halves take turns by the parity of the epoch; `nvcoll.device.common` says why two are enough.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

from nvcoll._plan import State
from nvcoll.backends.group import Member
from nvcoll.backends.heap import Piece
from nvcoll.device.common import BLOCK
from nvcoll.errors import ArgumentError

LINE = 64
BOARD, BELL, EPOCH, FLAGS = 0, 64, 128, 192

SPIN = 100.0
"""Microseconds of spinning before the core is yielded, where ranks do not share cores."""
YIELDS = 100
"""Yields of the core before sleeping; each takes some 0.3 us if nobody else wants the core."""
POLLS_PER_MICROSECOND = 30
"""Polls of a flag, with a pause each, in a microsecond; it need only be roughly right."""


@dataclass(frozen=True)
class Layout:
    """Offsets and sizes in an area, in bytes.

    Parameters
    ----------
    ranks
        Ranks of the communicator that share the memory.
    scratch
        Bytes to divide.
    """

    ranks: int
    scratch: int

    @property
    def flags_half(self) -> int:
        """Ring and two-shot take most: two flags a rank."""
        return (4 * self.ranks + 64) * LINE

    @property
    def lines(self) -> int:
        """Offset of the lines of the low-latency protocol."""
        return FLAGS + 2 * self.flags_half

    @property
    def lines_half(self) -> int:
        """Size of a half of them."""
        return self.scratch // 16 // LINE * LINE

    @property
    def data(self) -> int:
        """Offset of the data of the simple protocol."""
        return self.lines + 2 * self.lines_half

    @property
    def data_half(self) -> int:
        """Size of a half of them, or ArgumentError where scratch memory is too small."""
        half = (self.scratch - self.data) // 2 // LINE * LINE
        if half < LINE * (4 * self.ranks + 64):
            raise ArgumentError(
                f"NVCOLL_SCRATCH: {self.scratch} bytes are too few for {self.ranks} ranks on a node; "
                "raise it, 8M is the default"
            )
        return half


def open_area(memory: Member, piece: Piece, topology: Any, layout: Layout, settings: Any, slices: int) -> State:
    """Return the state with which a rank's kernels find its own area and its peers'.

    Parameters
    ----------
    memory, piece
        The heap's memory, and the allocation of the area in it.
    topology
        Nodes and ranks as the schedules are to see them.
    layout
        How the area is divided.
    settings
        Timeout and spinning.
    slices
        Ranks of the smallest node.
    """
    size = len(memory.members)
    tables = {
        "peers": [memory.address(p) + piece.offset for p in range(size)],
        "members": topology.members,
        "owners": topology.owners,
        "table": [0] * (2 * size),
        "locks": memory.origins,
    }
    arrays = {name: (ctypes.c_int64 * len(values))(*values) for name, values in tables.items()}
    private = ctypes.create_string_buffer(layout.data_half + layout.lines_half + 3 * BLOCK + 2 * LINE)
    workspace = -(-ctypes.addressof(private) // LINE) * LINE
    values = {
        "rank": memory.place,
        "size": size,
        "nodes": len(topology.nodes),
        "node": topology.node,
        "local_rank": topology.local_rank,
        "node_size": len(topology.members),
        "slices": slices,
        "epoch": piece.address + EPOCH,
        "spin": int((SPIN if settings.spin is None else settings.spin) * POLLS_PER_MICROSECOND),
        "bell": BELL,
        "flags": FLAGS,
        "flags_half": layout.flags_half,
        "lines": layout.lines,
        "lines_half": layout.lines_half,
        "data": layout.data,
        "data_half": layout.data_half,
        "workspace": workspace,
        "unpacked": workspace + layout.data_half,
        "blocks": workspace + layout.data_half + layout.lines_half,
        "heap": memory.address(memory.place),
        "heap_size": memory.extent,
    }
    values |= {name: ctypes.addressof(array) for name, array in arrays.items()}
    waiting = {
        "board": BOARD,
        "locks": values.pop("locks"),
        "timeout": int(settings.timeout * 1e9),
        "yields": YIELDS,
        "fd": memory.descriptor,
    }
    return State(values, waiting, (arrays, private, memory, piece))
