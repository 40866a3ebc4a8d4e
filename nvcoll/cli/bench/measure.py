"""Timing: batches of several contestants by turns, on ranks that start together.

A batch is timed as a whole, so that reading the clock costs nothing; a contestant's time on a rank is the median over
its batches, and its time is that of the slowest rank. The contestants take turns batch by batch: drift hits them alike.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any

import numpy as np

from nvcoll.cli.bench.contestants import Contestant
from nvcoll.errors import ArgumentError
from nvcoll.ops import SUM

MOST_CALLS = 1000  # a batch; at 1 us a call the clock's 50 ns are then 0.005 %
LEAST_BATCHES, MOST_BATCHES = 5, 50
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Budget:
    """How long to measure a contestant at one size.

    Parameters
    ----------
    seconds
        Time for all batches; a size whose calls are too slow for it still gets `LEAST_BATCHES` batches of one call.
    calls
        Calls in a batch, or None to fit the time.
    """

    seconds: float = 0.3
    calls: int | None = None

    def plan(self, estimates: Sequence[float]) -> tuple[list[int], int]:
        """Return the calls in each contestant's batch, and the number of batches.

        Parameters
        ----------
        estimates
            Seconds that a call of each contestant takes, equal on all ranks.
        """
        calls = [self.calls or _clamp(self.seconds / 20 / estimate, 1, MOST_CALLS) for estimate in estimates]
        longest = max(
            (count + _warm(count) + _single(count)) * estimate for count, estimate in zip(calls, estimates, strict=True)
        )
        return calls, _clamp(self.seconds / longest, LEAST_BATCHES, MOST_BATCHES)


@dataclass(frozen=True)
class Timing:
    """What was measured of one contestant at one size.

    Attributes
    ----------
    calls
        Calls in a batch.
    batches
        Seconds a call, shape (ranks, batches).
    single
        The 99th percentile of calls that were timed one by one, in seconds, one value a rank.
    """

    calls: int
    batches: Array
    single: Array

    @property
    def seconds(self) -> float:
        """Time of a call: the median of the batches, of the slowest rank."""
        return float(np.median(self.batches, axis=1).max())

    @property
    def p99(self) -> float:
        """99th percentile of single calls, of the slowest rank."""
        return float(self.single.max())


class Ranks:
    """The few things that the ranks of a benchmark must agree on.

    Parameters
    ----------
    comm
        An nvcoll communicator.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.comm.Barrier()

    def gather(self, values: Sequence[float]) -> Array:
        """Return the values of all ranks, shape (ranks, values); every rank gives as many."""
        table = np.zeros((self.comm.size, len(values)))
        table[self.comm.rank] = values
        total = np.empty_like(table)
        self.comm.Allreduce(table, total, SUM)
        return total

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over the ranks."""
        return [float(value) for value in self.gather(values).max(axis=0)]

    def refuse(self, reason: str) -> None:
        """Raise ArgumentError on all ranks if any of them has a reason; ranks without one need not say it."""
        if any(self.largest([bool(reason)])):
            raise ArgumentError(reason or "another rank cannot do what was asked for; it says why")

    def on_first(self, act: Callable[[], Any]) -> Any:
        """Let rank 0 do something, and return there what comes of it, else None; what it refuses, all ranks raise."""
        found, reason = None, ""
        if self.comm.rank == 0:
            try:
                found = act()
            except ArgumentError as exc:
                reason = str(exc)
        self.refuse(reason)
        return found


def measure(ranks: Ranks, contestants: Sequence[Contestant], budget: Budget) -> list[Timing]:
    """Time `contestants`, whose buffers are prepared, by turns; collective.

    Returns
    -------
    list of Timing
        In the contestants' order; equal on all ranks.
    """
    with no_garbage_collection():
        estimates = ranks.largest([_estimate(ranks, contestant.call) for contestant in contestants])
        calls, rounds = budget.plan(estimates)
        batches: list[list[float]] = [[] for _ in contestants]
        singles: list[list[float]] = [[] for _ in contestants]
        for _ in range(rounds):
            for index, contestant in enumerate(contestants):
                ranks.barrier()
                _batch(contestant.call, _warm(calls[index]))  # the one before left its own data in the caches
                batches[index].append(_batch(contestant.call, calls[index]))
                singles[index] += _one_by_one(contestant.call, _single(calls[index])) or batches[index][-1:]
    return [
        Timing(count, ranks.gather(batch), ranks.gather([float(np.percentile(single, 99))])[:, 0])
        for count, batch, single in zip(calls, batches, singles, strict=True)
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive `values`; not a number if there are none."""
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")


def _warm(calls: int) -> int:
    """Return how many calls go before a batch of `calls`."""
    return -(-calls // 10)


def _single(calls: int) -> int:
    """Return how many calls are timed one by one after a batch of `calls`; a batch of one is such a call itself."""
    return min(calls, 100) if calls > 1 else 0


def _estimate(ranks: Ranks, call: Callable[[], object]) -> float:
    ranks.barrier()
    _batch(call, 2)
    return max(1e-8, min(_batch(call, 2) for _ in range(3)))


def _batch(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, calls):
        call()
    return (time.perf_counter() - start) / calls


def _one_by_one(call: Callable[[], object], calls: int) -> list[float]:
    clock = time.perf_counter
    stamps = [clock()]
    for _ in repeat(None, calls):
        call()
        stamps.append(clock())
    return [after - before for before, after in pairwise(stamps)]


def _clamp(value: float, least: int, most: int) -> int:
    return int(min(max(value, least), most))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and none inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
