"""What mpi4py's users pass: handles of mpi4py, and specs of any form, mixed among the ranks of one call."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nvcoll
from nvcoll import IN_PLACE
from nvcoll.ops import DATATYPES, OPS
from tests.oracle import assert_reduced, random_data, supported


@pytest.fixture(scope="module")
def mpi():
    """mpi4py.MPI, without starting MPI if nobody has: handles are recognised without it."""
    pytest.importorskip("mpi4py").rc.initialize = False
    return pytest.importorskip("mpi4py.MPI")


class TestHandles:
    @pytest.mark.parametrize("op", [op for op in OPS if op != "AVG"])
    def test_operators(self, mpi, op):
        data = [random_data(np.random.default_rng(rank), "int32", op, 40) for rank in range(3)]

        def main(comm):
            results = []
            for _ in range(2):
                x = data[comm.rank].copy()
                comm.Allreduce(x, op=getattr(mpi, op))
                results.append(x)
            return results

        for results in nvcoll.emulate(3).run(main):
            for result in results:
                assert_reduced(result, data, op, "int32")

    def test_handles_that_come_and_go_are_never_taken_for_each_other(self, mpi):
        def main(comm):
            for _ in range(200):  # a new handle may get the address of one that is gone
                for op, expected in ((mpi.SUM, 5.0), (mpi.MAX, 3.0), (mpi.PROD, 6.0)):
                    x = np.array([2.0 + comm.rank])
                    comm.Allreduce(x, op=mpi.Op(op))
                    assert x[0] == expected
            gc.collect()
            return True

        assert nvcoll.emulate(2).run(main) == [True, True]

    def test_one_rank_with_mpi4py_s_names_and_one_with_ours(self, mpi):
        def main(comm):
            x = np.arange(6, dtype=np.float32)
            if comm.rank:
                comm.Allreduce(mpi.IN_PLACE, [x, 6, mpi.FLOAT], op=mpi.MIN)
            else:
                comm.Allreduce(IN_PLACE, [x[::-1].copy().data, nvcoll.FLOAT], nvcoll.MIN)
            with comm.zeros(3, mpi.INT32_T) as buffer:
                assert buffer.dtype == np.int32
            assert comm.explain("allreduce", 8, mpi.DOUBLE, mpi.MAX).datatype == "float64"
            return x.tolist() if comm.rank else None

        assert nvcoll.emulate(2).run(main)[1] == [0, 1, 2, 2, 1, 0]

    @pytest.mark.parametrize("op", ["MINLOC", "REPLACE", "NO_OP", "OP_NULL"])
    def test_operators_without_counterpart(self, mpi, op):
        x = np.ones(3)
        for _ in range(2):
            with pytest.raises(nvcoll.DatatypeError, match=rf"^Allreduce: op is MPI.{op}, expected one of SUM, PROD"):
                nvcoll.COMM_SELF.Allreduce(x, op=getattr(mpi, op))
            nvcoll.COMM_SELF.Allreduce(x)


# A form takes the data of `count` elements and gives (what to pass as sendbuf, what to pass as recvbuf, the result).
def as_arrays(comm, data, junk):
    recv = np.empty_like(data)
    return data.copy(), recv, lambda: recv


def in_place(comm, data, junk):
    x = data.copy()
    return x, None, lambda: x


def unaligned(comm, data, junk):
    memory = np.empty(data.nbytes + len(junk), np.uint8)
    array = memory[len(junk) :].view(data.dtype)
    array[...] = data
    return IN_PLACE, array, lambda: array


def in_the_middle(comm, data, junk):
    padded = np.concatenate([data[:0], np.zeros(len(junk), data.dtype), data, np.ones(3, data.dtype)])
    recv = np.full(len(data) + 5, 1).astype(data.dtype)
    spec = [padded, (len(data), len(junk)), data.dtype]
    return spec, [recv, len(data), 5, data.dtype], lambda: recv[5:]


def as_bytes(comm, data, junk):
    recv = bytearray(data.nbytes)
    kind = DATATYPES[data.dtype.name]
    return [data.tobytes(), kind], (recv, len(data), kind), lambda: np.frombuffer(recv, data.dtype)


def counted(comm, data, junk):
    x = np.concatenate([data, np.zeros(len(junk), data.dtype)])
    return [x, len(data)], None, lambda: x[: len(data)]


def shaped(comm, data, junk):
    x = data.copy().reshape(1, -1, 1)
    y = np.asfortranarray(np.empty_like(x))
    return x, y, y.ravel


FORMS = [as_arrays, in_place, unaligned, in_the_middle, as_bytes, counted, shaped]
CALLS = st.tuples(
    st.sampled_from(supported()),
    st.integers(0, 40) | st.sampled_from([100, 1000, 3001]),
    st.tuples(*[st.sampled_from(FORMS)] * 3),
    st.binary(max_size=9),
    st.booleans(),
)


@settings(max_examples=60)
@given(st.lists(CALLS, min_size=1, max_size=10))
def test_any_forms_on_any_ranks(calls):
    inputs = [
        [random_data(np.random.default_rng([number, rank]), name, op, count) for rank in range(3)]
        for number, ((name, op), count, *_) in enumerate(calls)
    ]

    def main(comm):
        results = []
        for ((_, op), _, forms, junk, symmetric), data in zip(calls, inputs, strict=True):
            send, recv, result = forms[comm.rank](comm, data[comm.rank], junk)
            if symmetric:  # an allocation between calls, and one more kind of memory
                buffer = comm.array(data[comm.rank])
                comm.Allreduce(buffer, op=OPS[op])
                assert recv is not buffer
            comm.Allreduce(send, recv, OPS[op])
            results.append(result().copy())
            assert not symmetric or buffer.tobytes() == results[-1].tobytes()
        return results

    outcomes = nvcoll.emulate(3).run(main)
    for ((name, op), *_), data, *results in zip(calls, inputs, *outcomes, strict=True):
        assert len({result.tobytes() for result in results}) == 1
        assert_reduced(results[0], data, op, name)
