"""The fast route on hosts: which calls it serves once their plan is made, and which it leaves to the long way."""

import ml_dtypes
import numpy as np
import pytest

import nvcoll
from nvcoll import IN_PLACE, SUM


def tried(*calls):
    """What the fast route says to calls, on two ranks, after each was made the long way."""

    def main(comm):
        found = []
        for send, recv in calls:
            comm.Allreduce(send, recv)
            comm.Barrier()
            found.append(comm._plans[None].run(send, recv, SUM))
        return found

    first, second = nvcoll.emulate(2).run(main)
    assert first == second
    return first


def pair(dtype=np.float32):
    return np.ones(4, dtype), np.zeros(4, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_arrays(dtype):
    x, y = pair(dtype)
    assert tried((x, y), (x, None), (IN_PLACE, x), (x, x)) == [True] * 4


def test_specs_that_say_what_is_so():
    x, y = pair()
    specs = [[x, nvcoll.FLOAT], (x, 4, nvcoll.FLOAT), [x, None, nvcoll.FLOAT], [x, x.dtype]]
    assert tried(*((spec, y) for spec in specs), *((y, spec) for spec in specs)) == [True] * 8


def test_constants_of_mpi4py():
    mpi = pytest.importorskip("mpi4py.MPI")
    x, y = pair()
    assert tried((mpi.IN_PLACE, x), ([x, mpi.FLOAT], [y, 4, mpi.FLOAT])) == [True] * 2


@pytest.mark.parametrize(
    "spec",
    [
        lambda x: [x, 3, nvcoll.FLOAT],  # another count than that of the array
        lambda x: [x, (4, 0), nvcoll.FLOAT],
        lambda x: [x, 4],
        lambda x: [x, 4, 0, nvcoll.FLOAT],
        lambda x: [x.tobytes(), nvcoll.FLOAT],  # another type than that of the memory
    ],
)
def test_specs_for_the_long_way(spec):
    x, y = pair()
    [found] = tried((spec(x), [y, 3, nvcoll.FLOAT] if spec(x)[1] == 3 else y))
    assert found is None


def test_what_is_wrong_is_left_to_the_long_way():
    def main(comm):
        x, y = pair()
        comm.Allreduce(x, y)
        fast, readonly = comm._plans[None], x.copy()
        readonly.flags.writeable = False
        strange = np.ones(4, ml_dtypes.bfloat16)[::2], np.ones(2, "M8[s]"), np.ones(4, ">f4"), readonly, "text", 5
        wrong = [
            [],
            [x],
            [x, 4, -1],
            [None, nvcoll.FLOAT],
            [x, 1 << 70, nvcoll.FLOAT],
            [x, (1 << 62) + 4, nvcoll.FLOAT],
            (x, -4, nvcoll.FLOAT),
        ]
        return [fast.run(x, one, SUM) for one in (*strange, *wrong, x[1:])], fast.run(x, y, object())

    assert nvcoll.emulate(1).run(main) == [([None] * 14, None)]
