"""What algorithms that cut a message into slices do inside the nodes, before and after the exchange between nodes."""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape


def near_cost(shape: Shape, link: Link) -> float:
    """Return the seconds of a direct exchange inside the nodes, there and back."""
    largest = max(shape.node_sizes)
    return 2 * (link.latency + (largest - 1) * shape.nbytes / shape.slices * link.per_byte) if largest > 1 else 0.0


def near_slots(shape: Shape) -> int:
    """Return the slots that it takes: for scatter and for gather, and none where all nodes have one rank."""
    largest = max(shape.node_sizes)
    return largest - 1 + shape.slices if largest > 1 else 0


def member_of(v: Any) -> Any:
    """Return ``member(c, b, k)``."""
    load, node_ranks, node_starts = v.load, v.node_ranks, v.node_starts

    @v.jit
    def member(c, b, k):
        """Return the k-th rank of node b."""
        return load(node_ranks(c) + 8 * (load(node_starts(c) + 8 * b) + k))

    return member


def inside_nodes(v: Any, slots_between: Any, between_nodes: Any) -> Any:
    """Return the kernel: reduce-scatter inside each node, what is given for between nodes, all-gather inside each node.

    Parameters
    ----------
    v
        The verbs.
    slots_between
        ``slots_between(c)`` returns how many slots the exchange between nodes takes.
    between_nodes
        ``between_nodes(c, e, source, acc, n, result, first)`` reduces n elements with those of the other owners of my
        slice, through slots from `first` on, and leaves the finished slice in `result`. Mine are at `source`, where no
        node has more than one rank; else that is 0, and my node's accumulators are at `acc`.
    """
    itemsize, begin, put, load, part_at = v.itemsize, v.begin, v.put, v.load, v.part_at
    nodes, node, local_rank, slices, node_starts = v.nodes, v.node, v.local_rank, v.slices, v.node_starts
    wait_copy, wait_reduce_all, accumulators, without, member = (
        v.wait_copy, v.wait_reduce_all, v.accumulators, v.without, member_of(v),
    )  # fmt: skip

    def kernel(c, send, recv, count):
        e, here, local, at = begin(c), node(c), local_rank(c), itemsize(c)
        members = load(node_starts(c) + 8 * (here + 1)) - load(node_starts(c) + 8 * here)
        largest = 0
        for b in range(nodes(c)):
            largest = max(largest, load(node_starts(c) + 8 * (b + 1)) - load(node_starts(c) + 8 * b))
        between = largest - 1
        gather = between + slots_between(c)
        for k in range(slices(c)):  # scatter
            if k != local:
                lo, hi = part_at(c, count, slices(c), k), part_at(c, count, slices(c), k + 1)
                put(c, e, member(c, here, k), without(k, local), send + lo * at, (hi - lo) * at)
        if local < slices(c):
            lo, hi = part_at(c, count, slices(c), local), part_at(c, count, slices(c), local + 1)
            mine = recv + lo * at
            acc = accumulators(c, mine)
            source = send + lo * at
            if largest == 1:
                between_nodes(c, e, source, acc, hi - lo, mine, between)
                return
            wait_reduce_all(c, e, members, local, 0, source, acc, hi - lo)
            between_nodes(c, e, 0, acc, hi - lo, mine, between)
            for k in range(members):  # gather
                if k != local:
                    put(c, e, member(c, here, k), gather + local, mine, (hi - lo) * at)
        for k in range(slices(c)):
            if k != local:
                lo, hi = part_at(c, count, slices(c), k), part_at(c, count, slices(c), k + 1)
                wait_copy(c, e, gather + k, recv + lo * at, (hi - lo) * at)

    return kernel
