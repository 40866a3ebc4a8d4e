"""How a call begins: its tag and, where a schedule begins with `share` or `put_own`, what these send.

The latency of a small message counts from the end of the kernel before. Until then, a kernel may touch no memory of the
calls before, but it can compute: where its epoch lies, where what it sends first lies, and where that goes. Then come
two loads, of the epoch and of the thread's first pack, one right behind the other, and as soon as they are there the
store. A kernel that looked these up one after the other took 0.2 us longer.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll._plan import DEVICE_FIELDS
from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.packs import BYTES

TAG, LOW, HIGH, AHEAD, HERE = range(len(DEVICE_FIELDS), len(DEVICE_FIELDS) + 5)
"""What follows the fields of a call: its tag, the two words of the pack, the slot for which that is, and mine.

Of slots, these are the addresses in the first half.
"""


def plain_opening(jit: Any, v: SimpleNamespace) -> tuple[Any, Any]:
    """Return ``prepare`` and ``start`` for schedules of which nothing is known.

    ``prepare(c, at)`` gets the address of the thread's first pack, and returns that, the address of the epoch, and
    those of two slots; ``start(c, epoch, at, nbytes)`` returns the tag and the pack, of which so many bytes count.
    """
    begin = v.begin

    @jit
    def prepare(c, at):
        return at, 0, 0, 0

    @jit
    def start(c, epoch, at, nbytes):
        return begin(c), 0, 0

    return prepare, start


def opening_of(jit: Any, v: SimpleNamespace, w: SimpleNamespace) -> tuple[Any, Any]:
    """Return the same for schedules that begin with ``share`` or ``put_own`` of this module."""
    epoch_at, tag_after, take, rank, size, around, without = (
        v.epoch_at, v.tag_after, v.take, v.rank, v.size, v.around, v.without,
    )  # fmt: skip
    slot_in, settled, load_pack, block = w.slot_in, ptx.settled, ptx.load_pack, ptx.block

    @jit
    def prepare(c, at):
        p = around(rank(c) + 1, size(c))
        ahead, here = slot_in(c, p, without(p, rank(c))), slot_in(c, rank(c), 0)
        return settled(at), settled(epoch_at(c, block())), settled(ahead), settled(here)

    @jit
    def start(c, epoch, at, nbytes):
        last, failed = load_pack(epoch)
        low, high = 0, 0
        if nbytes >= BYTES and at & (BYTES - 1) == 0:
            low, high = load_pack(at)
        elif nbytes > 0:
            low, high = take(at, nbytes)
            # Words, for the compiler: else it takes packs that were loaded whole to pieces too, hence waits for them.
            low, high = settled(low), settled(high)
        return tag_after(c, last, failed), low, high

    return prepare, start


def own_storer(jit: Any, v: SimpleNamespace, w: SimpleNamespace) -> Any:
    """Return ``store_own(c, e, to, source, nbytes)``, the protocol's ``store_part`` of what `start` has loaded."""
    get, pack_at, push, thread, threads = v.get, w.pack_at, w.push, ptx.thread, ptx.threads
    low, high = ptx.field(LOW), ptx.field(HIGH)

    @jit
    def store_own(c, e, to, source, nbytes):
        pack = low(c), high(c)
        i = thread() * BYTES
        while i < nbytes:
            push(pack_at(to, i), pack, e)
            i += threads() * BYTES
            if i < nbytes:
                pack = get(source + i, nbytes - i)

    return store_own


def sharing_at_once(
    jit: Any, v: SimpleNamespace, a: SimpleNamespace, w: SimpleNamespace, gather: Any
) -> tuple[Any, Any]:
    """Return ``share`` and ``reduce_shared`` for small messages with low latency, to ranks that are all near.

    Parameters
    ----------
    jit
        Decorator of device functions.
    v
        What `common.verbs` gives.
    a
        What `packs.arithmetic` gives.
    w
        The protocol.
    gather
        ``gather(c, e, k, me, at, own, i)`` waits for pack i of all others, and reduces all to accumulators.
    """
    get, put_back, outward, half, slots_half, rank, ranks, size, around, without = (
        v.get, v.put_back, v.outward, v.half, v.slots_half, v.rank, v.ranks, v.size, v.around, v.without,
    )  # fmt: skip
    slot_at, pack_at, push, thread, threads = w.slot_at, w.pack_at, w.push, ptx.thread, ptx.threads
    low, high, ahead, here = (ptx.field(index) for index in (LOW, HIGH, AHEAD, HERE))
    itemsize, finish = a.itemsize, a.finish

    @jit
    def share(c, e, source, nbytes):
        me, n = rank(c), size(c)
        next_one = outward(c, e, ahead(c) + half(e) * slots_half(c))
        pack = low(c), high(c)
        i = thread() * BYTES
        while i < nbytes:
            push(pack_at(next_one, i), pack, e)
            k = around(me + 2, n)
            while k != me:
                push(pack_at(outward(c, e, slot_at(c, e, k, without(k, me))), i), pack, e)
                k = around(k + 1, n)
            i += threads() * BYTES
            if i < nbytes:
                pack = get(source + i, nbytes - i)

    @jit
    def reduce_shared(c, e, source, recv, n):
        nbytes = n * itemsize
        at = here(c) + half(e) * slots_half(c)
        own = low(c), high(c)
        i = thread() * BYTES
        while i < nbytes:
            total = gather(c, e, size(c), rank(c), at, own, i)
            put_back(recv + i, finish(total, ranks(c)), nbytes - i)
            i += threads() * BYTES
            if i < nbytes:
                own = get(source + i, nbytes - i)

    return share, reduce_shared
