"""Requests between nodes: the queue's thread talks to MPI."""

import pytest

from tests.test_hosts import on_nodes  # noqa: F401 - the fixture

pytestmark = pytest.mark.mpi

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine


@pytest.mark.parametrize("per_node", [1, 2])
def test_any_order_of_waits(on_nodes, per_node):  # noqa: F811
    program = """
rng = np.random.default_rng(comm.rank)
every, active = [], []
room = np.zeros(10, "int64")
persistent = comm.Allreduce_init(nvcoll.IN_PLACE, room)
for number in range(60):
    x = np.full((1, 10, 3000, 60_000)[number % 4], comm.rank + number, "int64")
    every.append(x)
    if rng.integers(3):
        active.append(comm.Iallreduce(x))
    else:
        comm.Allreduce(x)
    if number % 20 == 7:
        comm.Barrier()
        persistent.Wait()
        room[:] = number
        persistent.Start()
    while active and rng.integers(2):
        active.pop(int(rng.integers(len(active)))).Wait()
persistent.Wait()
nvcoll.Request.Waitall(active)
tell(wrong=[k for k, x in enumerate(every) if (x != 4 * k + 6).any()], room=room.tolist(), sum=total())
comm.Iallreduce(np.empty(0)).Wait()
"""
    assert on_nodes(program, 4, per_node) == [[{"wrong": [], "room": [188] * 10, "sum": [10.0] * 3}]] * 4


def test_a_rank_that_leaves_is_named_on_all_nodes(on_nodes):  # noqa: F811
    program = """
total()
if comm.rank == 3:
    sys.exit()
with queue_held():
    requests = [comm.Iallreduce(np.ones(4)) for _ in range(2)]
for request in requests:
    tell(**attempt(request.Wait))
tell(**attempt(comm.Barrier))
"""
    for rank, told in enumerate(on_nodes(program, 4, 2, check=False)[:3]):
        assert told[0]["kind"] == "PeerLostError"
        assert told[0]["text"].startswith(f"Allreduce (call 2 on rank {rank}): rank 3 ")
        assert told[0]["seconds"] < SOON
        assert [one["kind"] for one in told[1:]] == ["StateError"] * 2


def test_mismatches(on_nodes):  # noqa: F811
    program = """
total()
tell(**attempt(comm.Iallreduce(np.ones(4 + (comm.rank > 1))).Wait))
nvcoll.Finalize()
request = comm.Iallreduce(x := np.ones(4))
nvcoll.Request.Waitall([request])
tell(x=x.tolist())
"""
    told = on_nodes(program, 4, 2)
    assert {first["kind"] for first, _ in told} <= {"MismatchError", "PeerLostError"}
    assert "MismatchError" in {first["kind"] for first, _ in told}
    assert [second for _, second in told] == [{"x": [4.0] * 4}] * 4


def test_arguments_are_judged_at_the_call(on_nodes):  # noqa: F811
    program = """
for verb in (comm.Iallreduce, comm.Allreduce_init):
    tell(**attempt(verb, np.ones(4), algorithm="ring"))
comm.Iallreduce(np.ones(4), algorithm="mpi").Wait()
tell(sum=total())
"""
    for first, second, last in on_nodes(program, 2, 1):
        assert first["text"] == "Iallreduce: algorithm is 'ring', expected 'mpi' for ranks on several nodes"
        assert second["text"] == "Allreduce_init: algorithm is 'ring', expected 'mpi' for ranks on several nodes"
        assert last == {"sum": [3.0] * 3}


def test_mpi_for_one_thread_is_refused(on_nodes):  # noqa: F811
    program = """
import mpi4py
mpi4py.rc.thread_level = "serialized"
tell(sum=total())
for verb in (comm.Iallreduce, comm.Allreduce_init):
    tell(**attempt(verb, np.ones(4)))
tell(sum=total())
"""
    for before, first, second, after in on_nodes(program, 2, 1):
        assert before == after == {"sum": [3.0] * 3}
        for verb, told in (("Iallreduce", first), ("Allreduce_init", second)):
            assert told["kind"] == "StateError"
            assert told["text"] == (
                f"{verb}: MPI was initialized for one thread at a time, expected MPI.THREAD_MULTIPLE, for the call "
                "runs on one of its own; leave mpi4py.rc.thread_level as it is"
            )


@pytest.mark.parametrize("ending", ["", "nvcoll.Finalize()", "from mpi4py import MPI; MPI.Finalize()"])
def test_ends_with_requests_outstanding(on_nodes, ending):  # noqa: F811
    """Some ranks begin calls that others never make; all end soon, and well."""
    program = f"""
total()
requests = [comm.Iallreduce(np.ones(4)) for _ in range(3)] if comm.rank < 3 else []
time.sleep(0.2 if comm.rank < 3 else 1.2)
nvcoll.Finalize()
for request in requests:
    tell(**attempt(request.Wait))
{ending}
"""
    told = on_nodes(program, 4, 2)
    assert told[3] == []
    for rank in range(3):
        assert {one["kind"] for one in told[rank]} <= {"StateError", "PeerLostError"}
        assert all(one["seconds"] < SOON for one in told[rank])
