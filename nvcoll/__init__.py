"""Collectives with mpi4py's API on symmetric memory.

>>> from nvcoll import COMM_WORLD, SUM
>>> buffer = COMM_WORLD.full(4, COMM_WORLD.rank, dtype="float32")
>>> COMM_WORLD.Allreduce(buffer, op=SUM)
"""

from nvcoll import ops as _ops
from nvcoll.errors import missing_extension as _missing_extension

try:
    from nvcoll import _bootstrap, _plan, _selection, _topology  # noqa: F401 - all are needed, so all are tried
except ImportError as _exc:
    raise _missing_extension(_exc) from _exc

from nvcoll.buffers import IN_PLACE, Buffer
from nvcoll.comm import COMM_SELF, COMM_WORLD, Comm, Finalize, Init, Is_initialized
from nvcoll.emulation import Emulation, emulate
from nvcoll.errors import (
    AllocationError,
    ArgumentError,
    BootstrapError,
    BuildError,
    DatatypeError,
    Error,
    MismatchError,
    PeerLostError,
    StateError,
    TimeoutError,
)
from nvcoll.ops import AVG, BAND, BOR, BXOR, LAND, LOR, LXOR, MAX, MIN, PROD, SUM, Datatype, Op
from nvcoll.planning import Candidate, Explanation

# The datatypes, by the names MPI gives them: FLOAT, DOUBLE, INT32_T, ...
globals().update(_ops.MPI_NAMES)

__version__ = "0.1.0"

__all__ = [
    "AVG",
    "BAND",
    "BOR",
    "BXOR",
    "COMM_SELF",
    "COMM_WORLD",
    "IN_PLACE",
    "LAND",
    "LOR",
    "LXOR",
    "MAX",
    "MIN",
    "PROD",
    "SUM",
    "AllocationError",
    "ArgumentError",
    "BootstrapError",
    "Buffer",
    "BuildError",
    "Candidate",
    "Comm",
    "Datatype",
    "DatatypeError",
    "Emulation",
    "Error",
    "Explanation",
    "Finalize",
    "Init",
    "Is_initialized",
    "MismatchError",
    "Op",
    "PeerLostError",
    "StateError",
    "TimeoutError",
    "emulate",
    *_ops.MPI_NAMES,
]
