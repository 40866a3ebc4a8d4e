"""Emulated ranks: parts of them, and memory on a GPU, given back when no ranks run that might wait for it."""

import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import nvcoll
from nvcoll.backends import emulated
from nvcoll.backends.driver import Device
from nvcoll.backends.emulated import Hub, LocalExchange, on_gpu, reserve_on, when_none_runs
from nvcoll.errors import AllocationError, DeviceError, PeerLostError, TimeoutError
from tests.conftest import eventually
from tests.fake_cuda import MEMORY
from tests.meeting import gather, together


def test_memory_goes_with_the_emulation(driver):
    with on_gpu():
        segment = reserve_on(Device(0), 2, 1 << 20)
        assert [len(taken) for taken in driver.taken.values()] == [2 << 20]
        del segment
        gc.collect()
        assert driver.taken
    assert not driver.taken


def test_memory_waits_for_the_emulation_inside_which_it_was_taken(driver):
    with on_gpu():
        with on_gpu():
            segment = reserve_on(Device(0), 2, 1 << 20)
            del segment
            gc.collect()
        assert driver.taken  # ranks of the outer one may run
    assert not driver.taken


def test_memory_that_somebody_keeps_is_free_for_the_emulation_after(driver):
    with on_gpu():
        segment = reserve_on(Device(0), 2, None)
    assert segment.size == MEMORY // 2
    assert driver.taken
    del segment
    gc.collect()
    with on_gpu():
        assert reserve_on(Device(0), 2, None).size == MEMORY // 2


def test_what_fails_keeps_nothing_else_from_being_given_back(driver):
    def fail():
        raise DeviceError("the context is lost")

    done = []
    with on_gpu():
        for act in (lambda: done.append(1), fail, lambda: done.append(2)):
            when_none_runs(act)
        assert done == []
    assert sorted(done) == [1, 2]


@pytest.mark.parametrize(("size", "each"), [(1, 1 << 30), (2, 1 << 30), (8, 384 << 20)])
def test_emulated_ranks_on_a_gpu_take_half_of_its_free_memory(monkeypatch, size, each):
    monkeypatch.setattr(emulated.driver, "memory_info", lambda: (6 << 30, 8 << 30))
    monkeypatch.setattr(emulated.driver, "allocate", lambda nbytes: 4096)
    monkeypatch.setattr(emulated.driver, "free", lambda address: None)
    monkeypatch.setattr(emulated, "_ended", [])
    assert emulated.reserve_on(contextlib.nullcontext(), size, None).size == each * size
    assert emulated.reserve_on(contextlib.nullcontext(), size, 5 << 20).size == (5 << 20) * size


class TestParts:
    @pytest.fixture
    def ranks(self):
        hub = Hub(4, 10)
        return [LocalExchange(hub, rank) for rank in range(4)]

    @pytest.fixture
    def halves(self, ranks):
        """The exchanges of two parts: of ranks 3 and 0 in this order, and of 1 and 2."""
        found = self.split(ranks, (7, 1), (-1, 0), (-1, 0), (7, 0))
        assert [members for _, members in found] == [(3, 0), (1, 2), (1, 2), (3, 0)]
        return [exchange for exchange, _ in found]

    def split(self, ranks, *wishes):
        return together(*[lambda e=exchange, w=each: e.split(*w) for exchange, each in zip(ranks, wishes, strict=True)])

    def waits(self, exchange, pool):
        """Begin an exchange on another thread, and return when it waits for others."""
        waiting = pool.submit(exchange.allgather, b"")
        eventually(lambda: exchange._hub.barrier.n_waiting)
        return waiting

    def test_two_at_the_same_time(self, ranks, halves):
        assert [(e.kind, e.rank, e.size, e.mpi_comm, e.verb) for e in halves] == [
            ("emulated", rank, 2, None, "Init") for rank in (1, 0, 1, 0)
        ]
        assert gather(halves, b"a", b"b", b"c", b"d") == [[b"d", b"a"], [b"b", b"c"], [b"b", b"c"], [b"d", b"a"]]
        assert gather(ranks, b"a", b"b", b"c", b"d")[2] == [b"a", b"b", b"c", b"d"]

    def test_a_rank_may_come_into_none(self, ranks):
        first, left_out, second, none = self.split(ranks, (0, 0), (None, 0), (0, -1), (None, 0))
        assert (left_out, none) == (None, None)
        assert first[1] == second[1] == (2, 0)

    def test_parts_of_parts(self, halves):
        (first, members), (second, _) = self.split([halves[3], halves[0]], (0, 1), (0, 0))
        assert members == (1, 0)
        (alone, own), (other, _) = self.split([first, second], (0, 0), (1, 0))
        assert (alone.rank, own, alone.allgather(b"x"), other.allgather(b"y")) == (0, (1,), [b"x"], [b"y"])
        assert gather([second, first], b"a", b"d") == [[b"a", b"d"]] * 2

    def test_the_same_color_again_is_another_part(self, ranks):
        first = [exchange for exchange, _ in self.split(ranks, *[(0, 0)] * 4)]
        second = [exchange for exchange, _ in self.split(ranks, *[(0, 0)] * 4)]
        with ThreadPoolExecutor(1) as pool:
            waiting = self.waits(first[0], pool)
            assert gather(second, *[b"second"] * 4) == [[b"second"] * 4] * 4
            assert gather(first[1:], *[b"first"] * 3)[0] == waiting.result(10) == [b"", *[b"first"] * 3]

    def test_the_first_need_not_stay_for_the_others_to_find_the_part(self):
        hub = Hub(2, 10)
        size, name = 3, b"name"
        known = id(hub.part(name, size))
        gc.collect()
        part = hub.part(name, size)
        assert (id(part), hub.part(name, size), part.size) == (known, part, size)
        assert hub.part(name, size) is not part  # all were there; nobody else comes

    def test_one_that_does_not_come_is_named_by_its_rank_in_the_part(self, ranks, halves):
        halves[3]._hub.timeout, halves[3].verb = 0.3, "Split"
        with pytest.raises(TimeoutError, match=r"^Split: rank 1 did not arrive within 0\.3 s"):
            halves[3].allgather(b"")
        assert gather(halves[1:3], b"b", b"c") == [[b"b", b"c"]] * 2
        assert gather(ranks, b"a", b"b", b"c", b"d")[3] == [b"a", b"b", b"c", b"d"]

    def test_a_rank_that_fails_is_not_waited_for_in_any_part(self, ranks, halves):
        (inner, _), _ = self.split([halves[1], halves[2]], (0, 0), (0, 0))
        with ThreadPoolExecutor(2) as pool:
            waiting = [self.waits(exchange, pool) for exchange in (halves[0], inner)]
            ranks[2].abandon()
            for each in waiting:
                with pytest.raises(PeerLostError, match="waits for a rank that failed; see its exception"):
                    each.result(5)
        later = LocalExchange(ranks[0]._hub.part(b"name", 2), 1)  # its ranks were on their way
        for exchange in (halves[3], later):
            with pytest.raises(PeerLostError, match=r"^Init: rank . waits for a rank that failed"):
                exchange.allgather(b"")

    def test_a_part_that_begins_while_a_rank_fails(self, ranks, halves):
        begun, added = threading.Event(), threading.Event()

        class Seen(weakref.WeakSet):
            def __iter__(self):
                for one in super().__iter__():
                    begun.set()
                    added.wait(0.2)  # without success, where nothing is added meanwhile
                    yield one

        first = ranks[0]._hub
        first._parts = Seen(first._parts)

        def begin():
            begun.wait(5)
            part = halves[1]._hub.part(b"name", 2)
            added.set()
            return part

        with ThreadPoolExecutor(2) as pool:
            late, waiting = pool.submit(begin), self.waits(ranks[0], pool)
            ranks[2].abandon()
            with pytest.raises(PeerLostError):
                waiting.result(5)
            assert late.result(5).abandoned

    def test_a_failure_in_a_part_is_none_of_the_others(self, ranks, halves):
        halves[0].abandon()
        with pytest.raises(PeerLostError):
            halves[3].allgather(b"")
        assert gather(halves[1:3], b"b", b"c") == [[b"b", b"c"]] * 2
        assert gather(ranks, b"a", b"b", b"c", b"d")[3] == [b"a", b"b", b"c", b"d"]

    def test_an_emulated_rank_that_fails_while_others_wait_in_parts(self, monkeypatch):
        def main(comm):
            part, _ = comm._world.exchange.split(comm.rank % 2, 0)
            if comm.rank == 2:
                eventually(lambda: part._hub.barrier.n_waiting)
                raise ZeroDivisionError
            part.allgather(b"")

        monkeypatch.setenv("NVCOLL_TIMEOUT", "10")
        with pytest.raises(ZeroDivisionError) as raised:
            nvcoll.emulate(4).run(main)
        assert raised.value.__notes__ == ["raised on emulated rank 2"]


def test_ranks_that_have_begun_do_not_wait_where_the_system_has_no_more_threads(monkeypatch):
    start, begun = threading.Thread.start, []

    def start_two(thread):
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setenv("NVCOLL_TIMEOUT", "60")
    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        nvcoll.emulate(3).run(lambda comm: comm.rank)
    eventually(lambda: not any(thread.is_alive() for thread in begun))


@pytest.mark.parametrize("extent", [1 << 61, (1 << 63) - 4096])
def test_heaps_that_no_memory_could_hold(extent):
    text = (
        rf"^memory of 4 ranks: Cannot allocate memory: cannot map {4 * extent} bytes .*; a smaller NVCOLL_HEAP may fit$"
    )
    with pytest.raises(AllocationError, match=text):
        emulated.reserve(4, extent)
