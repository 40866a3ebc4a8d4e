"""What a rank exchanges with each of a group, as in `nvcoll.device.groups`, with all ranks of it at the same time.

In turn, every rank would cost a latency: of a load or, with flags, of a fence. All ranks of a group must be near.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.packs import BYTES
from nvcoll.device.groups import puts_in_turn


def together(jit: Any, v: SimpleNamespace, w: SimpleNamespace, one: Any) -> tuple[Any, Any]:
    """Return ``group_of`` and ``wait_slices`` for a protocol; with low latency, they are for small messages.

    Parameters
    ----------
    jit
        Decorator of device functions.
    v
        What `common.verbs` gives.
    w
        The protocol.
    one
        ``one(c, e, at, i)`` waits for a pack of a slot and returns it.
    """
    return _flags_together(jit, v, w) if w.signals else _packs_together(jit, v, w, one)


def _packs_together(jit: Any, v: SimpleNamespace, w: SimpleNamespace, one: Any) -> tuple[Any, Any]:
    """Let threads share out the packs of the whole message, wherever each of these goes to or comes from.

    A slice of a few packs would leave most threads of a block idle.
    """
    itemsize, get, put_back, outward, rank, around, without, slice_of = (
        v.itemsize, v.get, v.put_back, v.outward, v.rank, v.around, v.without, v.slice_of,
    )  # fmt: skip
    slot_at, pack_at, push, thread, threads = w.slot_at, w.pack_at, w.push, ptx.thread, ptx.threads

    @jit
    def normal(k, at, each, slices):
        """Return the slice in which a place lies that is `at` bytes behind the beginning of slice k, and where in it.

        Slices follow each other around; all are taken to be of `each` bytes.
        """
        while at >= each:
            at -= each
            k = around(k + 1, slices)
        return k, at

    def each_pack(move: Any) -> Any:
        """Return what lets threads move the packs of all slices but mine, each always the same packs of a message.

        ``move(c, e, k, me, slot, at, message, i, nbytes)`` gets the slice k, and where the pack lies: `at` in the
        slice, `i` in the message of so many bytes.
        """

        @jit
        def walk(c, e, slices, me, slot, message, count):
            each, nbytes = slice_of(count, slices) * itemsize(c), count * itemsize(c)
            first, step = thread() * BYTES, threads() * BYTES
            k, at = around(me % slices + 1, slices), first
            while first < slices * each:
                k, at = normal(k, at, each, slices)
                i = k * each + at
                if k != me and i < nbytes:
                    move(c, e, k, me, slot, at, message, i, nbytes)
                first += step
                at += step

        return walk

    def group_of(rank_at: Any) -> tuple[Any, Any]:
        @jit
        def send(c, e, k, me, slot, at, source, i, nbytes):
            p, pack = rank_at(c, k), get(source + i, nbytes - i)  # both loads, before the first is used
            to = outward(c, e, slot_at(c, e, p, slot + without(k, me)))
            push(pack_at(to, at), pack, e)

        @jit
        def put_all(c, e, places, me, slot, source, nbytes):
            i = thread() * BYTES
            while i < nbytes:
                pack = get(source + i, nbytes - i)
                k = around(me + 1, places)
                while k != me:  # compilers unroll loops over a number, which takes longer for the few that there are
                    to = outward(c, e, slot_at(c, e, rank_at(c, k), slot + without(k, me)))
                    push(pack_at(to, i), pack, e)
                    k = around(k + 1, places)
                i += threads() * BYTES

        return each_pack(send), put_all

    @jit
    def receive(c, e, k, me, slot, at, to, i, nbytes):
        pack = one(c, e, slot_at(c, e, rank(c), slot + without(me, k)), at)
        put_back(to + i, pack, nbytes - i)

    return group_of, each_pack(receive)


def _flags_together(jit: Any, v: SimpleNamespace, w: SimpleNamespace) -> tuple[Any, Any]:
    """Store all data before the first flag is set, and let each flag be set, and awaited, by a thread of its own."""
    itemsize, rank, without, part_at, copy = v.itemsize, v.rank, v.without, v.part_at, v.copy
    flag, tell, wait_flags, slot_at = v.flag, v.tell, v.wait_flags, w.slot_at
    thread, threads, meet = ptx.thread, ptx.threads, ptx.meet
    data_of = puts_in_turn(jit, v, w.put_data)

    def group_of(rank_at: Any) -> tuple[Any, Any]:
        data_slices, data_all = data_of(rank_at)

        @jit
        def put_ends(c, e, places, me, slot):
            """Tell the first places but mine that their slots are full."""
            meet(e)
            k = thread()
            while k < places:
                if k != me:
                    tell(flag(c, e, rank_at(c, k), slot + without(k, me)), e)
                k += threads()

        @jit
        def put_slices(c, e, slices, me, slot, source, count):
            data_slices(c, e, slices, me, slot, source, count)
            put_ends(c, e, slices, me, slot)

        @jit
        def put_all(c, e, places, me, slot, source, nbytes):
            data_all(c, e, places, me, slot, source, nbytes)
            put_ends(c, e, places, me, slot)

        return put_slices, put_all

    @jit
    def wait_slices(c, e, slices, me, slot, to, count):
        """Wait for slices and store them, all after the last flag."""
        wait_flags(c, e, slot, slices - 1 if me < slices else slices)
        for k in range(slices):
            if k != me:
                lo, hi = part_at(c, count, slices, k), part_at(c, count, slices, k + 1)
                at = slot_at(c, e, rank(c), slot + without(me, k))
                copy(to + lo * itemsize(c), at, (hi - lo) * itemsize(c))

    return group_of, wait_slices
