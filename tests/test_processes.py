"""Real processes that do not agree on what they pass: any kind of memory on any rank, and thousands of mixed calls."""

import json

import pytest

from nvcoll.planning import read_rules
from tests.crew import PRELUDE

KINDS = """
# What a rank may pass: where its data lie, and where the result goes. Guards around both show stray writes.
GUARD = 16
KINDS = ("plain", "symmetric", "plain to plain", "symmetric to symmetric", "plain to symmetric", "symmetric to plain",
         "in place", "unaligned")

def room(where, nbytes, rng):
    # Bytes somewhere in symmetric or plain memory, with guards before and after them.
    start = int(rng.integers(1, 40)) * (1 if where == "unaligned" else 16)
    memory = symmetric[int(rng.integers(2))] if where == "symmetric" else plain
    part = memory[start : start + nbytes + 2 * GUARD]
    part[:GUARD] = part[GUARD + nbytes :] = 0xA5
    return part

def call(kind, data, rng, **options):
    # Reduce `data` in memory of that kind; return the result, and whether all else was left alone.
    source, _, target = kind.partition(" to ")
    here = room(source, data.nbytes, rng)
    send = here[GUARD : GUARD + data.nbytes].view(data.dtype)
    send[:] = data
    if kind == "in place":
        comm.Allreduce(nvcoll.IN_PLACE, send, **options)
    elif not target:
        comm.Allreduce(send, **options)
    else:
        there = np.full(data.nbytes + 2 * GUARD, 0xA5, np.uint8)
        if target == "symmetric":
            there = symmetric[2][: there.size]
            there[:] = 0xA5
        recv = there[GUARD : GUARD + data.nbytes].view(data.dtype)
        comm.Allreduce(send, recv, **options)
        clean = send.tobytes() == data.tobytes() and guarded(here) and guarded(there)
        return recv, clean
    return send, guarded(here)

def guarded(part):
    return bool((part[:GUARD] == 0xA5).all() and (part[-GUARD:] == 0xA5).all())

LARGEST = 3_300_000
symmetric = [comm.empty(LARGEST, "uint8") for _ in range(3)]
plain = np.empty(LARGEST, np.uint8)
"""


def told(ranks):
    return [[json.loads(line) for line in text.splitlines()] for text in ranks.stdout]


@pytest.fixture(params=["nvcoll", pytest.param("mpiexec", marks=pytest.mark.mpi)])
def launcher(request):
    return request.param


def thresholds():
    """Sizes in bytes at which another algorithm takes over."""
    return sorted({rule["upto"] for rule in read_rules(None)["host"] if "upto" in rule})


@pytest.mark.parametrize("n", [2, 3])
def test_any_kind_of_memory_on_any_rank(run_ranks, n):
    """All sizes at which something changes, and every kind of memory beside every other."""
    program = f"""
counts = sorted({{1, 2, 3, 100_000, 300_000}} | {{t // 8 + k for t in {thresholds()} for k in (-1, 0, 1)}})
rng = np.random.default_rng(comm.rank)
wrong = []
for count in counts:
    for turn in range(len(KINDS)):
        every = [np.arange(count, dtype=np.int64) * (rank + 3) + turn for rank in range(comm.size)]
        kind = KINDS[(turn * (comm.rank + 1) + comm.rank) % len(KINDS)]
        result, clean = call(kind, every[comm.rank], rng)
        if not (clean and np.array_equal(result, sum(every))):
            wrong.append([count, kind, clean])
tell(wrong=wrong, calls=len(counts) * len(KINDS))
"""
    found = told(run_ranks(PRELUDE + KINDS + program, n, env={"NVCOLL_SCRATCH": "1M"}))
    assert [rank[0]["wrong"] for rank in found] == [[]] * n
    assert found[0][0]["calls"] > 80


SOAK = """
from functools import reduce
from nvcoll.ops import DATATYPES, OPS

UFUNCS = {"SUM": np.add, "AVG": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum,
          "LAND": np.logical_and, "LOR": np.logical_or, "LXOR": np.logical_xor,
          "BAND": np.bitwise_and, "BOR": np.bitwise_or, "BXOR": np.bitwise_xor}
MOST = 200_000

def pool(rank, datatype):
    # Small whole numbers: sums and products of them are exact in what every type accumulates in, whatever the order.
    rng = np.random.default_rng([7, rank])
    numbers = rng.integers(-4, 5, 2 * MOST)
    if datatype.kind == "complex":
        numbers = numbers + 1j * rng.integers(-4, 5, 2 * MOST)
    return (numbers > 0 if datatype.kind == "bool" else numbers).astype(datatype.dtype)

def expected(arrays, op, datatype):
    wide = DATATYPES[datatype.accumulate].dtype
    total = reduce(UFUNCS[op], [one.astype(wide) for one in arrays])
    if op != "AVG":
        return total.astype(datatype.dtype)
    if datatype.kind in ("int", "uint"):
        return (np.sign(total) * (np.abs(total) // len(arrays))).astype(datatype.dtype)  # towards zero
    return (total / len(arrays)).astype(datatype.dtype)

pools = {name: [pool(rank, one) for rank in range(comm.size)] for name, one in DATATYPES.items()}
pairs = [(name, op) for name in DATATYPES for op in OPS if OPS[op].supports(DATATYPES[name]) is None]
ways = [None] * 4 + comm.algorithms()
shared, own = np.random.default_rng(1), np.random.default_rng(comm.rank)  # of all ranks, and of this one
wrong, began = [], time.monotonic()
for number in range(int(sys.argv[1])):
    name, op = pairs[shared.integers(len(pairs))]
    count = int(np.exp(shared.uniform(0, np.log(MOST))))
    first, way = int(shared.integers(MOST)), ways[shared.integers(len(ways))]
    if own.random() < 0.01:
        time.sleep(own.uniform(0, 0.005))
    if number % 500 == 499:
        with comm.full(count, 1, name):
            comm.Barrier()
    arrays = [one[first : first + count] for one in pools[name]]
    kind = KINDS[own.integers(len(KINDS))]
    result, clean = call(kind, arrays[comm.rank], own, op=OPS[op], algorithm=way)
    if not (clean and np.array_equal(result, expected(arrays, op, DATATYPES[name]))):
        wrong.append([number, name, op, count, way, kind, clean])
tell(wrong=wrong[:5], seconds=time.monotonic() - began)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_soak(run_ranks, launcher):
    """Ten thousand calls of all types, operators, algorithms, sizes and kinds of memory, each result checked."""
    calls = 10_000 if launcher == "nvcoll" else 2_000
    env = {"NVCOLL_SCRATCH": "1M", "OMP_NUM_THREADS": "1"}
    found = told(run_ranks(PRELUDE + KINDS + SOAK, 4, calls, launcher=launcher, timeout=280, env=env))
    assert [rank[0]["wrong"] for rank in found] == [[]] * 4
