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

from nvcoll.algorithms._registry import Link, Shape, algorithm, power_below, steps


def supports(shape: Shape) -> str | None:
    """Any call with more than one rank; on a single node the middle part is empty."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Direct exchange inside the nodes, whole slices at every step between them."""
    nodes, largest, slices = len(shape.node_sizes), max(shape.node_sizes), shape.slices
    part = shape.nbytes / slices
    near = 2 * (link.latency + (largest - 1) * part * link.per_byte) if largest > 1 else 0.0
    count = steps(nodes) + (2 if nodes != power_below(nodes) else 0)
    return near + count * (link.far_latency + part * shape.width / shape.itemsize * link.far_per_byte)


def slots(shape: Shape) -> tuple[int, int]:
    """Slots for scatter, folding, doubling and gather, each of a slice."""
    largest, slices = max(shape.node_sizes), shape.slices
    return largest + 2 + steps(len(shape.node_sizes)) + slices, slices


@algorithm(
    "nvrar", verb="allreduce", source="NVRAR, arXiv 2511.09557", order="rank order in a node, binary tree over nodes"
)
def text(v: Any) -> Any:
    width, itemsize, begin, put, load = v.width, v.itemsize, v.begin, v.put, v.load
    part_at, log2, fold, unfold = v.part_at, v.log2, v.fold, v.unfold
    nodes, node, local_rank, slices, node_ranks, node_starts = (
        v.nodes, v.node, v.local_rank, v.slices, v.node_ranks, v.node_starts,
    )  # fmt: skip
    wait_copy, wait_reduce, wait_reduce_all, accumulators, finish_to, jit = (
        v.wait_copy, v.wait_reduce, v.wait_reduce_all, v.accumulators, v.finish_to, v.jit,
    )  # fmt: skip

    @jit
    def member(c, b, k):
        """Return the k-th rank of node b."""
        return load(node_ranks(c) + 8 * (load(node_starts(c) + 8 * b) + k))

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

    def kernel(c, send, recv, count):
        e, here, local, at = begin(c), node(c), local_rank(c), itemsize(c)
        members = load(node_starts(c) + 8 * (here + 1)) - load(node_starts(c) + 8 * here)
        largest = 0
        for b in range(nodes(c)):
            largest = max(largest, load(node_starts(c) + 8 * (b + 1)) - load(node_starts(c) + 8 * b))
        inner, gather = largest, largest + 2 + log2(nodes(c))
        for k in range(slices(c)):  # scatter
            if k != local:
                lo, hi = part_at(c, count, slices(c), k), part_at(c, count, slices(c), k + 1)
                put(c, e, member(c, here, k), local, send + lo * at, (hi - lo) * at)
        if local < slices(c):
            lo, hi = part_at(c, count, slices(c), local), part_at(c, count, slices(c), local + 1)
            mine = recv + lo * at
            acc = accumulators(c, mine)
            wait_reduce_all(c, e, members, local, 0, send + lo * at, acc, hi - lo)
            between_nodes(c, e, acc, hi - lo, mine, inner)
            for k in range(members):  # gather
                if k != local:
                    put(c, e, member(c, here, k), gather + local, mine, (hi - lo) * at)
        for k in range(slices(c)):
            if k != local:
                lo, hi = part_at(c, count, slices(c), k), part_at(c, count, slices(c), k + 1)
                wait_copy(c, e, gather + k, recv + lo * at, (hi - lo) * at)

    return kernel
