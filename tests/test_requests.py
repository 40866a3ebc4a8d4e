"""Requests in one process: emulated ranks, and what needs no other rank."""

import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF, IN_PLACE, UNDEFINED, Prequest, Request
from nvcoll.errors import ArgumentError, DatatypeError, MismatchError, PeerLostError, StateError

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine


def run(main, size=3, **kwargs):
    return nvcoll.emulate(size, **kwargs).run(main)


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

    @pytest.mark.parametrize("verb", ["Waitall", "Testall", "Waitany"])
    def test_lists_of_other_things_are_refused(self, verb):
        with pytest.raises(
            ArgumentError, match=rf"{verb}: requests\[1\] is of type int, expected nvcoll.Request; pass"
        ):
            getattr(Request, verb)([Request(), 5])

    def test_undefined_is_that_of_mpi(self):
        mpi = pytest.importorskip("mpi4py.MPI")
        assert mpi.UNDEFINED == UNDEFINED


class TestPrequest:
    def test_start_while_active_and_after_free(self):
        pending = Late()
        request = Prequest(lambda: pending)
        assert request.Wait() is True
        assert request.Test() is True
        request.Start()
        with pytest.raises(StateError, match=r"Start: the request is active, .*; Wait for it first"):
            request.Start()
        with pytest.raises(StateError, match="Free: the request is active"):
            request.Free()
        pending.over.set()
        with pytest.raises(StateError, match="active"):  # its end was not told
            request.Start()
        request.Wait()
        request.Free()
        request.Free()
        assert request.Wait() is True
        with pytest.raises(StateError, match=r"Start: the request was freed, .*; make another with Allreduce_init"):
            request.Start()

    def test_startall_is_for_persistent_ones(self):
        with pytest.raises(
            ArgumentError, match=r"Startall: requests\[0\] is of type Request, expected nvcoll.Prequest"
        ):
            Prequest.Startall([Request()])


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


@pytest.mark.parametrize("comm", [COMM_SELF])
def test_one_rank_needs_no_thread(comm):
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


class TestOrder:
    """The order in which calls were begun, whatever else the ranks do."""

    def test_any_mix_of_blocking_and_nonblocking(self):
        """Each rank decides for itself which calls block, and which requests it waits for when."""

        def main(comm):
            rng = np.random.default_rng(comm.rank)
            every, active = [], []
            for number in range(400):
                x = np.full(1 + number % 50 * 40, comm.rank + number, "int64")
                every.append(x)
                kind = rng.integers(4)
                if kind == 0:
                    comm.Allreduce(x)
                    assert (x == 3 + 3 * number).all()
                elif kind == 1 and number % 10 == 0:
                    time.sleep(0.001)
                    active.append(comm.Iallreduce(x))
                else:
                    active.append(comm.Iallreduce(x))
                if kind == 3:
                    active.pop(int(rng.integers(len(active)))).Wait()
            comm.Barrier()
            assert all(request.Test() for request in active)
            assert all((x == 3 + 3 * number).all() for number, x in enumerate(every))

        run(main)

    def test_a_blocking_call_waits_for_all_before_it(self):
        def main(comm):
            if comm.rank == 0:
                late.wait(SOON)
            x = np.ones(4)
            requests = [comm.Iallreduce(x) for _ in range(5)]
            if comm.rank == 1:
                assert not requests[0].Test()
                late.set()
            comm.Barrier()
            assert Request.Testall(requests)
            return x[0]

        late = threading.Event()
        assert run(main) == [3.0**5] * 3

    def test_persistent_ones_run_as_they_were_started(self):
        def main(comm):
            x, y = np.ones(4), np.ones(40_000)
            first, second = comm.Allreduce_init(x), comm.Allreduce_init(y)
            for turn in range(50):
                Prequest.Startall([second, first] if turn % 2 else [first, second])
                Prequest.Waitall([first, second])
                x /= 3
                y /= 3
            return x[0], y[-1]

        assert run(main) == [(1.0, 1.0)] * 3

    def test_many_outstanding(self):
        def main(comm):
            data = np.ones((3000, 5))
            Request.Waitall([comm.Iallreduce(row) for row in data])
            return bool((data == 2).all())

        assert run(main, 2) == [True] * 2


class TestOverlap:
    def test_the_call_goes_on_while_the_rank_does_other_things(self):
        """No rank waits until all have the result."""

        def main(comm):
            x = np.full(200_000, comm.rank + 1.0)
            request = comm.Iallreduce(x)
            deadline = time.monotonic() + SOON
            while x[0] != 6 or x[-1] != 6:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            met.wait()
            assert request.Wait()

        met = threading.Barrier(3, timeout=SOON)
        run(main)

    def test_test_lets_it_go_on(self):
        def main(comm):
            request = comm.Iallreduce(np.ones(3))
            deadline = time.monotonic() + SOON
            while not request.Test():
                assert time.monotonic() < deadline

        run(main)

    def test_one_late_rank(self):
        def main(comm):
            if comm.rank == 2:
                time.sleep(0.3)
            start = time.monotonic()
            request = comm.Iallreduce(np.ones(3))
            begun = time.monotonic() - start
            request.Wait()
            return begun < 0.2

        assert run(main) == [True] * 3


class TestBuffers:
    @pytest.mark.parametrize("place", ["plain", "symmetric", "specification"])
    def test_live_until_the_call_has_ended(self, place):
        def main(comm):
            if comm.rank == 0:
                late.wait(SOON)
            x = comm.full(40_000, 1.0) if place == "symmetric" else np.ones(40_000)
            alive = weakref.ref(x)
            request = comm.Iallreduce([x, nvcoll.DOUBLE] if place == "specification" else x)
            del x
            gc.collect()
            if comm.rank == 1:
                assert alive() is not None
                late.set()
            request.Wait()
            return alive() is None

        late = threading.Event()
        if place == "symmetric":  # the allocation is collective
            late.set()
        assert run(main)[2] is True

    def test_are_let_go_then(self):
        def main(comm):
            x, y = bytearray(8), bytearray(8)
            for _ in range(2):  # the long way, and the fast one
                request = comm.Iallreduce(x, y)
                with pytest.raises(BufferError):
                    x.append(1)
                comm.Barrier()
            assert request.Wait()
            x.append(1)
            y.append(1)
            persistent = comm.Allreduce_init(x)
            persistent.Start()
            persistent.Wait()
            with pytest.raises(BufferError):
                x.append(1)
            persistent.Free()
            x.append(1)
            return len(x)

        assert run(main, 2) == [10] * 2

    @pytest.mark.parametrize("part", [slice(None), slice(1, 3)])
    def test_a_persistent_request_on_a_freed_one(self, part):
        def main(comm):
            x = comm.zeros(4)
            request = comm.Allreduce_init(x[part] if part.start else x)
            request.Start()
            request.Wait()
            x.free()
            with pytest.raises(StateError, match="Allreduce_init: a Buffer of this request was freed, expected living"):
                request.Start()
            assert request.Wait()

        run(main)


class TestErrors:
    def test_a_mismatch_is_raised_by_the_request_and_later_calls_are_refused(self):
        def main(comm):
            comm.Allreduce(np.ones(2))
            requests = [comm.Iallreduce(np.ones(4 + comm.rank)), comm.Iallreduce(np.ones(4))]
            kind, other = ("4", "5") if comm.rank == 0 else ("5", "4")
            why = rf"Allreduce \(call 2 on rank {comm.rank}\): this rank calls Allreduce of {kind} .* {other} float64"
            with pytest.raises(MismatchError, match=why):
                requests[0].Wait()
            with pytest.raises(StateError, match="an earlier call on this communicator failed"):
                requests[1].Wait()
            for call in (comm.Allreduce, comm.Iallreduce):
                with pytest.raises(StateError, match="an earlier call on this communicator failed"):
                    call(np.ones(4))
            assert requests[0].Wait()

        run(main, 2)

    def test_a_blocking_call_after_a_failed_one_is_refused(self):
        def main(comm):
            request = comm.Iallreduce(np.ones(4 + comm.rank))
            with pytest.raises(StateError, match="an earlier call on this communicator failed"):
                comm.Barrier()
            with pytest.raises(MismatchError):
                request.Test()

        run(main, 2)

    def test_a_rank_that_leaves(self):
        def main(comm):
            comm.Barrier()
            if comm.rank == 1:
                return
            request, later = comm.Iallreduce(np.ones(4)), comm.Allreduce_init(np.ones(4))
            with pytest.raises(PeerLostError, match=r"Allreduce \(call 2 on rank [02]\): rank 1 has left in or before"):
                request.Wait()
            with pytest.raises(StateError):
                later.Start()
            assert later.Wait()

        run(main)

    def test_a_rank_that_leaves_its_requests_behind(self):
        """It is the others that cannot go on; nothing hangs."""

        def main(comm):
            comm.Barrier()
            if comm.rank == 1:
                time.sleep(0.3)
                return
            left.append(comm.Iallreduce(np.ones(4)))
            left.append(comm.Iallreduce(np.ones(4)))
            return

        left = []
        run(main)
        for request in left:
            with pytest.raises((StateError, PeerLostError)):
                request.Wait()

    def test_after_the_communicator_is_gone(self):
        def main(comm):
            comm.Barrier()
            return comm, comm.Allreduce_init(np.ones(4))

        for comm, request in run(main):
            with pytest.raises(StateError, match="this communicator was finalized"):
                request.Start()
            with pytest.raises(StateError, match="this communicator was finalized"):
                comm.Iallreduce(np.ones(4))


class TestThreads:
    def test_wait_on_other_threads_than_began_them(self):
        def main(comm):
            data = np.ones((40, 6))
            requests = [comm.Iallreduce(row) for row in data]
            threads = [threading.Thread(target=Request.Waitall, args=(requests[k::4],)) for k in range(4)]
            for thread in reversed(threads):
                thread.start()
            for thread in threads:
                thread.join(SOON)
            return bool((data == 3).all())

        assert run(main) == [True] * 3

    def test_no_request_begins_during_another_threads_blocking_call(self):
        def main(comm):
            comm.Barrier()
            if comm.rank == 0:
                blocked = threading.Thread(target=comm.Barrier)
                blocked.start()
                time.sleep(0.2)
                with pytest.raises(StateError, match="another thread is in a call on this communicator"):
                    comm.Iallreduce(np.ones(3))
                met.set()
                blocked.join()
            else:
                met.wait(SOON)
                comm.Barrier()

        met = threading.Event()
        run(main, 2)

    def test_short_turns_of_the_interpreter(self):
        """Threads change at every chance: who runs the next call is decided anew each time."""

        def main(comm):
            x = np.ones(3)
            for _ in range(300):
                requests = [comm.Iallreduce(x) for _ in range(3)]
                requests[1].Wait()
                requests[2].Wait()
                x /= 8
                assert requests[0].Test()
            return x.tolist()

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            assert run(main, 2) == [[1.0] * 3] * 2
        finally:
            sys.setswitchinterval(before)
