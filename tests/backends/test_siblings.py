"""When a kernel is loaded beside ranks that share the GPU."""

import contextlib
import random
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from nvcoll.backends import siblings
from nvcoll.backends.siblings import Sibling, join

AT_ONCE = 5.0  # seconds; what is given up takes longer with the deadline of these tests
TIMEOUT = 20.0
GPU = 99


@pytest.fixture(autouse=True)
def others(monkeypatch):
    """None are left of other tests, of which one may have failed."""
    monkeypatch.setattr(siblings, "_siblings", weakref.WeakSet())


class Order:
    """Of a rank's launches, which none begins that is held back."""

    def __init__(self):
        self.held = 0
        self.busy = False

    def hold(self):
        self.held += 1

    def release(self):
        assert self.held
        self.held -= 1


def rank_of(group, launched=0, order=None, whole=None, timeout=TIMEOUT, over=False, reported=False):
    """What a rank has of a communicator, in which it has launched so many calls."""
    state = SimpleNamespace(order=order or Order(), sequence=launched, over=over, reported=reported)
    return join(Sibling(GPU, group, state, timeout, whole))


def held(one):
    return one.state.order.held > 0


def launch(one):
    """Launch a call, as soon as it is not held back."""
    order = one.state.order
    while order.held or order.busy:
        time.sleep(1e-4)
    order.busy = True
    time.sleep(1e-4)
    one.state.sequence += 1
    order.busy = False


def until(condition):
    latest = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.001)


@contextlib.contextmanager
def threads(*targets):
    """Run them beside the block, wait for their end, and raise what they raise."""
    raised = []

    def run(target):
        try:
            target()
        except BaseException as exc:
            raised.append(exc)

    running = [threading.Thread(target=run, args=(target,), daemon=True) for target in targets]
    for one in running:
        one.start()
    yield
    for one in running:
        one.join(20)
        assert not one.is_alive()
    assert not raised


@contextlib.contextmanager
def taking(least, most):
    """Fail where the block takes less or more seconds."""
    begun = time.monotonic()
    yield
    assert least <= time.monotonic() - begun < most


def test_at_once_where_every_call_is_complete_and_nobody_launches_meanwhile():
    order = Order()
    ranks = [rank_of("all", 7, order), rank_of("all", 7), rank_of("odd", 3, order), rank_of("odd", 3)]
    with taking(0, AT_ONCE), siblings.quiet(GPU):
        assert [one.state.order.held for one in ranks] == [1] * 4
    assert not any(map(held, ranks))


def test_what_is_on_its_way_is_waited_for():
    late, early = rank_of("odd", 3), rank_of("odd", 4)

    def follow():
        until(lambda: held(early))
        launch(late)

    with threads(follow), taking(0, AT_ONCE), siblings.quiet(GPU):
        assert late.state.sequence == early.state.sequence == 4
        assert held(late)


def test_a_launch_that_has_begun_is_waited_for():
    one, other = rank_of("odd", 3), rank_of("odd", 3)
    other.state.order.busy = True

    def end():
        until(lambda: held(one))
        time.sleep(0.05)
        other.state.sequence += 1
        other.state.order.busy = False
        launch(one)

    with threads(end), taking(0.05, AT_ONCE), siblings.quiet(GPU):
        assert one.state.sequence == other.state.sequence == 4


def test_who_is_ahead_is_held_back_until_the_others_have_come():
    """Else they might never be equal: who is ahead may stay so."""
    late, early = rank_of("odd", 0), rank_of("odd", 1)
    done = threading.Event()

    def run_ahead():
        while not done.is_set():
            launch(early)
            time.sleep(0.001)

    def follow():
        kept = 0  # how often it was seen that the other is held back
        while not done.is_set():
            time.sleep(0.001)
            kept = kept + 1 if held(early) else 0
            if kept > 5 and late.state.sequence < early.state.sequence:
                launch(late)

    with threads(run_ahead, follow), contextlib.ExitStack() as end:
        end.callback(done.set)
        for _ in range(3):
            with taking(0, AT_ONCE), siblings.quiet(GPU):
                assert late.state.sequence == early.state.sequence
            time.sleep(0.01)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_several_communicators(seed):
    """All make the same calls in the same order, each at a speed of its own; now and then some meet on the host."""
    chance, size = random.Random(seed), 6
    groups = [range(size), range(0, size, 2), range(1, size, 2), (0, 1), (2, 5), (3, 4)]
    orders = [Order() for _ in range(size)]
    parts = [{rank: rank_of(k, 0, orders[rank]) for rank in group} for k, group in enumerate(groups)]
    program = [(chance.choice(parts), chance.random() < 0.1) for _ in range(300)]
    meetings = [threading.Barrier(len(group)) for group in groups]

    def rank(number):
        pace = random.Random(seed * size + number)
        for part, meet in program:
            if number in part:
                time.sleep(pace.choice([0, 0, 1e-4, 1e-3]))
                if meet:
                    meetings[parts.index(part)].wait(10)
                else:
                    launch(part[number])

    def counts():
        return [{one.state.sequence for one in part.values()} for part in parts]

    with threads(*(lambda number=number: rank(number) for number in range(size))):
        for _ in range(10):
            time.sleep(0.005)
            with taking(0, 5), siblings.quiet(GPU):
                found = counts()
                assert all(len(one) == 1 for one in found)
                time.sleep(0.003)
                assert counts() == found
    assert counts() == [{program.count((part, False))} for part in parts]


def test_who_is_ahead_may_have_to_do_what_is_no_launch_there():
    """One that has to launch something else, before it comes to where a rank that is behind waits for it."""
    order = Order()
    ahead, waits_for, late = rank_of("even", 0, order), rank_of("all", 4), rank_of("all", 3)
    meeting = threading.Barrier(2)

    def rank():
        until(lambda: held(ahead))
        launch(ahead)  # alone in that communicator: nobody is behind there
        meeting.wait(10)

    def other():
        meeting.wait(10)
        launch(late)

    with threads(rank, other), taking(0, AT_ONCE), siblings.quiet(GPU):
        assert late.state.sequence == waits_for.state.sequence
        assert all(map(held, (ahead, late, waits_for)))


def test_ranks_that_have_ended_are_not_waited_for():
    ranks = [rank_of("odd", 3, over=True), rank_of("odd", 4), rank_of("even", 5), rank_of("even", 4)]
    ranks[2].left = True
    with taking(0, AT_ONCE), siblings.quiet(GPU):
        assert [*map(held, ranks)] == [False, True, False, True]


def test_the_last_calls_of_a_rank_that_ends_are_waited_for_and_it_can_go_on():
    """With its whole, all its parts end; what it has launched runs, as long as it has not left."""
    order, other = Order(), Order()
    whole = rank_of("all", 1, order)
    ahead, late = rank_of("odd", 4, order, whole), rank_of("odd", 3, other, rank_of("all", 1, other))

    def end():
        until(lambda: held(ahead))
        whole.state.over = True
        until(lambda: not held(ahead))
        launch(late)

    with threads(end), taking(0, AT_ONCE), siblings.quiet(GPU):
        assert late.state.sequence == 4
        assert held(late)
        assert not held(ahead)


def test_a_communicator_that_has_failed_is_not_waited_for():
    ranks = [rank_of("odd", 3), rank_of("odd", 4), rank_of("odd", 4, reported=True)]
    with taking(0, AT_ONCE), siblings.quiet(GPU):
        assert all(map(held, ranks))


@pytest.mark.parametrize("timeouts", [(0.8, 9), (9, 9)])
def test_a_moment_that_does_not_come_is_not_waited_for_for_ever(monkeypatch, timeouts):
    """Kernels that wait meanwhile must not be over their deadline for this."""
    monkeypatch.setattr(siblings, "PATIENCE", 0.5)
    ranks = [rank_of("odd", 3 + k, timeout=timeout) for k, timeout in enumerate(timeouts)]
    with taking(0.4 if min(timeouts) < 1 else 0.5, 3), siblings.quiet(GPU):
        assert not held(ranks[0])  # it might launch what is waited for


def test_who_has_to_load_before_it_can_launch_is_waited_for_less_long(monkeypatch):
    monkeypatch.setattr(siblings, "GRACE", 0.2)
    monkeypatch.setattr(siblings, "PATIENCE", 1)
    late, early = rank_of("odd", 3), rank_of("odd", 4)
    part = rank_of("pair", 0, late.state.order)
    for asking, least, most in ((part, 0.2, 0.9), (early, 1, 4)):
        with taking(least, most), siblings.quiet(GPU, lambda state=asking.state: [state, None]):
            assert not held(late)


def test_two_threads_may_wait_for_it_at_once():
    late, early = rank_of("odd", 3), rank_of("odd", 4)

    def load():
        with siblings.quiet(GPU):
            assert late.state.sequence == early.state.sequence

    def follow():
        until(lambda: early.state.order.held == 2)
        launch(late)

    with threads(load, load, follow):
        pass
    assert not any(map(held, (late, early)))


def test_after_an_error_launches_go_on():
    one = rank_of("all", 1)
    with pytest.raises(ValueError, match="load"), siblings.quiet(GPU):
        raise ValueError("load")
    assert not held(one)


def test_only_ranks_of_the_gpu_count():
    ranks = [rank_of("odd", 3), rank_of("odd", 4)]
    with taking(0, AT_ONCE), siblings.quiet(GPU - 1):
        assert not any(map(held, ranks))
