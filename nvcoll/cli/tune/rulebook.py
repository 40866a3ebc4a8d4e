"""Rules files: which rules a measurement replaces, and how the file is laid out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvcoll import _selection
from nvcoll.cli import _files
from nvcoll.cli.bench.report import counted
from nvcoll.errors import ArgumentError
from nvcoll.planning import VERBS, candidates, parse_rules, read_rules

Rules = dict[str, Any]
Rule = dict[str, Any]


@dataclass(frozen=True)
class Scope:
    """The calls that were measured, but for their sizes: what a rule's limits say.

    Attributes
    ----------
    kind
        Of hardware: ``"host"`` or ``"cuda"``.
    verb
        The collective.
    ranks, nodes
        How many.
    oversubscribed
        Whether ranks share cores, or a GPU.
    """

    kind: str
    verb: str
    ranks: int
    nodes: int
    oversubscribed: bool

    @classmethod
    def of(cls, comm: Any, verb: str) -> "Scope":
        """Return that of a communicator."""
        planner = comm._world.planner
        return cls(planner.kind, verb, comm.size, len(planner.topology.node_sizes), planner.crowded)

    def limits(self) -> Rule:
        """Return the part of a rule that says it."""
        return {
            "verb": self.verb,
            "nodes": [self.nodes, self.nodes],
            "oversubscribed": self.oversubscribed,
            "ranks": [self.ranks, self.ranks],
        }

    def rules(self, found: Sequence[tuple[str, int | None]], note: str) -> list[Rule]:
        """Return a rule for each range of sizes; the first has the note."""
        listed = [limited(self.limits(), upto) | {"use": name} for name, upto in found]
        listed[0]["note"] = note
        return listed

    def __str__(self) -> str:
        crowded = "oversubscribed" if self.oversubscribed else "not oversubscribed"
        return f"{self.kind}, {self.verb}, {self.ranks} ranks on {counted(self.nodes, 'node')}, {crowded}"


def limited(rule: Rule, upto: int | None) -> Rule:
    """Return a rule with a largest size, if there is one."""
    return rule if upto is None else rule | {"upto": upto}


def read(output: Path, in_force: Path | None) -> Rules:
    """Return the rules that new ones are added to: those of `output` if there are any, else those in force.

    Parameters
    ----------
    output
        The file that will be written.
    in_force
        The file that NVCOLL_RULES names, or None.

    Raises
    ------
    ArgumentError
        One of them is no rules file, or `output` cannot be written.
    """
    _files.check("--output", output)
    there = output.exists()
    if there and not output.is_file():
        raise ArgumentError(
            f"--output: {output} is no ordinary file; name another one, or take --dry-run, which shows the rules"
        )
    try:
        given = output.read_text() if there else ""
        if given.strip():
            return parse_rules(given)
    except (OSError, ValueError) as exc:
        raise ArgumentError(f"--output: {output} is there and is no rules file ({exc}); name another one") from exc
    rules = read_rules(in_force)
    if in_force is None:
        del rules[_selection.LAUNCH]  # where a file has none the package's are in force, also when they have changed
    return rules


def check(rules: Rules) -> None:
    """Raise ValueError unless nvcoll would take `rules`."""
    _selection.check_rules(rules, candidates(), VERBS)


def merge(rules: Rules, scope: Scope, new: Sequence[Rule]) -> Rules:
    """Put new rules of a scope before the others of its kind, and leave out older ones of exactly that scope."""
    limits = scope.limits()
    kept = [rule for rule in rules.get(scope.kind, []) if {key: rule.get(key) for key in limits} != limits]
    return rules | {scope.kind: [*new, *kept]}


def text(rules: Rules) -> str:
    """Lay out a file: a rule a line."""
    parts = []
    for kind, listed in rules.items():
        lines = ",\n".join(f"    {json.dumps(rule)}" for rule in listed)
        parts.append(f"  {json.dumps(kind)}: [\n{lines}\n  ]" if listed else f"  {json.dumps(kind)}: []")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(path: Path, rules: Rules) -> None:
    """Check the rules and write them.

    Raises
    ------
    ArgumentError
        The file cannot be written.
    """
    check(rules)
    with _files.refusing("--output", path, "the rules are above"):
        _files.replace(path, text(rules))
