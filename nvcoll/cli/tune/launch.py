"""Shapes of launches on GPUs: threads of a block, and whether a thread has several packs under way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nvcoll import _selection
from nvcoll.cli.bench.field import Field
from nvcoll.cli.bench.gpu.contestants import Nvcoll
from nvcoll.cli.bench.report import Row
from nvcoll.cli.bench.run import Workload
from nvcoll.cli.tune.race import timed
from nvcoll.cli.tune.rulebook import Rule, Rules, limited
from nvcoll.errors import ArgumentError
from nvcoll.planning import LAUNCH, read_rules

THREADS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Form:
    """A shape; ``str()`` of it is its name."""

    threads: int
    deep: bool

    def __str__(self) -> str:
        return f"{self.threads} threads, deep" if self.deep else f"{self.threads} threads"

    def rule(self) -> Rule:
        """Return the part of a rule that says it."""
        return {"threads": self.threads} | ({"deep": True} if self.deep else {})


FORMS = {str(form): form for form in (Form(threads, deep) for deep in (False, True) for threads in THREADS)}


class Shaped(Nvcoll):
    """nvcoll on a GPU with one algorithm and one shape of launches.

    Parameters
    ----------
    like
        A contestant with the stage, the operator and the buffer.
    algorithm
        Its algorithm and protocol.
    form
        The shape, the same on all ranks.
    """

    def __init__(self, like: Nvcoll, algorithm: str, form: Form) -> None:
        super().__init__(like.stage, like.op, like.buffer, algorithm)
        self.form = form
        self._plans: tuple[dict[Any, Any], dict[Any, Any]] = {}, {}

    def load(self) -> None:
        """Copy `send` to the GPU; calls from here on, until another shape's `load`, have this shape.

        The plans of each shape are kept apart. Those that the check has made are there when a graph is captured, in
        which nothing could be compiled or loaded.
        """
        calls = self.comm._calls
        calls._world.planner.launches = [self.form.rule()]
        calls._kept, calls._fast = self._plans
        super().load()

    def chosen(self) -> str:
        """Return the name of the shape."""
        return str(self.form)


def refuse(comm: Any) -> None:
    """Raise ArgumentError where shapes are not measured; the same on all ranks."""
    if comm.target != "cuda":
        raise ArgumentError("--launch shapes launches on GPUs, these ranks are on hosts; leave it out")
    if comm._world.planner.remote:
        raise ArgumentError(
            "--launch measures GPUs that reach each other's memory, here some are reached through a network; leave it "
            "out"
        )


class Shapes:
    """All shapes for the algorithms that were chosen, over all sizes.

    Parameters
    ----------
    field
        Who takes part.
    workload
        What is measured.
    chosen
        Bytes -> algorithm and protocol.

    Attributes
    ----------
    times
        Bytes -> seconds of a call by shape.
    before
        Bytes -> the shape that the rules in force give.
    """

    def __init__(self, field: Field, workload: Workload, chosen: Mapping[int, str]) -> None:
        self.field = field
        self.workload = workload
        self.chosen = chosen
        self.times: dict[int, dict[str, float]] = {nbytes: {} for nbytes in chosen}
        launches = field.ranks.comm._world.planner.launches
        self.before = {nbytes: _in_force(launches, nbytes) for nbytes in chosen}

    def rows(self) -> Iterator[Row]:
        """Measure; collective. Calls have the shapes of the rules in force again afterwards.

        Yields
        ------
        Row
            One for each size and shape.
        """
        calls = self.field.ranks.comm._calls
        planner = calls._world.planner
        before = calls._kept, calls._fast, planner.launches
        like: Any = self.field.own[0]
        try:
            for count in self.workload.counts:
                nbytes = count * self.workload.datatype.itemsize
                own = [Shaped(like, self.chosen[nbytes], form) for form in FORMS.values()]
                yield from timed(self.field, self.workload, count, own, self.times[nbytes])
        finally:
            calls._kept, calls._fast, planner.launches = before


def _in_force(launches: list[Rule], nbytes: int) -> str:
    """Return the shape that rules give; one whose blocks they limit is none of those that are measured."""
    threads, most, deep = _selection.shape_launch(launches, nbytes, False)
    return str(Form(threads, deep)) + (f", {most} blocks" if most else "")


def rules(found: list[tuple[str, int | None]], note: str) -> list[Rule]:
    """Return a rule for each range of sizes, for GPUs that reach each other's memory; the first has the note."""
    listed: list[Rule] = [limited({"far": False}, upto) | FORMS[name].rule() for name, upto in found]
    listed[0]["note"] = note
    return listed


def merge(old: Rules, new: list[Rule]) -> Rules:
    """Put new rules before the others, but leave out those that speak of near GPUs only: none of them counts any more.

    A file without any gets the package's besides, for a list must speak of far GPUs too.
    """
    kept = old.get(LAUNCH) or read_rules(None)[LAUNCH]
    return old | {LAUNCH: [*new, *(rule for rule in kept if rule.get("far") is not False)]}
