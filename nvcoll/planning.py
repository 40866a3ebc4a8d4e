"""From a call's shape to its plan: which algorithm, by which rule, with which arguments."""

import json
import struct
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvcoll import _selection
from nvcoll._plan import Plan
from nvcoll.algorithms import ALGORITHMS, Link, Shape
from nvcoll.backends.area import LINE
from nvcoll.device.common import STAMP_BITS
from nvcoll.device.low_latency import PAYLOAD
from nvcoll.errors import ArgumentError
from nvcoll.jit import Compiler
from nvcoll.ops import DATATYPES, OPS, SUM, Datatype, Op

PROTOCOLS = ("low_latency", "simple")
LINK = Link(0.3e-6, 1 / 10e9, 1e-6, 1 / 5e9)
"""Expected speed where no rule speaks. Only the order that it gives to algorithms matters."""
VERBS = ("allreduce",)
EMPTY = "allreduce of no elements"
CALLS = (*VERBS, "barrier", EMPTY)
"""What a rank's board may name: the last two run as the all-reduce of a token, but match no other call."""
ROUND = 384 << 10
"""Bytes of a message that go through scratch memory at a time, so that slots stay in a core's second-level cache."""
SLOT_ALIGN = 2 * LINE
"""Processors fetch lines in pairs: neighbours in a pair would be taken from each other."""


@dataclass(frozen=True)
class Candidate:
    """An algorithm with a protocol, as it stands for a call.

    Attributes
    ----------
    name : str
        What ``algorithm=`` takes, such as ``"ring/simple"``.
    reason : str or None
        Why it cannot serve; None if it can.
    seconds : float or None
        What it should take; None where it cannot serve, or nothing is expected of it.
    """

    name: str
    reason: str | None
    seconds: float | None


@dataclass(frozen=True)
class Explanation:
    """What `Comm.explain` returns; ``str()`` of it is for reading.

    Attributes
    ----------
    verb : str
        The collective.
    nbytes : int
        Size of the message in bytes.
    datatype, op : str
        Names of the datatype and operator.
    algorithm, protocol : str
        What would run.
    reason : str
        Why: the rule, or the cost, or that the caller asked for it.
    order : str
        In which order the ranks' contributions are combined.
    candidates : tuple of Candidate
        All that there are.
    """

    verb: str
    nbytes: int
    datatype: str
    op: str
    algorithm: str
    protocol: str
    reason: str
    order: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        name = self.algorithm + (f"/{self.protocol}" if self.protocol else "")
        lines = [f"{self.verb} of {self.nbytes} bytes, {self.datatype} {self.op}: {name}"]
        lines += [f"  because    {self.reason}", f"  order      {self.order}"]
        for other in self.candidates:
            told = other.reason or (f"{other.seconds * 1e6:.1f} us expected" if other.seconds is not None else "")
            lines.append(f"  candidate  {other.name:30} {told}")
        return "\n".join(lines)


def candidates(verb: str = "allreduce") -> list[str]:
    """Return every ``algorithm/protocol`` that serves a verb."""
    names = [name for name, algorithm in ALGORITHMS.items() if algorithm.verb == verb]
    return [f"{name}/{protocol}" for name in names for protocol in PROTOCOLS]


def parse_rules(text: str) -> dict[str, Any]:
    """Return the rules in the text of a rules file.

    Raises
    ------
    ValueError
        They are wrong; the message names the rule.
    """
    rules: dict[str, Any] = json.loads(text, object_pairs_hook=_each_once)
    _selection.check_rules(rules, candidates(), VERBS)
    return rules


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON whose keys differ: of two that are equal, one would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in the same braces; make one of the two")
    return found


def read_rules(path: Path | None) -> dict[str, Any]:
    """Read and check a rules file; None is the one in the package, which also has what another file leaves out.

    Raises
    ------
    ArgumentError
        If it cannot be read or a rule is wrong; the message names the file and the rule.
    """
    own = Path(__file__).with_name("rules.json")
    source = path or own
    try:
        rules = parse_rules(source.read_text())
    except (OSError, ValueError) as exc:
        raise ArgumentError(f"NVCOLL_RULES: {source}: {exc}; correct the file or unset the variable") from exc
    return rules if path is None else {_selection.LAUNCH: json.loads(own.read_text())[_selection.LAUNCH]} | rules


class Chooser(ABC):
    """Says which algorithm serves a call of one communicator; planners of each target make the plan of it.

    Parameters
    ----------
    layout
        How the communicator's area is divided.
    topology
        Its nodes; `Shape` is made from their sizes.
    slices
        Ranks of the smallest node, those that are not in `topology` included.
    rules
        All rules, equal on all ranks.
    crowded
        Whether ranks share cores, or a GPU.
    timeout
        Seconds that a wait may take.
    """

    kind: str
    """Whose rules apply."""
    link: Link
    """Expected speed where no rule speaks."""

    def __init__(
        self, layout: Any, topology: Any, slices: int, rules: dict[str, Any], crowded: bool, timeout: float
    ) -> None:
        self.layout = layout
        self.topology = topology
        self.rules = rules.get(self.kind, [])
        self.crowded = crowded
        self.slices = slices
        self.timeout = timeout

    @abstractmethod
    def capacity(self, base: str, protocol: str, shape: Shape) -> int:
        """Return the elements that pass through scratch memory at a time; 0 where it is too small."""

    def explain(self, verb: str, count: int, datatype: Datatype, op: Op, algorithm: str | None = None) -> Explanation:
        """Say which algorithm serves a call, and why.

        Raises
        ------
        ArgumentError
            If `algorithm` does not exist or cannot serve.
        """
        shape = self.shape(count, datatype)
        found = []
        for name in candidates(verb):
            base, protocol = name.split("/")
            reason = ALGORITHMS[base].supports(shape) or self._too_small(base, protocol, shape)
            found.append(Candidate(name, reason, None if reason else ALGORITHMS[base].cost(shape, self.link)))
        if shape.size == 1 and algorithm is None:
            why = "a single rank's reduction is its contribution"
            return Explanation(verb, shape.nbytes, datatype.name, op.name, "copy", "", why, "none", tuple(found))
        use, why = self._forced(verb, algorithm, found) if algorithm is not None else self._chosen(verb, shape, found)
        base, protocol = use.split("/")
        return Explanation(
            verb, shape.nbytes, datatype.name, op.name, base, protocol, why, ALGORITHMS[base].order, tuple(found)
        )

    def shape(self, count: int, datatype: Datatype) -> Shape:
        """Return what algorithms are told of a call."""
        width = DATATYPES[datatype.accumulate].itemsize
        return Shape(tuple(self.topology.node_sizes), count, datatype.itemsize, width, self.slices, datatype.name)

    def _chosen(self, verb: str, shape: Shape, found: list[Candidate]) -> tuple[str, str]:
        reasons = {one.name: one.reason for one in found}
        costs = {one.name: one.seconds for one in found if one.seconds is not None}
        nodes = len(shape.node_sizes)
        return _selection.choose(self.rules, verb, shape.nbytes, shape.size, nodes, self.crowded, reasons, costs)

    def _forced(self, verb: str, algorithm: str, found: list[Candidate]) -> tuple[str, str]:
        """Return the candidate that the caller names, with the protocol of its choice or the first that serves."""
        named = [one for one in found if algorithm in (one.name, one.name.split("/")[0])]
        if not named:
            names = ", ".join(dict.fromkeys(one.name.split("/")[0] for one in found))
            raise ArgumentError(
                f"{verb.capitalize()}: algorithm is {algorithm!r}, expected one of {names}, "
                f"alone or with a protocol ({', '.join(PROTOCOLS)}) as in 'ring/simple'"
            )
        # Simple serves every size; low latency is for those who ask for it.
        for one in reversed(named):
            if one.reason is None:
                return one.name, "asked for by the caller"
        raise ArgumentError(f"{verb.capitalize()}: {algorithm} cannot serve this call: {named[0].reason}")

    def _too_small(self, base: str, protocol: str, shape: Shape) -> str | None:
        if self.capacity(base, protocol, shape) > 0:
            return None
        return f"{self.layout.scratch} bytes of scratch memory are too few for {shape.size} ranks; raise NVCOLL_SCRATCH"


class Planner(Chooser):
    """Makes the plans of one communicator whose ranks share memory.

    Parameters
    ----------
    state
        The communicator's state.
    layout, topology, slices, rules, crowded, timeout
        As for `Chooser`.
    compiler
        Gives machine code.
    """

    kind = "host"
    link = LINK

    def __init__(
        self, state: Any, layout: Any, topology: Any, slices: int, rules: dict[str, Any], compiler: Compiler,
        crowded: bool, timeout: float,
    ) -> None:  # fmt: skip
        super().__init__(layout, topology, slices, rules, crowded, timeout)
        self.state = state
        self.compiler = compiler

    def _slot_bytes(self, base: str, protocol: str, shape: Shape) -> int:
        """Return the largest slot that the area has for an algorithm."""
        number = ALGORITHMS[base].slots(shape).number
        half: int = self.layout.lines_half if protocol == "low_latency" else self.layout.data_half
        return half // max(number, 1) // SLOT_ALIGN * SLOT_ALIGN

    def capacity(self, base: str, protocol: str, shape: Shape) -> int:
        """Return the elements of a round: the least of what fits into slots, into the workspace, and into a cache.

        A slot holds a cache line less than its size, for slices may be rounded up by that; the workspace, accumulators.
        """
        slots = ALGORITHMS[base].slots(shape)
        slot = self._slot_bytes(base, protocol, shape)
        held = (slot // LINE * PAYLOAD if protocol == "low_latency" else slot) // slots.width
        kept: int = self.layout.data_half // shape.width  # accumulators in the workspace
        return min(max(0, held - LINE // shape.itemsize) * slots.parts, ROUND // shape.itemsize, kept)

    def _geometry(self, base: str, protocol: str, shape: Shape) -> tuple[int, int]:
        """Return the elements of a round and the bytes between slots, as close together as the message allows."""
        slots = ALGORITHMS[base].slots(shape)
        capacity = self.capacity(base, protocol, shape)
        part = -(-min(shape.count, capacity) // slots.parts) + LINE // shape.itemsize
        nbytes = part * slots.width
        if protocol == "low_latency":
            nbytes = -(-nbytes // PAYLOAD) * LINE
        return capacity, -(-nbytes // SLOT_ALIGN) * SLOT_ALIGN

    def plan(self, told: Explanation, datatype: Datatype, op: Op, size: int | None = None) -> Plan:
        """Make the plan of a call that was explained; AVG divides by `size`, by default this planner's ranks."""
        count = told.nbytes // datatype.itemsize
        shape = self.shape(count, datatype)
        call = {"count": count, "itemsize": datatype.itemsize, "width": shape.width}
        if (size or shape.size) == 1:  # one rank's reduction is its contribution, AVG of it too
            return Plan(self.state, 0, call, 0, None, told)
        call["capacity"], call["stride"] = self._geometry(told.algorithm, told.protocol, shape)
        call["ranks"] = size or shape.size
        call["reduce"] = self.compiler.reducer(op.name, datatype.accumulate)
        if datatype.accumulate != datatype.name:
            call["widen"] = self.compiler.widener(datatype.name)
        if op.name == "AVG" or "widen" in call:
            call["finish"] = self.compiler.finisher(datatype.name, datatype.accumulate, op.name == "AVG")
        signature = pack_signature(told, datatype, op)
        call["stamp"] = pack_stamp(signature, count)
        kernel = self.compiler.schedule(told.algorithm, told.protocol)
        return Plan(self.state, kernel, call, signature, self.compiler, told)


def pack_signature(told: Explanation, datatype: Datatype, op: Op) -> int:
    """Return, as one number, what ranks must agree on besides the count."""
    digits = (
        (CALLS.index(told.verb), len(CALLS)),
        (list(ALGORITHMS).index(told.algorithm), len(ALGORITHMS)),
        (PROTOCOLS.index(told.protocol), len(PROTOCOLS)),
        (list(DATATYPES).index(datatype.name), len(DATATYPES)),
        (list(OPS).index(op.name), len(OPS)),
    )
    number = 0
    for digit, base in digits:
        number = number * base + digit
    return number


def pack_stamp(signature: int, *numbers: int) -> int:
    """Return what flags carry of a call, so that no rank takes those of a call that does not match for its own.

    The numbers are the count, and how the message is cut where ranks might do so differently.
    """
    return zlib.crc32(struct.pack(f"<{1 + len(numbers)}q", signature, *numbers)) & ((1 << STAMP_BITS) - 1)


def plan_meeting(planner: Any, verb: str, datatype: Datatype, count: int = 1, op: Op = SUM) -> Any:
    """Make the plan of a call in which ranks only meet, and reduce a token of a datatype."""
    told = planner.explain("allreduce", count, datatype, op)
    return planner.plan(replace(told, verb=verb), datatype, op)


def verb_of(call: str) -> str:
    """Return the verb of one of CALLS as users write it."""
    return call.partition(" ")[0].capitalize()


def describe_signature(number: int, count: int) -> str:
    """Say in words what a rank is doing, from the number on its board."""
    number, op = divmod(number, len(OPS))
    number, datatype = divmod(number, len(DATATYPES))
    number, protocol = divmod(number, len(PROTOCOLS))
    verb, algorithm = divmod(number, len(ALGORITHMS))
    kind = f"{list(ALGORITHMS)[algorithm]}/{PROTOCOLS[protocol]}"
    what = f" of {count} {list(DATATYPES)[datatype]}, {list(OPS)[op]}" if CALLS[verb] in VERBS else ""
    return f"{CALLS[verb].capitalize()}{what}, by {kind}"
