"""What a benchmark says: rows, the printed table, and the JSON file."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nvcoll.cli import info
from nvcoll.cli.bench.check import Verdict
from nvcoll.cli.bench.measure import Timing, geometric_mean

SCHEMA = 1
"""Raised when a field of the JSON file changes its meaning or goes."""
EXPLANATION = (
    "us: median over batches of a call, slowest rank; p99: calls timed one by one; bandwidths in GB/s (1e9 bytes)",
    "each line is checked on every rank with random data before it is timed; the timed calls reduce zeros",
)
WIDTHS = {"bytes": 10, "count": 9, "type": 10, "buffer": 12, "algorithm": 30, "us": 8, "p99": 8}
WIDTHS |= {"algbw": 7, "busbw": 7, "error": 7}


@dataclass(frozen=True)
class Outcome:
    """What became of one contestant at one size.

    Attributes
    ----------
    verdict
        The worst of all ranks; None if the call was refused.
    timing
        None if the answer was wrong or the call was refused.
    refused
        Why the contestant cannot do this call, or None.
    """

    verdict: Verdict | None
    timing: Timing | None
    refused: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether any rank got a wrong answer."""
        return self.verdict is not None and self.verdict.wrong > 0

    def cells(self) -> tuple[str, str, str]:
        """Return time, 99th percentile (us) and error as text."""
        if self.verdict is None:
            return "-", "-", "refused"
        if self.wrong:
            return "-", "-", "WRONG"
        error = "0" if self.verdict.error == 0 else f"{self.verdict.error:.0e}"
        if self.timing is None:
            return "-", "-", error
        return number(self.timing.seconds * 1e6), number(self.timing.p99 * 1e6), error

    def fields(self) -> dict[str, Any]:
        """Return the part of a JSON row that describes this outcome."""
        timing, verdict = self.timing, self.verdict
        return {
            "time_us": timing and timing.seconds * 1e6,
            "p99_us": timing and timing.p99 * 1e6,
            "error": verdict and (verdict.error if verdict.error < float("inf") else None),
            "wrong": verdict and verdict.wrong,
            "refused": self.refused,
            "calls": timing and timing.calls,
            "batches_us": timing and [[seconds * 1e6 for seconds in rank] for rank in timing.batches.tolist()],
        }


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    nbytes, count, datatype, op
        What was reduced.
    ranks
        How many took part.
    buffer
        Where nvcoll's data were.
    requested
        The algorithm that was asked for, or None: nvcoll chose.
    algorithm
        What ran: ``algorithm/protocol``.
    outcome
        What nvcoll did.
    peers
        What the peers did at this size, by name.
    """

    nbytes: int
    count: int
    datatype: str
    op: str
    ranks: int
    buffer: str
    requested: str | None
    algorithm: str
    outcome: Outcome
    peers: Mapping[str, Outcome] = field(default_factory=dict)

    @property
    def series(self) -> str:
        """What this row has in common with those of other sizes."""
        return self.buffer if self.requested is None else f"{self.buffer} {self.requested}"

    @property
    def algbw(self) -> float | None:
        """Algorithm bandwidth in GB/s: bytes over time."""
        timing = self.outcome.timing
        return None if timing is None else self.nbytes / timing.seconds / 1e9

    @property
    def busbw(self) -> float | None:
        """Bus bandwidth in GB/s, 2 (n - 1) / n of `algbw`: what a link carries if no byte crosses it twice."""
        return None if self.algbw is None else self.algbw * 2 * (self.ranks - 1) / self.ranks

    def ratio(self, peer: str) -> float | None:
        """Return the time of `peer` over that of nvcoll: above 1, nvcoll is faster."""
        other = self.peers[peer].timing
        if other is None or self.outcome.timing is None:
            return None
        return other.seconds / self.outcome.timing.seconds

    @property
    def wrong(self) -> bool:
        """Whether anybody got a wrong answer here."""
        return any(outcome.wrong for outcome in (self.outcome, *self.peers.values()))

    def fields(self) -> dict[str, Any]:
        """Return the JSON row."""
        peers = {name: {**outcome.fields(), "ratio": self.ratio(name)} for name, outcome in self.peers.items()}
        return {
            "bytes": self.nbytes,
            "count": self.count,
            "datatype": self.datatype,
            "op": self.op,
            "buffer": self.buffer,
            "requested": self.requested,
            "algorithm": self.algorithm,
            **self.outcome.fields(),
            "algbw_gbs": self.algbw,
            "busbw_gbs": self.busbw,
            "peers": peers,
        }


def number(value: float | None) -> str:
    """Return a positive number with at least three digits, never in exponents; ``-`` for None."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def counted(count: int, noun: str) -> str:
    """Return ``2 ranks``, or ``1 rank``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def heading(peers: Sequence[str]) -> str:
    """Return the table's first line."""
    texts = [f"{name:>{width}}" for name, width in WIDTHS.items()]
    for peer in peers:
        time, ratio = _peer_widths(peer)
        texts.append(f"{peer + ' us':>{time}} {'p99':>8} {'error':>7} {peer + '/nvcoll':>{ratio}}")
    return "#" + " ".join(texts)[1:]


def line(row: Row) -> str:
    """Return the table's line for `row`."""
    microseconds, p99, error = row.outcome.cells()
    cells = [str(row.nbytes), str(row.count), row.datatype, row.buffer, row.algorithm, microseconds, p99]
    cells += [number(row.algbw), number(row.busbw), error]
    texts = [f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS.values(), strict=True)]
    for peer, outcome in row.peers.items():
        microseconds, p99, error = outcome.cells()
        time, ratio = _peer_widths(peer)
        texts.append(f"{microseconds:>{time}} {p99:>8} {error:>7} {number(row.ratio(peer)):>{ratio}}")
    return " ".join(texts)


def _peer_widths(peer: str) -> tuple[int, int]:
    """Return the widths of a peer's time and ratio, whose heads hold its name."""
    return max(8, len(f"{peer} us")), max(10, len(f"{peer}/nvcoll"))


def means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the geometric mean of the ratios, ``{peer: {series: mean}}``, where there are any."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for peer in row.peers:
            ratio = row.ratio(peer)
            if ratio is not None:
                ratios.setdefault(peer, {}).setdefault(row.series, []).append(ratio)
    return {peer: {name: geometric_mean(some) for name, some in series.items()} for peer, series in ratios.items()}


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines below the table: refusals, wrong answers, geometric means."""
    everybody = [outcome for row in rows for outcome in (row.outcome, *row.peers.values())]
    for text in dict.fromkeys(outcome.refused for outcome in everybody if outcome.refused):
        yield f"refused: {text}"
    for row in rows:
        for name, outcome in (("nvcoll", row.outcome), *row.peers.items()):
            if outcome.verdict is not None and outcome.wrong:
                verdict = outcome.verdict
                what = f"{name} {row.buffer} {row.algorithm}" if name == "nvcoll" else name
                wrong = counted(verdict.wrong, "element")
                yield f"WRONG: {what}, {row.nbytes} bytes: {wrong}, error {verdict.error:.3g}"
    for peer, series in means(rows).items():
        for name, mean in series.items():
            yield f"geometric mean of {peer}/nvcoll, {name}: {number(mean)} (above 1: nvcoll is faster)"


def header(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines above the table, from the fields of the JSON file."""
    host = document["machine"]
    ranks = counted(document["ranks"], "rank")
    yield f"{document['verb']}, {document['op']}: {ranks}, bootstrap {document['bootstrap']}"
    yield f"date: {document['date']}"
    yield f"command: {shlex.join(document['command'])}"
    cores = f"{counted(host['physical_cores'], 'core')}, {counted(host['usable_cpus'], 'CPU')} usable"
    yield f"machine: {host['cpu_model']}, {cores}, load {host['load']}"
    yield "versions: " + ", ".join(f"{name} {text}" for name, text in document["versions"].items())
    yield from document["explanation"]


def document(verb: str, op: str, comm: Any, options: Mapping[str, Any], peers: Mapping[str, str]) -> dict[str, Any]:
    """Return the JSON file's fields but for the rows and the means.

    Parameters
    ----------
    verb, op
        What is measured.
    comm
        The communicator.
    options
        The command line's, by name.
    peers
        Version of each peer, by name.
    """
    return {
        "schema": SCHEMA,
        "verb": verb,
        "op": op,
        "ranks": comm.size,
        "bootstrap": comm.bootstrap,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["nvcoll", *sys.argv[1:]],
        "settings": dict(options),
        "machine": {**info.hardware(), "load": round(os.getloadavg()[0], 2)},
        "versions": {name: text for name, text in info.versions().items() if text} | dict(peers),
        "explanation": list(EXPLANATION),
    }
