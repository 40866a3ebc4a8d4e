"""Emulated ranks that share a GPU: the right bits from every algorithm, and errors where ranks do not agree."""

import gc
import itertools
import sys
import threading
import time

import numpy as np
import pytest

import nvcoll
from nvcoll.backends import driver
from nvcoll.planning import candidates
from tests.algorithms.calls import PLACES, Call
from tests.gpu.calls import judge
from tests.gpu.kernels import EVERY, LARGE_PAIRS, PAIRS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]

WORLDS = [
    (2, None), (3, None), (5, None), (8, None), (16, None), (33, None), (64, None), (4, 2), (5, [1, 4]), (7, [2, 2, 3]),
    (8, [1, 3, 4]), (16, 4), (30, [1, 2, 3] * 5), (32, 2),
]  # fmt: skip
COUNTS = [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 257, 509, 1021, 4093, 16384, 65537]
ROWS = [*((place,) for place in PLACES), PLACES[:4], PLACES[::-1]]


def cases():
    """Calls for each world, taken from wheels of lengths without a common factor, as in tests/algorithms."""
    wheels = {
        name: zip(itertools.cycle(PAIRS), itertools.cycle(COUNTS), itertools.cycle(ROWS[:-1] + ROWS[-1:] * 2))
        for name in candidates()
    }
    for start, wheel in enumerate(wheels.values()):
        for _ in range(5 * start):
            next(wheel)
    for size, nodes in WORLDS:
        turns = 8 if size <= 8 else 3
        calls = [(name, *next(wheels[name])) for _ in range(turns) for name in wheels]
        yield size, nodes, [Call(name, *pair, count, row) for name, pair, count, row in calls]


@pytest.mark.parametrize(
    ("size", "nodes", "calls"), [pytest.param(*case, id=f"{case[0]}-nodes-{case[1]}") for case in cases()]
)
def test_calls_in_a_world(gpu, size, nodes, calls):
    judge(gpu, calls, size, nodes)


@pytest.mark.parametrize(("size", "nodes"), [(8, 2), (6, [1, 2, 3])], ids=str)
@pytest.mark.parametrize("name", [*(name for name in EVERY if name.startswith("nvrar/")), "others"])
def test_every_type_and_operator(gpu, compiled_every, size, nodes, name):
    names = [name] if name in EVERY else [one for one in EVERY if not one.startswith("nvrar/")]
    counts, rows = itertools.cycle(COUNTS[:-2]), itertools.cycle(ROWS)
    judge(gpu, [Call(one, *pair, next(counts), next(rows)) for one in names for pair in EVERY[one]], size, nodes)


@pytest.mark.parametrize(("size", "count"), [(2, 3_000_017), (8, 400_009), (64, 60_013)])
def test_messages_of_several_pieces(gpu, size, count):
    places = [(PLACES[0],), (PLACES[3],), (PLACES[6],)]
    calls = [
        Call(name, *pair, count, next(row))
        for row in [itertools.cycle(places)]
        for name in candidates()
        for pair in LARGE_PAIRS
    ]
    judge(gpu, calls, size)


def test_messages_so_large_that_threads_have_several_packs_under_way(gpu):
    judge(gpu, [Call(name, "float32", "SUM", 5_000_011, (PLACES[3],)) for name in candidates()], 2)


def test_what_rules_choose(gpu):
    calls = [Call(None, "float32", "SUM", count, (PLACES[3],)) for count in (1, 1000, 100_003, 1_000_003)]
    for size, nodes in [(1, None), (2, None), (4, None), (4, 2)]:
        judge(gpu, calls, size, nodes)


def test_arrays_of_the_communicator_and_barriers():
    def main(comm):
        with comm.empty((3, 5), np.int32) as x, comm.empty((3, 5), np.int32) as y:
            x.copy_from(np.full((3, 5), comm.rank + 1, np.int32))
            comm.Barrier()
            for _ in range(3):  # the second time, plans are found by the fast route
                comm.Allreduce(x, y)
                comm.Allreduce(nvcoll.IN_PLACE, y, op=nvcoll.MAX)
            return comm.target, comm.backend, comm.stream != 0, y.copy_to().tolist()

    for told in nvcoll.emulate(4, device=0).run(main):
        assert told == ("cuda", "emulated", True, [[10] * 5] * 3)


def test_requests():
    def main(comm):
        x, y = comm.array(np.full(1000, comm.rank, np.int32)), comm.array(np.ones(1000, np.int32))
        nvcoll.Request.Waitall([comm.Iallreduce(x), comm.Iallreduce(y)])
        again = comm.Allreduce_init(y)
        for _ in range(3):
            again.Start()
            again.Wait()
        return x.copy_to().max().item(), y.copy_to().min().item()

    assert nvcoll.emulate(3, device=0).run(main) == [(3, 81)] * 3


def end_of(call, *args, **options):
    """How a call ended: the name of what it raised or None, and the message."""
    try:
        call(*args, **options)
    except nvcoll.Error as error:
        return type(error).__name__, str(error)
    return None, ""


def two_ends(comm, x, **options):
    """What two calls after a failure raise; the GPU is waited for, as the first one is raised when it is known."""
    with comm._world.device:
        driver.stream_synchronize(comm.stream)
    return end_of(comm.Allreduce, x, **options), end_of(comm.Allreduce, x, **options)


@pytest.mark.parametrize("algorithm", [None, "ring/simple", "two_shot/low_latency"])
def test_a_rank_that_does_not_come(monkeypatch, algorithm):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "1.5")
    done = threading.Barrier(3)

    def main(comm):
        x = comm.array(np.ones(100, np.int32))
        comm.Allreduce(x, algorithm=algorithm)
        x.copy_to()
        told = None
        if comm.rank != 1:
            start = time.monotonic()
            comm.Allreduce(x, algorithm=algorithm)
            told = *two_ends(comm, x, algorithm=algorithm), time.monotonic() - start
        done.wait(15)
        return told

    first, none, third = nvcoll.emulate(3, device=0).run(main)
    assert none is None
    for (kind, text), (after, _), seconds in (first, third):
        assert kind == "TimeoutError"
        assert "did not arrive: rank 1. " in text
        assert after == "StateError"
        assert 1 < seconds < 6


@pytest.mark.parametrize("verb", ["copy_to", "run"])
def test_who_makes_no_other_call_hears_of_a_failure(monkeypatch, verb):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "1.5")

    def main(comm):
        x = comm.array(np.ones(100, np.int32))
        comm.Allreduce(x)
        x.copy_to()
        if comm.rank == 0:
            comm.Allreduce(x)
            if verb == "copy_to":
                x.copy_to()

    with pytest.raises(nvcoll.TimeoutError, match=rf"^{verb}: a call up to number .* did not arrive: rank 1\. "):
        nvcoll.emulate(2, device=0).run(main)


def test_ctrl_c_ends_kernels_that_wait(run_command):
    program = """
import os, signal, threading, time
import numpy as np, nvcoll

def main(comm):
    x = comm.array(np.ones(1000, np.float32))
    comm.Allreduce(x)
    comm.Barrier()
    if comm.rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return time.sleep(2)
    comm.Allreduce(x)
    x.copy_to()

try:
    nvcoll.emulate(3, device=0).run(main)
except KeyboardInterrupt:
    print("interrupted", nvcoll.emulate(2, device=0).run(lambda comm: comm.rank))
"""
    status, output = run_command([sys.executable, "-c", program], timeout=60, env={"NVCOLL_TIMEOUT": "300"})
    assert (status, output) == (0, "interrupted [0, 1]\n")


@pytest.mark.parametrize("algorithm", ["one_shot/low_latency", "one_shot/simple", "ring/low_latency"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_calls_that_a_rank_has_queued_when_it_fails_send_nothing(monkeypatch, algorithm, dtype):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "1.5")
    failed = threading.Event()

    def main(comm):
        small, large = comm.array(np.ones(1, dtype)), comm.array(np.ones(100_000, dtype))
        for x in (small, large):
            comm.Allreduce(x, algorithm=algorithm)
        comm.Barrier()
        if comm.rank == 1:
            failed.wait(15)
        for x in (small, large):  # the first is one block, whose failure is that of all blocks of the second
            comm.Allreduce(x, algorithm=algorithm)
        with comm._world.device:
            driver.stream_synchronize(comm.stream)
        failed.set()
        told = end_of(comm.Allreduce, small, algorithm=algorithm)
        return small.copy_to()[0], set(large.copy_to().tolist()), told

    (_, others, told), (sent, late, told_late) = nvcoll.emulate(2, device=0).run(main)
    assert sent == 4  # what was sent before the deadline is good
    assert late == others == {2}, "a result was made of what a failed rank has sent"
    assert told[0] == told_late[0] == "TimeoutError"


def test_counts_that_do_not_match(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "1.5")

    def main(comm):
        x = comm.array(np.ones(128, np.int32))
        comm.Allreduce(x, algorithm="one_shot/simple")
        comm.Allreduce(x[: 64 if comm.rank == 1 else 128], algorithm="one_shot/simple")
        (kind, text), _ = two_ends(comm, x)
        return kind, text

    told = nvcoll.emulate(3, device=0).run(main)
    assert [kind for kind, _ in told] == ["MismatchError"] * 3
    assert all("rank 1 calls something else" in text for _, text in (told[0], told[2]))


@pytest.mark.parametrize("algorithm", [name for name in candidates() if name.endswith("/low_latency")])
@pytest.mark.parametrize("more", [0, 3])
def test_counts_of_as_many_packs_that_do_not_match(algorithm, more):
    """Floats carry no tag, so the call itself ends, and so may others; a barrier raises it on all ranks."""

    def main(comm):
        x = comm.array(np.ones(1000, np.float32))
        comm.Allreduce(x, algorithm=algorithm)
        comm.Barrier()
        comm.Allreduce(x[: 999 if comm.rank == 1 else 1000], algorithm=algorithm)
        for _ in range(more):
            comm.Allreduce(x, algorithm=algorithm)
        return [*end_of(comm.Barrier), end_of(comm.Allreduce, x)[0]]

    for kind, text, then in nvcoll.emulate(3, device=0).run(main):
        assert (kind, then) == ("MismatchError", "StateError"), text
        assert text.startswith(f"Barrier: in a call up to number {4 + more} of rank ")


def test_worlds_one_after_the_other_give_their_memory_back(gpu):
    def main(comm):
        x = comm.array(np.ones(10, np.float32))
        comm.Allreduce(x)
        return float(x.copy_to()[0])

    free = []
    for _ in range(4):
        assert nvcoll.emulate(2, device=0).run(main) == [2.0, 2.0]
        gc.collect()
        with gpu:
            free.append(driver.memory_info()[0])
    assert free[-1] >= free[0] - (64 << 20)


def test_memory_is_free_again_after_a_run():
    def main(comm):
        comm.Barrier()
        with comm._world.device:
            return driver.memory_info()[0]

    during = min(nvcoll.emulate(2, device=0).run(main))
    with driver.Device(0):
        assert driver.memory_info()[0] > during + (400 << 20)  # the heaps were 256 MiB each


def test_after_its_run_a_communicator_is_of_no_use(run_command):
    program = """
import numpy as np, nvcoll
kept = nvcoll.emulate(2, device=0).run(lambda comm: (comm, comm.array(np.ones(4, np.float32))))
try:
    kept[0][0].Allreduce(kept[0][1])
except nvcoll.StateError as error:
    print(error)
"""
    status, output = run_command([sys.executable, "-c", program])
    told = "this communicator was freed or finalized; make a new one, or call Init, and make persistent requests anew"
    assert (status, output) == (0, f"{told}\n")


def test_a_kernel_that_needs_a_whole_multiprocessor_runs_beside_ranks_that_wait():
    """As torch's products of matrices do: in registers, there is no room for them beside any block."""
    torch = pytest.importorskip("torch")

    def main(comm):
        x = comm.array(np.full(50_000, comm.rank + 1, np.float32))
        stream = torch.cuda.ExternalStream(comm.stream)
        with torch.cuda.stream(stream):
            matrix = torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda")
            product = matrix @ matrix  # loads the kernel
            comm.Allreduce(x)
            comm.Barrier()
            for turn in range(4):
                if comm.rank == turn % 2:
                    time.sleep(0.2)
                    torch.matmul(matrix, matrix, out=product)
                comm.Allreduce(x)
        return product[0, 0].item(), x.copy_to().max().item()

    assert nvcoll.emulate(2, device=0).run(main) == [(4096.0, 3.0 * 2**4)] * 2
