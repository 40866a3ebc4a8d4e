"""What the benchmark of GPUs says beyond that of hosts: the best of a peer's kernels, and the share of the link."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nvcoll.cli.bench import report
from nvcoll.cli.bench.report import Outcome, Row

GRAPHS = (
    "us: the GPU's time of a call, median over replays of a CUDA graph of calls, slowest rank; p99: over replays",
    "bandwidths in GB/s (1e9 bytes); link: bus bandwidth over that of copies, both ways at once, where it was measured",
)
EAGER = ("us: the host's time of a call, which does not wait for the GPU: median over batches; p99: of single calls",)
CHECKED = "each line is checked on every rank with random data before it is timed; the timed calls reduce zeros"


@dataclass(frozen=True)
class GpuRow(Row):
    """One line of the table.

    Attributes
    ----------
    eager
        Whether the times are the host's: they tell no bandwidth.
    link
        Bandwidth of copies between two GPUs in GB/s, or None.
    variants
        What each kernel of a peer that has several did, by peer and kernel.
    """

    eager: bool = False
    link: float | None = None
    variants: Mapping[str, Mapping[str, Outcome]] = field(default_factory=dict)

    @property
    def algbw(self) -> float | None:
        """Algorithm bandwidth in GB/s: bytes over time of the GPU."""
        return None if self.eager else super().algbw

    @property
    def share(self) -> float | None:
        """Bus bandwidth over that of copies."""
        return None if self.link is None or self.busbw is None else self.busbw / self.link

    def fields(self) -> dict[str, Any]:
        """Return the JSON row."""
        told = super().fields()
        for peer, kernels in self.variants.items():
            told["peers"][peer]["variants"] = {name: outcome.fields() for name, outcome in kernels.items()}
            told["peers"][peer]["variant"] = next(
                (name for name, outcome in kernels.items() if outcome is self.peers[peer]), None
            )
        return {**told, "link_share": self.share}


def merged(row: Row, eager: bool, link: float | None) -> GpuRow:
    """Make a row of `row` in which a peer of several kernels, named ``peer/kernel``, is the best of them."""
    variants: dict[str, dict[str, Outcome]] = {}
    peers: dict[str, Outcome] = {}
    for name, outcome in row.peers.items():
        peer, _, kernel = name.partition("/")
        if kernel:
            variants.setdefault(peer, {})[kernel] = outcome
            peers[peer] = best(list(variants[peer].values()))
        else:
            peers[peer] = outcome
    values = {one.name: getattr(row, one.name) for one in fields(Row)} | {"peers": peers}
    return GpuRow(**values, eager=eager, link=link, variants=variants)


def best(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the fastest of some kernels; a wrong answer of any of them is theirs together."""
    for outcome in outcomes:
        if outcome.wrong:
            return outcome
    timed = [(outcome.timing.seconds, outcome) for outcome in outcomes if outcome.timing is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else outcomes[0]


def heading(peers: Sequence[str]) -> str:
    """Return the table's first line."""
    return f"{report.heading(peers)} {'link':>6}"


def line(row: Row) -> str:
    """Return the table's line for a `GpuRow`."""
    share = row.share if isinstance(row, GpuRow) else None
    return f"{report.line(row)} {'-' if share is None else f'{100 * share:.0f} %':>6}"


def header(facts: Mapping[str, Any]) -> list[str]:
    """Return lines above the table, from the fields ``gpu`` and ``left_out`` of the JSON file."""
    gpu = facts["gpu"]
    names = ", ".join(f"{count} x {name}" for name, count in gpu["names"].items())
    lines = [f"GPUs: {names}; timed: {gpu['mode']}, {gpu['calls']} calls each"]
    if gpu["copy_gbs"] is None:
        lines.append(f"copies between GPUs: not measured, {gpu['copy_between']}")
    else:
        lines.append(f"copies between {gpu['copy_between']}, both ways at once: {gpu['copy_gbs']:.0f} GB/s each way")
    if gpu["exchange_us"] is not None:
        lines.append(f"kernels that only exchange a word with another rank: {report.number(gpu['exchange_us'])} us")
    if gpu["launch_us"] is not None:
        lines.append(f"bare launch of an empty kernel, through ctypes: {report.number(gpu['launch_us'])} us")
    return lines + [f"left out: {name}: {reason}" for name, reason in facts["left_out"].items()]
