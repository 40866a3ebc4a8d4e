"""From times to ranges of sizes: few of them, and the fastest algorithm in each but for what is noise."""

import math
from collections.abc import Mapping
from itertools import pairwise

Times = Mapping[str, float]
"""Seconds of a call, by the name of what was measured."""


def choose(table: Mapping[int, Times], margin: float) -> dict[int, str]:
    """Choose for every size one of those that are fastest there, so that the choice changes as rarely as it can.

    What takes at most `margin` longer than the fastest counts as fast as that. Among the choices that change equally
    rarely, the one whose times are shortest, as a geometric mean, is taken.

    Parameters
    ----------
    table
        Bytes, in rising order, -> times; at least one time for each.
    margin
        A fraction: 0.03 is 3 %.

    Returns
    -------
    dict
        Bytes -> name.
    """
    paths: list[tuple[int, float, tuple[str, ...]]] = [(0, 0.0, ())]  # changes, loss, names; one for each last name
    for times in table.values():
        fastest = min(times.values())
        fast = {name: math.log(time / fastest) for name, time in times.items() if time <= fastest * (1 + margin)}
        paths = [
            min((changes + (path[-1:] != (name,)), loss + more, (*path, name)) for changes, loss, path in paths)
            for name, more in fast.items()
        ]
    return dict(zip(table, min(paths)[2], strict=True))


def ranges(chosen: Mapping[int, str]) -> list[tuple[str, int | None]]:
    """Return (name, largest size) of each range of sizes with one name; the last has no largest.

    A limit is the largest size that was measured with that name: rules claim for a name what was measured, and to the
    next size, where another is faster, they leave the sizes between.

    Parameters
    ----------
    chosen
        Bytes, in rising order, -> name.
    """
    sizes = list(chosen)
    found: list[tuple[str, int | None]] = []
    for size, larger in pairwise(sizes):
        if chosen[size] != chosen[larger]:
            found.append((chosen[size], size))
    return [*found, (chosen[sizes[-1]], None)]
