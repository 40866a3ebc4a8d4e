"""What `nvcoll bench` rests on: data whose sums it knows, and batches that take turns."""

import numpy as np
import pytest

from nvcoll.cli.bench import measure
from nvcoll.cli.bench.check import COMBINE, INEXACT, Data, Verdict
from nvcoll.ops import DATATYPES, OPS, SUM

PAIRS = [(op, kind) for op in OPS.values() for kind in DATATYPES.values() if op.supports(kind) is None]


@pytest.mark.parametrize(("op", "datatype"), PAIRS, ids=[f"{op.name}-{datatype.name}" for op, datatype in PAIRS])
def test_check_knows_right_from_wrong(op, datatype):
    for size in (1, 3, 64):
        check_knows_right_from_wrong(op, datatype, size)


def check_knows_right_from_wrong(op, datatype, size):
    data = Data(op, datatype, size, seed=1)
    given = np.empty((size, 100), datatype.dtype)
    for rank in range(size):
        data.fill(given[rank], rank)
    wide = (
        np.dtype(np.complex128 if datatype.kind == "complex" else np.float64)
        if datatype.name in INEXACT
        else given.dtype
    )
    result = COMBINE[op.name].reduce(given.astype(wide), axis=0)
    if op.name == "AVG":
        result = np.trunc(result.astype(np.longdouble) / size) if datatype.name not in INEXACT else result / size
    result = result.astype(datatype.dtype)
    assert data.check(result).wrong == 0
    assert data.check(result).error <= data.tolerance()
    spoilt = result.copy()
    if datatype.name in INEXACT:
        spoilt[13] = 3 * spoilt[13] + size
    else:
        spoilt[13] = not spoilt[13] if datatype.kind == "bool" else spoilt[13] ^ 3
    assert data.check(spoilt).wrong == 1
    if datatype.name in INEXACT:
        spoilt[2] = np.nan
        assert data.check(spoilt) == Verdict(np.inf, 2)


def test_data_differ_between_ranks_seeds_and_chunks_and_not_between_lengths(monkeypatch):
    monkeypatch.setattr("nvcoll.cli.bench.check.CHUNK", 8)
    first, other, longer = np.empty(16), np.empty(16), np.empty(20)
    double = DATATYPES["float64"]
    Data(SUM, double, 2).fill(first, 0)
    Data(SUM, double, 2).fill(longer, 0)
    assert np.array_equal(first, longer[:16])
    assert len(np.unique(first)) == 16
    for seed, rank in ((0, 1), (1, 0)):
        Data(SUM, double, 2, seed).fill(other, rank)
        assert not (first == other).any()


def test_budget():
    budget = measure.Budget(seconds=1.0)
    calls, rounds = budget.plan([1e-6, 1e-3, 10.0])
    assert calls == [1000, 50, 1]
    assert rounds == measure.LEAST_BATCHES
    assert budget.plan([1e-6]) == ([1000], measure.MOST_BATCHES)
    assert budget.plan([1e-3]) == ([50], 9), "the calls around a batch count too"
    assert measure.Budget(1.0, calls=7).plan([1e-3])[0] == [7]


def test_measurements_take_turns():
    told = []

    class Told:
        def __init__(self, name):
            self.call = lambda: told.append(name)

    class Alone:
        rank, size = 0, 1

        def Barrier(self):
            told.append("|")

        def Allreduce(self, sendbuf, recvbuf, op):
            recvbuf[...] = sendbuf

    first, second = measure.measure(measure.Ranks(Alone()), [Told("a"), Told("b")], measure.Budget(1e-9, calls=2))
    rounds = "".join(told).split("|")[3:]
    assert rounds == ["aaaaa", "bbbbb"] * measure.LEAST_BATCHES, "one to warm up, a batch of two, and two one by one"
    assert first.batches.shape == (1, measure.LEAST_BATCHES)
    assert second.calls == 2
    told.clear()
    [alone] = measure.measure(measure.Ranks(Alone()), [Told("a")], measure.Budget(1e-9))
    assert alone.calls == 1
    assert "".join(told).split("|")[2:] == ["aa"] * measure.LEAST_BATCHES
    assert alone.p99 == pytest.approx(np.percentile(alone.batches, 99)), "a batch of one call is a single call"
