"""The lower-case verbs of requests, by themselves and beside mpi4py's own."""

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF, REQUEST_NULL, UNDEFINED, Prequest, Request
from nvcoll.errors import ArgumentError
from tests.conftest import without_mpi
from tests.test_requests import LISTS, Late

BESIDE = """
    import numpy as np
    import nvcoll
    from mpi4py import MPI

    def told(comm, kind, place):
        every = lambda: [comm.Iallreduce(place, np.ones(4)) for _ in range(2)]
        persistent = comm.Allreduce_init(place, np.ones(4))
        persistent.Start()
        found = [persistent.wait(), persistent.test(), every()[0].wait(), kind.waitall(every())]
        persistent.Free()
        for verb in ("waitall", "waitany", "waitsome"):
            found += [getattr(kind, verb)(some) for some in ([], every())]
        for verb in ("testall", "testany", "testsome"):
            requests = every()
            kind.Waitall(requests)
            found += [getattr(kind, verb)(some) for some in ([], requests)]
        return found

    theirs = told(MPI.COMM_SELF, MPI.Request, MPI.IN_PLACE)
    ours = told(nvcoll.COMM_SELF, nvcoll.Request, nvcoll.IN_PLACE)
    print(ours == theirs, len(ours))
    nvcoll.COMM_SELF.barrier()
"""


@pytest.mark.skipif(without_mpi() is not None, reason=str(without_mpi()))
def test_they_give_what_mpi4py_s_give(run_ranks):
    found = run_ranks(BESIDE, 1, launcher="mpiexec")
    assert found.stdout == ["True 16\n"], found


def test_one_request():
    pending = Late()
    request = Request(pending)
    assert request.test() == (False, None)
    assert request
    pending.over.set()
    assert request.test() == (True, None)
    assert not request
    assert request.wait() is REQUEST_NULL.wait() is None


def test_a_persistent_request():
    x = np.ones(3)
    request = COMM_SELF.Allreduce_init(x)
    request.Start()
    assert request.wait() is None
    Prequest.Startall([request])
    assert Prequest.waitall([request]) == [None]


def test_several():
    calls = [Late() for _ in range(3)]
    requests = [*map(Request, calls), Request()]
    assert Request.testall(requests) == (False, None)
    assert Request.testany(requests) == (UNDEFINED, False, None)
    assert Request.testsome(requests) == ([], [])
    for call in calls[:2]:
        call.over.set()
    assert Request.waitany(requests) == (0, None)
    assert Request.waitsome(requests) == ([1], [None])
    calls[2].over.set()
    assert Request.testall(iter(requests)) == (True, [None] * 4)
    assert Request.waitany(requests) == (UNDEFINED, None)
    assert Request.testany(requests) == (UNDEFINED, True, None)
    assert Request.waitsome(requests) == Request.testsome(requests) == (None, None)
    assert Request.waitall(iter(requests)) == [None] * 4


@pytest.mark.parametrize("verb", LISTS)
def test_what_is_refused_there_is_refused_here(verb):
    for wrong in (Request(), [Request(), 5]):
        with pytest.raises(ArgumentError, match=f"^{verb}: "):
            getattr(Request, verb.lower())(wrong)


@pytest.mark.parametrize("verb", ["wait", "test", *map(str.lower, LISTS)])
def test_a_status_is_judged(verb):
    args = () if verb in {"wait", "test"} else ([],)
    with pytest.raises(ArgumentError, match=r"status(es)? is of type float"):
        getattr(Request(), verb)(*args, 0.5)


@pytest.mark.parametrize("verb", ["wait", "test"])
def test_errors_are_those_of_the_call(verb):
    pending = Late(ValueError("of the call"))
    pending.over.set()
    with pytest.raises(ValueError, match="of the call"):
        getattr(Request(pending), verb)()


def test_real_calls():
    def main(comm):
        data = [np.full(100, comm.rank + 1.0) for _ in range(4)]
        objects = Request.waitall([comm.Iallreduce(x) for x in data])
        comm.barrier()
        return objects, {x for one in data for x in one}

    assert nvcoll.emulate(3).run(main) == [([None] * 4, {6.0})] * 3
