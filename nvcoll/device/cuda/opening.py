"""How a call begins: its tag and, where a schedule begins with `share` or `put_own`, what these send.

What a small message takes counts from the end of the kernel before. Until then, a kernel may touch no memory of the
calls before, but it can compute: where its epoch and its first packs lie and, for `share`, where in a slot these go.
Then come two loads, of the epoch and of the thread's first pack, one right behind the other. Schedules that begin so
also count their epoch early, by `count_epoch`, while they wait; others leave that for the end of the launch.
docs/explanation/gpus.md says what that saves.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll._plan import DEVICE_FIELDS
from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.packs import BYTES
from nvcoll.device.cuda.remote import STORED_TO

TAG, LOW, HIGH, HERE, FIRST, AHEAD = range(len(DEVICE_FIELDS), len(DEVICE_FIELDS) + 6)
"""What follows the fields of a call: its tag, the words of the thread's first pack, and three addresses.

These are where my first slot begins in the first half and, for `share`, where that pack goes at the rank after me, and
where the slot begins that it has for me, in the first half.
"""
WAY = FIRST
"""Where some ranks are far, what stands in place of the last two: how the rank after me is reached (`remote.ways`)."""
OPENERS = "share", "reduce_shared", "put_own", "count_epoch"
"""Verbs that rely on what was loaded, or replace what entry does at the end: only for schedules known to use them."""


def without_openers(v: SimpleNamespace) -> SimpleNamespace:
    """Return the verbs for schedules of which nothing is known."""
    return SimpleNamespace(**{name: verb for name, verb in vars(v).items() if name not in OPENERS})


def plain_opening(jit: Any, v: SimpleNamespace) -> SimpleNamespace:
    """Return how epochs begin and end with schedules of which nothing is known: only the tag is.

    ``prepare(c)`` returns what can be computed before the kernel before has ended, and ``foresee(c, at, nbytes)`` what
    can be of the thread's first pack: it lies at `at`, and so many bytes of it count. ``start(c, ready, foreseen, at,
    nbytes)`` gets all that, and returns what follows the fields of a call; what is not known is 0. ``renew(c, e)`` ends
    an epoch that another one follows, ``advance(c, e)`` the last one, and ``count_epoch(c, e)`` is the verb for
    schedules that ``opens``: here it leaves all to these two.
    """
    begin = v.begin

    @jit
    def prepare(c):
        return (0,)

    @jit
    def foresee(c, at, nbytes):
        return 0, 0

    @jit
    def start(c, ready, foreseen, at, nbytes):
        return begin(c), 0, 0, 0, 0, 0

    return SimpleNamespace(
        prepare=prepare, foresee=foresee, start=start, renew=v.renew, advance=v.advance, count_epoch=_nothing(jit)
    )  # fmt: skip


def opening_of(
    jit: Any, v: SimpleNamespace, w: SimpleNamespace, ways: SimpleNamespace | None = None
) -> SimpleNamespace:
    """Return the same, with all that there is to know, for schedules that begin with ``share`` or ``put_own``.

    They count their epochs themselves, so nothing is left to do at the end. Where some ranks are far, `ways` says how
    they are reached.
    """
    tag_after, take, epoch_at, offset = v.tag_after, v.take, v.epoch_at, v.offset
    settled, pinned, load_pack, block = ptx.settled, ptx.pinned, ptx.load_pack, ptx.block
    prepare, chosen = (_near if ways is None else _far)(jit, v, w, ways)

    @jit
    def foresee(c, at, nbytes):
        """Return whence to load 16 bytes, and whether the pack must be taken in parts instead.

        A pack of the symmetric heap is loaded whole even if the message ends within it: what comes of the bytes behind
        is part of no result. A thread without a pack loads the epoch once more, which is no branch and costs nothing.
        """
        whole = nbytes > 0 and at & (BYTES - 1) == 0 and (nbytes >= BYTES or offset(c, at, BYTES) >= 0)
        return pinned(at if whole else epoch_at(c, block())), pinned(1 if nbytes > 0 and not whole else 0)

    @jit
    def start(c, ready, foreseen, at, nbytes):
        last, failed = load_pack(ready[0])
        if foreseen[1] == 0:
            low, high = load_pack(foreseen[0])
        else:
            low, high = take(at, nbytes)
            # Words, for the compiler: else it takes packs that were loaded whole to pieces too, hence waits for them.
            low, high = settled(low), settled(high)
        return (tag_after(c, last, failed), low, high, *chosen(ready, last, failed))

    return SimpleNamespace(
        prepare=prepare, foresee=foresee, start=start, renew=v.go_on, advance=_nothing(jit), count_epoch=v.advance
    )  # fmt: skip


def _near(jit: Any, v: SimpleNamespace, w: SimpleNamespace, ways: None) -> tuple[Any, Any]:
    """Return ``prepare``, and ``chosen(ready, last, failed)``: the addresses, by the epoch before and what failed."""
    epoch_at, rank, size, around, without, private, slots_half = (
        v.epoch_at, v.rank, v.size, v.around, v.without, v.private, v.slots_half,
    )  # fmt: skip
    slot_in, pack_at, settled, pinned, block, thread = (
        w.slot_in, w.pack_at, ptx.settled, ptx.pinned, ptx.block, ptx.thread,
    )  # fmt: skip

    @jit
    def prepare(c):
        p = around(rank(c) + 1, size(c))
        ahead, here = slot_in(c, p, without(p, rank(c))), slot_in(c, rank(c), 0)
        first = pack_at(ahead, thread() * BYTES)
        return (
            pinned(epoch_at(c, block())), settled(ahead), settled(here),
            pinned(first), pinned(first + slots_half(c)), pinned(private(c)),
        )  # fmt: skip

    @jit
    def chosen(ready, last, failed):
        _, ahead, here, even, odd, nowhere = ready
        first = odd if last & 1 == 0 else even  # by the epoch that begins: the tag takes longer to make
        return here, nowhere if failed < 0 else first, ahead

    return prepare, chosen


def _far(jit: Any, v: SimpleNamespace, w: SimpleNamespace, ways: SimpleNamespace) -> tuple[Any, Any]:
    """Return the same where some ranks are far. None sends with a negative tag: all threads of the block meet first."""
    epoch_at, rank, size, around = v.epoch_at, v.rank, v.size, v.around
    way, slot_in, pinned, block = ways.way, w.slot_in, ptx.pinned, ptx.block

    @jit
    def prepare(c):
        return (
            pinned(epoch_at(c, block())),
            pinned(slot_in(c, rank(c), 0)),
            pinned(way(c, around(rank(c) + 1, size(c)))),
        )

    @jit
    def chosen(ready, last, failed):
        _, here, there = ready
        return here, there, 0

    return prepare, chosen


def known_ways(jit: Any, v: SimpleNamespace, ways: SimpleNamespace) -> SimpleNamespace:
    """Return what `remote.ways` gives, with the answers for the rank after me, and for my slots, that `start` returned.

    That they were asked for brought NVSHMEM's tables into caches, too.
    """
    half, rank, size, stride, slots_half, around = v.half, v.rank, v.size, v.stride, v.slots_half, v.around
    here, known, cells, lines = ptx.field(HERE), ptx.field(WAY), v.cells, v.lines
    stored_to_now, way_now = ways.stored_to, ways.way

    @jit
    def stored_to(c, p):
        if p == around(rank(c) + 1, size(c)):
            return known(c) == STORED_TO
        return stored_to_now(c, p)

    @jit
    def way(c, p):
        if p == around(rank(c) + 1, size(c)):
            return known(c)
        return way_now(c, p)

    @jit
    def places(c, e, slot):
        to = here(c) + half(e) * slots_half(c) + slot * stride(c)
        return to - lines(c) + cells(c), to

    return SimpleNamespace(stored_to=stored_to, way=way, places=places)


def _nothing(jit: Any) -> Any:
    """Return a verb that does nothing at the end of an epoch."""

    @jit
    def nothing(c, e):
        pass

    return nothing


def plain_storer(jit: Any, v: SimpleNamespace, w: SimpleNamespace, put: Any) -> tuple[Any, Any]:
    """Return ``store_own`` and ``put_own`` where nothing was loaded: the protocol's ``store_part``, and `put`."""
    return w.store_part, put


def own_storer(jit: Any, v: SimpleNamespace, w: SimpleNamespace, put: Any) -> tuple[Any, Any]:
    """Return the same for a message whose first packs `start` has loaded, to near ranks, with low latency."""
    get, outward, slot_at, pack_at, push, thread, threads = (
        v.get, v.outward, w.slot_at, w.pack_at, w.push, ptx.thread, ptx.threads,
    )  # fmt: skip
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

    @jit
    def put_own(c, e, p, slot, source, nbytes):
        store_own(c, e, outward(c, e, slot_at(c, e, p, slot)), source, nbytes)

    return store_own, put_own


def sharing_at_once(
    jit: Any, v: SimpleNamespace, a: SimpleNamespace, w: SimpleNamespace, gather: Any
) -> tuple[Any, Any]:
    """Return ``share`` and ``reduce_shared`` for small messages with low latency; all ranks, two or more, are near.

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
    get, give, outward, half, slots_half, rank, ranks, size, around, without = (
        v.get, v.give, v.outward, v.half, v.slots_half, v.rank, v.ranks, v.size, v.around, v.without,
    )  # fmt: skip
    slot_at, pack_at, push, thread, threads, settled, store_pack = (
        w.slot_at, w.pack_at, w.push, ptx.thread, ptx.threads, ptx.settled, ptx.store_pack,
    )  # fmt: skip
    low, high, first, ahead, here = (ptx.field(index) for index in (LOW, HIGH, FIRST, AHEAD, HERE))
    itemsize, finish = a.itemsize, a.finish

    @jit
    def share(c, e, source, nbytes):
        pack = low(c), high(c)
        i = thread() * BYTES
        if i < nbytes:
            push(first(c), pack, e)
        me, n = rank(c), size(c)
        next_one = outward(c, e, ahead(c) + half(e) * slots_half(c))
        while i < nbytes:
            k = around(me + 2, n)
            while k != me:
                push(pack_at(outward(c, e, slot_at(c, e, k, without(k, me))), i), pack, e)
                k = around(k + 1, n)
            i += threads() * BYTES
            if i < nbytes:
                pack = get(source + i, nbytes - i)
                push(pack_at(next_one, i), pack, e)

    @jit
    def reduce_shared(c, e, source, recv, n):
        nbytes = n * itemsize
        at = here(c) + half(e) * slots_half(c)
        own = low(c), high(c)
        i = thread() * BYTES
        while i < nbytes:
            to = settled(recv + i)  # before the wait, like what follows
            whole = settled(1 if nbytes - i >= BYTES and to & (BYTES - 1) == 0 else 0)
            total = finish(gather(c, e, size(c), rank(c), at, own, i), ranks(c))
            if whole != 0:
                store_pack(to, total)
            else:
                give(to, total, nbytes - i)
            i += threads() * BYTES
            if i < nbytes:
                own = get(source + i, nbytes - i)

    return share, reduce_shared
