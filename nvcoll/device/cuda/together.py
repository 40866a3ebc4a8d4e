"""What a rank exchanges with each of a group, as in `nvcoll.device.groups`, with all ranks of it at the same time.

For the low-latency protocol and small messages. In turn, every rank would cost the latency of a load, and a slice of a
few packs would leave most threads of a block idle. Here threads share out the packs of the whole message, wherever each
of these goes to or comes from.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.packs import BYTES


def together(jit: Any, v: SimpleNamespace, w: SimpleNamespace, one: Any) -> tuple[Any, Any]:
    """Return ``group_of`` and ``wait_slices``. All ranks of a group must be near.

    Parameters
    ----------
    jit
        Decorator of device functions.
    v
        What `common.verbs` gives.
    w
        The low-latency protocol.
    one
        ``one(c, e, at, i)`` waits for a pack of a slot and returns it.
    """
    itemsize, get, put_back, outward, rank, around, without, slice_of = (
        v.itemsize, v.get, v.put_back, v.outward, v.rank, v.around, v.without, v.slice_of,
    )  # fmt: skip
    slot_at, pack_at, push, thread, threads = w.slot_at, w.pack_at, w.push, ptx.thread, ptx.threads

    @jit
    def onward(k, at, each, slices):
        """Return the slice in which a place lies that is `at` bytes behind the beginning of slice k, and where in it.

        Slices follow each other around; all but the last of a message are of `each` bytes.
        """
        while at >= each:
            at -= each
            k = around(k + 1, slices)
        return k, at

    def group_of(rank_at: Any) -> tuple[Any, Any]:
        @jit
        def put_slices(c, e, slices, me, slot, source, count):
            each, nbytes, step = slice_of(count, slices) * itemsize(c), count * itemsize(c), threads() * BYTES
            k, at = onward(around(me % slices + 1, slices), thread() * BYTES, each, slices)
            first = thread() * BYTES
            while first < slices * each:
                i = k * each + at
                if k != me and i < nbytes:
                    to = outward(c, e, slot_at(c, e, rank_at(c, k), slot + without(k, me)))
                    push(pack_at(to, at), get(source + i, nbytes - i), e)
                k, at = onward(k, at + step, each, slices)
                first += step

        @jit
        def put_all(c, e, places, me, slot, source, nbytes):
            i = thread() * BYTES
            while i < nbytes:
                pack = get(source + i, nbytes - i)
                for step in range(1, places):
                    k = around(me + step, places)
                    to = outward(c, e, slot_at(c, e, rank_at(c, k), slot + without(k, me)))
                    push(pack_at(to, i), pack, e)
                i += threads() * BYTES

        return put_slices, put_all

    @jit
    def wait_slices(c, e, slices, me, slot, to, count):
        """Wait for slices and store them; no barrier ends it: nothing may be sent after it before `meet`.

        A thread stores those packs of a message that it has loaded when they were sent.
        """
        each, nbytes, step = slice_of(count, slices) * itemsize(c), count * itemsize(c), threads() * BYTES
        k, at = onward(around(me % slices + 1, slices), thread() * BYTES, each, slices)
        first = thread() * BYTES
        while first < slices * each:
            i = k * each + at
            if k != me and i < nbytes:
                pack = one(c, e, slot_at(c, e, rank(c), slot + without(me, k)), at)
                put_back(to + i, pack, nbytes - i)
            k, at = onward(k, at + step, each, slices)
            first += step

    return group_of, wait_slices
