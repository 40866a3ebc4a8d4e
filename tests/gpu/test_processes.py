"""Processes with a GPU each: right results from every algorithm, lost and late ranks, and several lives."""

import signal
import time
from pathlib import Path

import pytest

from tests.crew import Crew
from tests.gpu.devices import GPUS
from tests.gpu.kernels import DEEP_PAIRS

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("compiled")]
ROOT = str(Path(__file__).parents[2])
ENV = {"NVCOLL_BACKEND": "nvshmem", "NVCOLL_HEAP": "512M"}
SOON = "5"
"""NVCOLL_TIMEOUT where a rank is lost: it bounds each step of Init, too."""

EVERYTHING = """
import hashlib, sys
import numpy as np, nvcoll
from nvcoll import COMM_WORLD as comm
from nvcoll.ops import DATATYPES, OPS
from tests.gpu.kernels import PAIRS
from tests.oracle import assert_reduced, random_data

assert comm.target == "cuda" and comm.backend == "nvshmem", comm
assert len(comm._world.topology.nodes) == 1 and not comm._world.planner.remote
pairs, counts = int(sys.argv[1]), [int(one) for one in sys.argv[2:]]
calls, digest = 0, hashlib.sha256()
for name in comm.algorithms():
    for datatype, op in PAIRS[:pairs]:
        for count in counts:
            seeds = [[calls, rank] for rank in range(comm.size)]
            given = [random_data(np.random.default_rng(seed), datatype, op, count) for seed in seeds]
            x = comm.array(given[comm.rank], datatype)
            y = comm.empty(count, datatype)
            comm.Allreduce(x, y, op=OPS[op], algorithm=name)
            comm.Allreduce(x, op=OPS[op], algorithm=name)
            for result in (x.copy_to(), y.copy_to()):
                digest.update(result.tobytes())
                assert_reduced(result, given, op, datatype)
            comm.Barrier()
            x.free(), y.free()
            calls += 1
print("right", calls, digest.hexdigest())
"""

# Where ranks share a GPU, their kernels take turns: a call takes milliseconds.
SHARING = [
    pytest.param(2, len(DEEP_PAIRS), (1, 5, 1021, 65537, 1_000_003), id="2"),
    pytest.param(4, 2, (5, 1021, 65537), id="4"),
    pytest.param(8, 2, (7, 20_011), id="8"),
]
SHARING += [pytest.param(ranks, 2, (7, 20_011), id=str(ranks)) for ranks in (GPUS, 2 * GPUS) if ranks > 8]


@pytest.mark.parametrize(("ranks", "pairs", "counts"), SHARING)
def test_every_algorithm(run_ranks, ranks, pairs, counts):
    env = ENV | {"PYTHONPATH": ROOT, "NVCOLL_TIMEOUT": "60"}
    told = run_ranks(EVERYTHING, ranks, pairs, *counts, timeout=115, env=env)
    assert all(text.startswith("right") for text in told.stdout), told
    assert len(set(told.stdout)) == 1, f"ranks have different results; {told}"


def test_gpus_with_different_numbers_of_ranks_are_refused(run_ranks, two_gpus):
    env = ENV | {"CUDA_VISIBLE_DEVICES": "0,1"}
    ranks = run_ranks("from nvcoll import COMM_WORLD; COMM_WORLD.Barrier()", 3, timeout=60, env=env, check=False)
    assert "same number of ranks on every GPU of a host, got 2, 1; start as many on each" in ranks.stderr


@pytest.mark.parametrize("each", [None, "1"], ids=["near", "far"])
def test_several_lives(run_ranks, each):
    program = """
    import numpy as np, nvcoll
    from nvcoll.backends import driver
    kept, free = [], []
    for life in range(3):
        nvcoll.Init()
        comm = nvcoll.COMM_WORLD
        with comm._world.device:
            free.append(driver.memory_info()[0])
        x = comm.array(np.full(1000, comm.rank + life, np.float32))
        kept.append(x)  # a heap goes all the same
        comm.Allreduce(x)
        print(float(x.copy_to()[-1]))
        nvcoll.Finalize()
        assert x.freed and not nvcoll.Is_initialized()
    assert min(free) > free[0] - (128 << 20), free
    """
    env = ENV | ({"NVCOLL_RANKS_PER_NODE": each} if each else {})
    ranks = run_ranks(program, 2, timeout=100, env=env)
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
    with Crew(AFTER_A_CALL, 2, **ENV, NVCOLL_TIMEOUT=SOON) as crew:
        crew.all_told()
        crew.let_go(0)
        told, then = crew.told(0), crew.told(0)
        assert told["kind"] == "TimeoutError", told
        assert "did not arrive: rank 1" in told["text"]
        assert 4 < told["seconds"] < 20
        assert then["kind"] == "StateError"


def test_a_rank_that_is_killed():
    with Crew(AFTER_A_CALL, 2, **ENV, NVCOLL_TIMEOUT=SOON) as crew:
        crew.all_told()
        crew.send(1, 9)
        crew.ranks[1].wait(10)
        crew.let_go(0)
        told = crew.told(0)
        # Its memory may be gone, and what the GPU then meets ends the context of this rank: an error in any case.
        assert told["kind"] in {"TimeoutError", "DeviceError", "StateError"}, told
        assert told["seconds"] < 20


INTERRUPTED = """
x = comm.array(np.ones(1000, np.float32))
comm.Allreduce(x)
x.copy_to()
comm.Barrier()  # whose kernel could not be loaded while another one waits
tell(rank=comm.rank)
gate()
comm.Allreduce(x)
tell(**attempt(x.copy_to))
tell(**attempt(comm.Barrier))
tell(**attempt(comm.Barrier))
"""


def test_ctrl_c_ends_waits_and_the_process():
    with Crew(INTERRUPTED, 2, **ENV, NVCOLL_TIMEOUT="60") as crew:
        crew.all_told()
        crew.let_go(0)  # rank 1 does not come
        for _ in range(2):
            time.sleep(2)
            crew.send(0, signal.SIGINT)
            told = crew.told(0)
            assert told["kind"] == "KeyboardInterrupt"
            assert told["seconds"] < 20
        assert crew.told(0)["kind"] == "StateError"
        assert crew.ranks[0].wait(20) == 0


@pytest.mark.parametrize(
    "algorithm", ["one_shot/simple", "ring/simple", "two_shot/simple", "one_shot/low_latency", "ring/low_latency"]
)
def test_counts_that_do_not_match(algorithm):
    program = f"""
x = comm.array(np.ones(1000, np.float32))
comm.Allreduce(x, algorithm={algorithm!r})
x.copy_to()
tell(rank=comm.rank)
gate()
def again():
    comm.Allreduce(x[:999] if comm.rank == 1 else x, algorithm={algorithm!r})
    comm.Barrier()
tell(**attempt(again))
tell(**attempt(comm.Allreduce, x))
"""
    with Crew(program, 2, **ENV, NVCOLL_TIMEOUT=SOON) as crew:
        crew.all_told()
        crew.let_go()
        for rank, told in crew.all_told().items():
            assert told["kind"] == "MismatchError", told
            late = algorithm.endswith("/low_latency")
            what = "the ranks have not called the same" if late else f"rank {1 - rank} calls something else"
            assert what in told["text"]
            assert told["seconds"] < 20
        assert {told["kind"] for told in crew.all_told().values()} == {"StateError"}


FRESH = """
import numpy as np
from nvcoll import COMM_WORLD as comm
from nvcoll.backends import driver
x = comm.array(np.full(100_000, comm.rank + 1, np.float32))
comm.Allreduce(x)
assert (x.copy_to() == 3).all()
comm.Barrier()
with comm._world.device:
    print(driver.memory_info()[0])
"""


def test_the_gpus_are_free_again_after_a_rank_was_killed(run_ranks):
    before = [int(text) for text in run_ranks(FRESH, 2, timeout=60, env=ENV).stdout]
    with Crew(AFTER_A_CALL, 2, **ENV, NVCOLL_TIMEOUT=SOON) as crew:
        crew.all_told()
        crew.let_go(0)  # its kernel waits for rank 1
        crew.send(1, 9)
        crew.ranks[1].wait(10)
        assert crew.told(0)["kind"] in {"TimeoutError", "DeviceError", "StateError"}
    after = [int(text) for text in run_ranks(FRESH, 2, timeout=60, env=ENV).stdout]
    for free, again in zip(before, after, strict=True):
        assert again >= free - (64 << 20)
