"""Shapes of launches on GPUs: threads of a block, most blocks, and whether a thread has several packs under way."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nvcoll._selection import BLOCK_SIZES, LAUNCH, shape_launch
from nvcoll.cli.bench.field import Field
from nvcoll.cli.bench.gpu.contestants import Nvcoll
from nvcoll.cli.bench.report import Row
from nvcoll.cli.bench.run import Workload
from nvcoll.cli.tune.race import timed
from nvcoll.cli.tune.rulebook import Rule, Rules, limited
from nvcoll.errors import ArgumentError
from nvcoll.planning import read_rules

MANY = 64
"""Least threads that have several packs under way: those are for large messages."""
FEW = (8, 16, 32, 64)
"""Most blocks, for far ranks: through a network, what a block sends at a time is a message."""


@dataclass(frozen=True)
class Form:
    """A shape; ``str()`` of it is its name."""

    threads: int
    deep: bool
    blocks: int | None = None

    def __str__(self) -> str:
        limit = f", {self.blocks} blocks" if self.blocks else ""
        return f"{self.threads} threads{', deep' if self.deep else ''}{limit}"

    def rule(self) -> Rule:
        """Return the part of a rule that says it."""
        limit = {"blocks": self.blocks} if self.blocks else {}
        return {"threads": self.threads} | ({"deep": True} if self.deep else {}) | limit


_NEAR = [Form(threads, deep) for deep in (False, True) for threads in BLOCK_SIZES if threads >= MANY or not deep]
_FAR = [*_NEAR, *(Form(BLOCK_SIZES[-1], deep, blocks) for deep in (False, True) for blocks in FEW)]
FORMS = {far: {str(form): form for form in forms} for far, forms in ((False, _NEAR), (True, _FAR))}
"""Whether some ranks are far -> the shapes that are measured, by name."""


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
    far
        Whether some ranks are reached through a network. Rules have entries of their own for that.
    launched
        ``launched(nbytes)`` returns the size that rules speak of.
    """

    def __init__(self, field: Field, workload: Workload, chosen: Mapping[int, str]) -> None:
        self.field = field
        self.workload = workload
        self.chosen = chosen
        self.times: dict[int, dict[str, float]] = {nbytes: {} for nbytes in chosen}
        planner = field.ranks.comm._world.planner
        self.far: bool = planner.remote
        self.launched: Callable[[int], int] = planner.launched
        self.before = {nbytes: _in_force(planner.launches, planner.launched(nbytes), self.far) for nbytes in chosen}

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
                own = [Shaped(like, self.chosen[nbytes], form) for form in FORMS[self.far].values()]
                yield from timed(self.field, self.workload, count, own, self.times[nbytes])
        finally:
            calls._kept, calls._fast, planner.launches = before


def _in_force(launches: list[Rule], nbytes: int, far: bool) -> str:
    """Return the shape that rules give; one whose blocks they limit may be none of those that are measured."""
    threads, most, deep = shape_launch(launches, nbytes, far)
    return str(Form(threads, deep, most))


def rules(found: list[tuple[str, int | None]], note: str, far: bool, launched: Callable[[int], int]) -> list[Rule]:
    """Return a rule for each range of sizes, for near GPUs or far ones; the first has the note.

    ``launched(nbytes)`` is that of `Shapes`.
    """
    listed: list[Rule] = []
    for name, upto in found:
        most = None if upto is None else launched(upto)
        listed.append(limited({"far": far}, most) | FORMS[far][name].rule())
    listed[0]["note"] = note
    return listed


def merge(old: Rules, new: list[Rule]) -> Rules:
    """Put new rules before the others, but leave out those that speak of the same GPUs only: none counts any more.

    They are for near GPUs, or for far ones. A file without any gets the package's besides, for a list must speak of
    both.
    """
    kept = old.get(LAUNCH) or read_rules(None)[LAUNCH]
    return old | {LAUNCH: [*new, *(rule for rule in kept if rule.get("far") is not new[0]["far"])]}
