"""The verbs of a communicator on GPUs: arguments are judged, the plan is found, and the launch is queued on a stream.

The host never waits here, but in `barrier`. What fails on a GPU is known after the fact: the next call raises it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from nvcoll._plan import DevicePlan, DevicePlans
from nvcoll.arguments import in_place, judge_buffers
from nvcoll.backends import driver
from nvcoll.buffers import IN_PLACE, DeviceBuffer, Spec, as_stream, current_stream, parse_device
from nvcoll.device.common import STAMP_BITS
from nvcoll.device_requests import OnStream
from nvcoll.errors import ArgumentError, MismatchError, StateError, TimeoutError
from nvcoll.ops import DATATYPES, SUM, Datatype, Op
from nvcoll.requests import Ended, Pending
from nvcoll.world_cuda import DeviceWorld

MOST_KEPT = 16384
"""Plans kept; a program whose sizes never repeat begins anew then."""
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
        self._arrive: tuple[DeviceBuffer, DevicePlan] | None = None
        self._raised = False

    def empty(self, dims: tuple[int, ...], datatype: Datatype, verb: str = "empty") -> DeviceBuffer:
        """Allocate an array on the symmetric heap of the GPUs. Collective."""
        nbytes = math.prod(dims) * datatype.itemsize
        world = self._world
        return DeviceBuffer.on(world.heap.allocate(nbytes, verb), dims, datatype, world.device, driver, world.stream)

    def barrier(self) -> None:
        """Wait until this rank's calls are done and every rank has come here."""
        if self._arrive is None:
            self._arrive = self._arrival()
        token, plan = self._arrive
        stream = self._world.stream  # 0 is the legacy default
        if not plan.run(token.address, token.address, stream):
            raise self._failure("Barrier")
        with self._world.device:
            driver.stream_synchronize(stream)
        self._check("Barrier")

    def _arrival(self) -> tuple[DeviceBuffer, DevicePlan]:
        """Return what a barrier reduces, and its plan, which no other call matches. Collective."""
        self._world.planner.state.demand()
        self._check("Barrier")
        planner, kind = self._world.planner, DATATYPES["int32"]
        told = replace(planner.explain("allreduce", 1, kind, SUM), verb="barrier")
        self._world.settle()
        plan = planner.plan(told, kind, SUM)
        return self.empty((1,), kind, "Barrier"), plan  # last, for others wait for a rank that fails before

    def allreduce(self, sendbuf: Any, recvbuf: Any, op: Any, stream: Any, algorithm: str | None) -> None:
        """Queue an all-reduce."""
        verb = "Allreduce"
        fast = self._fast.get(algorithm)
        done = None if fast is None else fast.run(sendbuf, recvbuf, op, stream)
        if done is None:
            send, recv, handle, queue, owner = self._judge(verb, sendbuf, recvbuf, op, stream)
            if recv.count == 0:
                return
            plan = self._plan(recv, op, handle, algorithm)
            done = plan.run(send.address, recv.address, queue, owner)
        if not done:
            raise self._failure(verb)

    def begin(
        self, verb: str, sendbuf: Any, recvbuf: Any, op: Any, stream: Any, algorithm: str | None
    ) -> Callable[[], Pending]:
        """Judge the arguments of a nonblocking all-reduce; return what begins it."""
        send, recv, handle, queue, owner = self._judge(verb, sendbuf, recvbuf, op, stream)
        if recv.count == 0:
            return Ended
        plan = self._plan(recv, op, handle, algorithm)

        def start() -> Pending:
            for spec in (send, recv):
                if isinstance(spec.owner, DeviceBuffer) and spec.owner.freed:
                    raise StateError(f"{verb}: the DeviceBuffer was freed, expected a living one; make another request")
            with self._world.device:
                if driver.stream_capturing(queue):
                    raise StateError(
                        f"{verb}: the stream is being captured, and a request tells nothing of the calls of a graph; "
                        "call Allreduce"
                    )
            if not plan.run(send.address, recv.address, queue, owner):
                raise self._failure(verb)
            return OnStream(self._world.device, queue, lambda: self._check(verb), (send.owner, recv.owner))

        return start

    def _check(self, verb: str) -> None:
        """Raise the failure of a call that has ended."""
        if self._world.planner.state.failed:
            raise self._failure(verb)

    def _judge(self, verb: str, sendbuf: Any, recvbuf: Any, op: Any, stream: Any) -> tuple[Spec, Spec, Op, int, Any]:
        """Check the arguments of an all-reduce.

        Returns the buffers, in place the same twice, the operator, the stream's handle and what has it.
        """
        world = self._world
        world.planner.state.demand()
        sendbuf, recvbuf = in_place(verb, sendbuf, recvbuf)
        owner = stream
        if stream is None:
            owner = self._world.stream or current_stream(recvbuf)  # emulated ranks have one each
        queue = as_stream(owner, None, verb)
        send, recv, handle = judge_buffers(verb, sendbuf, recvbuf, op, partial(parse_device, stream=queue or 1))
        for name, spec in (("sendbuf", send), ("recvbuf", recv)):
            if spec.device not in (None, world.device.ordinal):
                raise ArgumentError(
                    f"{verb}: {name} is on GPU {spec.device}, rank {world.rank} works on GPU {world.device.ordinal}; "
                    "copy it there, or set NVCOLL_DEVICE"
                )
            unit = min(spec.datatype.itemsize, WORD)
            if spec.count and spec.address % unit:
                raise ArgumentError(
                    f"{verb}: {name} begins at {spec.address:#x}, expected a multiple of {unit} bytes, for GPUs load "
                    f"{spec.datatype.name} whole; pass a copy"
                )
        return send, recv, handle, queue, owner

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
        fast = self._fast.setdefault(algorithm, DevicePlans(IN_PLACE, self._world.stream))
        fast.add(recv.datatype.code, recv.nbytes, op, plan)
        return plan

    def _failure(self, verb: str) -> Exception:
        """Return the error of the call that failed on the GPU; once, for the communicator is of no use from then on."""
        if self._raised:
            return StateError("an earlier call on this communicator failed; it can only be freed: call Finalize")
        self._raised = True
        world, state = self._world, self._world.planner.state
        boards = world.planner.area.boards()
        tag = boards[world.rank] or 0
        others = {rank: its for rank, its in enumerate(boards) if rank != world.rank and its is not None}
        missing = [rank for rank, its in others.items() if its >> STAMP_BITS < tag >> STAMP_BITS]
        odd = [rank for rank, its in others.items() if its >> STAMP_BITS == tag >> STAMP_BITS and its != tag]
        where = f"{verb}: a call up to number {state.sequence} failed on the GPU of rank {world.rank}"
        if odd:
            return MismatchError(
                f"{where}: rank {', rank '.join(map(str, odd))} calls something else (count, datatype, operator or "
                "algorithm, or Barrier); make the calls agree"
            )
        if missing:
            late = f"did not arrive: rank {', rank '.join(map(str, missing))}"
        elif None not in boards:
            late = "all have arrived by now"
        else:
            late = "those that can be seen from here have arrived by now" if others else "none can be seen from here"
        return TimeoutError(
            f"{where}: no answer within NVCOLL_TIMEOUT; {late}. See what those ranks do, or raise NVCOLL_TIMEOUT if "
            "they are only slow"
        )
