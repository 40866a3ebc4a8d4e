"""The simple protocol: data, then a signal released after it. Every byte on the way is payload."""

from types import SimpleNamespace
from typing import Any


def protocol(t: Any, v: Any) -> SimpleNamespace:
    """Return ``put_part``, ``put_end`` and ``arrive`` for target `t` with common verbs `v`."""
    f, jit, copy, store_release = t.field, t.jit, t.copy, t.store_release
    rank, data, data_half, stride, error = f.rank, f.data, f.data_half, f.stride, f.error
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

    return SimpleNamespace(put_part=put_part, put_end=put_end, arrive=arrive)
