"""Comm: MPI's verbs. Each has its arguments judged, finds the plan and runs it, or puts it in the queue."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nvcoll._plan import MOST_KEPT, Plan, Plans
from nvcoll.arguments import judge, judge_explain, judge_info, judge_verb
from nvcoll.buffers import IN_PLACES, Spec, while_alive
from nvcoll.errors import StateError
from nvcoll.failures import failure
from nvcoll.ops import CODES, SUM, Op
from nvcoll.planning import EMPTY, Explanation, plan_meeting, verb_of
from nvcoll.requests import Pending, Prequest, Request
from nvcoll.splitting import Splitting


class Comm(Splitting):
    """A group of ranks that call collectives together: `COMM_WORLD`, `COMM_SELF`, and what is made from them.

    Those two come to life at their first use: that of `COMM_WORLD` finds the other ranks and is collective, that of
    `COMM_SELF` concerns this process alone. `Dup`, `Split` and `Split_type` make others.

    Parameters
    ----------
    opener
        Opens the world behind it; None for a communicator that is made from another one.
    name
        For messages.
    first
        The communicator with which it ends.
    """

    def __repr__(self) -> str:
        if not self.alive:
            return f"<nvcoll.Comm {self.name}, not in use{' yet' if self else ''}>"
        return f"<nvcoll.Comm {self.name}: rank {self.rank} of {self.size}, {self._world.backend}>"

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return self._world.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._world.size

    @property
    def backend(self) -> str:
        """Where its memory is: ``"shm"``, ``"nvshmem"``, ``"emulated"``, or ``"self"`` for `COMM_SELF`."""
        return self._world.backend

    @property
    def bootstrap(self) -> str:
        """How its ranks found each other: ``"run"``, ``"torchrun"``, ``"mpi"``, ``"single"`` or ``"emulated"``.

        Of `COMM_SELF`, it is the last.
        """
        return str(self._world.exchange.kind)

    @property
    def target(self) -> str:
        """What its kernels run on: ``"host"`` or ``"cuda"``."""
        return self._world.target

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream on which calls run that name none; 0 if the array decides, or on the host."""
        return int(getattr(self._world, "stream", 0))

    def Get_rank(self) -> int:
        """Return `rank`.

        Returns
        -------
        int
        """
        return self.rank

    def Get_size(self) -> int:
        """Return `size`.

        Returns
        -------
        int
        """
        return self.size

    def Get_name(self) -> str:
        """Return `name`.

        Returns
        -------
        str
        """
        return self.name

    def Set_name(self, name: str) -> None:
        """Set `name`.

        Parameters
        ----------
        name
            The new one. Nothing is sent.

        Raises
        ------
        ArgumentError
            It is no text.
        StateError
            The communicator was freed, or is `COMM_NULL`.
        """
        self.name = name

    def Barrier(self) -> None:
        """Wait until every rank has called it.

        Raises
        ------
        TimeoutError, PeerLostError, MismatchError
            As for `Allreduce`; on GPUs also if calls before it did not match.
        StateError
            On GPUs, while torch or CuPy captures a graph on its current stream.
        """
        others = self._calls or self._between
        if others is not None:
            others.barrier()
            return
        token, plan = self._token, self._meeting("barrier")
        if not plan.run(token.address, token.address):
            raise self._failure(plan)

    def barrier(self) -> None:
        """Do as `Barrier`; mpi4py has both."""
        self.Barrier()

    def _meeting(self, verb: str) -> Plan:
        """Return the plan of a call in which ranks only meet: it reduces a token, and matches no other call.

        Who calls this has looked up the token before: should another thread finalize meanwhile, to look then would
        begin anew.
        """
        planner, token, kept = self._world.planner, self._token, self._kept
        plan = kept.get(verb)
        if plan is None:
            plan = kept[verb] = plan_meeting(planner, verb, token.datatype)
        return plan

    def Allreduce(
        self, sendbuf: Any, recvbuf: Any = None, op: Any = SUM, *, stream: Any = None, algorithm: str | None = None
    ) -> None:
        """Reduce the ranks' data element by element, and give all ranks the result.

        Parameters
        ----------
        sendbuf
            This rank's contribution: an array, or ``[buf, count]``, ``[buf, datatype]``, ``[buf, count, datatype]``, or
            ``[buf, count, displacement, datatype]``. `IN_PLACE`, or None, takes it from `recvbuf`.
        recvbuf
            Where the result goes, of the same count and datatype. None, or `sendbuf` itself, reduces in place.
            Contents are undefined after an error in the call.
        op
            The operator: ours or mpi4py's.
        stream
            The CUDA stream on which arrays on a GPU are reduced; None is that on which their library works now, and
            the only choice for arrays of the host. A call on a GPU returns before it has run.
        algorithm
            Name of an algorithm (``"ring"``), or with a protocol (``"ring/low_latency"``), to use instead of the one
            that would be chosen. The protocol is simple if it is left out. The same on all ranks.

        Raises
        ------
        ArgumentError, DatatypeError
            Before anything is sent: buffers of different counts, types or orders, read-only, with gaps, that overlap,
            or in memory that this communicator does not reach: a GPU's, or on GPUs the host's.
        StateError
            The buffer was freed, an earlier call failed, or another thread is in a call of this communicator; on GPUs
            also if torch or CuPy captures a graph of which the call would not be a part: name the stream.
        MismatchError
            Another rank's call differs in count, datatype, operator or algorithm.
        TimeoutError
            A rank did not arrive within ``NVCOLL_TIMEOUT`` seconds.
        PeerLostError
            A rank ended, or failed; on GPUs that is a `TimeoutError`. After these three the communicator is unusable.
            On GPUs, the call after the one that failed raises them, and of floats whose count, datatype or operator
            does not match it may be the next `Barrier` only, and results wrong until then.

        Notes
        -----
        All ranks get bitwise equal results (between hosts without GPUs, if their MPI does). Floats of 8 and 16 bits are
        summed in float32 and rounded once. A call on arrays without elements is a call too: all ranks make it.
        """
        plans = self._plans.get(algorithm)
        if plans is not None and stream is None:
            done = plans.run(sendbuf, recvbuf, op)
            if done is True:
                return
            if done is not None:
                raise self._failure(done)
        self._allreduce(sendbuf, recvbuf, op, stream, algorithm)

    def _allreduce(self, sendbuf: Any, recvbuf: Any, op: Any, stream: Any, algorithm: str | None) -> None:
        """Go the long way of `Allreduce`: judge everything, make the plan if there is none, and run it."""
        if self._calls is not None:
            self._calls.allreduce(sendbuf, recvbuf, op, stream, algorithm)
            return
        send, recv, handle = judge("Allreduce", sendbuf, recvbuf, op, stream)
        if self._between is not None:
            self._between.allreduce(send, recv, handle, algorithm)
            return
        send, recv, plan = self._matched(send, recv, op, handle, algorithm)
        if not plan.run(send.address, recv.address):
            raise self._failure(plan)

    def _matched(self, send: Spec, recv: Spec, op: Any, handle: Op, algorithm: str | None) -> tuple[Spec, Spec, Plan]:
        """Return what a call reduces, and its plan. Without elements the ranks meet, to see that all have none."""
        if recv.count == 0:
            token, planner = self._token, self._world.planner
            if algorithm is not None:
                planner.explain("allreduce", 1, recv.datatype, handle, algorithm)  # which judges it
            return token, token, self._meeting(EMPTY)
        return send, recv, self._plan(recv, op, handle, algorithm)

    def _plan(self, recv: Spec, op: Any, handle: Op, algorithm: str | None) -> Plan:
        """Return the plan of an all-reduce, made if there is none, and keep it for the fast route with this `op`."""
        # Looked up once: should another thread finalize from here on, the plan must not end up in the next world's.
        planner, plans, kept = self._world.planner, self._plans, self._kept
        key = (recv.datatype.name, recv.nbytes, handle.name, algorithm)
        plan = kept.get(key)
        if plan is None:
            told = planner.explain("allreduce", recv.count, recv.datatype, handle, algorithm)
            plan = planner.plan(told, recv.datatype, handle)
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[key] = plan
        plans.setdefault(algorithm, Plans(IN_PLACES, CODES)).add(recv.datatype.code, recv.nbytes, op, plan)
        return plan

    def Iallreduce(
        self, sendbuf: Any, recvbuf: Any = None, op: Any = SUM, *, stream: Any = None, algorithm: str | None = None
    ) -> Request:
        """Begin an `Allreduce` and return: it goes on while this rank does other things.

        Parameters
        ----------
        sendbuf, recvbuf, op, stream, algorithm
            As for `Allreduce`. Leave the buffers alone until the request has ended.

        Returns
        -------
        Request
            To be waited for. Its ``Wait`` and ``Test`` raise what the blocking call would have raised.

        Raises
        ------
        ArgumentError, DatatypeError
            At once, as `Allreduce`.
        StateError
            The communicator is of no use any more, or another thread is in a blocking call; or, on GPUs, the stream is
            being captured.

        Notes
        -----
        The calls of a communicator, blocking and nonblocking, run in the order in which they were begun, which must be
        the same on all ranks.
        """
        plans = self._plans.get(algorithm)
        if plans is not None and stream is None:
            task = plans.begin(self._world.queue, sendbuf, recvbuf, op, self._failure)
            if task is not None:
                return Request(task)
        return Request(self._begin("Iallreduce", sendbuf, recvbuf, op, stream, algorithm)())

    def Allreduce_init(
        self,
        sendbuf: Any,
        recvbuf: Any = None,
        op: Any = SUM,
        info: Any = None,
        *,
        stream: Any = None,
        algorithm: str | None = None,
    ) -> Prequest:
        """Prepare an `Allreduce` on these buffers that is to be begun many times. Nothing is sent.

        Parameters
        ----------
        sendbuf, recvbuf, op, stream, algorithm
            As for `Allreduce`.
        info
            As for `Dup`.

        Returns
        -------
        Prequest
            Its ``Start`` begins a call, as `Iallreduce` does.

        Raises
        ------
        ArgumentError, DatatypeError
            As `Allreduce`.
        StateError
            On GPUs, if the communicator is of no use any more, or the stream is being captured.
        """
        judge_info("Allreduce_init", info)
        return Prequest(self._begin("Allreduce_init", sendbuf, recvbuf, op, stream, algorithm))

    def _begin(
        self, verb: str, sendbuf: Any, recvbuf: Any, op: Any, stream: Any, algorithm: str | None
    ) -> Callable[[], Pending]:
        """Judge the arguments of a nonblocking all-reduce; return what begins it."""
        if self._calls is not None:
            return self._calls.begin(verb, sendbuf, recvbuf, op, stream, algorithm)  # type: ignore[no-any-return]
        send, recv, handle = judge(verb, sendbuf, recvbuf, op, stream)
        begin, owners = self._world.queue.begin, (send.owner, recv.owner)
        if self._between is not None:
            self._between.judge(verb, algorithm)
            call = partial(self._between.allreduce, send, recv, handle, algorithm)
            return while_alive(verb, owners, partial(begin, call))
        send, recv, plan = self._matched(send, recv, op, handle, algorithm)
        return while_alive(verb, owners, partial(begin, plan, send.address, recv.address, owners, self._failure))

    def _failure(self, plan: Plan) -> BaseException:
        """Return the error of a call that ended early."""
        world = self.__dict__.get("_world")  # looked up as an attribute, it would come to life again
        if world is None or world.planner.state.failure is None:
            return StateError(f"{verb_of(plan.describe.verb)}: another thread finalized {self.name} meanwhile")
        return failure(world, plan.describe)

    def explain(self, verb: str, nbytes: int, dtype: Any = np.float32, op: Any = SUM) -> Explanation:
        """Say which algorithm would serve a call, and why. Not collective, and nothing is sent.

        Parameters
        ----------
        verb
            ``"allreduce"``.
        nbytes
            Size of the message in bytes.
        dtype
            Type of the elements.
        op
            The operator.

        Returns
        -------
        Explanation
            Print it, or read its fields: ``algorithm``, ``protocol``, ``reason``, ``candidates``.

        Raises
        ------
        ArgumentError
            If there is no such verb, datatype or operator, or `nbytes` is no multiple of the itemsize.
        DatatypeError
            If the operator is not defined for elements of this type.
        """
        count, datatype, handle = judge_explain(verb, nbytes, dtype, op)
        if self._between is not None:
            return self._between.explain(count, datatype, handle)
        return self._world.planner.explain("allreduce", count, datatype, handle)

    def algorithms(self, verb: str = "allreduce") -> list[str]:
        """Return the names that ``algorithm=`` takes.

        Parameters
        ----------
        verb
            ``"allreduce"``.

        Returns
        -------
        list of str

        Raises
        ------
        ArgumentError
            If there is no such verb.
        """
        judge_verb("algorithms", verb)
        return [one.name for one in self.explain(verb, 4).candidates]


COMM_NULL = Comm._none = Comm(None, "COMM_NULL")
