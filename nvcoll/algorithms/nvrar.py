"""NVRAR: reduce-scatter inside each node, recursive doubling between the nodes, all-gather inside each node.

    node          A               B               C            two ranks, two ranks, three ranks
    rank        0     1         2     3         4    5    6    the smallest node has two: slices .0 and .1
    scatter     A.0   A.1       B.0   B.1       C.0  C.1  .    every rank sends slice k to the k-th rank of its node
    fold        A.0 <---------- B.0                            three nodes: the first two become one (slice .1 likewise)
    step 1      AB.0 <------------------------> C.0
    unfold      A.0 ----------> B.0
    gather      every slice's owner sends it to all ranks of its node

2 steps inside a node, log2(N) between N nodes, of M/G bytes each, where G is the size of the smallest node; two
more where N is no power of two. Any number of nodes, of any and of different sizes.
"""

from typing import Any

from nvcoll.algorithms._doubling import doubling_of, doubling_slots, doubling_steps, doubling_width
from nvcoll.algorithms._inside_nodes import inside_nodes, near_cost, near_slots, owner_of
from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call with more than one rank; on a single node the middle part is empty."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Direct exchange inside the nodes, whole slices at every step between them."""
    nodes = len(shape.node_sizes)
    part = shape.nbytes / shape.slices
    part_seconds = link.far_latency + part * slots(shape).width / shape.itemsize * link.far_per_byte
    return near_cost(shape, link) + doubling_steps(nodes) * part_seconds


def slots(shape: Shape) -> Slots:
    """Slots for folding where nodes do, for doubling, for gather and for scatter, each of a slice."""
    largest, slices, nodes = max(shape.node_sizes), shape.slices, len(shape.node_sizes)
    width = shape.width if largest > 1 else doubling_width(nodes, shape)
    return Slots(near_slots(shape) + doubling_slots(nodes), slices, width)


@algorithm(
    "nvrar",
    verb="allreduce",
    source="NVRAR, arXiv 2511.09557",
    order="rank order in a node, binary tree over nodes",
    opens=True,
)
def text(v: Any) -> Any:
    nodes, node, double = v.nodes, v.node, doubling_of(v, owner_of(v))

    @v.jit
    def between_nodes(c, e, source, acc, n, result):
        double(c, e, node(c), nodes(c), source, acc, n, result)

    return inside_nodes(v, v.jit(doubling_slots), between_nodes)
