"""What `nvcoll tune` says beside the table of times."""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from nvcoll.cli.bench.measure import geometric_mean
from nvcoll.cli.bench.report import number
from nvcoll.cli.tune.rulebook import Rule


class Measured(Protocol):
    """What was measured, of algorithms or of shapes.

    Attributes
    ----------
    times
        Bytes -> seconds by name.
    before
        Bytes -> the name that the rules in force give; it may not have been measured.
    """

    times: dict[int, dict[str, float]]
    before: dict[int, str]


def left_out(reasons: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yield who cannot serve, and why."""
    for reason, names in reasons.items():
        yield f"left out: {', '.join(names)}: {reason}"


def note(document: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Return where, when and with what rules were measured, in a few words."""
    machine = document["machine"]
    place = f"{machine['cpu_model']}, {machine['physical_cores']} cores"
    if "gpu" in document:
        place = ", ".join(f"{count} x {name}" for name, count in document["gpu"]["names"].items())
    what = f"{args.dtype} {args.op}, {args.buffer}"
    return f"{place}; {what}; {document['date'][:10]}; nvcoll {document['versions'].get('nvcoll', 'unknown')}"


def lines(title: str, rules: Sequence[Rule], chosen: Mapping[int, str], measured: Measured) -> Iterator[str]:
    """Yield the rules, and what they gain over those in force, size by size.

    Parameters
    ----------
    title
        Of what the rules speak.
    rules
        As they are written.
    chosen
        Bytes -> the name that they give.
    measured
        The times.
    """
    yield f"rules for {title}:"
    for rule in rules:
        yield f"  {json.dumps(rule)}"
    yield f"{'bytes':>10} {'chosen':>30} {'us':>8} {'before':>30} {'us':>8} {'before/chosen':>13}"
    ratios = []
    for nbytes, name in chosen.items():
        times, before = measured.times[nbytes], measured.before[nbytes]
        now, then = times[name], times.get(before)
        ratio = None if then is None else then / now
        ratios += [] if ratio is None else [ratio]
        cells = [f"{nbytes:>10}", f"{name:>30}", f"{number(now * 1e6):>8}"]
        cells += [f"{before:>30}", f"{number(None if then is None else then * 1e6):>8}", f"{number(ratio):>13}"]
        yield " ".join(cells)
    if ratios:
        yield f"geometric mean of before/chosen: {number(geometric_mean(ratios))} (above 1: the new rules are faster)"


def last(args: argparse.Namespace) -> str:
    """Return the last line: what became of the rules."""
    if args.dry_run:
        return "nothing is written, as --dry-run asks for"
    return f"written to {args.output}; to use them: export NVCOLL_RULES={args.output.absolute()}"
