"""Shared memory of a node, on the ranks that a single process can be; tests of real ranks are in test_world."""

import os
import secrets
from pathlib import Path

import pytest

from nvcoll import _bootstrap, _topology
from nvcoll.backends import shm
from nvcoll.backends.emulated import Hub, LocalExchange
from nvcoll.backends.group import physical_memory
from nvcoll.backends.shm import SharedMemory
from nvcoll.errors import AllocationError, PeerLostError

PAGE = 4096


@pytest.fixture
def path(monkeypatch):
    """Where the next segment is."""
    monkeypatch.setattr(secrets, "token_hex", lambda n: f"test-shm-{os.getpid()}")
    path = Path(f"/dev/shm/nvcoll-test-shm-{os.getpid()}")
    path.unlink(missing_ok=True)
    return path


def alone(extent=None, exchange=None):
    return SharedMemory(exchange or LocalExchange(Hub(1, 10), 0), _topology.detect(0, [b""]), extent)


def second(path):
    """The memory of the second rank of a node, where the first says that it is at `path`."""

    class Second(LocalExchange):
        def allgather(self, data):
            return [b"\0/" + path.name.encode(), data]

    return SharedMemory(Second(Hub(2, 10), 1), _topology.detect(1, [b"", b""]), PAGE)


class Lossy(LocalExchange):
    """An exchange that loses a rank in its call `number`."""

    def __init__(self, number):
        super().__init__(Hub(1, 10), 0)
        self.left = number

    def allgather(self, data):
        self.left -= 1
        if not self.left:
            raise PeerLostError("gone")
        return super().allgather(data)


def test_memory_without_a_name(path):
    memory = alone(10 * PAGE + 5)
    assert not path.exists()
    assert (memory.extent, memory.place, memory.members) == (10 * PAGE, 0, (0,))
    assert memory.address(0) == memory.segment.address
    assert memory.descriptor == memory.segment.fd
    assert memory.segment.is_alive(0)
    memory.take(PAGE, 2 * PAGE)
    memory.give(PAGE, 2 * PAGE)
    memory.close()
    assert memory.segment.fd == -1


def test_as_much_as_there_is_by_default(path):
    memory = alone()
    assert memory.extent == physical_memory() // PAGE * PAGE
    memory.close()


def test_as_much_as_has_room_on_large_hosts(path, monkeypatch):
    """The heaps of all ranks of a node are mapped by each."""
    monkeypatch.setattr(shm, "physical_memory", lambda: 1 << 60)
    memory = alone()
    assert memory.extent == shm.SPACE
    memory.close()


@pytest.mark.parametrize("number", [1, 2])
def test_a_lost_rank_leaves_no_name(path, number):
    with pytest.raises(PeerLostError):
        alone(PAGE, Lossy(number))
    assert not path.exists()


@pytest.mark.parametrize("extent", [1 << 62, 1 << 70])
def test_more_than_can_be_addressed(path, extent):
    with pytest.raises(
        AllocationError, match=rf"rank 0: .* cannot map {extent} bytes .*; a smaller NVCOLL_HEAP may fit"
    ):
        alone(extent)
    assert not path.exists()


def test_what_cannot_be_created(path):
    path.touch()
    with pytest.raises(AllocationError, match=r"^shared memory cannot be created: rank 0: .*File exists"):
        alone(PAGE)
    assert path.exists()  # it is not ours
    path.unlink()


def test_what_cannot_be_mapped(path):
    """The second rank of a node: in one process it finds the segment open already, and says so to all."""
    first = _bootstrap.Segment.create(f"/{path.name}", 2 * PAGE)
    with pytest.raises(AllocationError, match=r"^shared memory cannot be mapped: rank 1: .*already open"):
        second(path)
    first.unlink()
    first.close()


def test_what_somebody_else_put_there(path):
    path.touch(0o644)
    os.truncate(path, 2 * PAGE)
    with pytest.raises(
        AllocationError, match=r"^shared memory cannot be mapped: rank 1: .* with mode 644, expected user"
    ):
        second(path)
    assert path.exists()  # it is not ours
    path.unlink()
