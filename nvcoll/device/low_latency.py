"""The low-latency protocol: 56 bytes of data and their flag in one cache line, so that one transfer brings both.

The flag is stored after the data of its line (release) and read before it (acquire). Lines have memory of their own:
no data of the simple protocol ever lies where a flag is looked for.
"""

from types import SimpleNamespace
from typing import Any

PAYLOAD = 56
"""Bytes of data in a line; its flag is the last eight."""


def protocol(t: Any, v: Any) -> SimpleNamespace:
    """Return ``put_part``, ``put_end`` and ``arrive`` for target `t` with common verbs `v`."""
    f, jit, copy, copy_line, store_release, line = t.field, t.jit, t.copy, t.copy_line, t.store_release, t.line
    rank, lines, lines_half, stride, unpacked, error = f.rank, f.lines, f.lines_half, f.stride, f.unpacked, f.error
    area, half, notify, wait = v.area, v.half, v.notify, v.wait

    @jit
    def slot_at(c, e, p, slot):
        return area(c, p) + lines(c) + half(e) * lines_half(c) + slot * stride(c)

    @jit
    def put_part(c, e, p, slot, offset, source, nbytes):
        """Write bytes into lines of rank p, from a multiple of a block on."""
        if error(c) != 0:
            return
        at = slot_at(c, e, p, slot) + offset // PAYLOAD * line
        full = nbytes // PAYLOAD
        for k in range(full):
            copy_line(at + line * k, source + PAYLOAD * k)
            store_release(at + line * k + PAYLOAD, e)
        if nbytes > full * PAYLOAD:
            copy(at + line * full, source + PAYLOAD * full, nbytes - full * PAYLOAD)
            store_release(at + line * full + PAYLOAD, e)

    @jit
    def put_end(c, e, p, slot):
        """Wake rank p if it sleeps; the lines speak for themselves."""
        notify(c, p)

    @jit
    def arrive(c, e, slot, nbytes):
        """Wait for lines of mine and return the address of their data, taken out of the lines if there are several."""
        at = slot_at(c, e, rank(c), slot)
        if nbytes <= PAYLOAD:
            if nbytes > 0:
                wait(c, at + PAYLOAD, e)
            return at
        to = unpacked(c) + slot * stride(c)
        for k in range((nbytes + PAYLOAD - 1) // PAYLOAD):
            wait(c, at + line * k + PAYLOAD, e)
            copy_line(to + PAYLOAD * k, at + line * k)
        return to

    return SimpleNamespace(put_part=put_part, put_end=put_end, arrive=arrive)
