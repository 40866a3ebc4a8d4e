"""Communicators made from others: who is in them, whose calls they match, what memory they have, and their ends."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nvcoll
from nvcoll import COMM_NULL, COMM_SELF, COMM_TYPE_SHARED, UNDEFINED
from nvcoll.errors import ArgumentError, StateError, TimeoutError


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")


def total(comm, value):
    x = np.full(3, float(value))
    comm.Allreduce(x)
    return x.tolist()


def refusal(call, *args):
    """What a call raised: (class, message)."""
    try:
        call(*args)
    except nvcoll.Error as exc:
        return type(exc), str(exc)
    return None


class TestWho:
    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([0, 1, 7, UNDEFINED]), st.integers(-2, 2)), min_size=1, max_size=6))
    def test_colors_and_keys(self, wishes):
        def main(comm):
            part = comm.Split(*wishes[comm.rank])
            return part and (part.rank, part.size, total(part, comm.rank)[0])

        found = nvcoll.emulate(len(wishes)).run(main)
        for rank, (color, _) in enumerate(wishes):
            alike = [other for other, wish in enumerate(wishes) if wish[0] == color]
            alike.sort(key=lambda other: (wishes[other][1], other))
            if color == UNDEFINED:
                assert found[rank] is COMM_NULL
            else:
                assert found[rank] == (alike.index(rank), len(alike), sum(alike))

    def test_nodes_are_those_of_the_whole(self):
        def main(comm):
            part = comm.Split(0 if comm.rank in (0, 3, 4, 5) else UNDEFINED, -comm.rank)
            return part and part._world.topology.nodes

        found = nvcoll.emulate(6, [2, 3, 1]).run(main)
        assert found[0] == ((0,), (1, 2), (3,)) == found[5]

    @pytest.mark.parametrize("algorithm", nvcoll.emulate(1).run(lambda comm: comm.algorithms())[0])
    def test_every_algorithm_that_serves(self, algorithm):
        def main(comm):
            part = comm.Split(comm.rank % 2, comm.rank)
            refused = next(one.reason for one in part.explain("allreduce", 4).candidates if one.name == algorithm)
            if refused:
                return None
            x = np.arange(1000.0) * (part.rank + 1)
            for _ in range(3):
                part.Allreduce(x, algorithm=algorithm)
            return x.tolist()

        for part in (found := nvcoll.emulate(7, [3, 4]).run(main))[:2]:
            assert part is None or part[1] > 0
        for rank, result in enumerate(found):
            size = 4 - rank % 2
            factor = size * (size + 1) / 2 * size**2
            assert result is None or result == (np.arange(1000) * factor).tolist()

    def test_node_by_node(self):
        def main(comm):
            parts = [comm.Split_type(COMM_TYPE_SHARED, -comm.rank), comm.Split_type(UNDEFINED)]
            return [part and (part.rank, part.size) for part in parts]

        found = nvcoll.emulate(5, [2, 3]).run(main)
        assert found == [[place, COMM_NULL] for place in [(1, 2), (0, 2), (2, 3), (1, 3), (0, 3)]]

    def test_parts_of_parts(self):
        def main(comm):
            half = comm.Split(comm.rank // 4)
            quarter = half.Split(half.rank // 2)
            return quarter.name, total(quarter, comm.rank)[0], total(half, comm.rank)[0], total(comm, comm.rank)[0]

        found = nvcoll.emulate(8).run(main)
        assert [one[1:] for one in found] == [(2 * (k // 2 * 2) + 1.0, 4 * (k // 4 * 4) + 6.0, 28.0) for k in range(8)]
        assert found[6][0] == "emulated rank 6.Split(1).Split(1)"

    def test_of_one_rank(self):
        dup, alone = COMM_SELF.Dup(), COMM_SELF.Split(3, 5)
        assert [dup.size, alone.size, dup.rank, total(alone, 4)] == [1, 1, 0, [4.0] * 3]
        dup.Free()
        alone.Free()


class TestArguments:
    @pytest.mark.parametrize(
        ("call", "text"),
        [
            (lambda comm: comm.Split(-1), "Split: color is -1, expected 0 or more, or UNDEFINED for no communicator"),
            (lambda comm: comm.Split(1.5), "Split: color is 1.5, expected an integer"),
            (lambda comm: comm.Split(None), "Split: color is None, expected an integer"),
            (lambda comm: comm.Split(0, "a"), "Split: key is 'a', expected an integer"),
            (lambda comm: comm.Split(1 << 63), f"Split: color is {1 << 63}, expected an integer of 64 bits"),
            (lambda comm: comm.Split_type(77), "Split_type: split_type is 77, expected COMM_TYPE_SHARED or UNDEFINED"),
            (lambda comm: comm.Split_type(1, 1j), "Split_type: key is 1j, expected an integer"),
        ],
    )
    def test_what_is_refused_before_anything_is_sent(self, call, text):
        def main(comm):
            if comm.rank == 1:  # alone: were anything sent, it would wait
                return refusal(call, comm)
            return None

        assert nvcoll.emulate(3).run(main)[1] == (ArgumentError, text)

    def test_numbers_of_numpy(self):
        assert nvcoll.emulate(2).run(lambda comm: comm.Split(np.int32(1), np.uint8(2)).size) == [2, 2]

    def test_what_mpi4py_s_may_be_given(self):
        def main(comm):
            node = comm.Split_type(COMM_TYPE_SHARED, 0, None)
            dup = comm.Dup(info=None)
            same = [dup != comm, dup != COMM_NULL, hash(dup) == hash(dup)]
            if dup != COMM_NULL:
                dup.Free()
            return node.size, comm.Split(0, -(1 << 63)).size, all(same), dup == COMM_NULL, comm == COMM_NULL

        assert nvcoll.emulate(2).run(main) == [(2, 2, True, True, False)] * 2

    def test_no_communicator(self):
        assert not COMM_NULL
        assert "not in use" in repr(COMM_NULL)
        kind, text = refusal(lambda: COMM_NULL.rank)
        assert kind is StateError
        assert text.startswith("COMM_NULL is what ranks get that gave UNDEFINED to Split")


def test_a_rank_that_does_something_else():
    """It is told on all ranks, which can go on."""

    def main(comm):
        told = refusal(comm.Split) if comm.rank == 1 else refusal(comm.empty, 100)
        return told, comm.Split().size, comm.full(3, 1.0).sum()

    told = nvcoll.emulate(3).run(main)
    assert {(kind, *rest) for (kind, _), *rest in told} == {(nvcoll.MismatchError, 3, 3.0)}
    assert [text.partition(";")[0] for (_, text), *_ in told] == [
        "empty: rank 0 allocates 400 bytes, rank 1 makes communicators",
        "Split: rank 1 makes communicators, rank 0 calls something else",
        "empty: rank 2 allocates 400 bytes, rank 1 makes communicators",
    ]


@pytest.mark.parametrize(
    ("verbs", "told"),
    [
        (("Split", "Dup", "Dup"), ["rank 0 calls Split, rank 1 calls Dup", "rank 1 calls Dup, rank 0 calls Split"]),
        (("Dup", "Split_type", "Dup"), ["rank 0 calls Dup, rank 1 calls Split_type"]),
        (("Split_type", "Split", "Split"), ["rank 0 calls Split_type, rank 1 calls Split"]),
    ],
)
def test_ranks_that_make_communicators_in_different_ways(verbs, told):
    """It is told on all ranks at once, and nobody gets one, also who would be in none; they can go on."""

    def main(comm):
        verb = verbs[comm.rank]
        args = {"Dup": (), "Split": (UNDEFINED,), "Split_type": (COMM_TYPE_SHARED,)}[verb]
        return verb, refusal(getattr(comm, verb), *args), comm.Dup().size

    found = nvcoll.emulate(3).run(main)
    assert {size for *_, size in found} == {3}
    for verb, (kind, text), _ in found:
        assert kind is nvcoll.MismatchError
        assert text.startswith(f"{verb}: rank ")
        assert text.endswith("; make the same calls in the same order on all ranks")
    for (verb, (_, text), _), each in zip(found, told, strict=False):
        assert text.startswith(f"{verb}: {each};")


class TestCalls:
    def test_communicators_do_not_match_each_other(self):
        """Ranks that use two at the same time, in opposite order, from two threads."""

        def main(comm):
            two = [comm, comm.Dup()]
            found = {}

            def work(which):
                found[which] = [total(two[which], 10 * which + k)[0] for k in range(200)]

            order = [0, 1] if comm.rank % 2 else [1, 0]
            threads = [threading.Thread(target=work, args=(which,)) for which in order]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return found

        expected = {which: [3.0 * (10 * which + k) for k in range(200)] for which in (0, 1)}
        assert nvcoll.emulate(3).run(main) == [expected] * 3

    def test_requests_of_several(self):
        def main(comm):
            three = [comm, comm.Dup(), comm.Split(comm.rank % 2)]
            data = [np.full(1000, comm.rank + 1.0) for _ in three]
            order = (2, 0, 1) if comm.rank else (1, 2, 0)
            requests = {k: three[k].Iallreduce(data[k]) for k in order}
            for k in (0, 1, 2):
                requests[k].Wait()
            return [x[0] for x in data]

        assert nvcoll.emulate(4).run(main) == [[10.0, 10.0, 4.0], [10.0, 10.0, 6.0]] * 2

    def test_what_fails_in_a_part_stays_there(self, monkeypatch):
        failed = threading.Event()

        def main(comm):
            part = comm.Split(comm.rank // 2)
            told = again = None
            if comm.rank != 3:
                told = refusal(total, part, 1)
            if comm.rank == 2:
                again = refusal(total, part, 1)
                failed.set()
            assert failed.wait(20)
            return told, again, total(comm, 1)[0]

        monkeypatch.setenv("NVCOLL_TIMEOUT", "1")
        found = nvcoll.emulate(4).run(main)
        assert [one[2] for one in found] == [4.0] * 4
        assert [one[0] for one in found[:2]] == [None, None]
        kind, text = found[2][0]
        assert kind is TimeoutError
        assert text.startswith("Allreduce (call 1 on rank 0 of emulated rank 2.Split(1)): no answer within")
        assert "did not arrive: rank 1." in text
        assert found[2][1][0] is StateError

    def test_after_a_failure_nothing_is_made(self, monkeypatch):
        def main(comm):
            if comm.rank:
                refusal(total, comm, 1)
                return refusal(comm.Dup), refusal(comm.Split)
            return None

        monkeypatch.setenv("NVCOLL_TIMEOUT", "0.5")
        told = nvcoll.emulate(2).run(main)[1]
        assert [kind for kind, _ in told] == [StateError] * 2


class TestEnd:
    def test_free(self):
        def main(comm):
            part = comm.Split(comm.rank % 2)
            inner = part.Dup()
            part.Free()
            told = [refusal(lambda: part.rank), refusal(part.Free), refusal(comm.Free), refusal(part.Dup)]
            return bool(part), bool(inner), told, total(inner, 1)[0], total(comm, 1)[0]

        for rank, (part, inner, told, *sums) in enumerate(nvcoll.emulate(4).run(main)):
            assert (part, inner, sums) == (False, True, [2.0, 4.0])
            name = f"emulated rank {rank}"
            gone = f"{name}.Split({rank % 2}) was freed, or has ended with the communicator that it was made from"
            assert told[0] == (StateError, f"{gone}; make another")
            assert told[1] == (StateError, f"Free: {gone}; make another")
            assert told[2] == (StateError, f"Free: {name} was made from no other communicator; call Finalize")
            assert told[3] == told[0]

    def test_free_completes_requests(self):
        def main(comm):
            part = comm.Dup()
            data = [np.full(50_000, comm.rank + 1.0) for _ in range(5)]
            requests = [part.Iallreduce(x) for x in data]
            persistent = part.Allreduce_init(data[0])
            part.Free()
            done = [request.Test() for request in requests]
            return all(done), {x for one in data for x in one}, refusal(persistent.Start)[0]

        assert nvcoll.emulate(3).run(main) == [(True, {6.0}, StateError)] * 3

    def test_after_a_run_parts_are_of_no_use(self):
        parts = nvcoll.emulate(2).run(lambda comm: comm.Dup())
        assert refusal(total, parts[0], 1)[0] is StateError

    def test_a_rank_that_fails_ends_the_waiting_in_parts_of_parts(self):
        """Also where the part between has been freed."""

        def main(comm):
            middle = comm.Dup()
            part = middle.Split(0)
            middle.Free()
            if comm.rank == 1:
                raise ValueError("mine")
            part.empty(10)

        started = time.monotonic()
        with pytest.raises(ValueError, match="mine"):
            nvcoll.emulate(3).run(main)
        assert time.monotonic() - started < 15

    def test_a_rank_that_fails_ends_the_waiting_in_parts(self):
        def main(comm):
            part = comm.Split(comm.rank // 2)
            if comm.rank == 1:
                raise ValueError("mine")
            part.empty(10)

        with pytest.raises(ValueError, match="mine"):
            nvcoll.emulate(2).run(main)
