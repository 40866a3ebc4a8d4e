"""The communicators that every process has, the beginning and the end of them, and what a process tells of itself."""

import atexit
import os
import time

from nvcoll import _bootstrap
from nvcoll.buffers import refuse_capture
from nvcoll.comm import Comm
from nvcoll.lifecycle import Living
from nvcoll.world import open_self, open_world

COMM_WORLD = Comm(open_world, "COMM_WORLD")
COMM_SELF = Comm(open_self, "COMM_SELF")

_finalized = False  # whether `Finalize` was ever called


def Init() -> None:
    """Bring `COMM_WORLD` to life now rather than on first use. Collective; does nothing if it is alive.

    Raises
    ------
    BootstrapError
        If the ranks cannot find each other, or a GPU that was asked for cannot be used.
    TimeoutError, PeerLostError
        If one of them does not come, or ends.
    ArgumentError
        If a variable of the environment, or the rules file, cannot be used.
    AllocationError
        If there is no memory for what they share.
    StateError
        In a child that was forked when the ranks had met.
    """
    COMM_WORLD.rank  # noqa: B018 - the first look opens it


def Finalize() -> None:
    """Leave `COMM_WORLD` and `COMM_SELF` and give their memory back; buffers of theirs are gone. Runs at exit too.

    Ranks that still wait for this one in a call raise PeerLostError. It may wait for the other ranks to finalize too:
    under MPI, whose communicators end on all together, and on GPUs of several processes, for NVSHMEM does, there
    ``NVCOLL_TIMEOUT`` at most. A later use, or `Init`, starts anew.

    Raises
    ------
    StateError
        On GPUs, while torch or CuPy captures a graph on its current stream.
    TimeoutError, MismatchError
        On GPUs, if a call has failed, and nobody has heard of it.
    """
    if COMM_WORLD.alive and COMM_WORLD.target == "cuda":
        refuse_capture("Finalize")
    _finish()


def _finish() -> None:
    """End both, at exit even where a graph is being captured."""
    global _finalized  # noqa: PLW0603 - it is the process that is in this state
    _finalized = True
    try:
        COMM_WORLD._close()
    finally:
        COMM_SELF._close()


def _exit() -> None:
    """End both with the process; what is freed after that was."""
    try:
        _finish()
    finally:
        Living._ended = True


def Is_initialized() -> bool:
    """Tell whether `COMM_WORLD` is alive.

    Returns
    -------
    bool
    """
    return COMM_WORLD.alive


def Is_finalized() -> bool:
    """Tell whether `Finalize` was called, and `COMM_WORLD` is not alive again.

    Returns
    -------
    bool
    """
    return _finalized and not COMM_WORLD.alive


def Wtime() -> float:
    """Return the seconds since some moment, the same one for all processes of a host.

    Returns
    -------
    float
        Of a clock that is never set. On GPUs, calls return before they have run: wait for them before you look.
    """
    return time.monotonic()


def Wtick() -> float:
    """Return the seconds between two values of `Wtime`, as the system tells them.

    Returns
    -------
    float
    """
    return time.get_clock_info("monotonic").resolution


def Get_processor_name() -> str:
    """Return the name of the host.

    Returns
    -------
    str
    """
    return os.uname().nodename


# the last that is registered is the first that runs: MPI goes when nothing of ours needs it any more
atexit.register(_bootstrap.finalize_mpi)
atexit.register(_exit)
