"""What has failed on a GPU is heard of, whatever the program does next; the messages are tested with the calls."""

import gc
import os
import signal
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest

import nvcoll
from nvcoll import emulation
from nvcoll.backends import emulated
from nvcoll.comm import Comm
from nvcoll.device.common import STAMP_BITS
from nvcoll.device_calls import DeviceCalls
from nvcoll.device_failures import raise_unheard
from nvcoll.ops import DATATYPES
from tests.conftest import eventually
from tests.fake_device_world import fake_world

MISSING = r"a call up to number 0, or a replay of one, failed on the GPU of rank 1: no answer .* did not arrive: rank 0"


@pytest.fixture
def world(monkeypatch):
    world = fake_world(monkeypatch)
    world.planner.tags = [5 << STAMP_BITS, 6 << STAMP_BITS, None, 6 << STAMP_BITS]
    return world


@pytest.fixture
def buffer(world):
    return DeviceCalls(world).allocate("zeros", (4,), DATATYPES["float32"])


class TestBuffers:
    @pytest.mark.parametrize(
        ("verb", "args"), [("copy_to", ()), ("copy_from", ([1, 2, 3, 4],)), ("fill", (0,)), ("fill", (1.5,))]
    )
    def test_what_waits_for_the_calls_raises_what_failed_in_them_once(self, world, buffer, verb, args):
        getattr(buffer, verb)(*args)
        world.planner.state.reported = True
        with pytest.raises(nvcoll.TimeoutError, match=f"^{verb}: {MISSING}"):
            getattr(buffer, verb)(*args)
        getattr(buffer, verb)(*args)  # what is there may still be of use

    def test_nothing_is_raised_that_a_call_has_raised(self, world, buffer):
        world.planner.state.reported, world.raised = True, True
        buffer.copy_to()

    def test_calls_of_other_communicators_use_them_too(self, world, buffer, monkeypatch):
        part = fake_world(monkeypatch)
        part.planner.tags, part.of = world.planner.tags, " of COMM_WORLD.Dup()"
        world._parts, part.whole = [part], world
        part.planner.state.reported = True
        with pytest.raises(nvcoll.TimeoutError, match=r"^copy_to: .* of rank 1 of COMM_WORLD\.Dup\(\): no answer"):
            buffer.copy_to()
        raise_unheard(part, "copy_to")

    def test_one_keeps_no_world(self, monkeypatch):
        world = fake_world(monkeypatch)
        buffer = DeviceCalls(world).allocate("zeros", (4,), DATATYPES["float32"])
        world.planner.state.reported, alive = True, weakref.ref(world)
        del world
        monkeypatch.undo()
        gc.collect()
        assert alive() is None
        buffer.copy_to()


class TestEnds:
    def give_end(self, world):
        ends = world.ends = []
        world.target, world.topology, world.backend = "cuda", SimpleNamespace(nodes=[(0, 1, 2, 3)]), "nvshmem"
        world.leave = lambda: ends.append("leave")
        world.close = lambda: ends.append("close")
        world.retire = lambda: ends.append("retire")
        world.give_up = lambda: ends.append("give up")
        world.exchange = SimpleNamespace(abandon=lambda: ends.append("abandon"))
        world.planner.state.reported = True
        return world

    def test_of_a_process(self, world):
        comm = Comm(lambda: self.give_end(world), "COMM_WORLD")
        assert comm.rank == 1
        with pytest.raises(nvcoll.TimeoutError, match=f"^Finalize: {MISSING}"):
            comm._close()
        assert world.ends == ["leave", "close"]
        assert not comm.alive

    def test_of_a_process_by_an_exception(self, world, monkeypatch):
        monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
        comm = Comm(lambda: self.give_end(world), "COMM_WORLD")
        assert comm.rank == 1
        comm._close()
        assert world.ends == ["close"]

    def test_of_an_emulated_rank(self, world, monkeypatch):
        monkeypatch.setattr(emulation.Emulation, "_open", lambda _: [self.give_end(world)])
        with pytest.raises(nvcoll.TimeoutError, match=f"^run: {MISSING}"):
            nvcoll.emulate(1, device=0).run(lambda comm: "as if all was well")
        assert world.ends == ["leave", "abandon", "leave", "retire"]

    def test_of_an_emulated_rank_beside_one_that_raised(self, world, monkeypatch):
        worlds = [self.give_end(world), self.give_end(fake_world(monkeypatch))]
        monkeypatch.setattr(emulation.Emulation, "_open", lambda self: worlds)

        def main(comm):
            if comm.name == "emulated rank 1":
                raise ZeroDivisionError
            while len(worlds[1].ends) < 2:  # it has left
                pass

        with pytest.raises(ZeroDivisionError):
            nvcoll.emulate(2, device=0).run(main)


def test_after_ctrl_c_no_rank_on_a_gpu_is_waited_for_and_all_are_retired(monkeypatch):
    done, goes_on = [], threading.Event()

    class World:
        target = "cuda"

        def __init__(self, rank):
            self.rank, self.exchange = rank, SimpleNamespace(abandon=lambda: done.append(("abandon", rank)))

        def give_up(self):
            done.append(("give up", self.rank))
            if self.rank == 1:
                raise KeyboardInterrupt("again")

        def leave(self):
            assert threading.current_thread() is not threading.main_thread()

        def retire(self):
            done.append(("retire", self.rank, bool(emulated._running)))

    def main(comm):
        if comm.name.endswith("0"):
            os.kill(os.getpid(), signal.SIGINT)
        goes_on.wait(20)

    monkeypatch.setattr(emulation.Emulation, "_open", lambda self: [World(rank) for rank in range(3)])
    monkeypatch.setattr(emulation, "raise_unheard", lambda world, verb: None)
    with pytest.raises(KeyboardInterrupt, match="again"):
        nvcoll.emulate(3, device=0).run(main)
    assert done == [("abandon", 0), ("give up", 0), ("abandon", 1), ("give up", 1)]
    assert emulated._running  # the ranks' threads have not ended
    goes_on.set()
    eventually(lambda: not emulated._running)
    assert done[4:] == [("retire", rank, True) for rank in range(3)]
