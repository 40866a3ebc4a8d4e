"""The race: every candidate at some sizes, and between two of these all but those that were far behind at both."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from nvcoll.cli.bench import run
from nvcoll.cli.bench.contestants import Nvcoll
from nvcoll.cli.bench.field import Field
from nvcoll.cli.bench.report import Row
from nvcoll.cli.bench.run import Workload
from nvcoll.cli.tune.ranges import Times

STRIDE = 4
"""At every so manieth size all candidates run."""
BEHIND = 4.0
"""Who takes so many times as long as the fastest is far behind. One algorithm's time may grow with the size while
another's hardly does, so that who is far behind at one size can win at another: both ends of a gap must agree."""


def ends(number: int) -> list[int]:
    """Return at which of so many sizes all candidates run: every `STRIDE`-th one and the last."""
    return sorted({*range(0, number, STRIDE), number - 1})


def far_behind(times: Times) -> set[str]:
    """Return who takes several times as long as the fastest."""
    fastest = min(times.values(), default=0.0)
    return {name for name, seconds in times.items() if seconds > BEHIND * fastest}


class Race:
    """All candidates for a verb over all sizes.

    Parameters
    ----------
    field
        Who takes part.
    workload
        What is measured.
    verb
        The collective.

    Attributes
    ----------
    times
        Bytes -> seconds of a call by candidate, of those that were right.
    before
        Bytes -> the candidate that the rules in force choose.
    left_out
        Why some candidates cannot serve: reason -> names.
    """

    def __init__(self, field: Field, workload: Workload, verb: str) -> None:
        self.field = field
        self.workload = workload
        self.times: dict[int, dict[str, float]] = {}
        self.before: dict[int, str] = {}
        self.left_out: dict[str, dict[str, None]] = {}  # of ordered sets
        self._able: dict[int, set[str]] = {}
        for count in workload.counts:
            nbytes = self._nbytes(count)
            told = field.ranks.comm.explain(verb, nbytes, workload.datatype, workload.op)
            self.times[nbytes] = {}
            self.before[nbytes] = f"{told.algorithm}/{told.protocol}"
            self._able[nbytes] = {one.name for one in told.candidates if one.reason is None}
            for one in told.candidates:
                if one.reason is not None:
                    self.left_out.setdefault(one.reason, {})[one.name] = None

    def rows(self) -> Iterator[Row]:
        """Measure; collective.

        Yields
        ------
        Row
            One for each size and candidate that runs there.
        """
        counts = self.workload.counts
        whole = ends(len(counts))
        for index in whole:
            yield from self._at(counts[index], set())
        for low, high in pairwise(whole):
            below, above = (self.times[self._nbytes(counts[end])] for end in (low, high))
            behind = far_behind(below) & far_behind(above)
            for count in counts[low + 1 : high]:
                yield from self._at(count, behind)

    def _nbytes(self, count: int) -> int:
        return count * self.workload.datatype.itemsize

    def _at(self, count: int, behind: set[str]) -> Iterator[Row]:
        """Run at one size all who can serve but those behind; who is in force runs all the same, for comparison."""
        nbytes = self._nbytes(count)
        names = self._able[nbytes] - (behind - {self.before[nbytes]})
        own = [one for one in self.field.own if one.algorithm in names]
        yield from timed(self.field, self.workload, count, own, self.times[nbytes])


def timed(
    field: Field, workload: Workload, count: int, own: Sequence[Nvcoll], times: dict[str, float]
) -> Iterator[Row]:
    """Check and time some contestants at one size; collective.

    Parameters
    ----------
    field
        How that is done.
    workload
        What is measured, but for the size.
    count
        The size in elements.
    own
        The contestants.
    times
        Here go the seconds of those that were right, by what they say they chose.

    Yields
    ------
    Row
    """
    for row in run.rows(field.ranks, replace(workload, counts=[count]), own, (), field.clock):
        if row.outcome.timing is not None:
            times[row.algorithm] = row.outcome.timing.seconds
        yield field.finish(row)
