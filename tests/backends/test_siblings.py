"""When a kernel is loaded beside ranks that share the GPU."""

import contextlib
import random
import threading
import time
from types import SimpleNamespace

import pytest

from nvcoll.backends import siblings

AT_ONCE = 0.15  # seconds


class Order:
    """Of a rank's launches, which `held` keeps away."""

    def __init__(self):
        self.held = False
        self.launching = threading.Lock()

    def hold(self):
        with self.launching:
            assert not self.held
            self.held = True

    def release(self):
        assert self.held
        self.held = False


class World:
    """A rank's part of a communicator, which has launched so many calls."""

    def __init__(self, group, launched, footing=None, over=False, left=False, whole=None, timeout=0.4, reported=False):
        self.device = SimpleNamespace(ordinal=99)
        self.footing = footing or SimpleNamespace(order=Order())
        state = SimpleNamespace(sequence=launched, over=over, reported=reported)
        self.planner = SimpleNamespace(state=state, timeout=timeout)
        self.exchange = SimpleNamespace(group=group)
        self.left, self.whole = left, whole
        siblings.join(self)

    @property
    def held(self):
        return self.footing.order.held

    def launch(self):
        """Launch a call, as soon as it is not held back."""
        order = self.footing.order
        while True:
            with order.launching:
                if not order.held:
                    self.planner.state.sequence += 1
                    return
            time.sleep(1e-4)


@contextlib.contextmanager
def thread(target):
    """Run it beside the block, and wait for its end."""
    one = threading.Thread(target=target, daemon=True)
    one.start()
    yield
    one.join(10)
    assert not one.is_alive()


@contextlib.contextmanager
def taking(least, most):
    """Fail where the block takes less or more seconds."""
    begun = time.monotonic()
    yield
    assert least <= time.monotonic() - begun < most


def test_at_once_where_every_call_is_complete_and_nobody_launches_meanwhile():
    first = World("all", 7)
    worlds = [first, World("all", 7), World("odd", 3, first.footing), World("odd", 3)]
    with taking(0, AT_ONCE), siblings.quiet(99):
        assert all(world.held for world in worlds)
    assert not any(world.held for world in worlds)


def test_what_is_on_its_way_is_waited_for():
    late, early = World("odd", 3, timeout=10), World("odd", 4, timeout=10)

    def launch():
        time.sleep(0.05)
        late.launch()

    with thread(launch), siblings.quiet(99):
        assert late.planner.state.sequence == early.planner.state.sequence
        assert late.held


def test_who_is_ahead_is_held_back_until_the_others_have_come():
    """Else they might never be equal: who is ahead may stay so."""
    late, early = World("odd", 0, timeout=10), World("odd", 1, timeout=10)
    done = threading.Event()

    def run_ahead():
        while not done.is_set():
            early.launch()
            time.sleep(0.001)

    def follow():
        kept = 0  # how often it was seen that the other is held back
        while not done.is_set():
            time.sleep(0.001)
            kept = kept + 1 if early.held else 0
            if kept > 5 and late.planner.state.sequence < early.planner.state.sequence:
                late.launch()

    with thread(run_ahead), thread(follow), contextlib.ExitStack() as end:
        end.callback(done.set)
        for _ in range(3):
            with taking(0, 1), siblings.quiet(99):
                assert late.planner.state.sequence == early.planner.state.sequence
            time.sleep(0.01)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_several_communicators(seed):
    """All make the same calls in the same order, each at a speed of its own, and look neither left nor right."""
    chance, size = random.Random(seed), 6
    groups = [range(size), range(0, size, 2), range(1, size, 2), (0, 1), (2, 5), (3, 4)]
    footings = [SimpleNamespace(order=Order()) for _ in range(size)]
    worlds = [
        {rank: World(number, 0, footings[rank], timeout=20) for rank in group} for number, group in enumerate(groups)
    ]
    program = chance.choices(worlds, k=300)

    def rank(number):
        pace = random.Random(seed * size + number)
        for world in program:
            if number in world:
                time.sleep(pace.choice([0, 0, 1e-4, 1e-3]))
                world[number].launch()

    def counts():
        return [{one.planner.state.sequence for one in world.values()} for world in worlds]

    with contextlib.ExitStack() as running:
        for number in range(size):
            running.enter_context(thread(lambda number=number: rank(number)))
        for _ in range(10):
            time.sleep(0.005)
            with taking(0, 5), siblings.quiet(99):
                found = counts()
                assert all(len(one) == 1 for one in found)
                time.sleep(0.003)
                assert counts() == found
    assert counts() == [{program.count(world)} for world in worlds]


def test_ranks_that_have_ended_are_not_waited_for():
    worlds = [World("odd", 3, over=True), World("odd", 4), World("even", 5, left=True), World("even", 4)]
    with taking(0, AT_ONCE), siblings.quiet(99):
        assert [world.held for world in worlds] == [False, True, False, True]


def test_the_last_calls_of_a_rank_that_ends_are_waited_for_and_it_can_go_on():
    """With its whole, all its parts end; what it has launched runs, as long as it has not left."""
    whole, first = World("all", 1, timeout=10), World("all", 1, timeout=10)
    ahead, late = World("odd", 4, whole.footing, whole=whole), World("odd", 3, first.footing, timeout=10, whole=first)

    def end():
        time.sleep(0.05)
        assert ahead.held
        whole.planner.state.over = True
        time.sleep(0.05)
        assert not ahead.held
        late.launch()

    with thread(end), siblings.quiet(99):
        assert late.planner.state.sequence == 4
        assert late.held
        assert not ahead.held


def test_a_communicator_that_has_failed_is_not_waited_for():
    worlds = [World("odd", 3), World("odd", 4), World("odd", 4, reported=True)]
    with taking(0, AT_ONCE), siblings.quiet(99):
        assert all(world.held for world in worlds)


def test_a_moment_that_does_not_come_is_not_waited_for_for_ever():
    """Kernels that wait meanwhile must not be over their deadline for this."""
    worlds = [World("odd", 3, timeout=0.8), World("odd", 4, timeout=9)]
    with taking(0.4, 0.6), siblings.quiet(99):
        assert all(world.held for world in worlds)


def test_while_others_are_to_load_as_well_it_is_waited_for_less_long(monkeypatch):
    monkeypatch.setattr(siblings, "GRACE", 0.2)
    worlds = [World("odd", 3, timeout=9), World("odd", 4, timeout=9)]
    with taking(0.2, 0.4), siblings.quiet(99, lambda: True):
        assert all(world.held for world in worlds)


def test_after_an_error_launches_go_on():
    world = World("all", 1)
    with pytest.raises(ValueError, match="load"), siblings.quiet(99):
        raise ValueError("load")
    assert not world.held


def test_only_ranks_of_the_gpu_count():
    worlds = [World("odd", 3), World("odd", 4)]
    with taking(0, AT_ONCE), siblings.quiet(98):
        assert not any(world.held for world in worlds)
