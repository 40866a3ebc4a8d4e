"""What stands behind a communicator on GPUs; the counterpart of `nvcoll.world`, whose `World` it resembles."""

import contextlib
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nvcoll import _topology
from nvcoll import settings as settings_
from nvcoll.backends import driver
from nvcoll.backends.device_area import SCRATCH, DeviceArea, DeviceLayout, Footing, private_size
from nvcoll.backends.emulated import Hub, open_ranks, reserve_on, when_none_runs
from nvcoll.backends.group import Part, agree
from nvcoll.backends.heap import Heap
from nvcoll.backends.nvshmem import SymmetricMemory, unfit_transport
from nvcoll.backends.siblings import Sibling, join
from nvcoll.errors import AllocationError, BootstrapError, DeviceError, Error
from nvcoll.jit_cuda import text_digest, toolchain
from nvcoll.kernels import Kernels
from nvcoll.parts import Parted
from nvcoll.planning import read_rules
from nvcoll.planning_cuda import DevicePlanner

PATIENCE = 5.0
"""Seconds that a rank waits in the end for others that may never come."""


class DeviceCommon:
    """What the worlds of a rank have in common: that which was opened, and its parts.

    Parameters
    ----------
    settings, rules
        In force on all ranks.
    device
        This rank's GPU.
    sharers
        Most ranks of a GPU.
    backend
        ``"nvshmem"`` or ``"emulated"``.
    near
        The kernels that reach ranks whose memory can be stored to, if there are any already.
    """

    def __init__(
        self, settings: Any, rules: dict[str, Any], device: Any, sharers: int, backend: str, near: Kernels | None = None
    ) -> None:
        self.settings = settings
        self.rules = rules
        self.device = device
        self.sharers = sharers
        self.backend = backend
        self._kernels = {} if near is None else {False: near}

    def kernels(self, remote: bool) -> Kernels:
        """Return the kernels for communicators in which some ranks are far from others, or for those with none."""
        if remote not in self._kernels:
            self._kernels[remote] = Kernels(self.device, self.settings.cache_dir, remote)
        return self._kernels[remote]


class DeviceWorld(Parted):
    """One rank's part of a world on GPUs.

    Parameters
    ----------
    exchange
        Byte exchange among all ranks.
    topology
        Nodes and ranks.
    planner
        Makes plans.
    heap
        Allocator of symmetric memory.
    common
        What it has in common with its parts, and with the ranks that are threads.
    footing
        What its areas have in common with those of its parts.
    far
        Ranks that kernels reach through the network only.
    stream
        Where this rank's calls go that name no stream; 0 leaves that to the arrays.
    whole
        The world that was opened, if this is a part of it.
    sibling
        What other ranks look at that are threads and share the GPU.
    """

    target = "cuda"
    raised = False  # whether the user has heard that a call has failed

    def __init__(
        self, exchange: Any, topology: Any, planner: DevicePlanner, heap: Heap, common: DeviceCommon,
        footing: Footing, far: Collection[int], stream: int, whole: "DeviceWorld | None" = None,
        sibling: Sibling | None = None,
    ) -> None:  # fmt: skip
        self.exchange = exchange
        self.topology = topology
        self.planner = planner
        self.heap = heap
        self.common = common
        self.footing = footing
        self.device = common.device
        self.backend = common.backend
        self.far = far
        self.stream = stream
        self.sibling = sibling
        self.rank: int = exchange.rank
        self.size: int = exchange.size
        self._leaving = threading.Lock()
        self._left: bool | None = None
        super().__init__(whole)  # from here on, the whole ends it

    def _part(self, exchange: Any, topology: Any, memory: Part, ranks: Sequence[int]) -> "DeviceWorld":
        far = frozenset(number for number, rank in enumerate(ranks) if rank in self.far)
        remote = _anywhere(exchange, bool(far))
        return build_world(exchange, topology, memory, self.common, far, remote, self.whole or self)

    def settle(self) -> None:
        """Wait for this rank's earlier calls, where a kernel may be loaded beside its siblings': see `siblings`."""
        if self.stream:
            self.finish()

    def leave(self) -> bool:
        """Take no more part. Returns whether no kernel of this rank runs any more."""
        with self._leaving:
            if self._left is None:
                self._left = self._leave()
                if self.sibling is not None:
                    self.sibling.left = self._left
        return self._left

    @property
    def left(self) -> bool:
        """Whether it takes no more part, and nothing of it is under way any more."""
        return bool(self._left)

    def give_up(self) -> None:
        """Let all kernels of this rank end that wait: those of one communicator may keep those of another waiting."""
        whole = self.whole or self
        for world in (whole, *whole._parts):
            world.planner.area.give_up()

    def _leave(self) -> bool:
        state, stream = self.planner.state, self.stream
        try:
            with self.device:
                with contextlib.nullcontext() if stream else contextlib.suppress(Error):  # of a stream that is gone
                    state.end(stream)  # calls on other streams are waited for, too
                try:
                    driver.stream_wait(stream)  # kernels end by their deadline at the latest
                except KeyboardInterrupt:
                    self.give_up()
                    raise
                if not stream:
                    driver.synchronize()  # other libraries' work, too, for it may use memory that goes
        except Error:  # the context is lost, and all that ran in it
            self._leave_parts()
            return False
        finally:
            state.end()
            self.stream = 0
        ended = self._leave_parts()  # whose calls have ended, too
        if stream and self.opened:
            _idle[self.device.ordinal].append(stream)
        return ended

    def close(self) -> None:
        """Leave, and give everything back; a part asks nobody, and its memory goes with that of the whole.

        The heap is given back by all ranks together. After a failure, and at the end of a program by an exception, some
        may never come to that, and are not waited for once more.
        """
        left, making = False, self._begin_end()
        try:
            left = self.leave() and not making
        finally:
            failed = not left or self.planner.state.reported or self._failed
            self._end(failed, left)
            if failed or hasattr(sys, "last_value"):
                self.exchange.timeout = min(self.exchange.timeout, PATIENCE)
            with contextlib.ExitStack() as ends:  # from the last to the first, whatever one of them raises
                ends.callback(self.exchange.close, failed)
                ends.callback(self.heap.close if left and self.opened else self.heap.retire)
                if left:
                    ends.callback(self._close_area)
                    for part in self._parts:  # of which `Finalize` did not know: another thread has just made them
                        ends.callback(part.planner.area.close)

    def free(self) -> bool:
        """Leave a part, and give its memory to the whole. Collective. Returns whether a call has failed."""
        left = reported = agreed = False
        try:
            left = self.leave()
            # After a failure, what others have sent may still be on its way: the memory goes with that of the whole.
            reported = self.planner.state.reported
            if reported:  # some may not come
                self.exchange.timeout = min(self.exchange.timeout, PATIENCE)
            self.heap.give_back("Free", left and not reported)
            agreed = True
        finally:
            self._end(not agreed, left)
            if left:
                self._close_area()
            self.heap.retire()
            self.exchange.close(not agreed)
        return reported

    def retire(self) -> None:
        """Leave, but keep the memory of buffers, which goes with the last reference to them."""
        making = self._retire_parts()
        if self.leave() and not making:
            if self.opened:
                when_none_runs(self._close_area)
            else:
                self._close_area()
        self.heap.retire()

    def _close_area(self) -> None:
        """Give back what belongs to the area, and what areas stand on with that of the whole, which is the last."""
        self.planner.area.close()
        if self.opened:
            self.footing.close()

    def finish(self) -> None:
        """Wait until this rank's calls are done, on whatever streams they are."""
        self.planner.state.precede(self.stream)
        with self.device:
            driver.stream_wait(self.stream)


_idle: defaultdict[int, list[int]] = defaultdict(list)
"""Streams of emulated ranks that have ended, by GPU: for other ranks, and never destroyed. Others may name them still.

Torch does when it frees a tensor which such a stream has used, and so do buffers, which outlive their rank.
"""


def _stream_on(device: Any) -> int:
    """Return a stream for an emulated rank."""
    try:
        return _idle[device.ordinal].pop()
    except IndexError:
        with device:
            return driver.stream_create()


@cache
def _shared_kernels(ordinal: int, cache_dir: Path | None) -> Kernels:
    """Return the kernels of all emulated ranks on a GPU, in this process."""
    return Kernels(driver.Device(ordinal), cache_dir, together=True)


def open_emulated_on(ordinal: int, size: int, node_sizes: tuple[int, ...]) -> list[DeviceWorld]:
    """Set up a world of threads that share a GPU, each with a stream of its own."""
    settings = settings_.read()
    settings_.let_streams_run_side_by_side()
    rules = read_rules(settings.rules)
    kernels = _shared_kernels(ordinal, settings.cache_dir)
    common = DeviceCommon(settings, rules, kernels.device, size, "emulated", kernels)
    hub = Hub(size, settings.timeout)
    segment = reserve_on(kernels.device, size, settings.heap)

    def build(exchange: Any, topology: Any, memory: Any) -> DeviceWorld:
        return build_world(exchange, topology, memory, common)

    return open_ranks(hub, segment, node_sizes, build)


def open_gpus(
    exchange: Any, topology: Any, identities: list[bytes], settings: Any, rules: dict[str, Any]
) -> DeviceWorld:
    """Set up a world of processes with a GPU each. Collective."""
    memory = SymmetricMemory(exchange, topology, settings)
    try:
        device: Any = memory.device
        _same(
            exchange, {"the architecture of the GPU": device.arch, "the text of kernels": text_digest()} | toolchain()
        )
        here, far, remote = _reach(exchange, identities, memory, settings)
        shares = exchange.allgather(len(here.ranks_on_my_gpu).to_bytes(4, "little"))
        sharers = max(int.from_bytes(share, "little") for share in shares)
        common = DeviceCommon(settings, rules, device, sharers, "nvshmem")
        return build_world(exchange, here, memory, common, far, remote)
    except BaseException:
        memory.close()
        raise


def _same(exchange: Any, facts: Mapping[str, str]) -> None:
    """Refuse ranks whose kernels would cut messages differently, which data on their way do not tell. Collective."""
    everyone = [json.loads(answer) for answer in exchange.allgather(json.dumps(facts).encode())]
    for name in facts:
        for rank, told in enumerate(everyone):
            mine, its = everyone[0].get(name), told.get(name)
            if mine != its:
                raise BootstrapError(
                    f"Init: {name} must be the same on all ranks, and differs on ranks 0 and {rank}: {mine or 'none'} "
                    f"and {its or 'none'}; make it so, or set NVCOLL_BACKEND=shm"
                )


def _reach(
    exchange: Any, identities: list[bytes], memory: SymmetricMemory, settings: Any
) -> tuple[Any, frozenset[int], bool]:
    """Return the nodes, the ranks that are far from this one, and whether any rank is far from any. Collective."""

    def detect(ranks_per_node: int | None) -> Any:
        return _topology.detect(exchange.rank, identities, ranks_per_node, gpus=memory.gpus)

    here = detect(settings.ranks_per_node)
    unreachable = {rank for rank, address in enumerate(memory.addresses) if not address}
    if _anywhere(exchange, not unreachable.isdisjoint(here.members)):
        here = detect(1)  # ranks of a node reach each other: that is what algorithms take for granted
    far = frozenset(unreachable)
    if settings.ranks_per_node is not None:  # its nodes stand for hosts
        far |= set(range(exchange.size)) - set(here.members)
    remote = _anywhere(exchange, bool(far))  # both ends of every slot must know in which form it is filled
    problem = unfit_transport() if remote else None
    agree(exchange, b"", problem or "", "other nodes cannot be reached", BootstrapError)
    return here, far, remote


def _anywhere(exchange: Any, fact: bool) -> bool:
    """Tell whether something is true of any rank. Collective."""
    return b"1" in exchange.allgather(b"1" if fact else b"0")


def build_world(
    exchange: Any,
    topology: Any,
    memory: Any,
    common: DeviceCommon,
    far: Collection[int] = (),
    remote: bool = False,
    whole: DeviceWorld | None = None,
) -> DeviceWorld:
    """Set up a rank's area and planner. Collective."""
    settings, device, kernels = common.settings, common.device, common.kernels(remote)
    heap = Heap(memory)
    layout = DeviceLayout(len(memory.members), max(settings.scratch, SCRATCH))
    verb = exchange.verb
    piece = heap.allocate(layout.nbytes + (0 if whole is None else private_size(layout)), verb)
    slices = min(topology.node_sizes)
    area, stream, problem = None, 0, ""
    footing: Any = None
    sibling = None
    try:
        if whole is not None:
            footing, stream = whole.footing, whole.stream
        else:
            footing = Footing(device)
            stream = _stream_on(device) if common.backend == "emulated" else 0
        area = DeviceArea(memory, piece, topology, layout, settings.timeout, slices, device, footing, far)
        if common.backend == "emulated":
            above = None if whole is None else whole.sibling
            sibling = join(Sibling(device.ordinal, exchange.group, area.state, settings.timeout, above))
    except Error as exc:
        problem = str(exc)
    kind = AllocationError if whole is None else DeviceError  # for a part, nothing is taken but of the heap
    try:
        count = device.multiprocessors.to_bytes(4, "little")  # and nobody writes before all areas are made
        counts = agree(exchange, count, problem, f"{verb}: a GPU cannot be set up", kind)
    except BaseException as exc:
        if sibling is not None:
            sibling.left = True
        if area is not None:
            area.close()
        if whole is None:
            if footing is not None:
                footing.close()
            if stream:
                _idle[device.ordinal].append(stream)
        elif type(exc) is kind:  # all ranks know
            heap.give_back(verb)
        raise
    assert area is not None
    smallest = min(int.from_bytes(answer, "little") for answer in counts)
    planner = DevicePlanner(
        area, topology, slices, common.rules, kernels, common.sharers, smallest, settings.timeout, remote
    )
    world = DeviceWorld(exchange, topology, planner, heap, common, footing, far, stream, whole, sibling)
    heap.finish = world.finish
    return world
