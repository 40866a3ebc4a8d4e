"""What the other ranks see when one is lost, late, or does something else; real processes."""

import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import nvcoll
from nvcoll.errors import MismatchError, StateError
from tests.conftest import processes, segments, wait_until_empty
from tests.crew import Crew

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine
SHORT = 2  # seconds: a timeout that ranks which are started at once do not need
NVCOLL = Path(sys.executable).with_name("nvcoll")


class TestLostRanks:
    """Survivors hear of it while they wait, and not when the timeout of ten minutes is over."""

    @pytest.mark.parametrize(
        ("end", "how"),
        [
            ("os.kill(os.getpid(), signal.SIGKILL)", "has ended"),
            ("os._exit(0)", "has ended"),
            ("sys.exit()", "has left"),
            ("raise ValueError('of its own')", "has left"),
            ("nvcoll.Finalize(); time.sleep(60)", "has left"),
        ],
    )
    def test_is_named_before_the_call(self, end, how):
        program = f"""
tell(sum=total())
if comm.rank == 2:
    {end}
for _ in range(2):
    tell(**attempt(comm.Allreduce, np.ones(4)))
tell(**attempt(comm.Barrier))
"""
        with Crew(program, 4) as crew:
            assert [told["sum"] for told in crew.all_told().values()] == [[10.0] * 3] * 4
            for rank, told in crew.all_told(but={2}).items():
                assert told["kind"] == "PeerLostError"
                assert told["text"].startswith(f"Allreduce (call 2 on rank {rank}): rank 2 {how} in or before call 2")
                assert told["seconds"] < SOON
            for _ in range(2):
                for told in crew.all_told(but={2}).values():
                    assert told["kind"] == "StateError"
                    assert "an earlier call on this communicator failed" in told["text"]
            assert set(crew.wait(but={2}).values()) == {0}

    @pytest.mark.parametrize("data", ["np.ones(4)", "np.ones(300_000)", "comm.full(300_000, 1.0)"])
    def test_is_named_in_the_call(self, data):
        """The rank is killed while it waits itself, for one that comes late."""
        program = f"""
data = {data}
comm.Allreduce(data)
tell(sum=total())
if comm.rank == 0:
    when_waiting(3, os.kill, os.getpid(), signal.SIGKILL)
if comm.rank == 1:
    gate()
for _ in range(2):
    tell(**attempt(comm.Allreduce, data))
"""
        with Crew(program, 3) as crew:
            crew.all_told()
            assert crew.wait(but={1, 2}) == {0: -signal.SIGKILL}
            for rank in (2, 1):
                told = crew.error_of_latecomer(rank)
                crew.let_go(1)
                assert told["kind"] == "PeerLostError"
                assert re.match(rf"Allreduce \(call [34] on rank {rank}\): rank 0 has ended", told["text"])
                assert told["seconds"] < SOON
            assert crew.wait() == {0: -signal.SIGKILL, 1: 0, 2: 0}

    def test_collective_allocation(self):
        program = """
tell(sum=total())
if comm.rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
tell(**attempt(comm.empty, 100))
"""
        with Crew(program, 3) as crew:
            crew.all_told()
            for rank in (1, 2):
                told = crew.told(rank)
                assert told["kind"] == "PeerLostError"
                assert told["text"].startswith(f"empty: rank 0 has died while rank {rank} waited; ")
                assert told["seconds"] < SOON

    def test_a_rank_that_is_lost_while_all_set_up(self):
        """Whoever made the shared memory removes its name, whatever goes wrong."""
        program = """
from nvcoll import _bootstrap
real = _bootstrap.Segment
class Deadly:
    create = real.create
    def open(name, size):
        segment = real.open(name, size)
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ["NVCOLL_RANK"] == "1":
    _bootstrap.Segment = Deadly
tell(**attempt(nvcoll.Init), alive=nvcoll.Is_initialized())
time.sleep(60)
"""
        with Crew(program, 3) as crew:
            for told in crew.all_told(but={1}).values():
                assert (told["kind"], told["alive"]) == ("PeerLostError", False)
                assert "rank 1 has died" in told["text"]
                assert told["seconds"] < SOON
            left = wait_until_empty(lambda: segments() - crew.before)  # while ranks 0 and 2 live on
            assert not left


class TestLateRanks:
    def test_late_is_no_error(self):
        program = """
tell(sum=total())
if comm.rank == 1:
    time.sleep(3)
tell(sum=total())
"""
        with Crew(program, 3) as crew:
            for _ in range(2):
                assert [told["sum"] for told in crew.all_told().values()] == [[6.0] * 3] * 3
            assert set(crew.wait().values()) == {0}

    def test_missing_ranks_are_named_when_the_time_is_over(self):
        """All others raise the same, though one of them does so first; who comes later hears of it."""
        program = """
tell(imported=True)
gate()
tell(sum=total())
if comm.rank in (1, 3):
    gate()
for _ in range(2):
    tell(**attempt(comm.Allreduce, np.ones(4)))
gate()
nvcoll.Finalize()
tell(sum=total())
"""
        with Crew(program, 5, NVCOLL_TIMEOUT=str(SHORT)) as crew:
            crew.all_told()
            crew.let_go()
            crew.all_told()
            texts = []
            for rank, told in crew.all_told(but={1, 3}).items():
                assert told["kind"] == "TimeoutError"
                assert told["text"].startswith(f"Allreduce (call 2 on rank {rank}): ")
                texts.append(told["text"])
                assert "did not arrive: rank 1, rank 3." in told["text"]
                assert told["seconds"] < SHORT + SOON
                assert crew.told(rank)["kind"] == "StateError"
            assert any(f"no answer within NVCOLL_TIMEOUT ({SHORT} s); " in text for text in texts)
            crew.let_go(1, 3)
            for rank in (1, 3):
                told = crew.error_of_latecomer(rank)
                assert told["kind"] == "TimeoutError"
                assert re.search(r"rank [024] waited in vain for rank 1 until its NVCOLL_TIMEOUT was", told["text"])
                assert told["seconds"] < SOON
            crew.let_go()
            assert [told["sum"] for told in crew.all_told().values()] == [[15.0] * 3] * 5

    def test_a_call_that_failed_writes_to_no_other_buffer(self):
        """Ranks that reduce in place must not take the places of earlier buffers for those that nobody told them."""
        program = """
n = 100_000
tell(imported=True)
gate()
first, second, third = (comm.full(n, 1.0) for _ in range(3))
comm.Allreduce(first)
comm.Allreduce(second)
if comm.rank != 1:
    tell(**attempt(comm.Allreduce, third))
else:
    gate()
    tell(clean=[bool((one == 3).all()) for one in (first, second)] + [bool((third == 1).all())])
"""
        with Crew(program, 3, NVCOLL_TIMEOUT=str(SHORT)) as crew:
            crew.all_told()
            crew.let_go()
            assert [crew.told(rank)["kind"] for rank in (0, 2)] == ["TimeoutError"] * 2
            crew.let_go(1)
            assert crew.told(1) == {"clean": [True] * 3}

    @pytest.mark.parametrize("verb", ["Init", "empty", "free"])
    def test_missing_from_another_call(self, verb):
        program = f"""
tell(imported=True)
gate()
buffer = comm.empty(3)
tell(sum=total())
if {verb!r} == "Init":
    nvcoll.Finalize()
if os.environ["NVCOLL_RANK"] == "1":
    gate()
tell(**attempt({{"Init": nvcoll.Init, "empty": lambda: comm.empty(100), "free": buffer.free}}[{verb!r}]))
"""
        with Crew(program, 3, NVCOLL_TIMEOUT=str(SHORT)) as crew:
            crew.all_told()
            crew.let_go()
            crew.all_told()
            found = [crew.told(rank) for rank in (0, 2)]
            crew.let_go(1)
            for told in found:
                assert told["kind"] == "TimeoutError"
                assert told["text"].startswith(f"{verb}: rank 1 did not arrive within {SHORT} s; ")
            late = crew.told(1)
            assert late["kind"] == "TimeoutError"
            assert late["text"].startswith(f"{verb}: rank 1 came too late: the others have given up")


MISMATCHES = {  # name: what all ranks call but rank 1, what rank 1 calls, and words about it
    "count": ({"n": 4}, {"n": 5}, "Allreduce of 5 float64"),
    "large count": ({"n": 100_000}, {"n": 100_001}, "Allreduce of 100001 float64"),
    "size": ({"n": 4}, {"n": 100_000}, "by two_shot/simple"),
    "datatype": ({"n": 4}, {"n": 8, "dtype": "float32"}, "Allreduce of 8 float32"),
    "operator": ({"n": 4}, {"n": 4, "op": "MAX"}, "MAX"),
    "algorithm": ({"n": 4}, {"n": 4, "algorithm": "two_shot"}, "by two_shot/simple"),
    "protocol": ({"n": 4}, {"n": 4, "algorithm": "one_shot/simple"}, "by one_shot/simple"),
    "symmetric": ({"n": 100_000, "symmetric": True}, {"n": 99_000, "symmetric": True}, "Allreduce of 99000 float64"),
    "barrier": ({"n": 4}, {"barrier": True}, "calls Barrier, by "),
    "no elements": ({"n": 1}, {"n": 0}, "calls Allreduce of no elements, by "),
}


class TestMismatches:
    def test_are_told_and_the_ranks_can_start_anew(self):
        program = f"""
def call(n=0, dtype="float64", op="SUM", algorithm=None, symmetric=False, barrier=False):
    if barrier:
        return comm.Barrier()
    data = room[:n] if symmetric else np.ones(n, dtype)
    comm.Allreduce(data, op=getattr(nvcoll, op), algorithm=algorithm)

for name, (all_of_them, one_of_them, _) in {MISMATCHES!r}.items():
    room = comm.zeros(100_000, "float64")
    tell(sum=total())
    found = attempt(call, **(one_of_them if comm.rank == 1 else all_of_them))
    tell(name=name, **found)
    tell(**attempt(total))
    nvcoll.Finalize()
    tell(**attempt(comm.Allreduce, room))
nvcoll.Init()
tell(sum=total())
"""
        with Crew(program, 3) as crew:
            for name, (_, _, odd) in MISMATCHES.items():
                assert [told["sum"] for told in crew.all_told().values()] == [[6.0] * 3] * 3
                for rank, told in crew.all_told().items():
                    assert (told["name"], told["kind"]) == (name, "MismatchError")
                    verb = "Barrier" if (name, rank) == ("barrier", 1) else "Allreduce"
                    assert told["text"].startswith(f"{verb} (call 2 on rank {rank}): this rank calls {verb}")
                    assert odd in told["text"]
                    assert "rank 1" in told["text"]
                    assert told["seconds"] < 3 * SOON  # kernels are compiled meanwhile
                assert {told["kind"] for told in crew.all_told().values()} == {"StateError"}
                for told in crew.all_told().values():
                    assert told["kind"] == "StateError"  # the buffer went with the communicator
                    assert "freed" in told["text"]
            assert [told["sum"] for told in crew.all_told().values()] == [[6.0] * 3] * 3
            assert set(crew.wait().values()) == {0}

    def test_allocations(self):
        """Nobody gets memory that others do not have, and the heap works on."""
        program = """
tell(**attempt(comm.empty, 100 + 1000 * (comm.rank == 1)))
buffer = comm.zeros(100)
tell(**attempt(buffer.free if comm.rank == 1 else lambda: comm.empty(10)))
tell(**attempt(buffer.free))
tell(sum=total())
"""
        with Crew(program, 3) as crew:
            for _ in range(2):
                for told in crew.all_told().values():
                    assert told["kind"] == "MismatchError"
                    assert "allocate and free in the same order on all ranks" in told["text"]
            assert {told["kind"] for told in crew.all_told().values()} == {None}
            assert [told["sum"] for told in crew.all_told().values()] == [[6.0] * 3] * 3


def test_a_barrier_matches_nothing_else():
    def main(comm):
        with pytest.raises(MismatchError) as caught:
            comm.Allreduce(np.zeros(1, np.uint8)) if comm.rank else comm.Barrier()  # the same bytes on their way
        return str(caught.value)

    for rank, text in enumerate(nvcoll.emulate(2).run(main)):
        own, other = ("Barrier", "Allreduce of 1 uint8, SUM")[:: -1 if rank else 1]
        assert text.startswith(f"{own.split()[0]} (call 1 on rank {rank}): this rank calls {own}, by ")
        assert f"; rank {1 - rank} calls {other}, by " in text


def test_buffers_of_a_refused_call_are_let_go():
    def main(comm):
        send, recv = bytearray(8), bytearray(8)
        comm.Allreduce(send, recv)
        with pytest.raises(MismatchError):
            comm.Allreduce(np.ones(1 + comm.rank))
        with pytest.raises(StateError):
            comm.Allreduce(send, recv)
        for one in (send, recv):
            one.append(0)  # BufferError if anybody still looks at its memory
        return len(send)

    assert nvcoll.emulate(2).run(main) == [9, 9]


class TestNothingRemains:
    def test_if_all_ranks_are_killed_at_once(self):
        with Crew("comm.empty(1 << 20); tell(sum=total())\nwhile True: total()", 3) as crew:
            crew.all_told()
            crew.kill()
            assert not segments() - crew.before

    @pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)", "raise ValueError"])
    def test_of_a_run(self, run_command, end):
        program = f"""
import os, signal, sys, time
import numpy as np, nvcoll
from nvcoll import COMM_WORLD as comm
buffer = comm.full(100_000, 1.0)
comm.Allreduce(buffer)
if comm.rank == 1:
    {end}
try:
    while True:
        comm.Allreduce(buffer)
except nvcoll.PeerLostError:
    time.sleep(60)  # until the launcher ends this rank: the other one may take its time to end
"""
        before = segments()
        status, output = run_command([NVCOLL, "run", "-n", "3", "-c", program], timeout=40)
        assert status == {"o": 128 + signal.SIGKILL, "s": 3, "r": 1}[end[0]], output
        assert not wait_until_empty(lambda: segments() - before)
        assert not wait_until_empty(processes)
