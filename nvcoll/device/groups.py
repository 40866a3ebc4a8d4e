"""What a rank exchanges with each of a group: a slice of a message with each, or the same bytes with all.

A group is k ranks at places 0 to k - 1, of which one is mine: ``rank_at(c, place)`` says who they are. Whatever a rank
sends, it goes to the place after its own first, so that not all send to the same one at once. Nobody has a slot for
what is its own: what comes from place p to place q is in the slot ``without(q, p)`` after the first.

The verbs `put_slices` and `put_all` are made by ``group_of(rank_at)`` for ranks of a node, which are near, and by
``anywhere_of(rank_at)`` for any; the two differ only on GPUs of which some are far. After `wait_slices` a schedule may
send nothing more in the same epoch: on GPUs, no barrier need end it.
"""

from typing import Any


def puts_in_turn(jit: Any, v: Any, put: Any) -> Any:
    """Return ``group_of``, whose verbs go from one rank to the next.

    Parameters
    ----------
    jit
        Decorator of device functions.
    v
        The verbs so far.
    put
        Writes bytes into a slot of a rank.
    """
    itemsize, around, without, part_at = v.itemsize, v.around, v.without, v.part_at

    def group_of(rank_at: Any) -> tuple[Any, Any]:
        """Return ``put_slices`` and ``put_all``."""

        @jit
        def put_slices(c, e, slices, me, slot, source, count):
            """Send each of the first places but mine its slice of a message. I may be behind them."""
            after = me % slices + 1
            for step in range(slices):
                k = around(after + step, slices)
                if k != me:
                    lo, hi = part_at(c, count, slices, k), part_at(c, count, slices, k + 1)
                    put(c, e, rank_at(c, k), slot + without(k, me), source + lo * itemsize(c), (hi - lo) * itemsize(c))

        @jit
        def put_all(c, e, places, me, slot, source, nbytes):
            """Send all places but mine the same bytes. I am at one of them."""
            for step in range(1, places):
                k = around(me + step, places)
                put(c, e, rank_at(c, k), slot + without(k, me), source, nbytes)

        return put_slices, put_all

    return group_of


def waits_in_turn(jit: Any, v: Any, wait_copy: Any) -> Any:
    """Return ``wait_slices``, which goes from one rank to the next.

    Parameters
    ----------
    jit, v
        As for `puts_in_turn`.
    wait_copy
        Waits for the bytes of a slot and stores them.
    """
    itemsize, around, without, part_at = v.itemsize, v.around, v.without, v.part_at

    @jit
    def wait_slices(c, e, slices, me, slot, to, count):
        """Wait for the slice of each of the first places but mine, and store it where it belongs in a message."""
        before = me % slices + slices - 1
        for step in range(slices):  # in the order in which they are sent to me
            k = around(before - step, slices)
            if k != me:
                lo, hi = part_at(c, count, slices, k), part_at(c, count, slices, k + 1)
                wait_copy(c, e, slot + without(me, k), to + lo * itemsize(c), (hi - lo) * itemsize(c))

    return wait_slices


def sharing(jit: Any, v: Any, put_all: Any, wait_reduce_finish: Any) -> tuple[Any, Any]:
    """Return ``share`` and ``reduce_shared``: all ranks get everyone's message, and reduce them to the result.

    They are the whole of a schedule, or of what it does in a world of a certain shape. On GPUs, what is sent first is
    loaded as the call begins; so the algorithm must be registered as one that ``opens``, and counts its epochs.

    Parameters
    ----------
    jit, v
        As for `puts_in_turn`.
    put_all
        That of the group of all ranks.
    wait_reduce_finish
        Waits for elements of all, and reduces them in their order to the result.
    """
    rank, size = v.rank, v.size

    @jit
    def share(c, e, source, nbytes):
        """Send all other ranks my message."""
        put_all(c, e, size(c), rank(c), 0, source, nbytes)

    @jit
    def reduce_shared(c, e, source, recv, n):
        """Wait for the messages of all others, of n elements, and reduce all in the order of the ranks."""
        wait_reduce_finish(c, e, size(c), rank(c), 0, source, recv, n)

    return share, reduce_shared
