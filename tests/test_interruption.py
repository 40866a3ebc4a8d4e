"""Ctrl-C and other signals while ranks wait for each other; real processes."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.crew import Crew

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine
NVCOLL = Path(sys.executable).with_name("nvcoll")


class TestInterruption:
    def test_ctrl_c_ends_a_wait(self):
        program = """
tell(sum=total())
when_waiting(2, tell, waiting=True) if comm.rank == 0 else None
if comm.rank == 1:
    gate()
for _ in range(2):
    tell(**attempt(comm.Allreduce, np.ones(4)))
"""
        with Crew(program, 3) as crew:
            crew.all_told()
            assert crew.told(0) == {"waiting": True}
            sent = time.monotonic()
            crew.send(0, signal.SIGINT)
            assert crew.told(0)["kind"] == "KeyboardInterrupt"
            assert time.monotonic() - sent < SOON
            assert crew.told(0)["kind"] == "StateError"
            for rank in (2, 1):
                told = crew.error_of_latecomer(rank)
                crew.let_go(1)
                assert told["kind"] == "PeerLostError"
                assert "rank 0 gave up in or before call" in told["text"]
            assert set(crew.wait().values()) == {0}

    def test_time_in_which_the_job_was_suspended_does_not_count(self):
        program = """
tell(sum=total())
when_waiting(2, tell, waiting=True) if comm.rank == 0 else gate()
tell(**attempt(comm.Allreduce, np.ones(4)))
"""
        with Crew(program, 2, NVCOLL_TIMEOUT="5") as crew:
            crew.all_told()
            assert crew.told(0) == {"waiting": True}
            for number, seconds in ((signal.SIGSTOP, 6), (signal.SIGCONT, 0.5)):
                for rank in range(2):
                    crew.send(rank, number)
                time.sleep(seconds)
            crew.let_go(1)
            assert [told["kind"] for told in crew.all_told().values()] == [None] * 2

    def test_a_rank_that_was_interrupted_and_ended_is_not_waited_for(self):
        program = """
tell(sum=total())
if comm.rank == 0:
    when_waiting(2, os.kill, os.getpid(), signal.SIGINT)
    comm.Barrier()
if comm.rank == 1:
    gate()
for _ in range(2):
    tell(**attempt(comm.Barrier))
"""
        with Crew(program, 3) as crew:
            crew.all_told()
            assert crew.wait(but={1, 2}) == {0: -signal.SIGINT}
            for rank in (2, 1):
                told = crew.error_of_latecomer(rank)
                crew.let_go(1)
                assert told["kind"] == "PeerLostError"
                assert "rank 0 gave up in or before call" in told["text"]
                assert told["seconds"] < SOON

    def test_ctrl_c_ends_an_allocation_and_the_ranks_can_start_anew(self):
        program = """
tell(sum=total())
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start() if comm.rank == 0 else gate()
for _ in range(2):
    tell(**attempt(comm.empty, 3))
nvcoll.Finalize()
nvcoll.Init()
tell(sum=total())
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            assert crew.told(0)["kind"] == "KeyboardInterrupt"
            told = crew.told(0)
            assert told["kind"] == "StateError"
            assert "call Finalize on all of them, and Init starts anew" in told["text"]
            crew.let_go(1)
            assert [crew.told(1)["kind"] for _ in range(2)] == ["PeerLostError", "StateError"]
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    @pytest.mark.parametrize(
        "wait", ["comm.Allreduce(np.ones(4))", "nvcoll.Request.Waitall([comm.Iallreduce(np.ones(4)), request])"]
    )
    def test_what_a_handler_raises_ends_the_wait_that_it_meets(self, wait):
        program = f"""
class Alarm(Exception):
    pass

def ring(number, frame):
    raise Alarm

signal.signal(signal.SIGALRM, ring)
tell(sum=total())
if comm.rank == 1:
    gate()
request = comm.Iallreduce(np.ones(4))
if comm.rank == 0:
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    tell(**attempt(lambda: {wait}))
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            told = crew.told(0)
            assert told["kind"] == "Alarm"
            assert told["seconds"] < SOON
            crew.let_go(1)

    def test_what_a_handler_raises_is_raised_though_the_others_come_meanwhile(self):
        program = """
class Alarm(Exception):
    pass

def ring(number, frame):
    tell(ringing=True)
    while comm._world.planner.state.boards()[1][0] < 2:
        time.sleep(0.005)
    time.sleep(0.2)
    raise Alarm

signal.signal(signal.SIGALRM, ring)
tell(sum=total())
signal.setitimer(signal.ITIMER_REAL, 0.3) if comm.rank == 0 else gate()
for _ in range(2 - comm.rank):
    tell(**attempt(comm.Allreduce, np.ones(4)))
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            assert crew.told(0) == {"ringing": True}
            crew.let_go(1)
            assert crew.told(0)["kind"] == "Alarm"
            told = crew.told(0)
            assert (told["kind"], "an earlier call on this communicator failed" in told["text"]) == ("StateError", True)
            assert crew.told(1)["kind"] is None  # it had all that it needs

    def test_handlers_that_do_not_raise_let_it_go_on(self):
        program = """
signal.signal(signal.SIGUSR1, lambda number, frame: tell(handled=number))
tell(sum=total())
if comm.rank == 0:
    when_waiting(2, os.kill, os.getpid(), signal.SIGUSR1)
else:
    gate()
tell(sum=total())
"""
        with Crew(program, 2) as crew:
            crew.all_told()
            assert crew.told(0) == {"handled": signal.SIGUSR1}
            crew.let_go(1)
            assert [told["sum"] for told in crew.all_told().values()] == [[3.0] * 3] * 2

    @pytest.mark.parametrize("rank_0", ["time.sleep(2)", "while True: comm.Allreduce(np.ones(3))"])
    def test_ctrl_c_ends_an_emulation(self, run_command, rank_0):
        """Whether ranks wait for each other or go on: nothing crashes, and the program does."""
        program = f"""
import os, signal, threading, time
import numpy as np, nvcoll

def main(comm):
    comm.Allreduce(np.ones(3))
    if comm.rank == 0:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        {rank_0}
    while True:
        comm.Allreduce(np.ones(3))

try:
    nvcoll.emulate(3).run(main)
except KeyboardInterrupt:
    print("interrupted", nvcoll.emulate(2).run(lambda comm: comm.rank))
"""
        assert run_command([sys.executable, "-c", program], timeout=40) == (0, "interrupted [0, 1]\n")

    def test_ctrl_c_at_the_launcher(self, run_command):
        program = """
import os, signal
from nvcoll import COMM_WORLD as comm
comm.Barrier()
if comm.rank == 1:
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()
comm.Barrier()
"""
        status, output = run_command([NVCOLL, "run", "-n", "3", "-c", program], timeout=40)
        assert status == 128 + signal.SIGINT
        assert "KeyboardInterrupt" in output


@pytest.mark.parametrize("call", ["part.Free()", "part.Allreduce(x)"])
def test_who_waits_for_requests_hears_of_the_end(run_command, call):
    """Also where those behind the one that runs end before it."""
    program = f"""
import os, signal, threading, time
import numpy as np, nvcoll

def main(comm):
    part, x = comm.Dup(), np.ones(8)
    if comm.rank == 1:
        time.sleep(3)
        return
    requests = [part.Iallreduce(np.ones(8)) for _ in range(3)]
    time.sleep(0.3)  # a thread runs the first
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        {call}
    except nvcoll.Error:
        print("told")

try:
    nvcoll.emulate(2).run(main)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("interrupted")
"""
    status, output = run_command([sys.executable, "-c", program], env={"NVCOLL_TIMEOUT": "60"})
    assert (status, output) == (0, "told\ninterrupted\n")
