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

from nvcoll.algorithms._registry import Link, Shape, algorithm, power_below, steps


def supports(shape: Shape) -> str | None:
    """Any call."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Steps inside a node first, then between nodes; folding takes two more."""
    far = len(shape.node_sizes) > 1
    latency, per_byte = (link.far_latency, link.far_per_byte) if far else (link.latency, link.per_byte)
    count = steps(shape.size) + (2 if shape.size != power_below(shape.size) else 0)
    return count * (latency + shape.nbytes * shape.width / shape.itemsize * per_byte)


def slots(shape: Shape) -> tuple[int, int]:
    """A slot for every step and two for folding, each of a whole message."""
    return steps(shape.size) + 2, 1


@algorithm(
    "recursive_doubling", verb="allreduce", source="Thakur, Rabenseifner & Gropp 2005", order="binary tree over ranks"
)
def text(v: Any) -> Any:
    rank, size, width, itemsize, begin, put = v.rank, v.size, v.width, v.itemsize, v.begin, v.put
    wait_copy, wait_reduce, accumulators, fill, finish_to = (
        v.wait_copy, v.wait_reduce, v.accumulators, v.fill, v.finish_to,
    )  # fmt: skip
    log2, fold, unfold = v.log2, v.fold, v.unfold

    def kernel(c, send, recv, count):
        e, me, n = begin(c), rank(c), size(c)
        doublings = log2(n)
        extra = n - (1 << doublings)  # ranks 0 .. 2 extra - 1 fold in pairs: the odd one of each hands over and waits
        acc = accumulators(c, recv)
        fill(c, acc, send, count)
        if me < 2 * extra and me % 2 == 1:
            put(c, e, me - 1, 0, acc, count * width(c))
            wait_copy(c, e, 1, recv, count * itemsize(c))
            return
        if me < 2 * extra:
            wait_reduce(c, e, me + 1, 0, acc, count)
        mine = fold(me, extra)
        for step in range(doublings):
            partner = unfold(mine ^ (1 << step), extra)
            put(c, e, partner, 2 + step, acc, count * width(c))
            wait_reduce(c, e, partner, 2 + step, acc, count)
        finish_to(c, recv, acc, count)
        if me < 2 * extra:
            put(c, e, me + 1, 1, recv, count * itemsize(c))

    return kernel
