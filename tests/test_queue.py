"""The queue of nonblocking calls, among emulated ranks: order, overlap, buffers, errors, threads."""

import gc
import os
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import nvcoll
from nvcoll import Prequest, Request
from nvcoll._plan import Queue
from nvcoll.errors import MismatchError, PeerLostError, StateError
from tests.conftest import eventually

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine


def address_space():
    """Bytes that this process has mapped or reserved."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def run(main, size=3):
    return nvcoll.emulate(size).run(main)


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
                begun.wait()
            request = comm.Iallreduce(np.ones(3))
            if comm.rank != 2:
                begun.wait()
            return request.Wait()

        begun = threading.Barrier(3, timeout=SOON)
        assert run(main) == [True] * 3


class TestBuffers:
    @pytest.mark.parametrize("place", ["plain", "symmetric", "specification"])
    def test_live_until_the_call_has_ended(self, place):
        def main(comm):
            x = comm.full(40_000, 1.0) if place == "symmetric" else np.ones(40_000)
            if comm.rank == 0:  # after the allocation, which is collective
                late.wait(SOON)
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
        assert run(main)[2] is True

    def test_are_let_go_then(self):
        def main(comm):
            x, y = bytearray(8), bytearray(8)
            for late in lates:  # the long way, and the fast one
                if comm.rank == 0:
                    late.wait(SOON)
                request = comm.Iallreduce(x, y)
                if comm.rank == 1:
                    with pytest.raises(BufferError):
                        x.append(1)
                    late.set()
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

        lates = [threading.Event() for _ in range(2)]
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
            begun = threading.Event()
            comm._world.queue.begin(lambda: begun.wait(SOON))  # none fails before all are begun
            requests = [comm.Iallreduce(np.ones(4 + comm.rank)), comm.Iallreduce(np.ones(4))]
            begun.set()
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
            if comm.rank != 1:
                left.append(comm.Iallreduce(np.ones(4)))
                left.append(comm.Iallreduce(np.ones(4)))
            begun.wait()

        left, begun = [], threading.Barrier(3, timeout=SOON)
        run(main)
        for request in left:
            with pytest.raises((StateError, PeerLostError)):
                request.Wait()

    def test_after_the_communicator_is_gone(self):
        def main(comm):
            comm.Barrier()
            return comm, comm.Allreduce_init(np.ones(4))

        for comm, request in run(main):
            with pytest.raises(StateError, match="this communicator was freed or finalized"):
                request.Start()
            with pytest.raises(StateError, match="this communicator was freed or finalized"):
                comm.Iallreduce(np.ones(4))


def test_memory_goes_with_the_communicator():
    """Without the help of the garbage collector."""

    def main(comm):
        comm.Iallreduce(np.ones(3)).Wait()
        persistent = comm.Allreduce_init(np.ones(3))
        persistent.Start()
        requests.append(comm.Iallreduce(np.ones(3)))
        begun.wait()  # a rank that leaves earlier would make it fail

    requests, begun = [], threading.Barrier(4, timeout=SOON)
    run(main, 4)
    gc.collect()
    gc.disable()
    try:
        mapped = address_space()
        for _ in range(5):
            run(main, 4)
        assert address_space() - mapped < 2 << 30  # a world of four ranks reserves 4 GiB
    finally:
        gc.enable()


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
                eventually(lambda: comm._world.planner.state.sequence >= 2, 60)
                with pytest.raises(StateError, match="another thread is in a call on this communicator"):
                    comm.Iallreduce(np.ones(3))
                met.set()
                blocked.join()
            else:
                met.wait(SOON)
                comm.Barrier()

        met = threading.Event()
        run(main, 2)

    def test_the_system_gives_no_thread(self, monkeypatch):
        """The call is refused, nothing of it remains, and the next one gets a thread that runs it."""

        def refuse(thread):
            if thread.name == "nvcoll requests":
                raise RuntimeError("can't start new thread")
            start(thread)

        def main(comm):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                comm.Iallreduce(np.zeros(3))
            met.wait()
            if comm.rank == 0:
                monkeypatch.undo()
            met.wait()
            x = np.ones(3)
            request = comm.Iallreduce(x)
            deadline = time.monotonic() + SOON
            while x[0] != 2:  # nobody waits for the request
                assert time.monotonic() < deadline
                time.sleep(0.001)
            met.wait()
            return request.Wait()

        met, start = threading.Barrier(2, timeout=SOON), threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert run(main, 2) == [True] * 2

    def test_a_queue_without_a_thread_ends(self, monkeypatch):
        def refuse(_):
            raise RuntimeError("can't start new thread")

        state = nvcoll.COMM_SELF._world.planner.state
        queue = Queue(state)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                queue.begin(print)
        queue.close()
        queue.join(SOON)

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
