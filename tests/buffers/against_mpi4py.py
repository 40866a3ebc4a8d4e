"""Give random specs to `parse` and to mpi4py: both take the same ones, and read the same bytes.

A program of its own (``python -m tests.buffers.against_mpi4py``), for MPI stays initialised in a process. It prints
how many specs were taken, and how many refused.
"""

import ctypes
import random

import numpy as np
from mpi4py import MPI

from nvcoll.buffers import parse
from nvcoll.errors import Error
from tests.buffers.memory import KINDS

TYPES = {
    "bool": MPI.BOOL,
    "int16": MPI.SHORT,
    "uint32": MPI.UINT32_T,
    "float32": MPI.FLOAT,
    "complex128": MPI.DOUBLE_COMPLEX,
}
SHAPES = [(), (0,), (1,), (6,), (2, 3), (4, 2, 2)]
LAYOUTS = [np.asarray, np.transpose, np.asfortranarray, lambda a: a[::2], lambda a: a[1:], lambda a: a[..., :1]]
CHOSEN = [kind for kind in KINDS if not kind.missing and kind.name != "__array_interface__"]  # which mpi4py lacks
AS_IT_LIES = {"ndarray": np.asarray, "memoryview": memoryview}  # these keep the layout; other kinds copy


def ours(spec):
    """Return the bytes that `parse` finds, or the message of its refusal."""
    try:
        parsed = parse("Isend", "buf", spec, writable=False)
    except Error as exc:
        return str(exc)
    return ctypes.string_at(parsed.address, parsed.nbytes)


def theirs(spec):
    """Return the bytes that mpi4py sends, or the message of its refusal."""
    received, status = bytearray(1024), MPI.Status()
    try:
        request = MPI.COMM_SELF.Isend(spec, 0)
    except (TypeError, ValueError, BufferError, KeyError, NotImplementedError) as exc:
        return repr(exc)
    MPI.COMM_SELF.Recv([received, MPI.BYTE], 0, 0, status)
    request.Wait()
    return bytes(received[: status.Get_count(MPI.BYTE)])


def draw_buffer(rng):
    """Return an object of any kind and layout, or None, the name of its type, and its number of elements."""
    if rng.random() < 0.05:
        return None, rng.choice([*TYPES]), 0
    kind = rng.choice(CHOSEN)
    name = rng.choice([name for name in TYPES if not kind.typed or name in kind.typed])
    shape = rng.choice([shape for shape in SHAPES if kind.empty or 0 not in shape])
    values = np.arange(np.prod(shape)).astype(name).reshape(shape)
    if values.ndim and kind.name in AS_IT_LIES:
        values = rng.choice(LAYOUTS)(values)
    return AS_IT_LIES.get(kind.name, kind.make)(values), name, values.size


def draw_spec(rng):
    """Return a buffer or a spec around one, well formed or not."""
    buf, name, size = draw_buffer(rng)
    count = rng.choice([None, None, -1, 0, 1, 2, size - 1, size, 2.0])
    displ = rng.choice([None, 0, 1, size, size + 1, -1])
    datatype = rng.choice([None, TYPES[name], np.dtype(name).char])
    pair = rng.choice([(count, displ), [count, displ]])
    forms = [buf, [buf, count], (buf, pair), [buf, count, datatype], [buf, pair, datatype], [buf]]
    forms += [(buf, count, displ, datatype), [buf, datatype]]
    return rng.choice(forms)


def main():
    """Compare specs until 4000 were drawn."""
    rng = random.Random(7)
    taken = refused = 0
    for _ in range(4000):
        spec = draw_spec(rng)
        mine = ours(spec)
        if isinstance(mine, str) and mine.endswith("give a smaller count or a larger buffer"):
            continue  # there mpi4py may read past the end of the memory
        yours = theirs(spec)
        assert mine == yours or (isinstance(mine, str) and isinstance(yours, str)), (spec, mine, yours)
        taken, refused = taken + isinstance(mine, bytes), refused + isinstance(mine, str)
    print(taken, refused)


if __name__ == "__main__":
    main()
