"""Processes with a GPU each: right results from every algorithm, lost and late ranks, and several lives."""

from pathlib import Path

import pytest

from tests.crew import Crew

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("compiled", "two_gpus")]
ROOT = str(Path(__file__).parents[2])
ENV = {"NVCOLL_BACKEND": "nvshmem", "NVCOLL_HEAP": "512M"}

EVERYTHING = """
import numpy as np, nvcoll
from nvcoll import COMM_WORLD as comm
from nvcoll.ops import DATATYPES, OPS
from tests.gpu.kernels import PAIRS
from tests.oracle import assert_reduced, random_data

assert comm.target == "cuda" and comm.backend == "nvshmem", comm
calls = 0
for name in comm.algorithms():
    for datatype, op in PAIRS[:4]:
        for count in (1, 5, 1021, 65537, 1_000_003):
            seeds = [[calls, rank] for rank in range(comm.size)]
            given = [random_data(np.random.default_rng(seed), datatype, op, count) for seed in seeds]
            x = comm.array(given[comm.rank], datatype)
            y = comm.empty(count, datatype)
            comm.Allreduce(x, y, op=OPS[op], algorithm=name)
            comm.Allreduce(x, op=OPS[op], algorithm=name)
            for result in (x.copy_to(), y.copy_to()):
                assert_reduced(result, given, op, datatype)
            comm.Barrier()
            x.free(), y.free()
            calls += 1
print("right", calls)
"""


def test_every_algorithm(run_ranks):
    ranks = run_ranks(EVERYTHING, 2, timeout=115, env=ENV | {"PYTHONPATH": ROOT})
    assert len({text.split()[-1] for text in ranks.stdout}) == 1
    assert all(text.startswith("right") for text in ranks.stdout)


def test_several_lives(run_ranks):
    program = """
    import numpy as np, nvcoll
    for life in range(3):
        nvcoll.Init()
        comm = nvcoll.COMM_WORLD
        x = comm.array(np.full(1000, comm.rank + life, np.float32))
        comm.Allreduce(x)
        print(float(x.copy_to()[-1]))
        nvcoll.Finalize()
        assert x.freed and not nvcoll.Is_initialized()
    """
    ranks = run_ranks(program, 2, timeout=100, env=ENV)
    assert [text.split() for text in ranks.stdout] == [["1.0", "3.0", "5.0"]] * 2


AFTER_A_CALL = """
from nvcoll.backends import driver
x = comm.array(np.ones(1000, np.float32))
comm.Allreduce(x)
x.copy_to()
tell(rank=comm.rank)
gate()
def again():
    comm.Allreduce(x)
    with comm._world.device:
        driver.synchronize()
    comm.Allreduce(x)
tell(**attempt(again))
tell(**attempt(comm.Allreduce, x))
"""


def test_a_rank_that_does_not_come():
    with Crew(AFTER_A_CALL, 2, **ENV, NVCOLL_TIMEOUT="2") as crew:
        crew.all_told()
        crew.let_go(0)
        told, then = crew.told(0), crew.told(0)
        assert told["kind"] == "TimeoutError", told
        assert "did not arrive: rank 1" in told["text"]
        assert 1.5 < told["seconds"] < 8
        assert then["kind"] == "StateError"


def test_a_rank_that_is_killed():
    with Crew(AFTER_A_CALL, 2, **ENV, NVCOLL_TIMEOUT="2") as crew:
        crew.all_told()
        crew.send(1, 9)
        crew.ranks[1].wait(10)
        crew.let_go(0)
        told = crew.told(0)
        # Its memory may be gone, and what the GPU then meets ends the context of this rank: an error in any case.
        assert told["kind"] in {"TimeoutError", "DeviceError", "StateError"}, told
        assert told["seconds"] < 15
