"""Who takes part in a benchmark, how they are timed, and how their rows are shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvcoll.cli.bench import report
from nvcoll.cli.bench.contestants import Contestant, Nvcoll
from nvcoll.cli.bench.measure import Ranks, measure
from nvcoll.cli.bench.report import Row
from nvcoll.cli.bench.run import Clock


@dataclass(frozen=True)
class Field:
    """The defaults are those of ranks on hosts.

    Attributes
    ----------
    ranks
        How they agree.
    own
        nvcoll, once for each line of a size.
    peers
        Other libraries.
    versions
        Of the peers' libraries, by the names that rows give them.
    free
        Gives everything back; collective.
    clock
        Times contestants that were right.
    facts
        More fields of the JSON file.
    lines
        More lines above the table.
    heading, line
        Make the table's text.
    finish
        Makes of a row what is shown and written.
    """

    ranks: Ranks
    own: Sequence[Nvcoll]
    peers: Sequence[Contestant]
    versions: Mapping[str, str]
    free: Callable[[], object]
    clock: Clock = measure
    facts: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()
    heading: Callable[[Sequence[str]], str] = report.heading
    line: Callable[[Row], str] = report.line
    finish: Callable[[Row], Row] = lambda row: row
