"""NVRAR for few nodes: as nvrar inside the nodes; between them, every slice goes to all its owners at once.

    node          A               B               C            two ranks, two ranks, three ranks
    rank        0     1         2     3         4    5    6    the smallest node has two: slices .0 and .1
    scatter     A.0   A.1       B.0   B.1       C.0  C.1  .    every rank sends slice k to the k-th rank of its node
    exchange    A.0 <---------> B.0 <---------> C.0            each sends to each (slice .1 likewise)
                ABC.0           ABC.0           ABC.0          and reduces all, in the order of the nodes
    gather      every slice's owner sends it to all ranks of its node

2 steps inside a node, one between N nodes, of (N - 1) M/G bytes, where G is the size of the smallest node. Any number
of nodes, of any and of different sizes.
"""

from typing import Any

from nvcoll.algorithms._inside_nodes import inside_nodes, near_cost, near_slots, owner_of
from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call with more than one rank; on a single node there is nothing to exchange."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Direct exchange inside the nodes, and of whole slices between them."""
    others = len(shape.node_sizes) - 1
    part = shape.nbytes / shape.slices
    far = link.far_latency + others * (part * slots(shape).width / shape.itemsize * link.far_per_byte)
    return near_cost(shape, link) + (far if others else 0.0)


def slots(shape: Shape) -> Slots:
    """Slots for every other node, for gather and for scatter, each of a slice."""
    largest, slices = max(shape.node_sizes), shape.slices
    width = shape.itemsize if largest == 1 else shape.width
    return Slots(near_slots(shape) + len(shape.node_sizes) - 1, slices, width)


@algorithm(
    "nvrar_one_hop",
    verb="allreduce",
    source="NVRAR, arXiv 2511.09557, with a direct exchange between nodes",
    order="rank order in a node, node order between",
    opens=True,
)
def text(v: Any) -> Any:
    width, itemsize, nodes, node, jit = v.width, v.itemsize, v.nodes, v.node, v.jit
    wait_reduce_partials, finish_to, share, count_epoch, reduce_shared = (
        v.wait_reduce_partials, v.finish_to, v.share, v.count_epoch, v.reduce_shared,
    )  # fmt: skip
    _, put_all = v.anywhere_of(owner_of(v))

    @jit
    def slots_between(nodes):
        return nodes - 1

    @jit
    def between_nodes(c, e, source, acc, n, result):
        here, total = node(c), nodes(c)
        if source == 0:
            put_all(c, e, total, here, 0, acc, n * width(c))
            wait_reduce_partials(c, e, total, here, 0, acc, n)
            finish_to(c, result, acc, n)
        else:  # every node has one rank
            share(c, e, source, n * itemsize(c))
            count_epoch(c, e)
            reduce_shared(c, e, source, result, n)

    return inside_nodes(v, slots_between, between_nodes)
