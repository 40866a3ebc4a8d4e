"""The verbs of a communicator on GPUs: arguments are judged, the plan is found, and the launch is queued on a stream.

The host never waits here, but in `barrier`, and in `allocate` for calls that may use the memory which it gives out.
What fails on a GPU is known after the fact: the next call raises it.
"""

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from nvcoll._plan import BROKEN, MOST_KEPT, DevicePlan, DevicePlans
from nvcoll.arguments import in_place, judge_buffers
from nvcoll.backends import driver
from nvcoll.buffers import (
    IN_PLACES,
    DeviceBuffer,
    Spec,
    as_stream,
    captured_stream,
    current_stream,
    keep_for,
    parse_device,
    refuse_capture,
    refuse_to_miss_a_graph,
    working_stream,
)
from nvcoll.buffers.refusals import BACK
from nvcoll.device_failures import failure, raise_unheard
from nvcoll.device_requests import OnStream, sweep
from nvcoll.errors import ArgumentError, MismatchError, StateError
from nvcoll.ops import CODES, DATATYPES, MAX, Datatype, Op
from nvcoll.planning import EMPTY, plan_meeting
from nvcoll.requests import Pending
from nvcoll.world_cuda import DeviceWorld

WORD = 8
"""Most bytes of an element that kernels load at once, and to a multiple of which its address must be."""


class DeviceCalls:
    """The calls of one communicator.

    Parameters
    ----------
    world
        What stands behind it.
    """

    def __init__(self, world: DeviceWorld) -> None:
        self._world = world
        self._kept: dict[tuple[str, int, str, str | None], DevicePlan] = {}
        self._fast: dict[str | None, DevicePlans] = {}
        self._meetings: dict[str, DevicePlan] = {}

    def allocate(self, verb: str, dims: tuple[int, ...], datatype: Datatype) -> DeviceBuffer:
        """Allocate an array on the symmetric heap of the GPUs. Collective."""
        self.check(verb)
        refuse_capture(verb)
        nbytes = math.prod(dims) * datatype.itemsize
        world = self._world
        sweep()
        allocation = world.heap.allocate(nbytes, verb)
        precede, whole = world.planner.state.precede, weakref.ref(world.whole or world)
        check = partial(_check, whole)  # a buffer may outlive them, and does not keep them
        return DeviceBuffer.on(allocation, dims, datatype, world.device, driver, world.stream, precede, check)

    def barrier(self) -> None:
        """Wait until this rank's calls are done and every rank has come here, and see whether all calls matched."""
        self.check("Barrier")
        refuse_capture("Barrier")
        area, world = self._world.planner.area, self._world
        owner = world.stream or working_stream(world.device.ordinal)  # where a library replays a graph, most likely
        stream = as_stream(owner, None, "Barrier")
        if not self._meeting("barrier").run(area.history, area.token, stream, owner):
            raise failure(self._world, "Barrier")
        try:
            same = area.same_history(stream)
        except KeyboardInterrupt:  # some ranks may pass this barrier, and some not
            world.raised = True
            world.give_up()
            raise
        self.check("Barrier")
        if not same:
            area.fail()
            world.raised = True
            number, rank = self._world.planner.state.sequence, f"{self._world.rank}{self._world.of}"
            raise MismatchError(
                f"Barrier: in a call up to number {number} of rank {rank}, or a replay of one, the ranks have not "
                "called the same (count, datatype, operator or algorithm), and its result is wrong; make the calls "
                "agree"
            )

    def _meeting(self, verb: str) -> DevicePlan:
        """Return the plan of a call in which ranks only meet: it matches no other call. Barriers compare histories."""
        plan = self._meetings.get(verb)
        if plan is None:
            self._world.settle()
            plan = self._meetings[verb] = plan_meeting(self._world.planner, verb, DATATYPES["int64"], 2, MAX)
        return plan

    def allreduce(self, sendbuf: Any, recvbuf: Any, op: Any, stream: Any, algorithm: str | None) -> None:
        """Queue an all-reduce."""
        verb = "Allreduce"
        fast = self._fast.get(algorithm)
        done = None if fast is None else fast.run(sendbuf, recvbuf, op, stream)
        if done is None:
            send, recv, handle, queue, owner = self._judge(verb, sendbuf, recvbuf, op, stream)
            plan, from_, to = self._matched(send, recv, op, handle, algorithm)
            done = plan.run(from_, to, queue, owner)
            if stream is not None or self._world.stream:  # it need not be the stream on which the library works
                keep_for(queue, send.owner, recv.owner)
        if not done:
            raise failure(self._world, verb)

    def begin(
        self, verb: str, sendbuf: Any, recvbuf: Any, op: Any, stream: Any, algorithm: str | None
    ) -> Callable[[], Pending]:
        """Judge the arguments of a nonblocking all-reduce; return what begins it."""
        send, recv, handle, queue, _ = self._judge(verb, sendbuf, recvbuf, op, stream)
        state = self._world.planner.state
        self._refuse_captured(verb, queue)  # before a kernel is loaded, which may spoil the graph
        plan, from_, to = self._matched(send, recv, op, handle, algorithm)

        def start() -> Pending:
            state.demand()
            queue, owner = self._queue(verb, sendbuf, recvbuf, stream)  # the libraries may be on other streams by now
            for spec in (send, recv):
                if isinstance(spec.owner, DeviceBuffer) and spec.owner.freed:
                    raise StateError(f"{verb}: the DeviceBuffer was freed, expected a living one; make another request")
            self._refuse_captured(verb, queue)
            owners = (send.owner, recv.owner)
            pending = OnStream(self._world.device, lambda: self.end(verb), lambda: self._world.left, owners)
            if not plan.run(from_, to, queue, owner):
                raise failure(self._world, verb)
            pending.record(queue)
            return pending

        return start

    def _refuse_captured(self, verb: str, queue: int) -> None:
        with self._world.device:
            if driver.stream_capturing(queue):
                raise StateError(
                    f"{verb}: the stream is being captured, and a request tells nothing of the calls of a graph; call "
                    "Allreduce"
                )

    def end(self, verb: str) -> None:
        """Raise the failure of a request whose call has ended. That its communicator has ended, too, is none."""
        state = self._world.planner.state
        if not state.over:
            self.check(verb)
        elif state.reported:
            raise StateError(BROKEN)

    def check(self, verb: str) -> None:
        """Raise the failure of a call that has ended, or that the communicator has."""
        self._world.planner.state.demand()
        if self._world.planner.state.failed:
            raise failure(self._world, verb)

    def _judge(self, verb: str, sendbuf: Any, recvbuf: Any, op: Any, stream: Any) -> tuple[Spec, Spec, Op, int, Any]:
        """Check the arguments of an all-reduce.

        Returns the buffers, in place the same twice, the operator, the stream's handle and what has it.
        """
        world = self._world
        world.planner.state.demand()
        sendbuf, recvbuf, result = in_place(verb, sendbuf, recvbuf)
        queue, owner = self._queue(verb, sendbuf, recvbuf, stream)
        send, recv, handle = judge_buffers(verb, sendbuf, recvbuf, result, op, partial(parse_device, stream=queue))
        for name, spec in ((result, recv),) if send is recv else (("sendbuf", send), ("recvbuf", recv)):
            back = BACK if spec is recv else ""
            gpu = spec.device
            if gpu is None and spec.count:
                with world.device:
                    gpu = driver.gpu_of(spec.address)
            if gpu not in (None, world.device.ordinal):
                raise ArgumentError(
                    f"{verb}: {name} is on GPU {gpu}, rank {world.rank}{world.of} works on GPU {world.device.ordinal}; "
                    f"copy it there{back}, or set NVCOLL_DEVICE"
                )
            unit = min(spec.datatype.itemsize, WORD)
            if spec.count and spec.address % unit:
                raise ArgumentError(
                    f"{verb}: {name} begins at {spec.address:#x}, expected a multiple of {unit} bytes, for GPUs load "
                    f"{spec.datatype.name} whole; pass a copy{back}"
                )
        return send, recv, handle, queue, owner

    def _queue(self, verb: str, sendbuf: Any, recvbuf: Any, stream: Any) -> tuple[int, Any]:
        """Return the handle of the stream for a call that is made now, and what has it."""
        if stream is not None:
            return as_stream(stream, None, verb), stream
        arrays = (recvbuf,) if sendbuf is recvbuf else (recvbuf, sendbuf)
        owner = self._world.stream or current_stream(*arrays, verb=verb)  # emulated ranks have one each
        queue = as_stream(owner, None, verb)
        refuse_to_miss_a_graph(verb, queue)
        return queue, owner

    def _matched(
        self, send: Spec, recv: Spec, op: Any, handle: Op, algorithm: str | None
    ) -> tuple[DevicePlan, int, int]:
        """Return the plan of a call, and its places. Without elements the ranks meet, to see that all have none."""
        if recv.count == 0:
            planner = self._world.planner
            if algorithm is not None:
                planner.explain("allreduce", 1, recv.datatype, handle, algorithm)  # which judges it
            return self._meeting(EMPTY), planner.area.token, planner.area.token
        return self._plan(recv, op, handle, algorithm), send.address, recv.address

    def _plan(self, recv: Spec, op: Any, handle: Op, algorithm: str | None) -> DevicePlan:
        """Return the plan of an all-reduce, made if there is none, and keep it for the fast route with this `op`."""
        key = (recv.datatype.name, recv.nbytes, handle.name, algorithm)
        plan = self._kept.get(key)
        if plan is None:
            planner = self._world.planner
            told = planner.explain("allreduce", recv.count, recv.datatype, handle, algorithm)
            self._world.settle()
            plan = planner.plan(told, recv.datatype, handle)
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[key] = plan
        if algorithm not in self._fast:
            stream, gpu = self._world.stream, self._world.device.ordinal
            self._fast[algorithm] = DevicePlans(IN_PLACES, CODES, stream, captured_stream, gpu)
        fast = self._fast[algorithm]
        fast.add(recv.datatype.code, recv.nbytes, op, plan)
        return plan


def _check(world: "weakref.ref[DeviceWorld]", verb: str) -> None:
    """Raise what has failed in a call that may have used a buffer."""
    alive = world()
    if alive is not None:
        raise_unheard(alive, verb)
