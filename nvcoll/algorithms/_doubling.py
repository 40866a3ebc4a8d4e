"""Recursive doubling over any number of places: all ranks, or those that own the same slice on each node."""

from typing import Any

from nvcoll.algorithms._registry import Shape, folds, steps


def doubling_steps(places: int) -> int:
    """Return how many steps it takes, folding included."""
    return steps(places) + (2 if folds(places) else 0)


def doubling_slots(places: int) -> int:
    """Return how many slots it takes: one a step, and one where places fold, which each comes to from one side only.

    Kernels count with this very text.
    """
    number, power = 0, 1
    while 2 * power <= places:
        number, power = number + 1, 2 * power
    return number + 1 if places > power else number


def doubling_width(places: int, shape: Shape) -> int:
    """Return the bytes of what fills a slot, for each element, where no place has accumulators to begin with."""
    return shape.itemsize if places == 2 else shape.width


def doubling_of(v: Any, rank_at: Any) -> Any:
    """Return ``double(c, e, me, total, source, acc, n, result)``, run by the ranks at places 0 to total - 1.

    It reduces n elements of each place, in a binary tree over the places, and leaves the result at `result`, by way of
    accumulators at `acc`. Mine are at `source`, the message itself, and the epoch is still to be counted; or that is 0,
    and `acc` has their accumulators already. Elements are sent where it is so far known to be all that there is, for
    they may be fewer bytes. The first slots are used.

    Parameters
    ----------
    v
        The verbs.
    rank_at
        ``rank_at(c, place)`` returns the rank at a place.
    """
    width, itemsize, put, put_own, fill, finish_to = v.width, v.itemsize, v.put, v.put_own, v.fill, v.finish_to
    log2, fold, unfold, count_epoch = v.log2, v.fold, v.unfold, v.count_epoch
    wait_copy, wait_reduce, wait_reduce_all, wait_reduce_finish = (
        v.wait_copy, v.wait_reduce, v.wait_reduce_all, v.wait_reduce_finish,
    )  # fmt: skip

    @v.jit
    def double(c, e, me, total, source, acc, n, result):
        doublings = log2(total)
        extra = total - (1 << doublings)  # places 0 .. 2 extra - 1 fold in pairs: the odd of each hands over and waits
        start = 1 if extra > 0 else 0
        done = 0
        if source != 0 and extra == 0 and doublings > 0:  # nobody folds: the usual case comes first
            put_own(c, e, rank_at(c, me ^ 1), 0, source, n * itemsize(c))
            count_epoch(c, e)
            if doublings == 1:
                wait_reduce_finish(c, e, 2, me & 1, 0, source, result, n)
                return
            wait_reduce_all(c, e, 2, me & 1, 0, source, acc, n)
            done = 1
        elif me < 2 * extra and me % 2 == 1:
            if source != 0:
                put_own(c, e, rank_at(c, me - 1), 0, source, n * itemsize(c))
                count_epoch(c, e)
            else:
                put(c, e, rank_at(c, me - 1), 0, acc, n * width(c))
            wait_copy(c, e, 0, result, n * itemsize(c))
            return
        elif extra > 0 and source != 0:
            count_epoch(c, e)
            if me < 2 * extra:
                wait_reduce_all(c, e, 2, 0, 0, source, acc, n)
            else:
                fill(c, acc, source, n)
        elif me < 2 * extra:
            wait_reduce(c, e, False, 0, acc, n)
        mine = fold(me, extra)
        for step in range(done, doublings):
            partner = rank_at(c, unfold(mine ^ (1 << step), extra))
            put(c, e, partner, start + step, acc, n * width(c))
            wait_reduce(c, e, mine & (1 << step) != 0, start + step, acc, n)  # by places: ranks may be in another order
        finish_to(c, result, acc, n)
        if me < 2 * extra:
            put(c, e, rank_at(c, me + 1), 0, result, n * itemsize(c))

    return double
