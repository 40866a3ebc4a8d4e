"""Long rows of calls of all kinds, with ranks that are late: nothing of one call may be seen in another."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvcoll.planning import candidates
from tests.algorithms.calls import PLACES, Call, judge
from tests.oracle import supported

PAIRS = supported()
NAMES = [*candidates(), *{name.split("/")[0] for name in candidates()}, None]


def random_call(rng, size):
    """Any algorithm, type, operator, count up to some rounds, places on each rank, and now and then a late rank."""
    count = int(2 ** rng.uniform(0, 14)) - 1 if rng.random() < 0.9 else int(rng.integers(0, 60_000))
    datatype, op = PAIRS[rng.integers(len(PAIRS))]
    if op == "AVG" and datatype[:3] in {"int", "uin"}:
        count = min(count, 500)  # for the reference's sake
    places = [PLACES[k] for k in rng.integers(len(PLACES), size=size)]
    if rng.random() < 0.5:  # all in one place, as programs have it
        places = places[:1]
    late = rng.choice(size, rng.integers(1, 3), replace=False) if rng.random() < 0.05 else []
    delays = tuple((int(rank), float(rng.uniform(0, 5e-3))) for rank in late)
    return Call(NAMES[rng.integers(len(NAMES))], datatype, op, count, tuple(places), delays)


@pytest.mark.parametrize(("size", "nodes"), [(2, None), (5, [2, 3]), (8, None)])
def test_two_thousand_calls(monkeypatch, size, nodes):
    monkeypatch.setenv("NVCOLL_SCRATCH", "256K")
    rng = np.random.default_rng(size)
    judge([random_call(rng, size) for _ in range(2000)], size, nodes, seed=size)


@pytest.mark.parametrize("microseconds", ["0", "300"])
def test_ranks_that_sleep_at_once_and_ranks_that_spin(monkeypatch, microseconds):
    monkeypatch.setenv("NVCOLL_SPIN", microseconds)
    rng = np.random.default_rng(2)
    judge([random_call(rng, 4) for _ in range(200)], 4)


def test_a_call_repeated_in_a_hurry_with_nobody_in_step():
    rng = np.random.default_rng(1)
    for name in candidates():
        delays = tuple((rank, float(rng.uniform(0, 2e-3))) for rank in range(6))
        calls = [Call(name, "float64", "SUM", 100, PLACES[:4], delays if k % 10 == 0 else ()) for k in range(60)]
        judge(calls, 6, seed=17)


CALLS = st.builds(
    lambda name, pair, count, places, late: Call(name, *pair, count, tuple(places), ((late, 1e-3),)),
    st.sampled_from(NAMES),
    st.sampled_from(PAIRS),
    st.integers(0, 300) | st.sampled_from([1000, 4096, 5000]),
    st.lists(st.sampled_from(PLACES), min_size=1, max_size=3),
    st.integers(0, 9),  # most often nobody
)


@settings(max_examples=40)
@given(st.lists(CALLS, min_size=1, max_size=12), st.sampled_from([None, [1, 2], [1, 1, 1]]))
def test_any_row_of_calls(calls, nodes):
    judge(calls, 3, nodes)
