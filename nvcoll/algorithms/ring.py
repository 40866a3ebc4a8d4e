"""Ring: slices travel around a ring and grow by a contribution at every stop; then the finished ones go round again.

    rank      0           1           2           3           4
    step 1    a0.0 ->     a1.1 ->     a2.2 ->     a3.3 ->     a4.4 -> (to rank 0)
    step 2    a4+0.4 ->   a0+1.0 ->   a1+2.1 ->   a2+3.2 ->   a3+4.3 ->
    ...       after 4 steps rank r has slice r + 1 complete
    step 5-8  complete slices go round: each rank has all of them

2 (n - 1) steps of M/n bytes, each to one neighbour only: for large messages where links to neighbours are best.
Any number of ranks and elements.
"""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """The slowest link of the ring decides every step."""
    far = len(shape.node_sizes) > 1
    latency, per_byte = (link.far_latency, link.far_per_byte) if far else (link.latency, link.per_byte)
    return 2 * (shape.size - 1) * (latency + shape.nbytes / shape.size * per_byte)


def slots(shape: Shape) -> Slots:
    """A slot for every step, each of a slice."""
    return Slots(2 * (shape.size - 1), shape.size, shape.width)


@algorithm(
    "ring", verb="allreduce", source="Patarasuk & Yuan 2009", order="per slice: along the ring from its first rank"
)
def text(v: Any) -> Any:
    rank, size, width, itemsize, begin, put = v.rank, v.size, v.width, v.itemsize, v.begin, v.put
    wait_copy, wait_reduce, accumulators, fill, finish_to, part_at = (
        v.wait_copy, v.wait_reduce, v.accumulators, v.fill, v.finish_to, v.part_at,
    )  # fmt: skip

    def kernel(c, send, recv, count):
        e, me, n = begin(c), rank(c), size(c)
        right, left = (me + 1) % n, (me - 1) % n
        acc = accumulators(c, recv)
        fill(c, acc, send, count)
        for step in range(n - 1):  # slice (me - step) moves right, slice (me - step - 1) comes and grows
            k = (me - step) % n
            lo, hi = part_at(c, count, n, k), part_at(c, count, n, k + 1)
            put(c, e, right, step, acc + lo * width(c), (hi - lo) * width(c))
            k = (me - step - 1) % n
            lo, hi = part_at(c, count, n, k), part_at(c, count, n, k + 1)
            wait_reduce(c, e, left < me, step, acc + lo * width(c), hi - lo)
        k = (me + 1) % n  # complete now: round it once, here, and pass on what was rounded
        lo, hi = part_at(c, count, n, k), part_at(c, count, n, k + 1)
        finish_to(c, recv + lo * itemsize(c), acc + lo * width(c), hi - lo)
        for step in range(n - 1):  # slice (me + 1 - step) moves right
            k = (me + 1 - step) % n
            lo, hi = part_at(c, count, n, k), part_at(c, count, n, k + 1)
            put(c, e, right, n - 1 + step, recv + lo * itemsize(c), (hi - lo) * itemsize(c))
            k = (me - step) % n
            lo, hi = part_at(c, count, n, k), part_at(c, count, n, k + 1)
            wait_copy(c, e, n - 1 + step, recv + lo * itemsize(c), (hi - lo) * itemsize(c))

    return kernel
