"""Exchanges of parts of the ranks: who comes into which, and that each stands for itself."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvcoll import _bootstrap, settings
from nvcoll._bootstrap import RendezvousServer, connect, part_of, wish
from nvcoll.errors import BootstrapError, PeerLostError, StateError, TimeoutError
from tests.conftest import eventually
from tests.meeting import gather, join, together

LAUNCH = bytes(16)  # the group of all ranks
SIZE = 4


def split(ranks, *wishes):
    """Split with one (color, key) a rank; return the parts' exchanges, by rank, and their members."""
    found = together(*[lambda e=exchange, w=each: e.split(*w) for exchange, each in zip(ranks, wishes, strict=True)])
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return [each and each[0] for each in found], [each and each[1] for each in found]


@pytest.fixture
def server():
    with RendezvousServer(SIZE) as server:
        yield server


@pytest.fixture
def ranks(server):
    """Four ranks that have joined."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(join(server, rank))) for rank in range(SIZE)]


@pytest.fixture
def halves(ranks):
    """The exchanges of two parts: of ranks 3 and 0 in this order, and of 1 and 2."""
    exchanges, members = split(ranks, (7, 1), (-1, 0), (-1, 0), (7, 0))
    assert members == [(3, 0), (1, 2), (1, 2), (3, 0)]
    yield exchanges
    for exchange in exchanges:
        exchange.close()


class TestWhoComesWhere:
    @pytest.mark.parametrize(
        ("wishes", "parts"),
        [
            ([(0, 0)], [(0,)]),
            ([(None, 0)], [()]),
            ([(0, 0), (1, 0), (0, 0)], [(0, 2), (1,), (0, 2)]),
            ([(5, 2), (5, 1), (5, 0)], [(2, 1, 0)] * 3),
            ([(5, 0), (5, -1), (5, 0)], [(1, 0, 2)] * 3),
            ([(0, 0), (None, -9), (0, -1)], [(2, 0), (), (2, 0)]),
            ([(2**63 - 1, 2**63 - 1), (-(2**63), 0), (2**63 - 1, -(2**63))], [(2, 0), (1,), (2, 0)]),
        ],
    )
    def test_order(self, wishes, parts):
        told = [wish("Split", *each) for each in wishes]
        assert [part_of("Split", rank, told)[0] for rank in range(len(wishes))] == parts

    def test_each_part_has_a_name_that_never_comes_again(self):
        names = []
        for _ in range(2):
            told = [wish("Split", rank % 2, -rank) for rank in range(4)]
            found = [part_of("Split", rank, told)[1] for rank in range(4)]
            assert found[:2] == found[2:]
            names += found[:2]
        assert len(set(names)) == 4
        assert {len(name) for name in names} == {16}

    @pytest.mark.parametrize("wrong", [(2**63, 0), (0, -(2**63) - 1), (0.5, 0), (0, "x"), (0, None)])
    def test_what_is_no_number_of_64_bits_is_refused_and_harms_nothing(self, ranks, wrong):
        ranks[1].verb = "Split"
        with pytest.raises(ValueError, match=r"^Split: color is .* and key is .*, expected whole numbers of 64 bits"):
            ranks[1].split(*wrong)
        assert gather(ranks, b"a", b"b", b"c", b"d")[1] == [b"a", b"b", b"c", b"d"]


class TestParts:
    def test_two_at_the_same_time(self, halves):
        assert gather(halves, b"a", b"b", b"c", b"d") == [[b"d", b"a"], [b"b", b"c"], [b"b", b"c"], [b"d", b"a"]]

    def test_facts(self, ranks):
        for exchange in ranks:
            exchange.verb = "Split"
        ranks[2].timeout = 7
        exchanges, _ = split(ranks, *[(0, -rank) for rank in range(SIZE)])
        with contextlib.ExitStack() as stack:
            for exchange in exchanges:
                stack.enter_context(contextlib.closing(exchange))
            facts = [(e.kind, e.rank, e.size, e.mpi_comm, e.verb) for e in exchanges]
            assert facts == [("run", SIZE - 1 - rank, SIZE, None, "Init") for rank in range(SIZE)]
            assert [exchange.timeout for exchange in exchanges] == [10, 10, 7, 10]

    def test_a_rank_may_come_into_none(self, ranks):
        exchanges, members = split(ranks, (0, 0), (None, 0), (0, 0), (None, 0))
        assert members == [(0, 2), None, (0, 2), None]
        assert gather(exchanges[::2], b"a", b"c") == [[b"a", b"c"]] * 2
        for exchange in exchanges[::2]:
            exchange.close()

    def test_alone(self):
        whole = connect(settings.read({}))
        part, members = whole.split(3, 0)
        assert (part.kind, part.rank, part.size, part.mpi_comm, members) == ("single", 0, 1, None, (0,))
        assert whole.split(None, 0) is None
        whole.close()
        assert part.allgather(b"x") == [b"x"]
        part.close()
        for closed in (part, whole):
            with pytest.raises(StateError, match="the exchange is closed"):
                closed.split(0, 0)

    def test_parts_of_parts(self, server, ranks):
        three, _ = split(ranks, (0, 3), (0, 2), (None, 0), (0, 1))
        three = [three[rank] for rank in (3, 1, 0)]
        nested, members = split(three, (1, 9), (2, 0), (1, 8))
        assert members == [(2, 0), (1,), (2, 0)]
        assert gather(nested, b"x", b"y", b"z") == [[b"z", b"x"], [b"y"], [b"z", b"x"]]
        for exchange in three:
            exchange.close()  # whoever made the parts of it closes them
        assert gather(nested, b"x", b"y", b"z") == [[b"z", b"x"], [b"y"], [b"z", b"x"]]
        for exchange in nested:
            exchange.close()

    def test_whatever_closes_first_the_others_go_on(self, ranks, halves):
        for exchange in (halves[1], halves[2]):
            exchange.close()
        assert gather(ranks, b"a", b"b", b"c", b"d")[3] == [b"a", b"b", b"c", b"d"]
        for exchange in ranks:
            exchange.close()
        assert gather([halves[3], halves[0]], b"d", b"a") == [[b"d", b"a"]] * 2
        with pytest.raises(StateError, match="the exchange is closed"):
            halves[1].allgather(b"")

    def test_threads_use_an_exchange_and_its_parts_at_the_same_time(self, ranks, halves):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(halves[0].allgather, b"a")
            assert gather(ranks, b"1", b"2", b"3", b"4")[0] == [b"1", b"2", b"3", b"4"]
            assert not waiting.done()
            assert halves[3].allgather(b"d") == waiting.result(10) == [b"d", b"a"]

    def test_the_same_color_again_is_another_part(self, ranks):
        first, _ = split(ranks, *[(0, 0)] * SIZE)
        second, _ = split(ranks, *[(0, 0)] * SIZE)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(first[0].allgather, b"first")
            assert gather(second, *[b"second"] * SIZE) == [[b"second"] * SIZE] * SIZE
            assert not waiting.done()
            assert gather(first[1:], *[b"first"] * 3)[0] == waiting.result(10) == [b"first"] * SIZE
        for exchange in first + second:
            exchange.close()


class TestFailures:
    def test_one_that_left_is_named_by_its_rank_in_the_part(self, ranks, halves):
        halves[3].verb = "Split"
        halves[0].close()
        with pytest.raises(PeerLostError, match=r"^Split: rank 1 has left while rank 0 waited"):
            halves[3].allgather(b"")
        with pytest.raises(StateError, match=r"^Split: an earlier call failed"):
            halves[3].split(0, 0)
        assert gather(halves[1:3], b"b", b"c") == [[b"b", b"c"]] * 2
        assert gather(ranks, b"a", b"b", b"c", b"d")[3] == [b"a", b"b", b"c", b"d"]

    def test_one_that_does_not_come_is_named_by_its_rank_in_the_part(self, ranks, halves):
        halves[3].timeout = 0.3
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"rank 1 did not arrive within 0\.3 s"):
            halves[3].allgather(b"")
        assert 0.3 <= time.monotonic() - start < 10
        with pytest.raises(TimeoutError, match=r"rank 1 came too late: the others have given up"):
            halves[0].allgather(b"")
        assert gather(halves[1:3], b"b", b"c") == [[b"b", b"c"]] * 2
        assert gather(ranks, b"a", b"b", b"c", b"d")[3] == [b"a", b"b", b"c", b"d"]

    def test_one_that_does_not_split(self, ranks):
        ranks[1].timeout = 0.3
        with pytest.raises(TimeoutError, match=r"ranks 0, 2, 3 did not arrive within 0\.3 s"):
            ranks[1].split(0, 0)
        with pytest.raises(StateError, match="an earlier call failed"):
            ranks[1].split(0, 0)

    def test_one_that_died_on_the_way_is_missed_in_the_part(self, ranks, monkeypatch):
        def die(*_):
            raise MemoryError

        ranks[1].timeout = 0.3
        monkeypatch.setattr(ranks[0]._channel, "part", die)
        died, (part, members), *_ = together(
            *[lambda e=e, color=color: e.split(color, 0) for e, color in zip(ranks, (0, 0, None, None), strict=True)]
        )
        assert isinstance(died, MemoryError)
        assert members == (0, 1)
        with contextlib.closing(part), pytest.raises(TimeoutError, match="rank 0 did not arrive"):
            part.allgather(b"")
        with pytest.raises(StateError, match="an earlier call failed"):
            ranks[0].allgather(b"")


class TestServer:
    NAME = bytes(range(16))

    def enter(self, server, rank, size, name=NAME):
        """Connect as a rank of a part."""
        return _bootstrap._Client(server.address, rank, size, server.key, 5, name, "Split")

    def test_forgets_a_part_when_all_of_its_ranks_are_gone(self, server, ranks, halves):
        assert len(server._sessions) == len(server._joined) == 3
        for exchange in halves[:3]:
            exchange.close()
        eventually(lambda: len(server._sessions) == 2)  # one of them has a member left
        halves[3]._channel.sock.close()  # as if it died
        eventually(lambda: list(server._sessions) == [(LAUNCH, 0)])
        assert list(server._joined) == [LAUNCH]

    @pytest.mark.parametrize(
        ("rank", "size", "message"),
        [
            (1, 5, "it says that there are 5 ranks, but there are 4"),
            (1, 3, "it says that its group has 3 ranks, but others say 2"),
            (2, 2, "there is no rank 2 among 2"),
            (0, 2, f"process {os.getpid()} is rank 0 already"),
        ],
    )
    def test_refuses_who_does_not_fit_and_lets_the_others_in(self, server, rank, size, message):
        first = self.enter(server, 0, 2)
        with pytest.raises(BootstrapError, match=f"^Split: {server.address} refused rank {rank}: {message}"):
            self.enter(server, rank, size)
        second = self.enter(server, 1, 2)
        found = together(lambda: first.allgather(b"a", 10, "Split"), lambda: second.allgather(b"b", 10, "Split"))
        assert found == [[b"a", b"b"]] * 2
        for client in (first, second):
            client.close(True, True)

    def test_makes_no_part_for_who_is_refused(self, server):
        for size in (0, 5):
            with pytest.raises(BootstrapError, match="refused rank 0"):
                self.enter(server, 0, size)
        with contextlib.closing(self.enter(server, 0, 1).sock):
            assert len(server._joined) == 2

    def test_the_end_of_a_process_concerns_no_rank_of_that_number_in_a_part(self, server):
        early = self.enter(server, 0, 2)
        server.tell_ended(1)  # of the launch
        late = self.enter(server, 1, 2)
        found = together(lambda: early.allgather(b"a", 10, "Split"), lambda: late.allgather(b"b", 10, "Split"))
        assert found == [[b"a", b"b"]] * 2
        for client in (early, late):
            client.close(True, True)

    def test_its_end_on_the_way_into_a_part(self, server, ranks):
        server.close()
        with pytest.raises(
            PeerLostError, match=r"^Split: rank 1 found nobody at .*; has the launcher, or rank 0, ended"
        ):
            ranks[0]._channel.part((2, 0), 1, self.NAME, 0.2, "Split")

    def test_leaves_no_descriptor(self, server, ranks):
        def open_files():
            return len(list(Path("/proc/self/fd").iterdir()))

        before = open_files()
        exchanges, _ = split(ranks, *[(0, 0)] * SIZE)
        assert open_files() == before + 2 * SIZE
        for exchange in exchanges:
            exchange.close()
        eventually(lambda: open_files() == before)
