"""NaN, infinities, zeros of both signs: whatever the result is, all ranks have the same bits of it."""

import itertools

import numpy as np
import pytest

import nvcoll
from nvcoll.ops import DATATYPES, OPS
from nvcoll.planning import candidates
from tests.algorithms.calls import Call
from tests.algorithms.orders import exact
from tests.oracle import supported

FLOATS = [(name, op) for name, op in supported() if DATATYPES[name].kind in {"float", "complex"}]
WORLDS = [(2, None), (3, None), (5, [2, 3]), (8, [1, 3, 4])]
COUNT = 301

# The sum of infinity and its negative, and widening of signalling NaNs, are what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def words(datatype, rank):
    """Random bit patterns, in half of the places NaNs of random payload, infinities, zeros and the smallest numbers.

    In a quarter of them, eight by eight, all bits are set.
    """
    dtype = DATATYPES[datatype].dtype
    part = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    unsigned, reals = np.dtype(f"u{part}"), DATATYPES[datatype].dtype if dtype.kind != "c" else np.dtype(f"f{part}")
    rng = np.random.default_rng([ord(datatype[0]), part, rank])
    bits = rng.integers(0, 1 << 8 * part, COUNT * dtype.itemsize // part, dtype=np.uint64).astype(unsigned)
    infinity = np.array(np.inf, reals).view(unsigned)
    sign = unsigned.type(1 << 8 * part - 1)
    chosen = [bits, bits, bits | infinity, infinity | 0 * bits, 0 * bits, 0 * bits + 1]
    bits = np.choose(rng.integers(0, len(chosen), len(bits)), chosen) ^ (bits & sign)
    bits[np.repeat(rng.integers(0, 4, len(bits) // 8 + 1) == 0, 8)[: len(bits)]] = unsigned.type(-1 % (1 << 8 * part))
    return bits.astype(unsigned).view(dtype)


def out_of_order(comm, each):
    """A communicator of the same ranks on nodes of `each`, in another order: that of each slice's owners is its own."""
    node, place = divmod(comm.rank, each)
    order = np.random.default_rng(place).permutation(comm.size // each)
    return comm.Split(0, place * comm.size + order[node])


def zeros(datatype, rank):
    """Zeros of both signs."""
    signs = np.random.default_rng(rank).integers(0, 2, COUNT)
    return np.where(signs, -0.0, 0.0).astype(DATATYPES[datatype].dtype)


def apart(ranks, calls):
    """The calls after which not all ranks have the same bits."""
    return [call for call, *results in zip(calls, *ranks, strict=True) if len(set(results)) > 1]


@pytest.mark.parametrize(("size", "each"), [(8, 2), (10, 2), (16, 2), (15, 3)])
def test_ranks_that_are_not_in_the_order_of_their_nodes(size, each):
    """Which operand is the left one must not go by ranks."""
    calls = [
        (name, op, algorithm) for name, op in (("float32", "MAX"), ("float64", "MIN")) for algorithm in candidates()
    ]

    def main(comm):
        part = out_of_order(comm, each)
        results = []
        for datatype, op, algorithm in calls:
            result = np.empty(COUNT, DATATYPES[datatype].dtype)
            part.Allreduce(zeros(datatype, part.rank), result, OPS[op], algorithm=algorithm)
            results.append(result.tobytes())
        return part.rank, results

    ranks, outcomes = zip(*nvcoll.emulate(size, each).run(main), strict=True)
    assert list(ranks) != sorted(ranks)
    assert not apart(outcomes, calls)


@pytest.mark.parametrize(("size", "nodes"), WORLDS)
def test_all_ranks_have_the_same_bits(size, nodes):
    calls = list(itertools.product(FLOATS, candidates()))

    def main(comm):
        results = []
        for (datatype, op), algorithm in calls:
            result = np.empty(COUNT, DATATYPES[datatype].dtype)
            comm.Allreduce(words(datatype, comm.rank), result, OPS[op], algorithm=algorithm)
            results.append(result.tobytes())
        return results

    outcomes = nvcoll.emulate(size, nodes).run(main)
    assert not apart(outcomes, calls)
    # Which of several NaNs, and which zero, is a matter of the order.
    for ((datatype, op), algorithm), result in zip(calls, outcomes[0], strict=True):
        if op in {"MIN", "MAX"} and datatype in {"float32", "float64"}:
            given = [words(datatype, rank) for rank in range(size)]
            expected = exact(Call(algorithm, datatype, op, COUNT), given, nvcoll.emulate(size, nodes).node_sizes)
            assert result == expected.tobytes(), (datatype, op, algorithm)


@pytest.mark.parametrize("algorithm", candidates())
@pytest.mark.parametrize("datatype", ["float16", "bfloat16", "float32", "float64"])
def test_a_nan_on_any_rank_is_one_in_the_result(datatype, algorithm):
    size = 5
    dtype = DATATYPES[datatype].dtype

    def main(comm):
        data = np.full(2 * size, comm.rank).astype(dtype)
        data[comm.rank] = np.nan
        infinite = np.full(4, [np.inf, -np.inf, np.inf, 1]).astype(dtype)
        if comm.rank == size - 1:
            infinite[2] = -np.inf
        found = {}
        for op in ("MIN", "MAX", "SUM", "PROD", "AVG"):
            result = np.empty_like(data)
            comm.Allreduce(data, result, OPS[op], algorithm=algorithm)
            found[op] = result.astype(np.float64).tolist()
        comm.Allreduce(infinite, algorithm=algorithm)
        return found, infinite.astype(np.float64).tolist()

    for found, infinite in nvcoll.emulate(size).run(main):
        numbers = {"MIN": 0, "MAX": 4, "SUM": 10, "PROD": 0, "AVG": 2}
        for op, number in numbers.items():
            assert np.isnan(found[op][:size]).all(), op
            assert found[op][size:] == [number] * size
        np.testing.assert_equal(infinite, [np.inf, -np.inf, np.nan, 5])


@pytest.mark.parametrize("algorithm", candidates())
@pytest.mark.parametrize(
    ("datatype", "columns", "totals", "averages"),
    [
        ("float16", [[2048, 60000], [1, 60000], [1, -60000]], [2050, 60000], [float(np.float16(2050 / 3)), 20000]),
        ("bfloat16", [[256, 3e38], [1, 0], [1, -3e38]], [258, 0], [86, 0]),
        ("float8_e4m3fn", [[16, 384], [1, 384], [1, -384]], [18, 384], [6, 128]),
        ("float8_e5m2", [[8, 49152], [1, 49152], [1, -49152]], [10, 49152], [3.5, 16384]),
    ],
)
def test_sums_that_a_small_float_cannot_hold_on_the_way(datatype, columns, totals, averages, algorithm):
    """2048 + 1 is 2048 in a float16, and 60000 + 60000 infinite; float32 keeps both until the end."""

    def main(comm):
        x = np.array(columns[comm.rank], DATATYPES[datatype].dtype)
        comm.Allreduce(x, algorithm=algorithm)
        y = np.array(columns[comm.rank], DATATYPES[datatype].dtype)
        comm.Allreduce(y, op=nvcoll.AVG, algorithm=algorithm)
        return x.astype(float).tolist(), y.astype(float).tolist()

    for total, average in nvcoll.emulate(3).run(main):
        assert total == totals
        assert average == averages


@pytest.mark.parametrize("algorithm", candidates())
def test_averages_of_integers_go_towards_zero(algorithm):
    columns = [[-3, 3, -7, 7, -128], [0, 0, -1, 0, 0], [0, 0, 0, 0, 127]]

    def main(comm):
        x = np.array(columns[comm.rank], np.int8)
        comm.Allreduce(x, op=nvcoll.AVG, algorithm=algorithm)
        y = np.array([250 + comm.rank], np.uint16)
        comm.Allreduce(y, op=nvcoll.AVG, algorithm=algorithm)
        return [*x.tolist(), *y.tolist()]

    assert nvcoll.emulate(3).run(main) == [[-1, 1, -2, 2, 0, 251]] * 3


def test_averages_over_more_ranks_than_the_type_can_hold():
    def main(comm):
        found = []
        for datatype in (np.int8, np.uint8):
            x = np.array([comm.rank == 0, 100 * (comm.rank == 1), 0], datatype)
            comm.Allreduce(x, op=nvcoll.AVG, algorithm="one_shot")
            found += x.tolist()
        return found

    assert nvcoll.emulate(256).run(main) == [[0] * 6] * 256
    assert nvcoll.emulate(100).run(main) == [[0, 1, 0, 0, 1, 0]] * 100
