"""The communicators that every process has, and the beginning and the end of them."""

import atexit

from nvcoll import _bootstrap
from nvcoll.comm import Comm
from nvcoll.world import open_self, open_world

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

    Ranks that still wait for this one in a call raise PeerLostError. It may wait for the other ranks to finalize too:
    under MPI, whose communicators end on all together, and on GPUs of several processes, for NVSHMEM does, there
    ``NVCOLL_TIMEOUT`` at most. A later use, or `Init`, starts anew.
    """
    try:
        COMM_WORLD._close()
    finally:
        COMM_SELF._close()


def Is_initialized() -> bool:
    """Tell whether `COMM_WORLD` is alive.

    Returns
    -------
    bool
    """
    return COMM_WORLD.alive


# the last that is registered is the first that runs: MPI goes when nothing of ours needs it any more
atexit.register(_bootstrap.finalize_mpi)
atexit.register(Finalize)
