"""Communicators that several threads bring to life, or to an end."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import nvcoll
from nvcoll import COMM_SELF, lifecycle, session
from nvcoll.buffers import streams
from nvcoll.comm import Comm
from nvcoll.lifecycle import Living


@pytest.mark.parametrize("call", [COMM_SELF.Barrier, lambda: COMM_SELF.Allreduce(np.ones(3))])
def test_finalized_while_a_call_is_planned(monkeypatch, call):
    """The call ends, and nothing of the world that is gone finds its way to the next one."""
    nvcoll.Finalize()
    planner = COMM_SELF._world.planner
    plan = planner.plan

    def plan_too_late(*given):
        made = plan(*given)
        nvcoll.Finalize()
        return made

    monkeypatch.setattr(planner, "plan", plan_too_late)
    with pytest.raises(nvcoll.StateError, match="this communicator was freed or finalized"):
        call()
    assert not COMM_SELF.alive
    call()


def test_no_end_while_a_library_captures_a_graph(monkeypatch):
    """But the end of the process is one, whatever a library does."""
    ends = []
    world = SimpleNamespace(alive=True, target="cuda", _close=lambda: ends.append("closed"))
    monkeypatch.setattr(session, "COMM_WORLD", world)
    monkeypatch.setattr(streams, "captured_stream", type("Stream", (), {"__module__": "cupy.cuda"}))
    with pytest.raises(nvcoll.StateError, match=r"^Finalize: cupy captures a graph, .+ call it before or after$"):
        nvcoll.Finalize()
    assert not ends
    session._finish()
    assert ends == ["closed"]


def test_an_end_that_is_interrupted_keeps_no_other_from_ending(monkeypatch):
    parts = [COMM_SELF.Dup() for _ in range(3)]
    for one in (parts[1], COMM_SELF):
        close = one._world.close

        def end_and_raise(close=close):
            close()
            raise KeyboardInterrupt

        monkeypatch.setattr(one._world, "close", end_and_raise)
    with pytest.raises(KeyboardInterrupt):
        nvcoll.Finalize()
    assert [one.alive for one in (*parts, COMM_SELF)] == [False] * 4
    assert COMM_SELF.Dup().size == 1


def test_what_fails_while_one_comes_to_life_gives_its_world_back(monkeypatch):
    nvcoll.Finalize()
    worlds, enter = [], Living._enter
    monkeypatch.setattr(Living, "_enter", lambda self, world: [worlds.append(world), enter(self, world)])
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "parse", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            COMM_SELF.Barrier()
    assert not COMM_SELF.alive
    with pytest.raises(nvcoll.StateError, match="freed or finalized"):
        worlds[0].planner.state.demand()
    COMM_SELF.Barrier()


def test_one_that_waits_for_other_ranks_keeps_no_other_from_coming_to_life():
    nvcoll.Finalize()
    begun, come = threading.Event(), threading.Event()

    def wait_for_others():
        begun.set()
        come.wait(60)
        raise nvcoll.BootstrapError("nobody came")

    def use():
        with pytest.raises(nvcoll.BootstrapError, match="nobody came"):
            waiting.Barrier()

    waiting = Comm(wait_for_others, "COMM_WORLD")
    thread = threading.Thread(target=use)
    thread.start()
    try:
        assert begun.wait(60)
        COMM_SELF.Barrier()
        assert thread.is_alive()
    finally:
        come.set()
        thread.join()
