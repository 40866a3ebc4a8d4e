"""What an algorithm is, and the registry from which selection, command line and documentation derive."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

SHARED = ("algorithms/_registry.py", "algorithms/_doubling.py", "algorithms/_inside_nodes.py")
"""Files that texts may be made of besides their own."""


@dataclass(frozen=True)
class Shape:
    """What is known of a call when an algorithm is chosen; equal on all ranks.

    Attributes
    ----------
    node_sizes : tuple of int
        Ranks on each node.
    count : int
        Elements of the message.
    itemsize, width : int
        Bytes of an element, and of an accumulator.
    slices : int
        Ranks of the smallest node; less than that of `node_sizes` where those are not all nodes.
    datatype : str
        Name of the elements' type.
    apart : bool
        Whether some ranks can neither load from nor store to the memory of some others; those of a node always can.
    """

    node_sizes: tuple[int, ...]
    count: int = 1
    itemsize: int = 4
    width: int = 4
    slices: int = 1
    datatype: str = "float32"
    apart: bool = False

    @cached_property
    def size(self) -> int:
        """Number of ranks."""
        return sum(self.node_sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the message."""
        return self.count * self.itemsize


class Slots(NamedTuple):
    """What an algorithm needs of a rank's scratch memory.

    Attributes
    ----------
    number : int
        How many slots there are.
    parts : int
        Into how many parts a message is cut to fill one.
    width : int
        Bytes of what fills one, for each element: those of an accumulator; or of the element itself, where only
        elements travel, and GPUs reduce them to the result in registers, without accumulators in memory.
    """

    number: int
    parts: int
    width: int


@dataclass(frozen=True)
class Link:
    """How fast ranks reach each other: seconds a step, and seconds a byte, inside a node and between nodes."""

    latency: float
    per_byte: float
    far_latency: float
    far_per_byte: float


@dataclass(frozen=True)
class Algorithm:
    """A schedule with what must be known to choose it.

    Attributes
    ----------
    name, verb : str
        What it is called, and the collective it serves.
    source : str
        Where it is described.
    order : str
        In which order contributions are combined.
    text : callable
        ``text(v)`` returns the kernel ``kernel(c, send, recv, count)`` over the verbs `v`.
    rounds : bool
        Whether messages larger than the scratch memory are cut into rounds for it; else it does that itself.
    opens : bool
        Whether the schedule begins with `share` or `put_own`, so that what these send can be loaded as a call begins.
        It must call `count_epoch` once on every path then, best after what it sends first.
    own_texts : dict
        Target -> text, where a target has one of its own.
    """

    name: str
    verb: str
    source: str
    order: str
    text: Callable[[Any], Any]
    rounds: bool = True
    opens: bool = False
    own_texts: dict[str, Callable[[Any], Any]] = field(default_factory=dict)

    def on(self, target: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Register the decorated text for a target that is measurably better off with one of its own."""

        def register(text: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self.own_texts[target] = text
            return text

        return register

    def text_for(self, target: str) -> Callable[[Any], Any]:
        """Return the kernel text for a target."""
        return self.own_texts.get(target, self.text)

    @property
    def _module(self) -> Any:
        return sys.modules[self.text.__module__]

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return str(self._module.__doc__)

    @property
    def file(self) -> str:
        """The file that defines it, by its path in the package."""
        return f"algorithms/{self._module.__name__.rpartition('.')[2]}.py"

    @property
    def sources(self) -> tuple[str, ...]:
        """The files on which its text depends, by their paths in the package."""
        return (*SHARED, self.file)

    def supports(self, shape: Shape) -> str | None:
        """Return why the algorithm cannot serve a call, or None."""
        reason: str | None = self._module.supports(shape)
        return reason

    def cost(self, shape: Shape, link: Link) -> float:
        """Return the seconds that a call is expected to take."""
        return float(self._module.cost(shape, link))

    def slots(self, shape: Shape) -> Slots:
        """Return what slots a rank needs."""
        slots: Slots = self._module.slots(shape)
        return slots


ALGORITHMS: dict[str, Algorithm] = {}
"""Every algorithm by its name, in the order of the files' import."""


def algorithm(
    name: str, *, verb: str, source: str, order: str, rounds: bool = True, opens: bool = False
) -> Callable[[Callable[[Any], Any]], Algorithm]:
    """Register the decorated kernel text; `supports`, `cost` and `slots` are functions of its module."""

    def register(text: Callable[[Any], Any]) -> Algorithm:
        ALGORITHMS[name] = Algorithm(name, verb, source, order, text, rounds, opens)
        return ALGORITHMS[name]

    return register


def power_below(n: int) -> int:
    """Return the largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


def folds(n: int) -> bool:
    """Tell whether ranks have to fold in pairs, so that a power of two of them is left."""
    return n != power_below(n)


def steps(n: int) -> int:
    """Return how many steps recursive doubling over n ranks takes, folding not counted."""
    return power_below(n).bit_length() - 1
