"""Recursive doubling: partners at distance 1, 2, 4, ... exchange all they have.

    rank      0       1       2       3       4
    fold      0 <---- 1       .       .       .      five ranks: the first two become one
    step 1    01 <--------> 2         3 <--> 4
    step 2    012 <-----------------> 34             (and 2 with 4)
    unfold    0 ----> 1

log2(n) steps of M bytes, and two more where n is no power of two. Any number of ranks and elements.
Partners put the lower rank's operand on the left, so both compute the same bits.
"""

from typing import Any

from nvcoll.algorithms._doubling import doubling_of, doubling_slots, doubling_steps, doubling_width
from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Steps inside a node first, then between nodes; folding takes two more."""
    far = len(shape.node_sizes) > 1
    latency, per_byte = (link.far_latency, link.far_per_byte) if far else (link.latency, link.per_byte)
    return doubling_steps(shape.size) * (latency + shape.nbytes * slots(shape).width / shape.itemsize * per_byte)


def slots(shape: Shape) -> Slots:
    """A slot for every step, and one where ranks fold, each of a whole message."""
    return Slots(doubling_slots(shape.size), 1, doubling_width(shape.size, shape))


@algorithm(
    "recursive_doubling",
    verb="allreduce",
    source="Thakur, Rabenseifner & Gropp 2005",
    order="binary tree over ranks",
    opens=True,
)
def text(v: Any) -> Any:
    rank, size, begin, accumulators, double = v.rank, v.size, v.begin, v.accumulators, doubling_of(v, v.everyone)

    def kernel(c, send, recv, count):
        double(c, begin(c), rank(c), size(c), send, accumulators(c, recv), count, recv)

    return kernel
