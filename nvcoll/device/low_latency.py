"""The low-latency protocol: 56 bytes of data and their flag in one cache line, so that one transfer brings both.

The flag is stored after the data of its line (release) and read before it (acquire). Lines have memory of their own:
no data of the simple protocol ever lies where a flag is looked for. Questions and answers have a slot of their own for
each rank: an answer cannot be told from a question that has the same flag.
"""

from types import SimpleNamespace
from typing import Any

PAYLOAD = 56
"""Bytes of data in a line; its flag is the last eight."""


def protocol(t: Any, v: Any) -> SimpleNamespace:
    """Return the verbs of the protocol for target `t` with common verbs `v`."""
    f, jit, copy, copy_line, store_release, line = t.field, t.jit, t.copy, t.copy_line, t.store_release, t.line
    rank, size, lines, lines_half, stride = f.rank, f.size, f.lines, f.lines_half, f.stride
    unpacked, error = f.unpacked, f.error
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

    @jit
    def ask(c, e, p, source, nbytes):
        """Give rank p bytes that it will answer with as many."""
        put_part(c, e, p, rank(c), 0, source, nbytes)
        put_end(c, e, p, rank(c))

    @jit
    def asked(c, e, p, nbytes):
        """Wait for rank p's question and return its address."""
        return arrive(c, e, p, nbytes)

    @jit
    def answer_at(c, e, p):
        """Return the address to which the answer for rank p may be written, or 0 if it takes `answer_part`."""
        return 0

    @jit
    def answer_part(c, e, p, offset, source, nbytes):
        """Write bytes of the answer for rank p, from a multiple of a block on."""
        put_part(c, e, p, size(c) + rank(c), offset, source, nbytes)

    @jit
    def answer_end(c, e, p):
        """Tell rank p that the answer is complete."""
        put_end(c, e, p, size(c) + rank(c))

    @jit
    def answered(c, e, p, nbytes):
        """Wait for rank p's answer and return its address."""
        return arrive(c, e, size(c) + p, nbytes)

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
