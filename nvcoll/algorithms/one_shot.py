"""One-shot: everybody sends everything to everybody, and everybody reduces everything.

    rank      0     1     2     3     4
    step 1    every rank puts its message into a slot of its own on every other rank
    result    a0 + a1 + a2 + a3 + a4, computed on each rank in rank order

One step, so the lowest latency; (n - 1) M bytes leave each rank, so for small messages only.
Any number of ranks and elements.
"""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """One step, in which all messages of a rank leave one after the other."""
    far = len(shape.node_sizes) > 1
    latency, per_byte = (link.far_latency, link.far_per_byte) if far else (link.latency, link.per_byte)
    return latency + (shape.size - 1) * shape.nbytes * per_byte


def slots(shape: Shape) -> Slots:
    """A slot for every other rank, each of a whole message."""
    return Slots(shape.size - 1, 1, shape.itemsize)


@algorithm("one_shot", verb="allreduce", source="MPICH's and NCCL's direct all-reduce", order="rank order", opens=True)
def text(v: Any) -> Any:
    itemsize, begin, share, count_epoch, reduce_shared = v.itemsize, v.begin, v.share, v.count_epoch, v.reduce_shared

    def kernel(c, send, recv, count):
        e = begin(c)
        share(c, e, send, count * itemsize(c))
        count_epoch(c, e)
        reduce_shared(c, e, send, recv, count)

    return kernel
