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

from nvcoll.algorithms._inside_nodes import inside_nodes, member_of, near_cost
from nvcoll.algorithms._registry import Link, Shape, algorithm, power_below, steps


def supports(shape: Shape) -> str | None:
    """Any call with more than one rank; on a single node the middle part is empty."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Direct exchange inside the nodes, whole slices at every step between them."""
    nodes = len(shape.node_sizes)
    part = shape.nbytes / shape.slices
    count = steps(nodes) + (2 if nodes != power_below(nodes) else 0)
    return near_cost(shape, link) + count * (link.far_latency + part * shape.width / shape.itemsize * link.far_per_byte)


def slots(shape: Shape) -> tuple[int, int]:
    """Slots for scatter, folding, doubling and gather, each of a slice."""
    largest, slices = max(shape.node_sizes), shape.slices
    return largest + 2 + steps(len(shape.node_sizes)) + slices, slices


@algorithm(
    "nvrar", verb="allreduce", source="NVRAR, arXiv 2511.09557", order="rank order in a node, binary tree over nodes"
)
def text(v: Any) -> Any:
    width, itemsize, put, nodes, node, local_rank = v.width, v.itemsize, v.put, v.nodes, v.node, v.local_rank
    log2, fold, unfold, wait_copy, wait_reduce = v.log2, v.fold, v.unfold, v.wait_copy, v.wait_reduce
    finish_to, member, jit = v.finish_to, member_of(v), v.jit

    @jit
    def slots_between(c):
        return 2 + log2(nodes(c))

    @jit
    def between_nodes(c, e, acc, n, result, first):
        """Recursive doubling over the ranks that own my slice on each node. Leaves the finished slice in `result`."""
        here, local, total = node(c), local_rank(c), nodes(c)
        doublings = log2(total)
        extra = total - (1 << doublings)
        if here < 2 * extra and here % 2 == 1:
            put(c, e, member(c, here - 1, local), first, acc, n * width(c))
            wait_copy(c, e, first + 1, result, n * itemsize(c))
            return
        if here < 2 * extra:
            wait_reduce(c, e, member(c, here + 1, local), first, acc, n)
        mine = fold(here, extra)
        for step in range(doublings):
            partner = member(c, unfold(mine ^ (1 << step), extra), local)
            put(c, e, partner, first + 2 + step, acc, n * width(c))
            wait_reduce(c, e, partner, first + 2 + step, acc, n)
        finish_to(c, result, acc, n)
        if here < 2 * extra:
            put(c, e, member(c, here + 1, local), first + 1, result, n * itemsize(c))

    return inside_nodes(v, slots_between, between_nodes)
