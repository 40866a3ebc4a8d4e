"""The simple protocol: data, then a signal released after it. Every byte on the way is payload.

A question lies in a slot of the rank that asks, and the answer is written over it. A line then goes to the rank that
answers and comes back, already owned by the one that writes next; with slots apart for both ways, each line would have
to be taken back from its last reader before it can be written again.
"""

from types import SimpleNamespace
from typing import Any


def protocol(t: Any, v: Any) -> SimpleNamespace:
    """Return the verbs of the protocol for target `t` with common verbs `v`."""
    f, jit, copy, store_release = t.field, t.jit, t.copy, t.store_release
    rank, size, data, data_half, stride, error = f.rank, f.size, f.data, f.data_half, f.stride, f.error
    area, half, flag, notify, wait = v.area, v.half, v.flag, v.notify, v.wait

    @jit
    def slot_at(c, e, p, slot):
        return area(c, p) + data(c) + half(e) * data_half(c) + slot * stride(c)

    @jit
    def put_part(c, e, p, slot, offset, source, nbytes):
        """Write bytes into a slot of rank p, from a multiple of a block on."""
        if error(c) == 0:
            copy(slot_at(c, e, p, slot) + offset, source, nbytes)

    @jit
    def put_end(c, e, p, slot):
        """Tell rank p that its slot is full."""
        if error(c) == 0:
            store_release(flag(c, e, p, slot), e)
            notify(c, p)

    @jit
    def arrive(c, e, slot, nbytes):
        """Wait for a slot of mine to be filled and return the address of what came."""
        wait(c, flag(c, e, rank(c), slot), e)
        return slot_at(c, e, rank(c), slot)

    @jit
    def ask(c, e, p, source, nbytes):
        """Give rank p bytes that it will answer with as many."""
        copy(slot_at(c, e, rank(c), p), source, nbytes)
        put_end(c, e, p, rank(c))

    @jit
    def asked(c, e, p, nbytes):
        """Wait for rank p's question and return its address."""
        wait(c, flag(c, e, rank(c), p), e)
        return slot_at(c, e, p, rank(c))

    @jit
    def answer_at(c, e, p):
        """Return the address to which the answer for rank p may be written, or 0 if it takes `answer_part`."""
        return slot_at(c, e, p, rank(c)) if error(c) == 0 else 0

    @jit
    def answer_part(c, e, p, offset, source, nbytes):
        """Write bytes of the answer for rank p, from a multiple of a block on; their question is overwritten."""
        if error(c) == 0:
            copy(slot_at(c, e, p, rank(c)) + offset, source, nbytes)

    @jit
    def answer_end(c, e, p):
        """Tell rank p that the answer is complete."""
        put_end(c, e, p, size(c) + rank(c))

    @jit
    def answered(c, e, p, nbytes):
        """Wait for rank p's answer and return its address."""
        wait(c, flag(c, e, rank(c), size(c) + p), e)
        return slot_at(c, e, rank(c), p)

    return SimpleNamespace(
        put_part=put_part,
        put_end=put_end,
        arrive=arrive,
        ask=ask,
        asked=asked,
        answer_at=answer_at,
        answer_part=answer_part,
        answer_end=answer_end,
        answered=answered,
    )
