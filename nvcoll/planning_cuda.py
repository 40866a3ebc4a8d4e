"""Plans of calls on GPUs: the shape of the launch, the geometry of slots, and the kernel."""

from dataclasses import replace
from typing import Any

from nvcoll import _selection
from nvcoll._plan import DevicePlan
from nvcoll.algorithms import ALGORITHMS, Link, Shape
from nvcoll.backends.device_area import DeviceArea
from nvcoll.device.cuda.layout import BLOCKS, deepens
from nvcoll.errors import ArgumentError
from nvcoll.jit_cuda import THREADS
from nvcoll.kernels import Kernels
from nvcoll.ops import DATATYPES, Datatype, Op
from nvcoll.planning import Chooser, Explanation, pack_signature, pack_stamp

PACK = 16
"""Bytes that a thread moves at a time."""
FULL = 64
"""Threads that a block of fewer may get, so that each has one pack, where not as many blocks fit as that takes."""
ROOM = 8
"""Where ranks run side by side on a GPU, one multiprocessor in so many is left to what else they run."""
LINK = Link(1.5e-6, 1 / 300e9, 5e-6, 1 / 40e9)
"""Expected speed where no rule speaks. Only the order that it gives to algorithms matters."""


class DevicePlanner(Chooser):
    """Makes the plans of one communicator on GPUs.

    Parameters
    ----------
    area
        This rank's area.
    topology, slices, rules, timeout
        As for `Chooser`.
    kernels
        Gives loaded kernels.
    sharers
        Ranks that share this rank's GPU, itself included: kernels of all must fit on it at the same time.
    multiprocessors
        Of the smallest GPU of the communicator.
    remote
        Whether some ranks are far: their memory can neither be loaded from nor stored to.
    """

    kind = "cuda"
    link = LINK

    def __init__(
        self, area: DeviceArea, topology: Any, slices: int, rules: dict[str, Any], kernels: Kernels, sharers: int,
        multiprocessors: int, timeout: float, remote: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(area.layout, topology, slices, rules, sharers > 1, timeout)
        self.launches = rules[_selection.LAUNCH]
        self.area = area
        self.state = area.state
        self.kernels = kernels
        self.sharers = sharers
        self.overlap = sharers == 1  # where ranks share a GPU, its room is for those that wait for each other
        self.multiprocessors = multiprocessors
        self.remote = remote

    def shape(self, count: int, datatype: Datatype) -> Shape:
        """Return what algorithms are told of a call."""
        return replace(super().shape(count, datatype), apart=self.remote)

    def deep(self, nbytes: int, datatype: str) -> bool:
        """Tell whether threads have several packs of a message under way at a time."""
        return self._shape(nbytes, datatype)[2]

    def launched(self, nbytes: int) -> int:
        """Return how much of a message a launch puts in one: through a network, what a node sends goes in slices."""
        return -(-nbytes // self.slices) if self.remote else nbytes

    def _shape(self, nbytes: int, datatype: str) -> tuple[int, int | None, bool]:
        return launch_shape(self.launches, self.launched(nbytes), datatype, self.remote)

    def grid(self, nbytes: int, function: int, datatype: str = "float32") -> tuple[int, int]:
        """Return blocks and threads for a message, equal on all ranks: what waits for each other must run together."""
        threads, limit, _ = self._shape(nbytes, datatype)
        packs = max(1, -(-self.launched(nbytes) // PACK))
        most = self._most(function, threads)
        while threads < FULL and threads * most < packs and limit is None:
            threads *= 2
            most = self._most(function, threads)
        most = min(most, limit or most)
        each = -(-packs // (threads * most))  # of a thread: the same number in all blocks, but for the last
        return -(-packs // (threads * each)), self._crew(threads)

    def _crew(self, threads: int) -> int:
        """Return the threads of a block that has so many for a slice: inside a node, all slices are moved."""
        return min(threads * self.slices, THREADS) if self.remote else threads

    def _most(self, function: int, threads: int) -> int:
        """Return how many blocks of so many threads may run at the same time."""
        resident = self.kernels.occupancy(function, self._crew(threads)) * self.multiprocessors
        if resident < self.sharers:
            raise ArgumentError(
                f"Allreduce: {self.sharers} ranks share a GPU that runs {resident} blocks of a kernel at a time; "
                f"start {resident} ranks at most on it"
            )
        most = min(BLOCKS, resident // self.sharers)
        if self.kernels.together:
            most = min(most, max(1, (self.multiprocessors - self.multiprocessors // ROOM) // self.sharers))
        return most

    def _stride(self, base: str, shape: Shape) -> int:
        """Return the bytes between the slots of a block."""
        return int(self.layout.slots_block // max(1, ALGORITHMS[base].slots(shape).number) // PACK * PACK)

    def capacity(self, base: str, protocol: str, shape: Shape) -> int:
        """Return the elements of a block, in whole packs, that fit its slots and, where there are any, accumulators."""
        slots = ALGORITHMS[base].slots(shape)
        flagged = self.remote or not _has_sentinel(shape.datatype)
        spread = 2 if protocol == "low_latency" and flagged else 1
        unit = PACK // shape.itemsize
        part = self._stride(base, shape) // spread // slots.width // unit * unit
        return int(min(part * slots.parts, self.layout.slots_block // slots.width // unit * unit))

    def plan(self, told: Explanation, datatype: Datatype, op: Op) -> DevicePlan:
        """Make the plan of a call that was explained."""
        count = told.nbytes // datatype.itemsize
        shape = self.shape(count, datatype)
        if shape.size == 1:  # one rank's reduction is its contribution, AVG of it too
            return DevicePlan(self.state, 0, {"count": told.nbytes}, 1, 1, None, told)
        call = {"count": count, "ranks": shape.size, "stride": self._stride(told.algorithm, shape)}
        deep = self.deep(told.nbytes, datatype.name)
        function = self.kernels.get(told.algorithm, told.protocol, op.name, datatype.name, deep, state=self.state)
        blocks, threads = self.grid(told.nbytes, function, datatype.name)
        unit = PACK // datatype.itemsize
        call["part"] = -(-count // (blocks * unit)) * unit
        whole = ALGORITHMS[told.algorithm].slots(shape).parts == 1  # what the threads have under way is of one piece
        row = unit * threads * (4 if deep else 1) if whole else unit
        call["capacity"] = _piece(call["part"], self.capacity(told.algorithm, told.protocol, shape), row, unit)
        cut = (call["part"], call["capacity"], call["stride"])
        call["stamp"] = pack_stamp(pack_signature(told, datatype, op), count, *cut)
        return DevicePlan(self.state, function, call, blocks, threads, self.kernels, told, self.overlap)


def launch_shape(launches: list[dict[str, Any]], nbytes: int, datatype: str, far: bool) -> tuple[int, int | None, bool]:
    """Return what rules say of a launch: the threads of a block, the most blocks or None, and whether it is deep."""
    threads, limit, deep = _selection.shape_launch(launches, nbytes, far)
    if deep and not deepens(DATATYPES[datatype].itemsize):
        return min(2 * threads, THREADS), limit, False  # more threads, where each cannot have more packs
    return threads, limit, deep


def _piece(part: int, capacity: int, row: int, unit: int) -> int:
    """Return the elements of a block in one piece: as few pieces as there can be, as alike as whole rows make them.

    A piece of some packs left over takes nearly as long as a full one, and part of a row nearly as long as a whole one.
    Where no row fits, pieces are whole packs.
    """
    pieces = max(1, -(-part // capacity))
    whole = row if row <= capacity else unit
    return min(capacity, max(1, -(-part // (pieces * whole))) * whole)


def _has_sentinel(datatype: str) -> bool:
    return DATATYPES[DATATYPES[datatype].accumulate].kind in ("float", "complex")
