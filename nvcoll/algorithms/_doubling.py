"""Recursive doubling over any number of places: all ranks, or those that own the same slice on each node."""

from typing import Any

from nvcoll.algorithms._registry import power_below, steps


def doubling_steps(places: int) -> int:
    """Return how many steps it takes, folding included."""
    return steps(places) + (2 if places != power_below(places) else 0)


def doubling_slots(places: int) -> int:
    """Return how many slots it takes."""
    return steps(places) + 2


def doubling_of(v: Any, rank_at: Any) -> Any:
    """Return ``double(c, e, me, total, k, source, acc, n, result, first)``, run by the ranks at places 0 to total - 1.

    It reduces n elements of each place, in a binary tree over the places, and leaves the result at `result`, by way of
    accumulators at `acc`. Mine are at `source`, or that is 0 and `acc` has their accumulators already: elements are
    sent where it is so far known to be all that there is, for they may be fewer bytes. Slots are used from `first` on.

    Parameters
    ----------
    v
        The verbs.
    rank_at
        ``rank_at(c, place, k)`` returns the rank at a place.
    """
    width, itemsize, put, fill, finish_to = v.width, v.itemsize, v.put, v.fill, v.finish_to
    log2, fold, unfold, wait_copy, wait_reduce, wait_reduce_all = (
        v.log2, v.fold, v.unfold, v.wait_copy, v.wait_reduce, v.wait_reduce_all,
    )  # fmt: skip

    @v.jit
    def double(c, e, me, total, k, source, acc, n, result, first):
        doublings = log2(total)
        extra = total - (1 << doublings)  # places 0 .. 2 extra - 1 fold in pairs: the odd of each hands over and waits
        if me < 2 * extra and me % 2 == 1:
            if source != 0:
                put(c, e, rank_at(c, me - 1, k), first + 1, source, n * itemsize(c))
            else:
                put(c, e, rank_at(c, me - 1, k), first + 1, acc, n * width(c))
            wait_copy(c, e, first, result, n * itemsize(c))
            return
        if me < 2 * extra:
            if source != 0:
                wait_reduce_all(c, e, 2, 0, first, source, acc, n)
            else:
                wait_reduce(c, e, rank_at(c, me + 1, k), first + 1, acc, n)
        elif source != 0 and extra > 0:
            fill(c, acc, source, n)
        mine = fold(me, extra)
        done = 0
        if source != 0 and extra == 0 and doublings > 0:
            upper = mine & 1
            put(c, e, rank_at(c, mine ^ 1, k), first + upper, source, n * itemsize(c))
            wait_reduce_all(c, e, 2, upper, first, source, acc, n)
            done = 1
        for step in range(done, doublings):
            partner = rank_at(c, unfold(mine ^ (1 << step), extra), k)
            put(c, e, partner, first + 2 + step, acc, n * width(c))
            wait_reduce(c, e, partner, first + 2 + step, acc, n)
        finish_to(c, result, acc, n)
        if me < 2 * extra:
            put(c, e, rank_at(c, me + 1, k), first, result, n * itemsize(c))

    return double
