"""The benchmark itself: for every size prepare, check, and only then time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nvcoll.cli.bench.check import Data, Verdict
from nvcoll.cli.bench.contestants import Contestant, Nvcoll
from nvcoll.cli.bench.measure import Budget, Ranks, Timing, measure
from nvcoll.cli.bench.report import Outcome, Row
from nvcoll.errors import ArgumentError
from nvcoll.ops import Datatype, Op

SMALL = 1 << 16  # elements up to which several checks are cheap
Clock = Callable[[Ranks, Sequence[Contestant], Budget], list[Timing]]
CHECKS = 4  # both halves of the scratch memory, which calls use in turn, and each again when it is not new


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Parameters
    ----------
    counts
        Elements, one number for each line or group of lines.
    datatype, op
        What is reduced.
    budget
        How long to measure.
    """

    counts: Sequence[int]
    datatype: Datatype
    op: Op
    budget: Budget


def counts(least: int, most: int, factor: float, itemsize: int) -> list[int]:
    """Return the element counts from `least` to `most` bytes, each `factor` times the one before.

    Raises
    ------
    ArgumentError
        The range is empty, or the factor does not grow it.
    """
    if most < least:
        raise ArgumentError(f"--max {most} is below --min {least}; exchange them")
    if not factor > 1:
        raise ArgumentError(f"--factor {factor:g} does not grow a size; give a number above 1, such as 2")
    found: dict[int, None] = {}  # an ordered set: small sizes may round to the same count
    nbytes = float(least)
    while nbytes <= most:
        found[max(1, int(nbytes) // itemsize)] = None
        nbytes *= factor
    return list(found)


def rows(
    ranks: Ranks, workload: Workload, own: Sequence[Nvcoll], peers: Sequence[Contestant], clock: Clock = measure
) -> Iterator[Row]:
    """Check and time the contestants size by size; collective.

    Yields
    ------
    Row
        One for each size and contestant of `own`; the same on all ranks but for `Verdict`, which holds at least what
        this rank saw itself.
    """
    for count in workload.counts:
        everybody: list[Contestant] = [*own, *peers]
        outcomes = _round(ranks, everybody, count, workload, clock)
        beside = {peer.name: outcome for peer, outcome in zip(peers, outcomes[len(own) :], strict=True)}
        for contestant, outcome in zip(own, outcomes, strict=False):
            yield Row(
                nbytes=count * workload.datatype.itemsize,
                count=count,
                datatype=workload.datatype.name,
                op=workload.op.name,
                ranks=ranks.comm.size,
                buffer=contestant.buffer,
                requested=contestant.algorithm,
                algorithm=contestant.chosen(),
                outcome=outcome,
                peers=beside,
            )


def _round(
    ranks: Ranks, everybody: Sequence[Contestant], count: int, workload: Workload, clock: Clock
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    right: dict[int, Contestant] = {}
    for index, contestant in enumerate(everybody):
        contestant.prepare(count)
        outcome, all_right = _check(ranks, contestant, workload)
        outcomes[index] = outcome
        if all_right:
            right[index] = contestant
    for contestant in right.values():  # sums of zeros stay finite however often they are reduced in place
        contestant.send.fill(0)
    timings = clock(ranks, list(right.values()), workload.budget) if right else []
    for index, timing in zip(right, timings, strict=True):
        outcomes[index] = Outcome(outcomes[index].verdict, timing)
    return [outcomes[index] for index in range(len(everybody))]


def _check(ranks: Ranks, contestant: Contestant, workload: Workload) -> tuple[Outcome, bool]:
    """Return the verdict on random data, and whether every rank found it right (equal on all ranks)."""
    comm = ranks.comm
    worst = Verdict(0.0, 0)
    for seed in range(CHECKS if contestant.send.size <= SMALL else 1):
        data = Data(workload.op, workload.datatype, comm.size, seed)
        data.fill(contestant.send, comm.rank)
        try:
            contestant.call()
        except ArgumentError as exc:  # what an algorithm cannot do depends on what all ranks know: all are refused
            if contestant.may_refuse:
                return Outcome(None, None, str(exc)), False
            raise
        verdict = data.check(contestant.recv)
        worst = Verdict(max(worst.error, verdict.error), worst.wrong + verdict.wrong)
    error, wrong = ranks.largest([worst.error, worst.wrong])
    # What this rank saw itself counts even if the ranks' own exchange, made of the same calls, failed to carry it.
    seen = Verdict(max(error, worst.error), max(int(wrong), worst.wrong))
    return Outcome(seen, None), wrong == 0
