# cython: language_level=3, boundscheck=False, wraparound=True
"""Who am I: the exchange of bytes between ranks, memory they share, and the sign that a rank lives."""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t

import atexit
import builtins
import contextlib
import datetime
import hmac
import itertools
import math
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
import warnings
import weakref

from nvcoll.errors import AllocationError, BootstrapError, MismatchError, PeerLostError, StateError, TimeoutError

include "segment.pxi"
include "identity.pxi"
include "frames.pxi"
include "rendezvous.pxi"
include "parts.pxi"
include "channels.pxi"
include "launchers.pxi"


class Exchange:
    """Bytes between all ranks, for set-up and collective allocation; slow, and simple.

    Attributes
    ----------
    rank, size
        Which rank this is, and of how many.
    kind
        How the ranks found each other: "run", "torchrun", "mpi" or "single".
    mpi_comm
        For kind "mpi" a duplicate of mpi4py's ``COMM_WORLD``, or what was split from that, else None.
    verb
        What the user called, for messages: who exchanges bytes for another call sets it before.
    of
        For messages too: which communicator's ranks they count, such as " of COMM_WORLD.Dup()".
    timeout
        Seconds to wait for other ranks.
    """

    verb = "Init"
    of = ""

    def __init__(self, kind, rank, size, channel, timeout):
        self.kind, self.rank, self.size = kind, rank, size
        self.mpi_comm = channel.comm if kind == "mpi" else None
        self._channel, self.timeout = channel, timeout
        self._lock = threading.Lock()
        self._failed = False
        self._pid = os.getpid()

    def allgather(self, data):
        """Give `data` and return what every rank gave, by rank. Collective.

        Parameters
        ----------
        data
            Bytes, at most 16 MiB.

        Returns
        -------
        list of bytes

        Raises
        ------
        TimeoutError
            Ranks, which the message names, did not arrive within ``NVCOLL_TIMEOUT`` seconds.
        PeerLostError
            A rank has ended, or has left. The exchange cannot be used any more.
        StateError
            The exchange is closed, or this process is a fork of the rank.
        ValueError
            `data` is too long.
        """
        data = bytes(data)
        if len(data) > LARGEST:
            raise ValueError(f"{self.verb}: {len(data)} bytes were given, at most {LARGEST} are carried")
        with self._turn() as channel:
            return channel.allgather(data, self.timeout, self.verb)

    def split(self, color, key):
        """Divide the ranks into parts, each with an exchange of its own. Collective.

        An exchange and its parts are independent: threads may use them at the same time, what fails in one leaves the
        others as they are, and each has to be closed, in any order.

        Parameters
        ----------
        color
            A number of 64 bits, with a sign: ranks that give the same come into one part. None: this rank comes into
            none.
        key
            A number like `color`: ranks of a part are in the order of their keys, and where these are equal, in that
            of this exchange.

        Returns
        -------
        (Exchange, tuple of int) or None
            The exchange of this rank's part, of the same kind and timeout, and for each of its ranks the rank in this
            exchange; None for a rank that comes into no part.

        Raises
        ------
        TimeoutError, PeerLostError, StateError
            As `allgather` does. One that ends on the way into a part is missed there, by its deadline.
        BootstrapError
            The meeting point did not let this rank into its part. The exchange cannot be used any more.
        MismatchError, AllocationError
            A rank does something else, or MPI has no more communicators. The exchange can still be used.
        ValueError
            `color` or `key` is not a number that fits.
        """
        mine = wish(self.verb, color, key)
        with self._turn() as channel:
            members, token = part_of(self.verb, self.rank, channel.allgather(mine, self.timeout, self.verb))
            place = members.index(self.rank) if members else None
            part = channel.part(members, place, token, self.timeout, self.verb)
        if part is None:
            return None
        return Exchange(self.kind, place, len(members), part, self.timeout), members

    @contextlib.contextmanager
    def _turn(self):
        """Give the channel to one thread at a time; what raises meanwhile leaves the exchange unusable."""
        if self._pid != os.getpid():
            raise StateError(_forked(self.verb, self.rank))
        with self._lock:
            if self._channel is None:
                raise StateError(f"{self.verb}: the exchange is closed; connect anew")
            if self._failed:
                raise StateError(
                    f"{self.verb}: an earlier call failed, and the ranks may be out of step; "
                    "call Finalize on all of them, and Init starts anew"
                )
            self._failed = True
            try:
                yield self._channel
            except (MismatchError, AllocationError):  # all ranks know of it, and are in step
                self._failed = False
                raise
            self._failed = False

    def close(self, failed=False):
        """Leave; collective for kind "mpi" if nothing has failed. A second call does nothing.

        Parameters
        ----------
        failed
            Whether something else than an exchange has failed, so that the other ranks may never come to this call.
        """
        orderly = self._pid == os.getpid() and not self._failed
        channel, self._channel, self.mpi_comm = self._channel, None, None
        if channel is not None:
            channel.close(orderly, orderly and not failed)

    def __repr__(self):
        return f"<Exchange {self.kind}: rank {self.rank} of {self.size}>"


def _forked(verb, rank):
    return (
        f"{verb}: this process was forked from rank {rank} and is no rank itself; only the ranks that the launcher "
        "started may communicate; a child works alone if the 'spawn' start method and NVCOLL_BOOTSTRAP=single made it"
    )


cdef object _first = None  # (pid, rank) of the process that first connected to others


def connect(settings):
    """Find the other ranks, in the way that `choose` tells. Collective.

    Parameters
    ----------
    settings
        What `nvcoll.settings.read` returned.

    Returns
    -------
    Exchange

    Raises
    ------
    BootstrapError
        The ranks could not find each other, or a launcher's variables contradict themselves.
    StateError
        This process is a forked child of a rank.

    Warns
    -----
    RuntimeWarning
        Rank 0 listens for other hosts under torchrun's variables, and there is no ``NVCOLL_KEY``.
    """
    global _first
    kind, _ = choose(settings)
    if kind == "single":
        return Exchange("single", 0, 1, _Alone(), settings.timeout)
    if _first is not None and _first[0] != os.getpid():
        raise StateError(_forked("Init", _first[1]))
    rank, size, channel = {"run": _from_run, "torchrun": _from_torchrun, "mpi": _from_mpi}[kind](settings)
    _first = os.getpid(), rank
    return Exchange(kind, rank, size, channel, settings.timeout)
