"""Agreement among ranks, and a rank's part of memory."""

import os
from types import SimpleNamespace

import pytest

from nvcoll.backends.group import Member, Part, Room, agree, physical_memory
from nvcoll.errors import AllocationError, BootstrapError


class Exchange:
    """An exchange whose other ranks gave `others`."""

    rank, size = 0, 3

    def __init__(self, *others):
        self.others = others

    def allgather(self, data):
        return [data, *self.others]


class TestAgree:
    def test_what_all_gave(self):
        assert agree(Exchange(b"\0b", b"\0"), b"a", "", "x") == [b"a", b"b", b""]

    @pytest.mark.parametrize(
        ("problem", "others", "message"),
        [
            ("no room", (b"\0b", b"\0c"), "it: rank 0: no room"),
            ("", (b"\0b", b"\1all gone"), "it: rank 2: all gone"),
            ("mine", (b"\1yours", b"\0"), "it: rank 0: mine"),
            ("", (b"\1\xff", b"\0"), "it: rank 1: \ufffd"),
        ],
    )
    def test_the_first_problem_is_everybodys(self, problem, others, message):
        with pytest.raises(AllocationError) as caught:
            agree(Exchange(*others), b"a", problem, "it")
        assert str(caught.value) == message
        assert isinstance(caught.value, MemoryError)

    def test_an_error_of_the_callers_kind(self):
        with pytest.raises(BootstrapError, match=r"^it: rank 1: no$"):
            agree(Exchange(b"\1no", b"\0"), b"", "", "it", BootstrapError)


class Segment:
    """A segment that writes down what is asked of it."""

    address = 1 << 20

    def __init__(self):
        self.asked = []

    def __getattr__(self, verb):
        return lambda *args: self.asked.append((verb, *args))


def test_members_lie_side_by_side():
    member = Member(None, (4, 5, 9), 1, 1000, -1)
    member.segment = Segment()
    assert [member.address(place) for place in range(3)] == [1 << 20, (1 << 20) + 1000, (1 << 20) + 2000]
    member.take(10, 20)
    member.give(30, 40)
    member.close()
    assert member.segment.asked == [("reserve", 1010, 20), ("release", 1030, 40), ("close",)]


class TestRoom:
    def test_what_is_taken_is_not_taken_again(self):
        room, me, you = Room(), object(), object()
        assert room.take(100, 50, me)
        assert not any(
            room.take(at, nbytes, who) for at, nbytes in [(100, 50), (149, 1), (90, 11)] for who in (me, you)
        )
        assert room.take(150, 1, you)
        assert room.take(90, 10, you)
        room.give(100)
        assert room.take(101, 49, you)

    def test_what_the_others_have(self):
        """Ranges that touch are one: allocations are many, and their places travel."""
        room, me = Room(), object()
        for at, nbytes, who in [(30, 10, 1), (0, 10, 1), (10, 5, 2), (15, 5, me), (20, 4, 2), (24, 1, 1)]:
            assert room.take(at, nbytes, who)
        assert room.beside(me) == [(0, 15), (20, 5), (30, 10)]
        assert room.beside(1) == [(10, 14)]
        assert Room().beside(me) == []


def test_a_part_is_the_same_memory_for_fewer_ranks():
    whole = Member(None, (4, 5, 7, 9), 2, 1000, 3)
    whole.segment = Segment()
    part = Part(whole, SimpleNamespace(rank=2), [9, 6, 7])  # of which rank 6 is on another node
    assert (part.members, part.place, part.origins) == ((0, 2), 1, (3, 2))
    assert [part.address(place) for place in range(2)] == [whole.address(3), whole.address(2)]
    assert (part.room, part.extent, part.descriptor) == (whole.room, 1000, 3)
    inner = Part(part, SimpleNamespace(rank=0), [2])
    assert (inner.members, inner.place, inner.origins) == ((0,), 0, (2,))
    inner.take(10, 20)
    part.give(30, 40)
    part.close()
    assert whole.segment.asked == [("reserve", 2010, 20), ("release", 2030, 40)]


def test_physical_memory():
    assert physical_memory() % os.sysconf("SC_PAGE_SIZE") == 0
    assert physical_memory() > 1 << 26
