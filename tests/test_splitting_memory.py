"""The memory that communicators have in common: who gets which part of it, and what becomes of that."""

import threading
from itertools import pairwise

import numpy as np
import pytest

import nvcoll
from nvcoll import UNDEFINED
from tests.test_splitting import refusal, total


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")


def test_buffers_of_all_lie_apart_and_are_symmetric_to_all():
    def main(comm):
        odd = comm.Split(comm.rank % 2)
        pairs = comm.Split(comm.rank // 2)
        buffers = []
        for k in range(8):
            comms = (comm, odd, pairs, odd)
            buffers.append(comms[k % 4].full(5000, k))
        places = sorted((b.__array_interface__["data"][0], b.nbytes) for b in buffers)
        apart = all(at + nbytes <= after for (at, nbytes), (after, _) in pairwise(places))
        start, size = comm._world.planner.state.heap
        inside = all(start <= at and at + nbytes <= start + size for at, nbytes in places)
        same = all(one._world.planner.state.heap == (start, size) for one in (odd, pairs))
        sums = [one.size for one in (comm, odd, pairs)]
        for one in (comm, odd, pairs):
            for buffer in buffers:
                one.Allreduce(buffer, algorithm="two_shot")
        right = all((b == k * np.prod(sums)).all() for k, b in enumerate(buffers))
        return apart, inside, same, right

    assert nvcoll.emulate(4).run(main) == [(True,) * 4] * 4


def test_places_are_the_same_on_the_ranks_that_have_them_whatever_else_these_have():
    def main(comm):
        start = comm._world.planner.state.heap[0]
        parts = [comm.Split(0 if comm.rank in one else UNDEFINED) for one in ((0, 1), (1, 2), (2, 0))]
        found = {}
        for turn in range(4):
            for which, part in enumerate(parts):
                if part:
                    buffer = part.empty(2000 * (1 + (which + turn) % 3))
                    found[which, turn] = buffer.__array_interface__["data"][0] - start, buffer
        return {key: place for key, (place, _) in found.items()}

    one, two, three = nvcoll.emulate(3).run(main)
    for turn in range(4):
        assert one[0, turn] == two[0, turn]
        assert two[1, turn] == three[1, turn]
        assert three[2, turn] == one[2, turn]


def test_allocations_of_two_communicators_at_the_same_time():
    """From threads: who finds that another has taken the place meanwhile looks for a new one, with all ranks."""

    def main(comm):
        two, found = [comm, comm.Dup()], {}

        def work(which):
            found[which] = [two[which].full(3000, which) for _ in range(30)]

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        start = comm._world.planner.state.heap[0]
        places = [[b.__array_interface__["data"][0] - start for b in found[which]] for which in (0, 1)]
        kept = all((b == which).all() for which in (0, 1) for b in found[which])
        return kept, len({*places[0], *places[1]}), places

    found = nvcoll.emulate(3).run(main)
    assert found == [found[0]] * 3
    assert found[0][:2] == (True, 60)


def test_no_room(monkeypatch):
    def main(comm):
        told = refusal(comm.Split, comm.rank % 2)
        return told, total(comm, 1)[0], comm.empty(10).size

    monkeypatch.setenv("NVCOLL_HEAP", "12M")
    found = nvcoll.emulate(4).run(main)
    (kind, text), *rest = found[0]
    assert kind is nvcoll.AllocationError
    assert text.startswith("Split making emulated rank 0.Split(0): out of memory: rank 0: needs 8388608 bytes")
    assert text.endswith("raise NVCOLL_HEAP or lower NVCOLL_SCRATCH")
    assert rest == [4.0, 10]


def test_after_a_failure_all_of_it_is_given_back():
    """A mismatch, known to all: the ranks are in step, buffers are gone, and the memory is used again."""

    def main(comm):
        places, gone = set(), []
        for _ in range(10):
            part = comm.Dup()
            kept = part.full(10, 3.0)
            places.add(kept.__array_interface__["data"][0])
            assert refusal(part.Allreduce, np.ones(3 + part.rank)) is not None
            part.Free()
            gone.append(kept.freed)
        return len(places), all(gone), total(comm, 1)[0]

    assert nvcoll.emulate(3).run(main) == [(1, True, 3.0)] * 3


def test_memory_that_a_rank_may_still_use_is_given_back_by_none(monkeypatch):
    def main(comm):
        part = comm.Dup()
        kept = part.full(10, 3.0)
        place = kept.__array_interface__["data"][0]
        if comm.rank == 1:
            monkeypatch.setattr(part._world, "leave", lambda: False)
        part.Free()
        return kept.freed, comm.Dup().full(10, 1.0).__array_interface__["data"][0] != place

    assert nvcoll.emulate(3).run(main) == [(True, True)] * 3


def test_generations_without_end():
    """Each replaces its parent, which is freed: neither names, but for a number, nor chains of memory grow."""

    def main(comm):
        part = comm
        for _ in range(1500):
            old, part = part, part.Dup()
            if old is not comm:
                old.Free()
        return part.name, total(part, 1)[0]

    assert nvcoll.emulate(1).run(main) == [("emulated rank 0.Dup()#1500", 1.0)]


def test_freed_memory_is_used_again():
    def main(comm):
        places = set()
        for _ in range(20):
            part = comm.Split(comm.rank % 2)
            part.full(100_000, 1.0)
            kept = part.full(10, 3.0)
            places.add(kept.__array_interface__["data"][0])
            assert total(part, 1)[0] == part.size
            part.Free()
        return len(places), refusal(comm.Allreduce, kept)

    for count, told in nvcoll.emulate(4).run(main):
        assert count == 1
        assert "freed" in told[1]
