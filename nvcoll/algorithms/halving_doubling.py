"""Recursive halving and doubling: partners exchange halves of what they still care for, then gather the results back.

    rank      0            1            2            3            4
    fold      0 <--------- 1            .            .            .     five ranks: the first two become one
    halve 2   01 keeps the lower half, 3 the upper; 2 and 4 likewise
    halve 1   each keeps a quarter, complete now
    double 1  quarters become halves
    double 2  halves become the whole
    unfold    0 ---------> 1

2 log2(n) steps, 2 (n - 1)/n M bytes: few steps and little traffic, for the middle of the range.
Any number of ranks and elements. Partners put the lower rank's operand on the left.
"""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm, folds, power_below, steps


def supports(shape: Shape) -> str | None:
    """Any call."""
    return None


def cost(shape: Shape, link: Link) -> float:
    """Halving and doubling; folding moves the whole message twice."""
    far = len(shape.node_sizes) > 1
    latency, per_byte = (link.far_latency, link.far_per_byte) if far else (link.latency, link.per_byte)
    power = power_below(shape.size)
    seconds = 2 * steps(shape.size) * latency + 2 * (power - 1) / power * shape.nbytes * per_byte
    if folds(shape.size):
        seconds += 2 * (latency + shape.nbytes * per_byte)
    return seconds


def slots(shape: Shape) -> Slots:
    """Slots for folding, halving and doubling. A whole message fits in one where there is folding, else half of one."""
    folded = folds(shape.size)
    return Slots(folded + 2 * steps(shape.size), 1 if folded else 2, shape.width)


@algorithm("halving_doubling", verb="allreduce", source="Rabenseifner 2004", order="binary tree over ranks")
def text(v: Any) -> Any:
    rank, size, width, itemsize, begin, put = v.rank, v.size, v.width, v.itemsize, v.begin, v.put
    wait_copy, wait_reduce, accumulators, fill, finish_to = (
        v.wait_copy, v.wait_reduce, v.accumulators, v.fill, v.finish_to,
    )  # fmt: skip
    log2, fold, unfold, middle = v.log2, v.fold, v.unfold, v.middle

    def kernel(c, send, recv, count):
        e, me, n = begin(c), rank(c), size(c)
        total = log2(n)
        power = 1 << total
        extra = n - power  # ranks 0 .. 2 extra - 1 fold in pairs: the odd one of each hands over and waits
        start = 1 if extra > 0 else 0
        acc = accumulators(c, recv)
        fill(c, acc, send, count)
        if me < 2 * extra and me % 2 == 1:
            put(c, e, me - 1, 0, acc, count * width(c))
            wait_copy(c, e, 0, recv, count * itemsize(c))
            return
        if me < 2 * extra:
            wait_reduce(c, e, False, 0, acc, count)
        mine = fold(me, extra)
        lo, hi = 0, count
        for step in range(total):  # the far partner first, so that slices end up in rank order
            distance = power >> (step + 1)
            partner = unfold(mine ^ distance, extra)
            cut = middle(lo, hi)  # the lower half is the larger: it fills a slot of half a message
            keep_lo, keep_hi, give_lo, give_hi = lo, cut, cut, hi
            if mine & distance:
                keep_lo, keep_hi, give_lo, give_hi = cut, hi, lo, cut
            put(c, e, partner, start + step, acc + give_lo * width(c), (give_hi - give_lo) * width(c))
            wait_reduce(c, e, mine & distance != 0, start + step, acc + keep_lo * width(c), keep_hi - keep_lo)
            lo, hi = keep_lo, keep_hi
        finish_to(c, recv + lo * itemsize(c), acc + lo * width(c), hi - lo)
        for step in range(total):  # the way back: my part and my partner's make the part of the step before
            distance = 1 << step
            partner = unfold(mine ^ distance, extra)
            put(c, e, partner, start + total + step, recv + lo * itemsize(c), (hi - lo) * itemsize(c))
            # Find the parent's bounds by walking down to it again: cheaper than keeping them on a stack.
            wide_lo, wide_hi = 0, count
            for above in range(total - 1 - step):
                cut = middle(wide_lo, wide_hi)
                if mine & (power >> (above + 1)):
                    wide_lo = cut
                else:
                    wide_hi = cut
            if mine & distance:
                wait_copy(c, e, start + total + step, recv + wide_lo * itemsize(c), (lo - wide_lo) * itemsize(c))
            else:
                wait_copy(c, e, start + total + step, recv + hi * itemsize(c), (wide_hi - hi) * itemsize(c))
            lo, hi = wide_lo, wide_hi
        if me < 2 * extra:
            put(c, e, me + 1, 0, recv, count * itemsize(c))

    return kernel
