"""The picture of a benchmark: time over size, and the ratio to each peer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvcoll.cli.bench.report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)
CLOSE_RATIOS = (0.8, 0.9, 1.1, 1.2)


def save(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw `rows` into `path`, a PNG, PDF or SVG file by its suffix.

    Parameters
    ----------
    path
        The file to write.
    rows
        All rows of a benchmark.
    title
        One or two lines above the panels.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    peers = list(rows[0].peers) if rows else []
    figure, panels = plt.subplots(
        1 + bool(peers), 1, figsize=(8, 7.5 if peers else 5), sharex=True, squeeze=False, layout="constrained"
    )
    try:
        figure.suptitle(title, fontsize=10)
        _times(panels[0, 0], rows, peers)
        if peers:
            _ratios(panels[1, 0], rows, peers)
        _bytes_axis(panels[-1, 0], {row.nbytes for row in rows})
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def size_text(nbytes: int) -> str:
    """Return 65536 as ``64 KiB``."""
    unit, name = next((unit, name) for unit, name in UNITS if nbytes >= unit)
    return f"{nbytes / unit:g} {name}"


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows that were timed to lines: by buffer, and by algorithm where one was asked for."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.outcome.timing:
            lines.setdefault(f"nvcoll {row.series}", []).append(row)
    return lines


def _times(axes: "Axes", rows: Sequence[Row], peers: Iterable[str]) -> None:
    lines = _lines(rows)
    for (label, some), marker in zip(lines.items(), "os^vD*Pphd<>" * len(lines), strict=False):
        timed = [(row.nbytes, row.outcome.timing.seconds * 1e6) for row in some if row.outcome.timing]
        axes.plot(*_columns(timed), marker=marker, markersize=4, label=label)
    for peer in peers:
        timings = {row.nbytes: row.peers[peer].timing for row in rows}
        timed = [(nbytes, timing.seconds * 1e6) for nbytes, timing in timings.items() if timing]
        axes.plot(*_columns(timed), color="black", linestyle="--", marker="x", markersize=4, label=peer)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel("time of a call (us)")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)


def _ratios(axes: "Axes", rows: Sequence[Row], peers: Iterable[str]) -> None:
    for label, some in _lines(rows).items():
        for peer in peers:
            ratios = [(row.nbytes, row.ratio(peer)) for row in some]
            found = [(nbytes, ratio) for nbytes, ratio in ratios if ratio is not None]
            axes.plot(*_columns(found), marker="o", markersize=4, label=f"{peer} / {label}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("time of the peer / time of nvcoll\n(above 1: nvcoll is faster)")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = RATIOS + CLOSE_RATIOS if high < 4 * low else RATIOS
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)


def _bytes_axis(axes: "Axes", sizes: set[int]) -> None:
    ticks = sorted(sizes)
    ticks = ticks[:: -(-len(ticks) // 13)]
    axes.set_xticks(ticks, [size_text(tick) for tick in ticks], rotation=45, ha="right", fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("bytes on each rank")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
