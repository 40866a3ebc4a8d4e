"""Who takes part in a benchmark: nvcoll, and the libraries it is compared with.

A peer is a small class: a `name`, a `version`, and `prepare(count)`, which sets `send`, `recv` and `call`. To add one,
write the class and put it into `PEERS`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from nvcoll.buffers import IN_PLACE
from nvcoll.errors import ArgumentError
from nvcoll.ops import Datatype, Op

BUFFERS = ("symmetric", "numpy", "out-of-place")
Array = np.ndarray[Any, np.dtype[Any]]


class Contestant(Protocol):
    """What the checks and the clock use of a contestant.

    Attributes
    ----------
    name
        Shown in the table.
    send, recv
        The flat arrays that the prepared call reads and writes; the same one where it works in place.
    call
        The prepared call; collective.
    """

    name: str
    send: Array
    recv: Array
    call: Callable[[], object]

    @property
    def may_refuse(self) -> bool:
        """Whether an `ArgumentError` of a call is an answer: nobody can do this here."""

    def prepare(self, count: int) -> None:
        """Make `call` reduce the first `count` elements."""


class Arrays:
    """The arrays of all contestants, each made once, at its first use and for the largest count.

    Parameters
    ----------
    comm
        An nvcoll communicator.
    count
        Elements of each array.
    datatype
        Their type.
    """

    def __init__(self, comm: Any, count: int, datatype: Datatype) -> None:
        self.comm = comm
        self.count = count
        self.datatype = datatype
        self._made: dict[str, Array] = {}

    def plain(self) -> Array:
        """Return an ordinary NumPy array; nvcoll's ``numpy`` and the peers share it."""
        if "plain" not in self._made:
            self._made["plain"] = np.zeros(self.count, self.datatype.dtype)
        return self._made["plain"]

    def symmetric(self, role: str) -> Array:
        """Return an array on the symmetric heap, one for each `role`; collective."""
        if role not in self._made:
            self._made[role] = self.comm.zeros(self.count, self.datatype.dtype)
        return self._made[role]

    def pair(self, kind: str) -> tuple[Array, Array]:
        """Return (send, recv) for a kind of `BUFFERS`; collective."""
        if kind == "numpy":
            return self.plain(), self.plain()
        recv = self.symmetric("recv")
        return (self.symmetric("send") if kind == "out-of-place" else recv), recv

    def free(self) -> None:
        """Free the symmetric arrays; collective. A second call does nothing."""
        made, self._made = self._made, {}
        for role in sorted(made):
            if role != "plain":
                made[role].free()  # type: ignore[attr-defined]


class Nvcoll:
    """nvcoll with one kind of buffer and one algorithm.

    Parameters
    ----------
    comm
        The communicator.
    arrays
        Where the buffers come from.
    op
        What is computed.
    buffer
        One of `BUFFERS`.
    algorithm
        One of ``comm.algorithms()``; None lets nvcoll choose.
    """

    name = "nvcoll"
    send: Array
    recv: Array
    call: Callable[[], object]

    def __init__(self, comm: Any, arrays: Arrays, op: Op, buffer: str, algorithm: str | None = None) -> None:
        self.comm = comm
        self.arrays = arrays
        self.datatype = arrays.datatype
        self.op = op
        self.buffer = buffer
        self.algorithm = algorithm

    @property
    def may_refuse(self) -> bool:
        """Whether it may: an algorithm that was asked for has limits, the one that nvcoll chooses has none."""
        return self.algorithm is not None

    def prepare(self, count: int) -> None:
        """Make `call` reduce the first `count` elements."""
        send, recv = self.arrays.pair(self.buffer)
        self.send, self.recv = send[:count], recv[:count]
        keywords = {} if self.algorithm is None else {"algorithm": self.algorithm}
        source: Any = IN_PLACE if send is recv else self.send
        self.call = partial(self.comm.Allreduce, source, self.recv, self.op, **keywords)

    def chosen(self) -> str:
        """Return the algorithm and protocol of the prepared call, as ``ring/simple``."""
        if self.algorithm is not None:
            return self.algorithm
        why = self.comm.explain("allreduce", self.recv.nbytes, self.datatype, self.op)
        return f"{why.algorithm}/{why.protocol}" if why.protocol else str(why.algorithm)


class Mpi:
    """mpi4py's ``Allreduce``, in place on an ordinary NumPy array.

    Raises
    ------
    ArgumentError
        mpi4py is missing, its ranks are not nvcoll's, or the MPI library lacks the datatype or operator.
    """

    name = "mpi"
    may_refuse = False
    send: Array
    recv: Array
    call: Callable[[], object]

    def __init__(self, comm: Any, arrays: Arrays, op: Op) -> None:
        # A rank that somebody else started is a world of its own to MPI: told without starting MPI in it.
        if comm.size > 1 and comm.bootstrap != "mpi":
            raise _not_of_mpi(f"these were started by {comm.bootstrap}", comm.size)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as exc:
            cure = 'pip install "nvcoll[mpich]"'
            raise ArgumentError(f"--compare mpi needs mpi4py and an MPI library ({exc}); {cure}") from exc
        self.mpi = MPI.COMM_WORLD
        if self.mpi.size != comm.size:
            raise _not_of_mpi(f"nvcoll has {comm.size}, MPI {self.mpi.size}", max(comm.size, self.mpi.size))
        self.arrays = arrays
        self.in_place = MPI.IN_PLACE
        self.version = " ".join(MPI.Get_library_version().splitlines()[0].rstrip("\0").split())
        self.op: Any = getattr(MPI, op.name, None)
        if self.op is None:
            raise ArgumentError(f"--compare mpi cannot do {op.name}, which MPI lacks; choose another --op")
        try:  # one element tells what the library lacks
            self.mpi.Allreduce(self.in_place, np.zeros(1, arrays.datatype.dtype), self.op)
        except (MPI.Exception, BufferError, ValueError, TypeError, KeyError) as exc:
            fact = f"cannot reduce {arrays.datatype.name} with {op.name} ({exc})"
            raise ArgumentError(f"--compare mpi {fact}; leave --compare out or take another --dtype") from exc

    def prepare(self, count: int) -> None:
        """Make `call` reduce the first `count` elements."""
        self.send = self.recv = self.arrays.plain()[:count]
        self.call = partial(self.mpi.Allreduce, self.in_place, self.recv, self.op)


def _not_of_mpi(fact: str, size: int) -> ArgumentError:
    return ArgumentError(
        f"--compare mpi needs ranks that MPI started; {fact}; "
        f"type `mpiexec -n {size} nvcoll bench allreduce --compare mpi`"
    )


PEERS = {"mpi": Mpi}
"""Name for ``--compare`` -> class, made as ``PEERS[name](comm, arrays, op)``."""
