"""Requests: what holds for whatever carries a call out, and results of the verbs that make them."""

import threading

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF, IN_PLACE, REQUEST_NULL, UNDEFINED, Prequest, Request
from nvcoll.errors import ArgumentError, DatatypeError, StateError

LISTS = ["Waitall", "Testall", "Waitany", "Testany", "Waitsome", "Testsome"]
SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine


def run(main, size=3):
    return nvcoll.emulate(size).run(main)


class Late:
    """A pending call that ends when it is told to."""

    def __init__(self, problem=None):
        self.over, self.problem = threading.Event(), problem

    def done(self):
        return self.over.is_set()

    def wait(self):
        self.over.wait(SOON)
        if self.problem:
            raise self.problem


class TestRequest:
    """What holds for whatever carries a call out."""

    def test_is_active_until_its_end_was_told(self):
        pending = Late()
        request = Request(pending)
        assert repr(request) == "<nvcoll.Request, active>"
        assert request.Test() is False
        pending.over.set()
        assert repr(request) == "<nvcoll.Request, active>"
        assert request.Test() is True
        assert repr(request) == "<nvcoll.Request, inactive>"
        assert request.Test() is True
        assert request.Wait() is True

    @pytest.mark.parametrize("end", ["Wait", "Test"])
    def test_errors_are_raised_once(self, end):
        pending = Late(ValueError("of the call"))
        request = Request(pending)
        pending.over.set()
        with pytest.raises(ValueError, match="of the call"):
            getattr(request, end)()
        assert getattr(request, end)() is True

    def test_an_interrupted_wait_leaves_it_active(self):
        class Interrupted(Late):
            def wait(self):
                raise KeyboardInterrupt

        pending = Interrupted()
        request = Request(pending)
        with pytest.raises(KeyboardInterrupt):
            request.Wait()
        assert request.Test() is False
        pending.wait = pending.over.set
        assert request.Wait() is True

    def test_one_of_the_same_call(self):
        """mpi4py's handles may be made from each other."""
        pending = Late(ValueError("of the call"))
        first = Request(pending)
        second = Request(first)
        assert second
        assert second.Test() is False
        pending.over.set()
        for one in (second, first):
            with pytest.raises(ValueError, match="of the call"):
                one.Wait()
            assert not one
        assert not Request(first)

    def test_free(self):
        pending = Late()
        request = Request(pending)
        with pytest.raises(StateError, match=r"Free: the request is active, .*; Wait for it first"):
            request.Free()
        pending.over.set()
        request.Wait()
        request.Free()
        assert request.Wait() is True

    def test_waitall_waits_for_all_and_raises_the_first_error(self):
        calls = [Late(), Late(ValueError("second")), Late(ValueError("third"))]
        requests = [Request(), *map(Request, calls)]
        threading.Timer(0.1, lambda: [call.over.set() for call in calls]).start()
        with pytest.raises(ValueError, match="second"):
            Request.Waitall(requests)
        assert Request.Waitall(requests) is True
        assert Request.Waitall([]) is True

    def test_testall_changes_nothing_before_all_have_ended(self):
        calls = [Late(), Late()]
        requests = [*map(Request, calls), Request()]
        calls[0].over.set()
        assert Request.Testall(requests) is False
        assert repr(requests[0]) == "<nvcoll.Request, active>"
        calls[1].over.set()
        assert Request.Testall(iter(requests)) is True
        assert repr(requests[0]) == "<nvcoll.Request, inactive>"

    def test_waitany(self):
        calls = [Late(), Late()]
        requests = [Request(), *map(Request, calls)]
        threading.Timer(0.1, calls[1].over.set).start()
        assert Request.Waitany(requests) == 2
        calls[0].over.set()
        assert Request.Waitany(requests) == 1
        assert Request.Waitany(requests) == Request.Waitany([]) == UNDEFINED

    def test_testany(self):
        calls = [Late(), Late()]
        requests = [Request(), *map(Request, calls)]
        assert Request.Testany(requests) == (UNDEFINED, False)
        calls[1].over.set()
        assert Request.Testany(iter(requests)) == (2, True)
        assert Request.Testany(requests) == (UNDEFINED, False)
        calls[0].over.set()
        assert Request.Testany(requests) == (1, True)
        assert Request.Testany(requests) == Request.Testany([]) == (UNDEFINED, True)

    def test_some(self):
        calls = [Late() for _ in range(4)]
        requests = [*map(Request, calls), Request()]
        assert Request.Testsome(requests) == []
        threading.Timer(0.1, calls[2].over.set).start()
        assert Request.Waitsome(iter(requests)) == [2]
        assert [bool(one) for one in requests] == [True, True, False, True, False]
        calls[0].over.set()
        calls[3].over.set()
        assert Request.Testsome(requests) == [0, 3]
        calls[1].over.set()
        assert Request.Waitsome(requests) == [1]
        for verb in (Request.Waitsome, Request.Testsome):
            assert verb(requests) is verb([]) is None

    @pytest.mark.parametrize("verb", [Request.Waitsome, Request.Testsome])
    def test_some_end_all_that_have_ended_and_raise_the_first_error(self, verb):
        calls = [Late(), Late(ValueError("second")), Late(ValueError("third")), Late()]
        requests = [*map(Request, calls)]
        for call in calls[:3]:
            call.over.set()
        with pytest.raises(ValueError, match="second"):
            verb(requests)
        assert [bool(one) for one in requests] == [False, False, False, True]

    def test_what_has_ended_is_the_null_request(self):
        pending = Late()
        request, persistent = Request(pending), Prequest(lambda: pending)
        assert request != REQUEST_NULL != persistent
        assert request != Request(pending)
        assert len({request, persistent, REQUEST_NULL}) == 3
        pending.over.set()
        request.Wait()
        persistent.Free()
        assert request == REQUEST_NULL == persistent == request
        assert request not in (None, 0, "", nvcoll.COMM_NULL)
        assert REQUEST_NULL.Wait() is REQUEST_NULL.Test() is not REQUEST_NULL

    def test_the_null_request_is_mpi4py_s(self):
        mpi = pytest.importorskip("mpi4py.MPI")
        assert mpi.REQUEST_NULL == REQUEST_NULL == mpi.Request()
        assert mpi.COMM_NULL != REQUEST_NULL
        assert Request(Late()) != mpi.REQUEST_NULL

    def test_what_mpi4py_s_verbs_give_for_null_requests(self):
        ended = [True, True, UNDEFINED, (UNDEFINED, True), None, None]
        assert [getattr(Request, verb)([REQUEST_NULL] * 2) for verb in LISTS] == ended

    def test_is_true_while_active(self):
        """A loop over what is left, as in mpi4py's programs, must end."""
        calls = [Late(), Late()]
        requests = [*map(Request, calls)]
        turns = []
        for call in calls:
            call.over.set()
        while any(requests) and len(turns) < 3:
            turns.append(Request.Waitany(requests))
        assert turns == [0, 1]
        assert not Request()

    @pytest.mark.parametrize("verb", LISTS)
    def test_lists_of_other_things_are_refused(self, verb):
        told = rf"{verb}: requests\[1\] is of type int, expected nvcoll.Request; pass"
        with pytest.raises(ArgumentError, match=told):
            getattr(Request, verb)([Request(), 5])

    @pytest.mark.parametrize("verb", LISTS)
    def test_a_request_without_a_list_is_refused(self, verb):
        told = rf"{verb}: expected a list of requests, got a Request; pass \[request\] for a single one"
        with pytest.raises(ArgumentError, match=told):
            getattr(Request, verb)(Request())

    @pytest.mark.parametrize("verb", LISTS)
    def test_mpi4py_s_null_request_is_inactive_and_others_are_refused(self, verb):
        mpi = pytest.importorskip("mpi4py.MPI")
        mixed = [mpi.REQUEST_NULL, REQUEST_NULL, mpi.Prequest()]
        assert getattr(Request, verb)(mixed) == getattr(Request, verb)([REQUEST_NULL] * 3)
        assert [type(one) for one in mixed] == [mpi.Request, Request, mpi.Prequest]

        class Active(mpi.Request):
            def __bool__(self):
                return True

        told = rf"{verb}: requests\[1\] is mpi4py's Active, expected nvcoll.Request; give it to mpi4py's own {verb}$"
        with pytest.raises(ArgumentError, match=told):
            getattr(Request, verb)([REQUEST_NULL, Active()])

    def test_a_status_is_taken_and_left_as_it_is(self):
        mpi = pytest.importorskip("mpi4py.MPI")
        request, status = Request(), mpi.Status()
        before = [status.source, status.tag, status.error]
        for one in (None, status):
            assert request.Wait(one) is request.Test(one) is request.Wait(status=one) is True
            assert Request.Waitany([request], one) == Request.Waitany([request], status=one) == UNDEFINED
        for several in (None, [status], []):
            assert Request.Waitall([request], several) is Request.Testall([request], statuses=several) is True
            assert Request.Waitsome([request], several) is Request.Testsome([request], statuses=several) is None
        assert [status.source, status.tag, status.error] == before

    @pytest.mark.parametrize("verb", ["Wait", "Test", *LISTS])
    def test_what_is_no_status_is_refused(self, verb):
        args = () if verb in {"Wait", "Test"} else ([],)
        several = verb[4:] in {"all", "some"}
        text = "expected None, or a Status of mpi4py; leave it out, for it tells nothing of a collective call"
        if several:
            text = (
                "expected None, or a list for those of mpi4py; leave it out, for they tell nothing of collective calls"
            )
        for wrong, kind in ((0.5, "float"), ((), "tuple")):
            with pytest.raises(ArgumentError, match=f"^{verb}: status{'es' * several} is of type {kind}, {text}$"):
                getattr(Request(), verb)(*args, wrong)
        other = pytest.importorskip("mpi4py.MPI").Status() if several else []
        with pytest.raises(ArgumentError, match=f"^{verb}: status"):
            getattr(Request(), verb)(*args, other)

    def test_undefined_is_that_of_mpi(self):
        mpi = pytest.importorskip("mpi4py.MPI")
        assert mpi.UNDEFINED == UNDEFINED


class TestPrequest:
    def test_start_while_active_and_after_free(self):
        pending = Late()
        request = Prequest(lambda: pending)
        assert request.Wait() is True
        assert request.Test() is True
        assert request
        request.Start()
        with pytest.raises(StateError, match=r"Start: the request is active, .*; Wait for it first"):
            request.Start()
        with pytest.raises(StateError, match="Free: the request is active"):
            request.Free()
        pending.over.set()
        with pytest.raises(StateError, match="active"):  # its end was not told
            request.Start()
        request.Wait()
        assert request
        request.Free()
        request.Free()
        assert not request
        assert request.Wait() is True
        with pytest.raises(StateError, match=r"Start: the request was freed, .*; make another with Allreduce_init"):
            request.Start()

    def test_one_of_the_same_call(self):
        begun = []
        first = Prequest(lambda: begun.append(1) or Late())
        second = Prequest(first)
        second.Start()
        assert begun == [1]
        assert first.Test() is True  # it has not begun this one
        assert Prequest(second).Test() is False

    def test_startall_is_for_persistent_ones(self):
        for wrong in (Request(), nvcoll.REQUEST_NULL):
            told = r"Startall: requests\[0\] is of type Request, expected nvcoll.Prequest; pass what Allreduce_init"
            with pytest.raises(ArgumentError, match=told):
                Prequest.Startall([wrong])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 1000, 100_000])
def test_results(size, count):
    def main(comm):
        send, out, inside = np.full(count, comm.rank + 1.0), np.zeros(count), comm.full(count, comm.rank, "int64")
        persistent = comm.Allreduce_init(IN_PLACE, inside, op=nvcoll.MAX)
        for turn in range(3):
            requests = [comm.Iallreduce(send, out), comm.Iallreduce(float32 := np.ones(count, "float32")), persistent]
            persistent.Start()
            assert Request.Waitall(requests)
            assert (send == comm.rank + 1).all()
            assert (out == size * (size + 1) / 2).all()
            assert (float32 == size).all()
            assert (inside == size - 1 + turn).all()
            inside += 1
        persistent.Free()

    run(main, size)


def test_some_of_real_calls():
    def main(comm):
        data = [np.full(1000, comm.rank + 1.0) for _ in range(6)]
        requests = [comm.Iallreduce(x) for x in data]
        found = []
        while (some := Request.Waitsome(requests)) is not None:
            found += some
        return sorted(found), {x for one in data for x in one}, Request.Testany(requests)

    assert run(main) == [([*range(6)], {6.0}, (UNDEFINED, True))] * 3


def test_one_rank_needs_no_thread():
    comm = COMM_SELF
    before = threading.active_count()
    x, y = np.arange(5.0), np.zeros(5)
    request = comm.Iallreduce(x, y)
    assert (x == y).all()
    assert request.Test()
    persistent = comm.Allreduce_init(x, y)
    x += 1
    persistent.Start()
    persistent.Wait()
    assert (x == y).all()
    comm.Iallreduce(np.empty(0)).Wait()
    nothing = comm.Allreduce_init(np.empty(0))
    nothing.Start()
    with pytest.raises(StateError, match="active"):
        nothing.Start()
    assert nothing.Wait()
    assert threading.active_count() == before


def test_hints_are_taken_and_what_is_none_is_refused():
    mpi = pytest.importorskip("mpi4py.MPI")
    x = np.ones(3)
    for info in (None, nvcoll.INFO_NULL, mpi.INFO_NULL):
        COMM_SELF.Allreduce_init(x, IN_PLACE, nvcoll.SUM, info).Free()
        COMM_SELF.Allreduce_init(x, op=nvcoll.SUM, info=info).Free()
        COMM_SELF.Dup(info).Free()
        COMM_SELF.Split_type(nvcoll.COMM_TYPE_SHARED, 0, info).Free()
    calls = {
        "Allreduce_init": lambda: COMM_SELF.Allreduce_init(x, IN_PLACE, nvcoll.SUM, 7),
        "Dup": lambda: COMM_SELF.Dup(7),
        "Split_type": lambda: COMM_SELF.Split_type(nvcoll.COMM_TYPE_SHARED, 0, 7),
    }
    for verb, call in calls.items():
        with pytest.raises(ArgumentError, match=f"{verb}: info is of type int, expected an Info of mpi4py, or None; "):
            call()


def test_programs_without_requests_start_no_thread():
    def main(comm):
        comm.Allreduce(np.ones(3))
        return threading.active_count()

    before = threading.active_count()
    assert max(run(main)) <= before + 3


def test_threads_end_with_the_communicator():
    before = threading.active_count()
    run(lambda comm: comm.Iallreduce(np.ones(3)).Wait())
    assert threading.active_count() == before


def test_arguments_are_judged_at_the_call():
    def main(comm):
        x = np.ones(4)
        for verb in ("Iallreduce", "Allreduce_init"):
            call = getattr(comm, verb)
            with pytest.raises(ArgumentError, match=f"{verb}: recvbuf holds 5 float64, sendbuf 4; give both the same"):
                call(x, np.ones(5))
            with pytest.raises(DatatypeError, match=f"{verb}: "):
                call(x, op=nvcoll.BAND)
            with pytest.raises(ArgumentError, match=f"{verb}: sendbuf is read-only"):
                call(bytes(8))
            with pytest.raises(ArgumentError, match=f"{verb}: stream is given"):
                call(x, stream=0)
            with pytest.raises(ArgumentError, match="algorithm is 'none', expected one of"):
                call(x, algorithm="none")
        comm.Iallreduce(x, algorithm="ring/simple").Wait()
        return x[0]

    assert run(main) == [3.0] * 3
