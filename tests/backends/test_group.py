"""Agreement among ranks, and a rank's part of memory."""

import os

import pytest

from nvcoll.backends.group import Member, agree, physical_memory
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


def test_physical_memory():
    assert physical_memory() % os.sysconf("SC_PAGE_SIZE") == 0
    assert physical_memory() > 1 << 26
