"""Every algorithm and protocol gives the right bits on any ranks and nodes, for any type, operator and count."""

import itertools

import pytest

from nvcoll.planning import candidates
from tests.algorithms.calls import PLACES, Call, judge
from tests.oracle import supported

WORLDS = [
    *((size, None) for size in (*range(1, 18), 31, 32, 33, 64)),
    *((size, 2) for size in (4, 5, 6, 9, 16, 17, 33)),
    (3, [1, 1, 1]),
    (5, [1, 4]),
    (7, [2, 2, 3]),
    (8, [1, 3, 4]),
    (9, [4, 5]),
    (10, [3, 3, 4]),
    (12, [1, 2, 4, 5]),
    (15, [5, 5, 5]),
    (31, [1, 30]),
    (32, 8),
    (64, 16),
]

# 0, 1, primes, and what lies around lines (56 bytes of payload, 64 bytes) and packs (64 and 256 bytes) of each size.
COUNTS = [
    0, 1, 2, 3, 4, 5, 7, 8, 11, 13, 14, 15, 16, 17, 28, 29, 31, 55, 57, 63, 64, 65, 97, 127, 129, 255, 257, 509, 513,
    1021, 4093,
]  # fmt: skip

MIXED = (PLACES[0], PLACES[3], PLACES[4], PLACES[5], PLACES[1])  # a row of ranks that have theirs at different places
ROWS = [*((place,) for place in PLACES), PLACES[2:4], MIXED, PLACES[::-1]]


def cases():
    """Calls for each world: every candidate takes the next type and operator, count and places from its own wheels.

    The wheels have lengths without a common factor, so that each pair of positions comes about.
    """
    wheels = {
        name: zip(itertools.cycle(supported()), itertools.cycle(COUNTS), itertools.cycle(ROWS), strict=True)
        for name in candidates()
    }
    for start, wheel in enumerate(wheels.values()):
        for _ in range(17 * start):  # so that a world sees other combinations from each candidate
            next(wheel)
    for size, nodes in WORLDS:
        turns = 12 if size <= 17 else 5
        calls = [(name, *next(wheels[name])) for _ in range(turns) for name in wheels]
        yield size, nodes, [Call(name, *pair, count, row) for name, pair, count, row in calls]


CASES = list(cases())


@pytest.mark.parametrize(
    ("size", "nodes", "calls"), [pytest.param(*case, id=f"{case[0]}-nodes-{case[1]}") for case in CASES]
)
def test_calls_in_a_world(size, nodes, calls):
    judge(calls, size, nodes)


def test_the_table_has_every_pair_that_matters():
    pairs, counts, rows = supported(), COUNTS, ROWS
    assert len(counts) == 31
    assert len(rows) == 11
    seen = {}
    for size, nodes, calls in CASES:
        for call in calls:
            algorithm = seen.setdefault(call.algorithm, {"pairs": set(), "count and places": set(), "worlds": set()})
            algorithm["pairs"].add((call.datatype, call.op))
            algorithm["count and places"].add((call.count, call.places))
            algorithm["worlds"].add((size, str(nodes)))
    assert set(seen) == set(candidates())
    for found in seen.values():
        assert found["pairs"] == set(pairs)
        assert found["count and places"] == set(itertools.product(counts, rows))
        assert len(found["worlds"]) == len(WORLDS)
