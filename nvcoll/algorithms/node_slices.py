"""The two ends of an all-reduce between hosts: slices are reduced inside a node, and spread inside it again.

    node          A             B           two ranks, three ranks: slices .0 and .1
    rank        0     1       2    3    4
    scatter     A.0   A.1     B.0  B.1  .   every rank sends slice k to the k-th rank of its node
    (between)   A.0 <=======> B.0           MPI reduces each slice between the nodes, outside these kernels
    gather      every slice's owner sends it to all ranks of its node

The two halves of scratch memory still suffice, though a scatter alone does not hold contributions of all to all: a
rank begins the scatter of the next message after the gather of this one, and a gather holds slices from owners who
have read all that their node sent them. `slices` may be less than the ranks of this node: another node is smaller.
"""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call; used between hosts only, and not chosen by itself."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """One step inside a node."""
    return link.latency + (shape.size - 1) * shape.nbytes / max(1, shape.slices) * link.per_byte


def slots(shape: Shape) -> Slots:
    """Slots for every other rank of the node, and on the way back for every slice, each of a slice."""
    return Slots(shape.size, shape.slices, shape.itemsize)


@algorithm(
    "node_scatter",
    verb="scatter between hosts",
    source="NVRAR, arXiv 2511.09557",
    order="rank order in a node",
    rounds=False,
)
def scatter(v: Any) -> Any:
    size, local_rank, slices, itemsize, begin = v.size, v.local_rank, v.slices, v.itemsize, v.begin
    wait_reduce_all, part_at = v.wait_reduce_all, v.part_at
    put_slices, _ = v.group_of(v.everyone)

    def kernel(c, send, acc, count):
        e, me, at = begin(c), local_rank(c), itemsize(c)
        put_slices(c, e, slices(c), me, 0, send, count)
        if me < slices(c):
            lo, hi = part_at(c, count, slices(c), me), part_at(c, count, slices(c), me + 1)
            wait_reduce_all(c, e, size(c), me, 0, send + lo * at, acc, hi - lo)

    return kernel


@algorithm("node_gather", verb="gather between hosts", source="NVRAR, arXiv 2511.09557", order="none", rounds=False)
def gather(v: Any) -> Any:
    size, local_rank, slices, itemsize, begin = v.size, v.local_rank, v.slices, v.itemsize, v.begin
    wait_slices, finish_to, part_at = v.wait_slices, v.finish_to, v.part_at
    _, put_all = v.group_of(v.everyone)

    def kernel(c, acc, recv, count):
        e, me, at = begin(c), local_rank(c), itemsize(c)
        if me < slices(c):
            lo, hi = part_at(c, count, slices(c), me), part_at(c, count, slices(c), me + 1)
            finish_to(c, recv + lo * at, acc, hi - lo)
            put_all(c, e, size(c), me, 0, recv + lo * at, (hi - lo) * at)
        wait_slices(c, e, slices(c), me, 0, recv, count)

    return kernel
