"""Comm: MPI's verbs. Each validates, finds the plan and runs it; all judgement on arguments is here or in `buffers`."""

import atexit
import math
import operator
from dataclasses import replace
from typing import Any

import numpy as np

from nvcoll._plan import Plan, Plans
from nvcoll.buffers import IN_PLACE, Buffer, DeviceBuffer, Spec, check_pair, is_in_place, parse
from nvcoll.errors import ArgumentError, DatatypeError, StateError
from nvcoll.failures import failure
from nvcoll.lifecycle import Living
from nvcoll.ops import SUM, Op, as_datatype, as_op
from nvcoll.planning import Explanation
from nvcoll.world import open_self, open_world

MOST_ELEMENTS = 2**59
"""Elements of an array, so that the bytes of the widest type fit an address."""
MOST_KEPT = 16384
"""Plans kept for the long way; a program whose sizes never repeat begins anew then."""


class Comm(Living):
    """A group of ranks that call collectives together. `COMM_WORLD` and `COMM_SELF` are the two there are.

    Nothing happens when it is made: the first use finds the other ranks, takes memory and is collective.

    Parameters
    ----------
    opener
        Opens the world behind it.
    name
        For messages.
    """

    def __repr__(self) -> str:
        if not self.alive:
            return f"<nvcoll.Comm {self.name}, not in use yet>"
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
        """Where its memory is: ``"shm"``, ``"emulated"``, or ``"self"`` for `COMM_SELF`."""
        return self._world.backend

    @property
    def bootstrap(self) -> str:
        """How its ranks found each other: ``"run"``, ``"torchrun"``, ``"mpi"``, ``"single"`` or ``"emulated"``."""
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

    def empty(self, shape: Any, dtype: Any = np.float32) -> Buffer:
        """Allocate an array on the symmetric heap, contents undefined. Collective: same size and order on all ranks.

        Parameters
        ----------
        shape
            Shape of the array, or its length.
        dtype
            A NumPy dtype, or a datatype of nvcoll or mpi4py.

        Returns
        -------
        Buffer
            A NumPy array; verbs use it where it lies, without copies.

        Raises
        ------
        AllocationError
            On all ranks, if one of them has no room.
        MismatchError
            On all ranks, if they ask for different sizes.
        """
        datatype = as_datatype(dtype, "empty", "dtype")
        dims = _dimensions(shape)  # judged before anything is sent or taken
        if self._calls is not None:
            return self._calls.empty(dims, datatype)  # type: ignore[no-any-return]
        return Buffer.on(self._world.heap.allocate(math.prod(dims) * datatype.itemsize), dims, datatype)

    def zeros(self, shape: Any, dtype: Any = np.float32) -> Buffer:
        """Allocate an array of zeros on the symmetric heap. Collective; see `empty`.

        Parameters
        ----------
        shape, dtype
            As for `empty`.

        Returns
        -------
        Buffer
        """
        return self.full(shape, 0, dtype)

    def full(self, shape: Any, fill_value: Any, dtype: Any = np.float32) -> Buffer:
        """Allocate an array of one value on the symmetric heap. Collective; see `empty`.

        Parameters
        ----------
        shape, dtype
            As for `empty`.
        fill_value
            The value of every element.

        Returns
        -------
        Buffer
        """
        buffer = self.empty(shape, dtype)
        buffer.fill(fill_value)
        return buffer

    def array(self, data: Any, dtype: Any = None) -> Buffer:
        """Copy an array to the symmetric heap. Collective; see `empty`.

        Parameters
        ----------
        data
            Anything ``numpy.asarray`` takes, of the same size on all ranks.
        dtype
            Type of the elements; None is that of `data`.

        Returns
        -------
        Buffer
        """
        source = np.asarray(data)
        buffer = self.empty(source.shape, source.dtype if dtype is None else dtype)
        if isinstance(buffer, DeviceBuffer):
            buffer.copy_from(source)
        else:
            buffer[...] = source
        return buffer

    def Barrier(self) -> None:
        """Wait until every rank has called it.

        Raises
        ------
        TimeoutError, PeerLostError, MismatchError
            As for `Allreduce`.
        """
        if self._calls is not None:
            self._calls.barrier()
        elif self._between is not None:
            self._between.barrier()
            return
        token, kept = self._token, self._kept
        plan = kept.get("barrier")
        if plan is None:
            planner = self._world.planner
            told = replace(planner.explain("allreduce", 1, token.datatype, SUM), verb="barrier")
            plan = kept["barrier"] = planner.plan(told, token.datatype, SUM)
        if not plan.run(token.address, token.address):
            raise self._failure(plan)

    def Allreduce(
        self, sendbuf: Any, recvbuf: Any = None, op: Any = SUM, *, stream: Any = None, algorithm: str | None = None
    ) -> None:
        """Reduce the ranks' data element by element, and give all ranks the result.

        Parameters
        ----------
        sendbuf
            This rank's contribution: an array, or ``[buf, count]``, ``[buf, datatype]``, ``[buf, count, datatype]``.
            `IN_PLACE` takes it from `recvbuf`.
        recvbuf
            Where the result goes, of the same count and datatype. None, or `sendbuf` itself, reduces in place.
            Contents are undefined after an error in the call.
        op
            The operator: ours or mpi4py's.
        stream
            A CUDA stream for arrays on a GPU; None for arrays of the host.
        algorithm
            Name of an algorithm (``"ring"``), or with a protocol (``"ring/simple"``), to use instead of the one that
            would be chosen. The same on all ranks.

        Raises
        ------
        ArgumentError, DatatypeError
            Before anything is sent: buffers of different counts or types, read-only, with gaps, or on a GPU.
        MismatchError
            Another rank's call differs in count, datatype, operator or algorithm.
        TimeoutError
            A rank did not arrive within ``NVCOLL_TIMEOUT`` seconds.
        PeerLostError
            A rank ended, or failed. After these three the communicator is unusable.

        Notes
        -----
        All ranks get bitwise equal results. Floats of 8 and 16 bits are summed in float32 and rounded once.
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
        send, recv, handle = _judge(sendbuf, recvbuf, op, stream)
        datatype, nbytes = recv.datatype, recv.nbytes
        if recv.count == 0:
            return
        if self._between is not None:
            self._between.allreduce(send, recv, handle, algorithm)
            return
        # Looked up once: should another thread finalize from here on, the plan must not end up in the next world's.
        planner, plans, kept = self._world.planner, self._plans, self._kept
        key = (datatype.name, nbytes, handle.name, algorithm)
        plan = kept.get(key)
        if plan is None:
            plan = planner.plan(planner.explain("allreduce", recv.count, datatype, handle, algorithm), datatype, handle)
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[key] = plan
        plans.setdefault(algorithm, Plans(IN_PLACE)).add(datatype.code, nbytes, op, plan)
        if not plan.run(send.address, recv.address):
            raise self._failure(plan)

    def _failure(self, plan: Plan) -> BaseException:
        """Return the error of a call that ended early."""
        world = self.__dict__.get("_world")  # looked up as an attribute, it would come to life again
        if world is None or world.planner.state.failure is None:
            return StateError(f"{plan.describe.verb.capitalize()}: another thread finalized {self.name} meanwhile")
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
            If there is no such verb, or `nbytes` is no multiple of the itemsize.
        """
        if not isinstance(verb, str) or verb.lower() != "allreduce":
            raise ArgumentError(f"explain: verb is {verb!r}, expected 'allreduce'")
        datatype, handle = as_datatype(dtype, "explain", "dtype"), as_op(op, "explain")
        if reason := handle.supports(datatype):
            raise DatatypeError(f"explain: {reason}")
        if not hasattr(nbytes, "__index__") or nbytes < 0 or nbytes % datatype.itemsize:
            raise ArgumentError(
                f"explain: nbytes is {nbytes!r}, expected a multiple of "
                f"the {datatype.itemsize} bytes of {datatype.name}"
            )
        if self._between is not None:
            return self._between.explain(nbytes // datatype.itemsize, datatype, handle)
        return self._world.planner.explain("allreduce", nbytes // datatype.itemsize, datatype, handle)

    def algorithms(self, verb: str = "allreduce") -> list[str]:
        """Return the names that ``algorithm=`` takes.

        Parameters
        ----------
        verb
            ``"allreduce"``.

        Returns
        -------
        list of str
        """
        return [one.name for one in self.explain(verb, 4).candidates]


def _dimensions(shape: Any) -> tuple[int, ...]:
    """Return a shape as whole numbers whose product fits an address."""
    try:
        dims = tuple(operator.index(length) for length in np.atleast_1d(np.asarray(shape, dtype=object)))
    except TypeError:
        raise ArgumentError(f"empty: shape is {shape!r}, expected whole numbers; give a length or a tuple") from None
    if min(dims, default=0) < 0:
        raise ArgumentError(f"empty: shape {shape} has a negative dimension; give sizes of 0 or more")
    if math.prod(dims) >= MOST_ELEMENTS:
        raise ArgumentError(f"empty: shape {dims} has more elements than addresses; give a product below 2**59")
    return dims


def _judge(sendbuf: Any, recvbuf: Any, op: Any, stream: Any) -> tuple[Spec, Spec, Op]:
    """Check the arguments of an all-reduce; in place, both specs are the same."""
    verb = "Allreduce"
    if stream is not None:
        raise ArgumentError(f"{verb}: stream is given, and arrays of the host have none; leave it out")
    if is_in_place(sendbuf):
        if recvbuf is None:
            raise ArgumentError(f"{verb}: sendbuf is IN_PLACE and recvbuf missing; pass the array as recvbuf")
        sendbuf = recvbuf
    elif recvbuf is None or is_in_place(recvbuf):
        recvbuf = sendbuf
    recv = parse(verb, "recvbuf" if recvbuf is not sendbuf else "sendbuf", recvbuf, True)
    send = recv
    if recvbuf is not sendbuf:
        send = parse(verb, "sendbuf", sendbuf, False)
        check_pair(verb, send, recv)
    handle = as_op(op, verb)
    if reason := handle.supports(recv.datatype):
        raise DatatypeError(f"{verb}: {reason}")
    return send, recv, handle


COMM_WORLD = Comm(open_world, "COMM_WORLD")
COMM_SELF = Comm(open_self, "COMM_SELF")


def Init() -> None:
    """Bring `COMM_WORLD` to life now rather than on first use. Collective; does nothing if it is alive.

    Raises
    ------
    BootstrapError
        If the ranks cannot find each other.
    """
    COMM_WORLD.rank  # noqa: B018 - the first look opens it


def Finalize() -> None:
    """Leave `COMM_WORLD` and `COMM_SELF` and give their memory back; buffers of theirs are gone. Runs at exit too.

    Not collective: ranks that still wait for this one raise PeerLostError. A later use, or `Init`, starts anew.
    """
    COMM_WORLD._close()
    COMM_SELF._close()


def Is_initialized() -> bool:
    """Tell whether `COMM_WORLD` is alive.

    Returns
    -------
    bool
    """
    return COMM_WORLD.alive


atexit.register(Finalize)
