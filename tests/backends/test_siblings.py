"""When a kernel is loaded beside ranks that share the GPU."""

import threading
import time
from types import SimpleNamespace

import pytest

from nvcoll.backends import siblings


class Order:
    held = False

    def hold(self):
        assert not self.held
        self.held = True

    def release(self):
        assert self.held
        self.held = False


class World:
    """A rank's part of a communicator, which has launched so many calls."""

    def __init__(self, group, launched, footing=None, over=False):
        self.device = SimpleNamespace(ordinal=99)
        self.footing = footing or SimpleNamespace(order=Order())
        self.planner = SimpleNamespace(state=SimpleNamespace(sequence=launched, over=over))
        self.exchange = SimpleNamespace(group=group)
        siblings.join(self)


@pytest.fixture(autouse=True)
def grace(monkeypatch):
    monkeypatch.setattr(siblings, "GRACE", 0.2)


def test_at_once_where_every_call_is_complete_and_nobody_launches_meanwhile():
    first = World("all", 7)
    worlds = [first, World("all", 7), World("odd", 3, first.footing), World("odd", 3)]
    started = time.monotonic()
    with siblings.quiet(99):
        assert all(world.footing.order.held for world in worlds)
    assert time.monotonic() - started < 0.15
    assert not any(world.footing.order.held for world in worlds)


def test_what_is_on_its_way_is_waited_for():
    late, early = World("odd", 3), World("odd", 4)

    def launch():
        time.sleep(0.05)
        late.planner.state.sequence = 4

    thread = threading.Thread(target=launch)
    thread.start()
    with siblings.quiet(99):
        assert late.planner.state.sequence == early.planner.state.sequence
    thread.join()


def test_ranks_that_have_ended_are_not_waited_for():
    worlds = [World("odd", 3, over=True), World("odd", 4)]
    started = time.monotonic()
    with siblings.quiet(99):
        assert len(worlds) == 2
    assert time.monotonic() - started < 0.15


def test_a_moment_that_does_not_come_is_not_waited_for_for_ever():
    worlds = [World("odd", 3), World("odd", 4)]
    started = time.monotonic()
    with siblings.quiet(99):
        assert all(world.footing.order.held for world in worlds)
    assert time.monotonic() - started > 0.2


def test_after_an_error_launches_go_on():
    world = World("all", 1)
    with pytest.raises(ValueError, match="load"), siblings.quiet(99):
        raise ValueError("load")
    assert not world.footing.order.held


def test_only_ranks_of_the_gpu_count():
    worlds = [World("odd", 3), World("odd", 4)]
    started = time.monotonic()
    with siblings.quiet(98):
        assert not any(world.footing.order.held for world in worlds)
    assert time.monotonic() - started < 0.15
