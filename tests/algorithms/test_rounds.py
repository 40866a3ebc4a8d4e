"""Messages larger than scratch memory go in rounds; a round's ends are where an element is lost or done twice."""

import re
from pathlib import Path

import numpy as np
import pytest

import nvcoll
from nvcoll.algorithms import ALGORITHMS
from nvcoll.ops import DATATYPES
from nvcoll.planning import candidates
from tests.algorithms.calls import PLACES, Call, judge

SIDES = (PLACES[0], PLACES[3], PLACES[1], PLACES[4])  # two-shot on plain and symmetric arrays together takes rounds
TYPES = [("float32", "SUM"), ("bfloat16", "AVG"), ("complex128", "PROD"), ("int8", "BXOR"), ("float16", "SUM")]


@pytest.fixture(autouse=True)
def little_scratch(monkeypatch):
    monkeypatch.setenv("NVCOLL_SCRATCH", "96K")


def elements_of_a_round(size, nodes, name, datatype):
    """How many elements of a datatype a candidate takes at a time."""
    base, protocol = name.split("/")

    def main(comm):
        planner = comm._world.planner
        return planner.capacity(base, protocol, planner.shape(1, DATATYPES[datatype]))

    return nvcoll.emulate(size, nodes).run(main)[0]


@pytest.mark.parametrize(("size", "nodes"), [(2, None), (3, [1, 2]), (5, None), (7, [2, 2, 3])])
def test_counts_around_whole_rounds(size, nodes):
    calls = []
    for turn, name in enumerate(candidates()):
        datatype, op = TYPES[turn % len(TYPES)]
        capacity = elements_of_a_round(size, nodes, name, datatype)
        assert 16 < capacity < 50_000
        counts = (capacity - 1, capacity, capacity + 1, 2 * capacity, 3 * capacity + 1)
        calls += [Call(name, datatype, op, count, SIDES[shift:] + SIDES[:shift]) for shift, count in enumerate(counts)]
    judge(calls, size, nodes)


def test_many_rounds_follow_each_other_without_a_pause():
    calls = [Call(name, "int32", "SUM", 100_003, SIDES) for name in candidates()]
    judge(calls, 3)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_slices_of_several_blocks(monkeypatch, size):
    monkeypatch.setenv("NVCOLL_SCRATCH", "8M")
    calls = []
    for turn, name in enumerate(candidates()):
        # 16 KiB of accumulators are worked on at a time; some ranks have whole blocks, others a part at the end.
        for datatype, op in (("float32", "SUM"), TYPES[1 + turn % 4]):
            width = DATATYPES[DATATYPES[datatype].accumulate].itemsize
            count = 5 * size * 16384 // width
            calls += [Call(name, datatype, op, count + extra, SIDES[:2]) for extra in (0, 1001)]
    judge(calls, size)


def test_ranks_that_are_late_between_rounds_lose_nothing():
    delays = [((0, 0.02),), ((1, 0.01), (2, 0.02)), ()]
    calls = [Call(n, "float32", "SUM", 30_011, SIDES[:3], delays[k % 3]) for k, n in enumerate(candidates())]
    judge(calls, 4)


@pytest.mark.parametrize("nbytes", [1, 4096, 16384])
def test_too_little_scratch_memory_is_an_error_that_names_the_variable(monkeypatch, nbytes):
    monkeypatch.setenv("NVCOLL_SCRATCH", str(nbytes))
    with pytest.raises(
        nvcoll.ArgumentError, match=f"^NVCOLL_SCRATCH: {nbytes} bytes are too few for 2 ranks on a node; "
    ):
        nvcoll.emulate(2).run(lambda comm: comm.rank)


def test_where_lines_are_too_few_the_low_latency_protocol_says_so_and_simple_serves():
    def main(comm):
        x = np.ones(4, np.float32)
        comm.Allreduce(x, algorithm="ring")  # by name alone: whatever serves
        with pytest.raises(
            nvcoll.ArgumentError, match=r"^Allreduce: ring/low_latency cannot serve this call: 98304 bytes "
        ):
            comm.Allreduce(x, algorithm="ring/low_latency")
        reasons = {one.name: one.reason for one in comm.explain("allreduce", 16).candidates}
        comm.Allreduce(x)
        return x.tolist(), reasons

    (x, reasons), *_ = nvcoll.emulate(29).run(main)
    assert x == [29.0**2] * 4
    assert reasons["ring/low_latency"] == "98304 bytes of scratch memory are too few for 29 ranks; raise NVCOLL_SCRATCH"
    assert reasons["ring/simple"] is None


def test_the_message_may_be_cut_only_where_the_algorithm_says_so():
    assert {name for name, algorithm in ALGORITHMS.items() if not algorithm.rounds} == {
        "two_shot",
        "node_scatter",
        "node_gather",
    }


def available():
    """Bytes of memory that nobody uses."""
    return int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) << 10


@pytest.mark.slow
def test_more_bytes_than_31_bits_count(monkeypatch):
    count = (1 << 31) + 12_345
    if (free := available()) < 6 << 30:
        pytest.skip(f"needs 6 GiB of memory, {free >> 20} MiB are available")
    monkeypatch.setenv("NVCOLL_HEAP", "6G")
    monkeypatch.setenv("NVCOLL_SCRATCH", "16M")
    # A period that divides no power of two, so that data that lands elsewhere is seen.
    periods = [np.random.default_rng(rank).integers(-128, 128, 1_000_003).astype(np.int8) for rank in range(2)]
    expected = periods[0] + periods[1]

    def main(comm):
        with comm.empty(count, np.int8) as buffer:
            tile(np.asarray(buffer), periods[comm.rank])
            comm.Allreduce(buffer, algorithm="two_shot")  # directly, each rank from the other's memory
            seen = [differs(buffer, expected)]
            tile(np.asarray(buffer), periods[comm.rank])
            comm.Allreduce(buffer, algorithm="ring")  # in rounds
            return [*seen, differs(buffer, expected)]

    assert nvcoll.emulate(2).run(main) == [[False, False], [False, False]]


def tile(array, period):
    """Fill an array with repetitions of a shorter one."""
    whole = len(array) // len(period) * len(period)
    array[:whole].reshape(-1, len(period))[...] = period
    array[whole:] = period[: len(array) - whole]


def differs(array, period):
    """Whether an array is anything but repetitions of a shorter one."""
    whole = len(array) // len(period) * len(period)
    rows = array[:whole].reshape(-1, len(period))
    return any((row != period).any() for row in rows) or (array[whole:] != period[: len(array) - whole]).any()
