"""The communicator's interface: forms of a call, what is refused and in which words, and the life of a communicator."""

import array
import ctypes
import re
import sys

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF, COMM_WORLD, IN_PLACE
from nvcoll import comm as comm_module
from nvcoll.ops import DATATYPES
from nvcoll.planning import candidates

SIZE = 3
MINE = [1.0, 2.0, 4.0]  # what rank 0 puts in; rank r has (r + 1) times that
TOTAL = [6.0, 12.0, 24.0]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")


@pytest.fixture
def finalized():
    """COMM_WORLD and COMM_SELF are not in use, before and after."""
    nvcoll.Finalize()
    yield
    nvcoll.Finalize()


def contribution(comm, dtype=np.float64):
    return (np.array(MINE) * (comm.rank + 1)).astype(dtype)


IN_PLACE_FORMS = {
    "x": lambda comm, x: comm.Allreduce(x),
    "x, None": lambda comm, x: comm.Allreduce(x, None),
    "x, x": lambda comm, x: comm.Allreduce(x, x),
    "IN_PLACE, x": lambda comm, x: comm.Allreduce(IN_PLACE, x),
    "None, x": lambda comm, x: comm.Allreduce(None, x),
    "x, IN_PLACE": lambda comm, x: comm.Allreduce(x, IN_PLACE),
    "by name": lambda comm, x: comm.Allreduce(sendbuf=IN_PLACE, recvbuf=x, op=nvcoll.SUM),
    "[x]": lambda comm, x: comm.Allreduce([x, None]),
    "[x, count]": lambda comm, x: comm.Allreduce([x, 3]),
    "[x, type]": lambda comm, x: comm.Allreduce([x, nvcoll.DOUBLE]),
    "[x, count, type]": lambda comm, x: comm.Allreduce([x, 3, "float64"]),
    "IN_PLACE, [x, type]": lambda comm, x: comm.Allreduce(IN_PLACE, [x, np.float64]),
    "two views of the same": lambda comm, x: comm.Allreduce(x[:], x[:]),
    "a view of the memory": lambda comm, x: comm.Allreduce(memoryview(x)),
    "the memory as bytes": lambda comm, x: comm.Allreduce([x.view(np.uint8), nvcoll.DOUBLE]),
    "two dimensions": lambda comm, x: comm.Allreduce(x.reshape(3, 1)),
    "a ctypes array": lambda comm, x: comm.Allreduce((ctypes.c_double * 3).from_buffer(x)),
    "an algorithm": lambda comm, x: comm.Allreduce(x, algorithm="ring"),
}


class TestForms:
    """Each is called twice: the first call takes the long way and makes the plan, the second may go the fast way."""

    @pytest.mark.parametrize("form", IN_PLACE_FORMS)
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_in_place(self, form, symmetric):
        def main(comm):
            results = []
            for _ in range(2):
                x = comm.array(contribution(comm)) if symmetric else contribution(comm)
                assert IN_PLACE_FORMS[form](comm, np.asarray(x) if symmetric else x) is None
                results.append(x.tolist())
            return results

        assert nvcoll.emulate(SIZE).run(main) == [[TOTAL, TOTAL]] * SIZE

    @pytest.mark.parametrize(
        "make",
        [
            lambda comm, x: x,
            lambda comm, x: comm.array(x),
            lambda comm, x: array.array("d", x),
            lambda comm, x: memoryview(bytearray(x.tobytes())).cast("d"),
            lambda comm, x: [bytearray(x.tobytes()), nvcoll.DOUBLE],
            lambda comm, x: (np.concatenate([[-1.0], x, [-1.0]]), 3, 1, "d"),
            lambda comm, x: [np.concatenate([[-1.0], x, [-1.0]]), (3, 1)],
        ],
    )
    @pytest.mark.parametrize("read_only", [False, True])
    def test_out_of_place(self, make, read_only):
        def main(comm):
            results = []
            for _ in range(2):
                send = make(comm, contribution(comm))
                memory = send[0] if isinstance(send, list | tuple) else send
                if read_only and isinstance(send, np.ndarray):
                    send.setflags(write=False)
                recv = np.zeros(3)
                before = np.asarray(memory).tobytes()
                comm.Allreduce(send, recv)
                assert np.asarray(memory).tobytes() == before
                results.append(recv.tolist())
            return results

        assert nvcoll.emulate(SIZE).run(main) == [[TOTAL, TOTAL]] * SIZE

    def test_bytes_may_be_sent(self):
        def main(comm):
            recv = bytearray(3)
            comm.Allreduce(bytes([1, 2, comm.rank]), recv)
            return list(recv)

        assert nvcoll.emulate(SIZE).run(main) == [[3, 6, 3]] * SIZE

    def test_types_of_one_size_do_not_share_a_plan(self):
        def main(comm):
            results = []
            for _ in range(2):
                words = np.array([2**31 - 1, 3], np.uint32) + np.uint32(comm.rank)
                for x in (words.astype(np.float32), words.view(np.int32), words):
                    smallest = np.empty_like(x)
                    comm.Allreduce(x, smallest, op=nvcoll.MIN)
                    results.append(smallest.tolist())
                for dtype in ("float16", "bfloat16", "int16", "uint16"):
                    x = np.array([2 + comm.rank, 100]).astype(DATATYPES[dtype].dtype)
                    comm.Allreduce(x)
                    results.append(x.astype(float).tolist())
                x = np.array([comm.rank == 1, comm.rank < 9, False])
                comm.Allreduce(x, op=nvcoll.LXOR)
                y = x.view(np.uint8) + np.uint8(2)
                comm.Allreduce(y, op=nvcoll.BXOR)
                results.append([x.tolist(), y.tolist()])
            return results

        # The second and third rank's words are negative as int32; a float32 rounds the first one's up.
        once = [[2.0**31, 3.0], [-(2**31), 3], [2**31 - 1, 3], *[[9.0, 300.0]] * 4]
        once.append([[True, True, False], [3, 3, 2]])
        assert nvcoll.emulate(SIZE).run(main) == [once * 2] * SIZE

    def test_operators_of_one_type_do_not_share_a_plan(self):
        def main(comm):
            results = []
            for op in [nvcoll.SUM, nvcoll.PROD, nvcoll.MIN, nvcoll.MAX, nvcoll.AVG] * 2:
                x = contribution(comm)
                comm.Allreduce(x, op=op)
                results.append(x.tolist())
            return results

        once = [TOTAL, [6.0, 48.0, 384.0], MINE, [3.0, 6.0, 12.0], [2.0, 4.0, 8.0]]
        assert nvcoll.emulate(SIZE).run(main) == [once * 2] * SIZE

    def test_fortran_order_is_reduced_as_it_lies(self):
        def main(comm):
            x = np.asfortranarray(np.arange(6.0).reshape(2, 3) + comm.rank)
            y = np.empty_like(x)
            comm.Allreduce(x, y)
            comm.Allreduce(x)
            return x.tolist() == y.tolist() == (np.arange(6.0).reshape(2, 3) * 3 + 3).tolist()

        assert all(nvcoll.emulate(SIZE).run(main))

    @pytest.mark.parametrize("shape", [0, (3, 0), (0, 7)])
    def test_empty_arrays(self, shape):
        def main(comm):
            for symmetric in (False, True):
                x = comm.empty(shape) if symmetric else np.empty(shape, np.float32)
                comm.Allreduce(x)
                comm.Allreduce(x, np.empty(shape, np.float32))
                comm.Iallreduce([None, 0, nvcoll.FLOAT], x).Wait()
            for algorithm in comm.algorithms():
                comm.Allreduce(np.empty(shape), algorithm=algorithm)
            with pytest.raises(nvcoll.ArgumentError, match="rang"):
                comm.Allreduce(np.empty(shape), algorithm="rang")
            x = np.ones(())
            comm.Allreduce(x)
            return float(x)

        assert nvcoll.emulate(SIZE).run(main) == [3.0] * SIZE

    @pytest.mark.parametrize("verb", ["Barrier", "barrier"])
    def test_barrier_waits_for_all(self, verb):
        arrived = []

        def main(comm):
            barrier = getattr(comm, verb)
            barrier()
            if comm.rank == 1:
                arrived.append("late")
            barrier()
            return list(arrived), barrier()

        assert nvcoll.emulate(SIZE).run(main) == [(["late"], None)] * SIZE


def contents(arrays):
    """The bytes of those arguments that are arrays of numbers."""
    return [one.tobytes() for one in arrays if isinstance(one, np.ndarray) and not one.dtype.hasobject]


class Unhashable:
    __hash__ = None


X = np.ones(4, np.float32)
REFUSED = {
    "nothing": ((None,), {}, "sendbuf is None, expected an array"),
    "in place of nothing": ((IN_PLACE,), {}, "sendbuf is IN_PLACE and recvbuf missing; pass the array as recvbuf"),
    "in place twice": ((IN_PLACE, IN_PLACE), {}, "is IN_PLACE, expected an array"),
    "a number": ((3.0,), {}, "sendbuf is of type float, expected memory"),
    "a list of numbers": (([1.0, 2.0, 3.0, 4.0, 5.0],), {}, "sendbuf is a list of 5 items, expected an array"),
    "counts": ((X, np.ones(3, np.float32)), {}, "recvbuf holds 3 float32, sendbuf 4; give both the same count"),
    "types": ((X, np.ones(4)), {}, "recvbuf holds 4 float64, sendbuf 4 float32; give both the same datatype"),
    "types of one size": ((X, np.ones(4, np.int32)), {}, "recvbuf holds 4 int32, sendbuf 4 float32"),
    "overlap": ((X[:3], X[1:]), {}, "sendbuf and recvbuf overlap by 8 bytes; pass IN_PLACE or a copy"),
    "orders": ((np.ones((2, 3)), np.ones((2, 3), order="F")), {}, "sendbuf is in C order, recvbuf in F order"),
    "gaps": ((X[::2],), {}, "sendbuf has gaps between its elements, expected contiguous memory"),
    "read-only": ((b"1234",), {}, "sendbuf is read-only, expected memory to write the result to; give a bytearray as"),
    "read-only result": ((X, bytes(16)), {}, "recvbuf is read-only"),
    "in place as recvbuf": ((IN_PLACE, b"1234"), {}, "recvbuf is read-only"),
    "in place as sendbuf": ((b"1234", IN_PLACE), {}, "sendbuf is read-only"),
    "gaps in what is sent": ((X[::2], X[:2]), {}, "sendbuf has gaps between its elements, expected contiguous memory"),
    "objects": ((np.array([None]),), {}, "sendbuf holds Python objects"),
    "byte order": ((X.astype(">f4"),), {}, "expected this machine's byte order; convert: x = x.astype('float32')"),
    "too few": (([X, 5],), {}, "sendbuf holds 4 float32, expected 5; give a smaller count or a larger buffer"),
    "operator": ((X,), {"op": "SUM"}, "op is 'SUM', expected one of SUM, PROD, MIN, "),
    "no operator": ((X,), {"op": None}, "op is None, expected one of SUM"),
    "a function": ((X,), {"op": max}, "op is of type builtin_function_or_method, expected one of SUM"),
    "what cannot be hashed": ((X,), {"op": Unhashable()}, "op is of type Unhashable, expected one of SUM"),
    "bits of floats": ((X,), {"op": nvcoll.BAND}, "BAND is defined for "),
    "order of complex": ((X.astype("c8"),), {"op": nvcoll.MIN}, "MIN is defined for types with an order"),
    "sum of bools": ((X > 0,), {}, "SUM is defined for numbers, the buffers hold bool; take LOR"),
    "stream": ((X,), {"stream": 1}, "stream is given, and arrays of the host have none; leave it out"),
    "algorithm": ((X,), {"algorithm": "bucket"}, "algorithm is 'bucket', expected one of halving_doubling, nvrar, "),
    "protocol": ((X,), {"algorithm": "ring/fast"}, "algorithm is 'ring/fast', expected one of "),
    "between hosts": ((X,), {"algorithm": "mpi"}, "algorithm is 'mpi', expected one of "),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_is_refused_leaves_the_communicator_as_it_was(self, case):
        args, options, message = REFUSED[case]

        def main(comm):
            kept = contents(args)
            x = np.ones(4, np.float32)
            for _ in range(2):  # before there is a plan for float32, SUM, and after
                if comm.rank == 1:  # the others need not refuse the same
                    with pytest.raises(nvcoll.ArgumentError, match="^Allreduce: .*" + re.escape(message)):
                        comm.Allreduce(*args, **options)
                x.fill(1)
                comm.Allreduce(x)
            assert kept == contents(args)
            return x.tolist()

        assert nvcoll.emulate(2).run(main) == [[2.0] * 4] * 2

    def test_kinds_of_errors(self):
        with pytest.raises(ValueError, match="same count"):
            COMM_SELF.Allreduce(X.copy(), np.ones(3, np.float32))
        with pytest.raises(TypeError, match="same datatype"):
            COMM_SELF.Allreduce(X.copy(), np.ones(4))


class TestExplain:
    def test_it_says_what_will_run(self):
        def main(comm):
            told = comm.explain("allreduce", 16, np.float64, nvcoll.MAX)
            x = np.ones(2)
            comm.Allreduce(x, op=nvcoll.MAX)
            [plan] = comm._kept.values()
            assert plan.describe == told
            assert comm.explain("Allreduce", 16, "d", nvcoll.MAX) == told
            return str(told).splitlines()[0]

        assert nvcoll.emulate(2).run(main)[0] == "allreduce of 16 bytes, float64 MAX: one_shot/low_latency"

    def test_algorithms_are_the_names_that_allreduce_takes(self):
        def main(comm):
            assert comm.algorithms() == comm.algorithms("allreduce") == candidates()
            with pytest.raises(nvcoll.ArgumentError, match=r"^algorithms: verb is 'bcast', expected"):
                comm.algorithms("bcast")
            for name in comm.algorithms():
                x = contribution(comm)
                comm.Allreduce(x, algorithm=name)
                assert x.tolist() == TOTAL
            return True

        assert all(nvcoll.emulate(SIZE).run(main))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("bcast", 4), "explain: verb is 'bcast', expected 'allreduce'"),
            (("allreduce", 5), "explain: nbytes is 5, expected a whole number, 0 or more, and a multiple of the 4 "),
            (("allreduce", -4), "explain: nbytes is -4, expected a whole number, 0 or more"),
            (("allreduce", 4, "float80"), "explain: dtype is 'float80', expected a datatype"),
            (("allreduce", 4, "float32", "SUM"), "explain: op is 'SUM', expected one of SUM"),
            (("allreduce", 4, bool), "explain: SUM is defined for numbers, the buffers hold bool"),
        ],
    )
    def test_refusals(self, args, message):
        with pytest.raises(nvcoll.ArgumentError, match="^" + re.escape(message)):
            COMM_SELF.explain(*args)
        with pytest.raises(nvcoll.ArgumentError, match=r"verb is 'bcast'"):
            COMM_SELF.algorithms("bcast")


@pytest.mark.usefixtures("finalized")
class TestLife:
    def test_nothing_happens_before_the_first_use(self):
        assert repr(COMM_WORLD) == "<nvcoll.Comm COMM_WORLD, not in use yet>"
        assert repr(COMM_SELF) == "<nvcoll.Comm COMM_SELF, not in use yet>"
        assert not nvcoll.Is_initialized()
        COMM_SELF.Barrier()
        assert not nvcoll.Is_initialized()
        assert (COMM_WORLD.rank, COMM_WORLD.size) == (0, 1)
        assert nvcoll.Is_initialized()
        assert repr(COMM_WORLD) == "<nvcoll.Comm COMM_WORLD: rank 0 of 1, shm>"
        assert repr(COMM_SELF) == "<nvcoll.Comm COMM_SELF: rank 0 of 1, self>"

    @pytest.mark.parametrize("comm", [COMM_WORLD, COMM_SELF])
    def test_names_of_mpi4py(self, comm):
        found = comm.Get_rank(), comm.Get_size(), comm.Get_name()
        assert found == (comm.rank, comm.size, comm.name) == (0, 1, comm.name)
        assert isinstance(comm, nvcoll.Intracomm)
        with pytest.raises(AttributeError, match="'Comm' object has no attribute 'Alltoallw'"):
            comm.Alltoallw()

    def test_init_and_finalize_may_be_repeated(self):
        for _ in range(3):
            nvcoll.Init()
            nvcoll.Init()
            assert nvcoll.Is_initialized()
            x = np.arange(3.0)
            COMM_WORLD.Allreduce(x, op=nvcoll.AVG)
            assert x.tolist() == [0.0, 1.0, 2.0]
            nvcoll.Finalize()
            nvcoll.Finalize()
            assert not nvcoll.Is_initialized()

    @pytest.mark.parametrize("comm", [COMM_WORLD, COMM_SELF])
    def test_buffers_end_with_their_communicator(self, comm):
        buffer = comm.zeros(3)
        comm.Allreduce(buffer)
        nvcoll.Finalize()
        assert buffer.freed
        with pytest.raises(nvcoll.StateError, match=r"^Allreduce: sendbuf is a Buffer that was freed"):
            comm.Allreduce(buffer)
        comm.Allreduce(comm.zeros(3))

    @pytest.mark.parametrize("comm", [COMM_WORLD, COMM_SELF])
    @pytest.mark.parametrize("op", [nvcoll.SUM, nvcoll.AVG, nvcoll.PROD, nvcoll.LAND])
    def test_one_rank_s_reduction_is_its_contribution(self, comm, op):
        send, recv = np.array([-3, 0, 2], np.int8), np.zeros(3, np.int8)
        for _ in range(2):
            recv.fill(0)
            comm.Allreduce(send, recv, op)
            assert recv.tolist() == send.tolist() == [-3, 0, 2]
        comm.Allreduce(send, op=op, algorithm="ring/simple")
        assert send.tolist() == [-3, 0, 2]
        assert comm.explain("allreduce", 4).algorithm == "copy"

    def test_sizes_that_never_repeat_keep_no_more_than_so_many_plans(self):
        send = np.random.default_rng(0).integers(0, 256, 17_000, dtype=np.uint8)
        for count in (*range(1, len(send)), 5, 300, len(send) - 1):
            recv = np.zeros(count, np.uint8)
            COMM_SELF.Allreduce(send[:count], recv, nvcoll.MAX if count % 2 else nvcoll.MIN)
            assert count % 100 or recv.tobytes() == send[:count].tobytes()
        assert recv.tobytes() == send[: len(recv)].tobytes()
        assert len(COMM_SELF._kept) <= comm_module.MOST_KEPT < len(send)

    def test_a_forked_child_is_no_rank(self, run_command):
        program = """
import os, sys
import numpy as np
from nvcoll import COMM_WORLD, COMM_SELF, Finalize, StateError
COMM_SELF.Barrier()
buffer = COMM_WORLD.zeros(3)
pid = os.fork()
for comm in (COMM_WORLD, COMM_SELF) if pid == 0 else ():
    try:
        comm.Allreduce(np.ones(3))
    except StateError as exc:
        os.write(1, f"child: {exc}\\n".encode())
if pid == 0:
    Finalize()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
COMM_WORLD.Allreduce(buffer)
print("parent:", buffer.tolist())
"""
        status, output = run_command([sys.executable, "-c", program])
        assert status == 0, output
        why = "this process was forked from a rank and is none itself; start ranks with a launcher, and helper "
        why += "processes that use nvcoll with the 'spawn' start method and NVCOLL_BOOTSTRAP=single"
        assert re.findall(rf"^child: (\w+): {why}", output, re.MULTILINE) == ["COMM_WORLD", "COMM_SELF"]
        assert "parent: [0.0, 0.0, 0.0]" in output
