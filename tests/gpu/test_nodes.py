"""Nodes that `NVCOLL_RANKS_PER_NODE` makes of one host: ranks of other nodes are reached by puts of NVSHMEM, by P2P."""

from pathlib import Path

import pytest

from tests.crew import Crew
from tests.gpu.devices import GPUS

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("compiled_far")]
ROOT = str(Path(__file__).parents[2])
ENV = {"NVCOLL_BACKEND": "nvshmem", "NVCOLL_HEAP": "512M", "PYTHONPATH": ROOT}

EVERYTHING = """
import hashlib, sys
import numpy as np, nvcoll
from nvcoll import COMM_WORLD as comm
from nvcoll.ops import OPS
from tests.gpu.kernels import FAR_PAIRS, REACHING
from tests.oracle import assert_reduced, random_data

each, pairs, rounds, counts = *map(int, sys.argv[1:4]), [int(one) for one in sys.argv[4:]]
nodes = comm._world.topology.nodes
assert nodes == tuple(tuple(range(k, min(k + each, comm.size))) for k in range(0, comm.size, each)), nodes
assert comm.backend == "nvshmem" and comm._world.planner.remote
assert [one.name for one in comm.explain("allreduce", 4).candidates if one.reason is None] == REACHING

calls, digest = 0, hashlib.sha256()
for name in REACHING:
    for datatype, op in FAR_PAIRS[:pairs]:
        for count in counts:
            seeds = [[calls, rank] for rank in range(comm.size)]
            given = [random_data(np.random.default_rng(seed), datatype, op, count) for seed in seeds]
            x = comm.array(given[comm.rank], datatype)
            results = [comm.empty(count, datatype) for _ in range(rounds)]
            for y in results:  # back to back: slots and what is staged are used again while others may still read
                comm.Allreduce(x, y, op=OPS[op], algorithm=name)
            comm.Allreduce(x, op=OPS[op], algorithm=name)
            for result in [x.copy_to(), *(y.copy_to() for y in results)]:
                digest.update(result.tobytes())
                assert_reduced(result, given, op, datatype)
            comm.Barrier()
            for one in (x, *results):
                one.free()
            calls += 1
print("right", calls, digest.hexdigest())
"""

WORLDS = [  # ranks, ranks of a node; and how much is tried, for the kernels of ranks that share a GPU take turns
    pytest.param(2, 1, 5, 5, (1, 5, 1021, 65537, 400_009), id="2-of-1"),
    pytest.param(4, 3, 2, 2, (5, 20_011), id="4-of-3"),
    pytest.param(4, 2, 2, 2, (5, 20_011), id="4-of-2"),
    pytest.param(8, 2, 1, 2, (5, 20_011), id="8-of-2"),
]
WORLDS += [  # a GPU for each rank
    pytest.param(GPUS, each, 5, 3, (1, 5, 1021, 65537), id=f"{GPUS}-gpus-of-{each}")
    for each in (1, 2, 4)
    if each < GPUS > 2
]


@pytest.mark.parametrize(("ranks", "each", "pairs", "rounds", "counts"), WORLDS)
def test_every_algorithm_that_reaches_other_nodes(run_ranks, ranks, each, pairs, rounds, counts):
    env = ENV | {"NVCOLL_RANKS_PER_NODE": str(each)}
    told = run_ranks(EVERYTHING, ranks, each, pairs, rounds, *counts, timeout=115, env=env)
    assert all(text.startswith("right") for text in told.stdout), told
    assert len(set(told.stdout)) == 1, f"ranks have different results; {told}"


def test_what_needs_memory_of_the_others_is_refused_and_rules_choose_something_else(run_ranks):
    program = """
    import numpy as np, nvcoll
    from nvcoll import COMM_WORLD as comm
    x = comm.array(np.full(1000, comm.rank + 1, np.int32))
    for name in ("two_shot", "two_shot/simple", "two_shot/low_latency"):
        try:
            comm.Allreduce(x, algorithm=name)
        except nvcoll.ArgumentError as error:
            print(error)
    for nbytes in (8, 1 << 20, 256 << 20):
        assert comm.explain("allreduce", nbytes, "int32").algorithm != "two_shot"
    comm.Allreduce(x)  # nobody was harmed
    assert (x.copy_to() == 3).all()
    """
    ranks = run_ranks(program, 2, timeout=100, env=ENV | {"NVCOLL_RANKS_PER_NODE": "1"})
    reason = "cannot serve this call: needs ranks that can load from each other's memory"
    names = ("two_shot", "two_shot/simple", "two_shot/low_latency")
    assert ranks.stdout == ["".join(f"Allreduce: {name} {reason}\n" for name in names)] * 2


LATE = """
from nvcoll.backends import driver
x = comm.array(np.ones(1000, np.float32))
for name in ("nvrar/simple", "ring/low_latency"):
    comm.Allreduce(x, algorithm=name)
x.copy_to()
tell(rank=comm.rank)
gate()
def again():
    comm.Allreduce(x, algorithm="nvrar/simple")
    with comm._world.device:
        driver.synchronize()
    comm.Allreduce(x, algorithm="nvrar/simple")
tell(**attempt(again))
tell(**attempt(comm.Allreduce, x))
"""


def test_a_rank_of_another_node_that_does_not_come():
    with Crew(LATE, 2, **ENV, NVCOLL_TIMEOUT="5", NVCOLL_RANKS_PER_NODE="1") as crew:
        crew.all_told()
        crew.let_go(0)
        told, then = crew.told(0), crew.told(0)
        assert told["kind"] == "TimeoutError", told
        assert 4 < told["seconds"] < 20
        assert then["kind"] == "StateError"
