"""What algorithms that cut a message into slices do inside the nodes, before and after the exchange between nodes."""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape


def near_cost(shape: Shape, link: Link) -> float:
    """Return the seconds of a direct exchange inside the nodes, there and back."""
    largest = max(shape.node_sizes)
    return 2 * (link.latency + (largest - 1) * shape.nbytes / shape.slices * link.per_byte) if largest > 1 else 0.0


def near_slots(shape: Shape) -> int:
    """Return the slots that it takes: for gather and for scatter, and none where all nodes have one rank."""
    largest = max(shape.node_sizes)
    return shape.slices + largest - 1 if largest > 1 else 0


def owner_of(v: Any) -> Any:
    """Return ``owner(c, b)``."""
    size, nodes, load, owners = v.size, v.nodes, v.load, v.owners

    @v.jit
    def owner(c, b):
        """Return the rank of node b that owns the same slice as I."""
        if size(c) == nodes(c):
            return b
        return load(owners(c) + 8 * b)

    return owner


def inside_nodes(v: Any, slots_between: Any, between_nodes: Any) -> Any:
    """Return the kernel: reduce-scatter inside each node, what is given for between nodes, all-gather inside each node.

    Parameters
    ----------
    v
        The verbs.
    slots_between
        ``slots_between(nodes)`` returns how many slots the exchange between nodes takes: the first.
    between_nodes
        ``between_nodes(c, e, source, acc, n, result)`` reduces n elements with those of the other owners of my slice,
        and leaves the finished slice in `result`. Mine are at `source`, where no node has more than one rank, and the
        epoch is still to be counted; else that is 0, and my node's accumulators are at `acc`.
    """
    itemsize, begin, load, part_at, accumulators = v.itemsize, v.begin, v.load, v.part_at, v.accumulators
    size, nodes, local_rank, node_size, slices, members, owners = (
        v.size, v.nodes, v.local_rank, v.node_size, v.slices, v.members, v.owners,
    )  # fmt: skip
    count_epoch, wait_reduce_all, wait_slices = v.count_epoch, v.wait_reduce_all, v.wait_slices

    @v.jit
    def member(c, k):
        """Return the k-th rank of my node."""
        return load(members(c) + 8 * k)

    put_slices, put_all = v.group_of(member)

    def kernel(c, send, recv, count):
        e, me, parts, at = begin(c), local_rank(c), slices(c), itemsize(c)
        if size(c) == nodes(c):
            between_nodes(c, e, send, accumulators(c, recv), count, recv)
            return
        load(owners(c))  # nobody waits for it here, but the table is at hand when it is needed
        gather = slots_between(nodes(c))
        scatter = gather + parts
        put_slices(c, e, parts, me, scatter, send, count)
        count_epoch(c, e)
        if me < parts:
            lo, hi = part_at(c, count, parts, me), part_at(c, count, parts, me + 1)
            mine = recv + lo * at
            acc = accumulators(c, mine)
            wait_reduce_all(c, e, node_size(c), me, scatter, send + lo * at, acc, hi - lo)
            between_nodes(c, e, 0, acc, hi - lo, mine)
            put_all(c, e, node_size(c), me, gather, mine, (hi - lo) * at)
        wait_slices(c, e, parts, me, gather, recv, count)

    return kernel
