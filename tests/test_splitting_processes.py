"""Communicators made from others, of real ranks: their lives, losses and forks, and several nodes."""

import pytest

from tests.crew import Crew


def test_lives_with_parts_leave_nothing():
    program = """
def held():
    mappings = [line for line in open("/proc/self/maps") if "nvcoll-" in line]
    return len(os.listdir("/proc/self/fd")), len(mappings)

def life(free):
    part = comm.Split(comm.rank % 2, -comm.rank)
    inner = part.Dup()
    buffer = part.full(1000, 1.0)
    inner.Allreduce(buffer)
    found = float(buffer[0])
    if free:
        inner.Free()
        part.Free()
    nvcoll.Finalize()
    return found, bool(inner)

tell(first=life(True))
before = held()
tell(found=[life(k % 2) for k in range(8)], same=held() == before)
"""
    with Crew(program, 4) as crew:
        for rank in range(4):
            assert crew.told(rank) == {"first": [2.0, False]}
            assert crew.told(rank) == {"found": [[2.0, False]] * 8, "same": True}


def test_who_is_killed_is_missed_at_once_and_named():
    """Locks of ranks that a part lacks are not looked at, and those of others not taken for theirs."""
    program = """
part = comm.Split(0 if comm.rank else nvcoll.UNDEFINED)
late = comm.Split(comm.rank // 2, -comm.rank)
tell(ready=total())
if comm.rank == 2:
    gate()
tell(**attempt((part or comm).Allreduce, np.ones(3)) if comm.rank else attempt(comm.Barrier))
"""
    with Crew(program, 4, NVCOLL_TIMEOUT="60") as crew:
        crew.all_told()
        crew.ranks[2].kill()
        for rank in (1, 3):
            told = crew.told(rank)
            assert told["kind"] == "PeerLostError"
            assert f"rank {rank - 1} of COMM_WORLD.Split(0)): rank 1 has ended" in told["text"]
            assert told["seconds"] < 10
        assert crew.told(0)["kind"] == "PeerLostError"


def test_messages_count_ranks_as_the_communicator_does():
    program = """
part = comm.Split(0 if comm.rank else nvcoll.UNDEFINED)
if part and part.rank == 0:
    tell(**attempt(part.empty, 10))
    tell(**attempt(part.Free))
else:
    tell(**attempt(gate))
"""
    with Crew(program, 3, NVCOLL_TIMEOUT="1") as crew:
        late = "of COMM_WORLD.Split(0): rank 1 did not arrive within 1 s"
        told = crew.told(1)
        assert told["text"].startswith(f"empty {late}"), told
        assert crew.told(1)["kind"] == "StateError"


def test_another_thread_finalizes_while_one_is_made():
    """Its memory stays: the thread that makes it may be anywhere in there."""
    program = """
from nvcoll import world as world_module
total()
if comm.rank == 1:
    open_area = world_module.open_area
    def late(*args):
        time.sleep(1.5)
        return open_area(*args)
    world_module.open_area = late
    tell(**attempt(comm.Dup))
else:
    found = []
    def make():
        found.append(attempt(comm.Dup))
    thread = threading.Thread(target=make)
    thread.start()
    time.sleep(0.7)
    nvcoll.Finalize()
    thread.join()
    tell(**found[0])
    tell(sum=float(np.ones(3).sum()))
"""
    with Crew(program, 2, NVCOLL_TIMEOUT="10") as crew:
        assert crew.told(0)["kind"] in {"StateError", "PeerLostError"}
        assert crew.told(0) == {"sum": 3.0}
        assert crew.told(1)["kind"] in {None, "PeerLostError", "StateError"}
        assert [rank.wait(15) for rank in crew.ranks] == [0, 0]


def test_a_fork_is_no_rank():
    program = """
part = comm.Dup()
total()
if os.fork() == 0:
    tell(**attempt(part.Allreduce, np.ones(3)))
    os._exit(0)
os.wait()
tell(sum=float(comm.size) if part.size == comm.size else 0.0)
"""
    with Crew(program, 2) as crew:
        for rank in range(2):
            told = crew.told(rank)
            assert told["kind"] == "StateError"
            assert told["text"].startswith("COMM_WORLD.Dup(): this process was forked from a rank")
            assert crew.told(rank) == {"sum": 2.0}


@pytest.mark.mpi
@pytest.mark.parametrize("per_node", [1, 2, 3])
def test_on_several_nodes(run_ranks, per_node):
    program = """
import numpy as np, nvcoll
from nvcoll import COMM_WORLD as comm
parts = [comm.Split(comm.rank % 2, -comm.rank), comm.Dup(), comm.Split_type(nvcoll.COMM_TYPE_SHARED)]
parts.append(parts[0].Split(0))
found = []
for _ in range(3):
    for part in parts:
        x = part.full(70_000, comm.rank + 1.0)
        part.Allreduce(x)
        found.append([part.rank, part.size, float(x[0]), bool((x == x[0]).all())])
parts.pop(0).Free()
x = np.full(5, comm.rank + 1.0)
parts[-1].Allreduce(x)
print(found[:4], found[:4] * 3 == found, x[0])
"""
    ranks = run_ranks(program, 6, launcher="mpiexec", env={"NVCOLL_RANKS_PER_NODE": str(per_node)})
    for rank, told in enumerate(ranks.stdout):
        odd, node = float(12 if rank % 2 else 9), rank // per_node * per_node
        mine = [2 - rank // 2, 3, odd, True]
        alike = [rank % per_node, per_node, float(sum(range(node + 1, node + per_node + 1))), True]
        assert told.strip() == f"{[mine, [rank, 6, 21.0, True], alike, mine]} True {odd}"


@pytest.mark.mpi
def test_mpi4py_s_shared_type(run_ranks):
    program = """
from mpi4py import MPI
from nvcoll import COMM_WORLD as comm
print(comm.Split_type(MPI.COMM_TYPE_SHARED, -comm.rank).rank, bool(comm.Split(MPI.UNDEFINED)))
"""
    assert run_ranks(program, 2, launcher="mpiexec").stdout == ["1 False\n", "0 False\n"]
