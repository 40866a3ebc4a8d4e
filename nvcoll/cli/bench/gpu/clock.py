"""Timing on GPUs: graphs of many calls, replayed, or calls one after another; the contestants take turns."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from nvcoll.cli.bench.gpu.contestants import OnGpu
from nvcoll.cli.bench.gpu.stage import Stage
from nvcoll.cli.bench.measure import Budget, Ranks, Timing, no_garbage_collection

CALLS = 50  # in a graph, and in a batch of calls: few enough that a stream takes them all at once
AT_A_TIME = 5  # replays of one contestant before it is another's turn
LEAST, MOST = 10, 100  # replays or batches of a contestant
Array = np.ndarray[Any, np.dtype[Any]]


class ExchangingRanks(Ranks):
    """The ranks' agreements through the bytes that they exchange on the host: the calls under test take no part."""

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.exchange(None)

    def exchange(self, value: Any) -> list[Any]:
        """Return every rank's value, anything that JSON can hold."""
        exchange = self.comm._world.exchange
        exchange.verb = "bench"
        told = exchange.allgather(json.dumps(value).encode())
        return [json.loads(one) for one in told]

    def gather(self, values: Sequence[float]) -> Array:
        """Return the values of all ranks, shape (ranks, values); every rank gives as many."""
        return np.array(self.exchange([float(value) for value in values]))


@dataclass(frozen=True)
class Graphs:
    """Replays of CUDA graphs, by the GPU's own clock.

    Parameters
    ----------
    stage
        Captures and replays.
    """

    stage: Stage

    def __call__(self, ranks: Ranks, contestants: Sequence[Any], budget: Budget) -> list[Timing]:
        """Time `contestants`, whose buffers are prepared, by turns; collective.

        Returns
        -------
        list of Timing
            Seconds of a call: a batch is a replay, and `Timing.single` is the 99th percentile over replays.
        """
        calls = budget.calls or CALLS
        graphs = [self._capture(ranks, contestant, calls) for contestant in contestants]
        longest = max(ranks.largest([min(self._replay(ranks, graph, 2)) for graph in graphs]))
        turns = turns_of(budget, longest)
        seconds: list[list[float]] = [[] for _ in graphs]
        with no_garbage_collection():
            for _ in range(turns):
                for index, graph in enumerate(graphs):
                    seconds[index] += self._replay(ranks, graph, AT_A_TIME)
        return [_timing(ranks, calls, [one / calls for one in some]) for some in seconds]

    def _capture(self, ranks: Ranks, contestant: OnGpu, calls: int) -> Any:
        contestant.load()
        self.stage.synchronize()
        ranks.barrier()  # a capture may wait for the device, which must not wait for another rank meanwhile
        graph = self.stage.capture(contestant.enqueue, calls)
        ranks.barrier()
        return graph

    def _replay(self, ranks: Ranks, graph: Any, times: int) -> list[float]:
        ranks.barrier()
        return self.stage.replay(graph, times)


@dataclass(frozen=True)
class Eager:
    """Calls one after another, by the host's clock: what a call costs the host, which does not wait for the GPU.

    Parameters
    ----------
    stage
        Whose stream takes the calls.
    """

    stage: Stage

    def __call__(self, ranks: Ranks, contestants: Sequence[Any], budget: Budget) -> list[Timing]:
        """Time `contestants`, whose buffers are prepared, by turns; collective.

        Returns
        -------
        list of Timing
            Seconds of the host for a call: `Timing.single` is the 99th percentile of calls timed one by one.
        """
        calls = budget.calls or CALLS
        for contestant in contestants:
            contestant.load()
        longest = max(ranks.largest([self._until_done(ranks, contestant, calls) for contestant in contestants]))
        seconds: list[list[float]] = [[] for _ in contestants]
        singles: list[list[float]] = [[] for _ in contestants]
        with no_garbage_collection():
            for _ in range(turns_of(budget, 2 * longest) * AT_A_TIME):
                for index, contestant in enumerate(contestants):
                    seconds[index].append(self._batch(ranks, contestant, calls))
                    singles[index] += self._one_by_one(ranks, contestant, calls)
        return [
            Timing(calls, ranks.gather(some), ranks.gather([float(np.percentile(single, 99))])[:, 0])
            for some, single in zip(seconds, singles, strict=True)
        ]

    def _until_done(self, ranks: Ranks, contestant: OnGpu, calls: int) -> float:
        start = time.perf_counter()
        self._batch(ranks, contestant, calls)
        return time.perf_counter() - start

    def _batch(self, ranks: Ranks, contestant: OnGpu, calls: int) -> float:
        ranks.barrier()
        enqueue = contestant.enqueue
        with self.stage.current():
            enqueue()
            start = time.perf_counter()
            for _ in range(calls):
                enqueue()
            seconds = time.perf_counter() - start
        self.stage.synchronize()
        return seconds / calls

    def _one_by_one(self, ranks: Ranks, contestant: OnGpu, calls: int) -> list[float]:
        ranks.barrier()
        enqueue, clock = contestant.enqueue, time.perf_counter
        with self.stage.current():
            enqueue()
            stamps = [clock()]
            for _ in range(calls):
                enqueue()
                stamps.append(clock())
        self.stage.synchronize()
        return [after - before for before, after in pairwise(stamps)]


def turns_of(budget: Budget, longest: float) -> int:
    """Return how often it is each contestant's turn if its slowest replay takes so many seconds."""
    batches = min(max(budget.seconds / max(longest, 1e-6), LEAST), MOST)
    return -(-int(batches) // AT_A_TIME)


def _timing(ranks: Ranks, calls: int, seconds: Sequence[float]) -> Timing:
    p99 = float(np.percentile(np.array(seconds), 99))
    return Timing(calls, ranks.gather(seconds), ranks.gather([p99])[:, 0])
