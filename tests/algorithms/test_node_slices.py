"""The two ends of a reduction between hosts, on emulated ranks of one host among others; and the whole, under MPI."""

import threading

import numpy as np
import pytest

from nvcoll import _topology, settings
from nvcoll.backends.emulated import EmulatedMemory, Hub, LocalExchange, reserve
from nvcoll.jit import Compiler
from nvcoll.ops import DATATYPES, OPS
from nvcoll.planning import Explanation
from nvcoll.world import Common, _build
from tests.oracle import assert_reduced, random_data

PAIRS = [
    ("float32", "SUM"),
    ("bfloat16", "AVG"),
    ("int32", "MAX"),
    ("float16", "SUM"),
    ("bool", "LXOR"),
    ("int8", "AVG"),
    ("float8_e4m3fn", "AVG"),
]
COUNTS = [1, 2, 5, 64, 1001, 4099]


def on_one_host(size, slices, main):
    """Run ``main(world)`` on the ranks of a host; the smallest host, elsewhere, has `slices` of them."""
    given = settings.read()
    hub, segment, compiler = Hub(size, 60), reserve(size, 1 << 24), Compiler(given.cache_dir)
    outcomes = [None] * size

    def rank_main(rank):
        exchange = LocalExchange(hub, rank)
        whole = _topology.detect(rank, [b"here"] * size + [b"there"] * slices)
        memory = EmulatedMemory(exchange, segment)
        try:
            world = _build(exchange, whole, memory, Common(given, {}, True, "shm", compiler))
            outcomes[rank] = main(world)
        except BaseException as exc:
            outcomes[rank] = exc
            exchange.abandon()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segment.close()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def plan(world, name, count, datatype, op, total):
    told = Explanation("allreduce", count * datatype.itemsize, datatype.name, op.name, name, "simple", "", "", ())
    return world.planner.plan(told, datatype, op, total)


@pytest.mark.parametrize(("size", "slices"), [(1, 1), (2, 1), (2, 2), (5, 3), (5, 5), (8, 2)])
def test_scatter_and_gather_make_a_reduction(size, slices):
    cases = [(PAIRS[(k + turn) % len(PAIRS)], count) for turn, count in enumerate(COUNTS) for k in range(3)]

    def main(world):
        results = []
        for number, ((name, opname), count) in enumerate(cases):
            datatype, op = DATATYPES[name], OPS[opname]
            send = random_data(np.random.default_rng([number, world.rank]), name, opname, count)
            before = send.tobytes()
            each = -(-count // slices)
            mine = max(0, min(each, count - world.rank * each)) if world.rank < slices else 0
            part = np.full(mine * np.dtype(datatype.accumulate).itemsize + 64, 0xA5, np.uint8)
            result = np.empty_like(send)
            # Twice the ranks for AVG, as if another host had put in zeros.
            assert plan(world, "node_scatter", count, datatype, op, 2 * size).run(send.ctypes.data, part.ctypes.data)
            assert plan(world, "node_gather", count, datatype, op, 2 * size).run(part.ctypes.data, result.ctypes.data)
            assert send.tobytes() == before
            assert (part[-64:] == 0xA5).all()
            results.append(result)
        return results

    outcomes = on_one_host(size, slices, main)
    for number, ((name, opname), count) in enumerate(cases):
        given = [random_data(np.random.default_rng([number, rank]), name, opname, count) for rank in range(size)]
        found = [results[number] for results in outcomes]
        assert len({result.tobytes() for result in found}) == 1
        if size == 1 and opname != "AVG":
            assert found[0].tobytes() == given[0].tobytes()
            continue
        elsewhere = [np.zeros_like(given[0])] * size if opname == "AVG" else []
        assert_reduced(found[0], given + elsewhere, opname, name)


BETWEEN_HOSTS = """
import numpy as np
import nvcoll
from nvcoll import COMM_WORLD as comm
assert comm.explain("allreduce", 4).algorithm == "mpi"
"""


@pytest.mark.mpi
def test_pieces_fit_scratch_memory(run_ranks):
    program = """
neighbour = comm.full(1 << 16, 7)  # what lies behind the scratch memory
for count in (1000, 1 << 17, 300_001):
    data = [np.random.default_rng([rank, count]).integers(-99, 99, count).astype("f4") for rank in range(comm.size)]
    mine = data[comm.rank].copy()
    comm.Allreduce(mine)
    print(count, bool((mine == sum(data)).all()), bool((neighbour == 7).all()))
"""
    env = {"NVCOLL_RANKS_PER_NODE": "2", "NVCOLL_SCRATCH": "256K"}
    ranks = run_ranks(BETWEEN_HOSTS + program, 4, launcher="mpiexec", env=env)
    for text in ranks.stdout:
        assert text.split() == ["1000", "True", "True", "131072", "True", "True", "300001", "True", "True"], ranks
