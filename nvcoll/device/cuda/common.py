"""Verbs of the CUDA target that do not depend on the protocol: where I am, epochs, signals, waiting, local arithmetic.

Blocks are independent of each other: block b of a rank talks to block b of the other ranks only, through flags and
slots of its own, and counts epochs of its own. Epochs lie in device memory, so that a launch captured in a graph
counts on when it is replayed. As on the host, two halves of every slot take turns by the parity of the epoch, and
the same argument (see `nvcoll.device.common`) shows that a half is written again only after it was read.

What was not received must not be passed on, lest a peer takes it for what it awaits. A thread whose wait is over its
deadline ends. The barriers after waits, and those before signals, count the threads (`meet`), and a block that has lost
one ends. And once any block of a rank has failed, the tags of all its calls are negative, with which nothing is sent.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll._plan import DEVICE_FIELDS
from nvcoll.device.common import STAMP_BITS, around, everyone, fold, heaps, unfold, without
from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.layout import BLOCKS, EPOCH, EPOCHS, FAILED, HISTORY, LAST, LINE, NEAR
from nvcoll.device.cuda.packs import BYTES

LOOK = 256
"""Counts of polls in vain between looks at the clock and at what other blocks met."""


def verbs(jit: Any, a: SimpleNamespace, p: SimpleNamespace, deep: bool) -> SimpleNamespace:
    """Return the verbs for an operator on a datatype.

    Parameters
    ----------
    jit
        Decorator of device functions.
    a
        What `packs.arithmetic` gives.
    p
        What `packs.partial` gives.
    deep
        Whether a thread has up to four packs under way at a time.
    """
    f = SimpleNamespace(**{name: ptx.field(index) for index, name in enumerate(DEVICE_FIELDS)})
    load, store, load_acquire, load_relaxed = ptx.load, ptx.store, ptx.load_acquire, ptx.load_relaxed
    store_relaxed, store_all, fence, sync, clock = ptx.store_relaxed, ptx.store_all, ptx.fence, ptx.sync, ptx.clock
    add = ptx.add
    thread, threads, block, any_of, meet, leave = ptx.thread, ptx.threads, ptx.block, ptx.any_of, ptx.meet, ptx.leave
    load_pack, store_pack, take, give = ptx.load_pack, ptx.store_pack, p.take, p.give
    peers, rank, size, state, report, timeout, board = f.peers, f.rank, f.size, f.state, f.report, f.timeout, f.board
    send, stamp, flags, flags_half, flags_block = f.send, f.stamp, f.flags, f.flags_half, f.flags_block
    heap, heap_size, ranks, workspace, workspace_block = f.heap, f.heap_size, f.ranks, f.workspace, f.workspace_block
    widen_pack, finish_pack = a.widen, a.finish
    size_of, width_of, words, widens, finishes = a.itemsize, a.width, a.words, a.widens, a.finishes

    @jit
    def itemsize(c):
        return size_of

    @jit
    def width(c):
        return width_of

    shared = {function.__name__: jit(function) for function in (around, everyone, fold, unfold, without)}
    excluding, near = shared["without"], ptx.chosen([DEVICE_FIELDS.index(f"peer{k}") for k in range(NEAR)])

    @jit
    def area(c, p):
        """Return the address of rank p's area; those of the first ranks are arguments, which need not be loaded."""
        return near(c, p) if p < NEAR else load(peers(c) + 8 * p)

    @jit
    def epoch_at(c, b):
        """Return the address of block b's epoch, and of what says beside it whether this rank has failed."""
        return state(c) + EPOCHS + EPOCH * b

    @jit
    def tag_after(c, epoch, failed):
        """Return the tag of the epoch after one, negative if this rank has failed."""
        return ((epoch + 1) << STAMP_BITS) | stamp(c) | failed

    @jit
    def begin(c):
        """Return the tag of this block's next epoch, negative if this rank has failed.

        Threads may come to know of it one by one.
        """
        epoch, failed = load_pack(epoch_at(c, block()))
        return tag_after(c, epoch, failed)

    @jit
    def advance(c, e):
        """Count this block's epoch, as the last thing that a launch does for it or, better, while it waits for others.

        Its tag is at hand, so nothing need be loaded.
        """
        sync()  # all threads have read the epoch
        if thread() == 0:
            epoch = (e & ~FAILED) >> STAMP_BITS
            store(epoch_at(c, block()), 1 if epoch == LAST else epoch)  # 2 is next then: beyond it, tags are negative
            if block() == 0 and e >= 0:
                store_relaxed(board(c), e)  # for those who wonder why nothing comes
                history = state(c) + HISTORY
                if send(c) != history:  # which a barrier reduces, so it must stay as it is
                    square = e * e  # of tags themselves, the sum would not change if two calls had each other's
                    add(history, square)
                    add(history + 8, -square)

    @jit
    def go_on(c, e):
        """Go on to an epoch of the same launch: what was cleared is so for peers before they hear more."""
        sync()
        if thread() == 0:
            fence()
        meet(e)

    @jit
    def renew(c, e):
        """Count this block's epoch in the middle of a launch, and go on to the next one."""
        advance(c, e)
        go_on(c, e)

    @jit
    def half(e):
        return (e >> STAMP_BITS) & 1

    @jit
    def given_up(c, e, waited):
        """Tell whether to wait no more: the deadline is over, or another wait of this rank's was over its deadline."""
        if block() == 0 and e >= 0:
            store_relaxed(board(c), e)  # whoever else gives up sees that this rank has come
        if waited < timeout(c):
            return load_relaxed(state(c)) != 0
        fence()
        store_relaxed(report(c), FAILED)
        store_relaxed(state(c), FAILED)
        store_all(epoch_at(c, 0) + 8, epoch_at(c, BLOCKS), EPOCH, FAILED)
        return True

    @jit
    def in_vain(c, e, polls, since):
        """Count polls in vain, and look at the clock now and then; return counts, since when, and whether to give up.

        Both counts are 0 at first.
        """
        polls += 1
        if polls != LOOK:
            return polls, since, False
        now = clock()
        if since == 0:
            since = now
        return 0, since, given_up(c, e, now - since)

    @jit
    def wait_word(c, e, at):
        """Wait until a word is this call's tag, and tell whether to give up."""
        polls, since = 0, 0
        while load_acquire(at) != e:
            polls, since, gone = in_vain(c, e, polls, since)
            if gone:
                return True
        return False

    @jit
    def flag(c, e, p, slot):
        """Return the address of a flag in rank p's area."""
        return area(c, p) + flags(c) + half(e) * flags_half(c) + block() * flags_block(c) + slot * LINE

    @jit
    def private(c):
        """Return the address of memory that only this block uses."""
        return workspace(c) + block() * workspace_block(c)

    @jit
    def outward(c, e, at):
        """Return where to write what is for a peer: with a negative tag, to none. No branch: loads go on."""
        return private(c) if e < 0 else at

    @jit
    def tell(at, e):
        """Set a flag. What this thread has stored, and its block before the last barrier, is visible to who sees it."""
        fence()
        store_relaxed(at, e)

    @jit
    def wait_flags(c, e, slot, number):
        """Wait for flags of mine, from one on, each by a thread of its own.

        What those who set them had stored is visible to all threads of the block then.
        """
        gone = False
        k = thread()
        while k < number and not gone:
            gone = wait_word(c, e, flag(c, e, rank(c), slot + k))
            k += threads()
        if any_of(gone):
            leave()

    @jit
    def signal_all(c, e, slot, first, second):
        """Tell every other rank that I am here, with two values. All that this block has stored is visible to it then.

        The flag for rank p is that of a slot where p itself is not counted.
        """
        meet(e)
        p = thread()
        while p < size(c):
            if p != rank(c):
                at = flag(c, e, p, slot + excluding(p, rank(c)))
                store_relaxed(at + 8, first)
                store_relaxed(at + 16, second)
                tell(at, e)
            p += threads()

    @jit
    def wait_signals(c, e, slot):
        """Wait for a signal of every other rank."""
        wait_flags(c, e, slot, size(c) - 1)

    @jit
    def told(c, e, slot):
        """Return the values of a signal that has come."""
        at = flag(c, e, rank(c), slot)
        return load_relaxed(at + 8), load_relaxed(at + 16)

    heap_of, offset = heaps(jit, area, rank, heap, heap_size)

    @jit
    def accumulators(c, recv):
        """Return where partial results are kept: the result itself, unless they are wider than its elements."""
        if widens:
            return private(c)
        return recv

    @jit
    def get(at, nbytes):
        """Load a pack, of which the first bytes count, from any address."""
        if nbytes >= BYTES and at & (BYTES - 1) == 0:
            return load_pack(at)
        return take(at, nbytes)

    @jit
    def put_back(at, pack, nbytes):
        """Store the first bytes of a pack to any address."""
        if nbytes >= BYTES and at & (BYTES - 1) == 0:
            store_pack(at, pack)
        else:
            give(at, pack, nbytes)

    @jit
    def beyond(i, step, nbytes):
        """Return where the second to fourth pack from i on lie, `step` bytes apart, and what comes after them.

        The first two must be there. Where another is not, or not whole, its place is i again: loads, and stores to
        memory of one's own, may be done twice, and take no longer. What goes over a link must look whether it is i.
        """
        third = i + 2 * step if i + 2 * step + BYTES <= nbytes else i
        fourth = i + 3 * step if i + 3 * step + BYTES <= nbytes else i
        return i + step, third, fourth, max(i + step, third, fourth) + step

    @jit
    def load_four(at, i, i1, i2, i3):
        """Load four packs, all before the first is used."""
        return load_pack(at + i), load_pack(at + i1), load_pack(at + i2), load_pack(at + i3)

    @jit
    def copy(to, source, nbytes):
        """Copy bytes, by all threads of the block, pack i by thread i modulo their number."""
        i = thread() * BYTES
        step = threads() * BYTES
        if deep and (to | source) & (BYTES - 1) == 0:
            while i + step + BYTES <= nbytes:  # two to four packs under way at a time
                i1, i2, i3, after = beyond(i, step, nbytes)
                first, second, third, fourth = load_four(source, i, i1, i2, i3)
                store_pack(to + i, first)
                store_pack(to + i1, second)
                if i2 != i:
                    store_pack(to + i2, third)
                if i3 != i:
                    store_pack(to + i3, fourth)
                i = after
        while i < nbytes:
            put_back(to + i, get(source + i, nbytes - i), nbytes - i)
            i += step

    spread = words // 2  # packs of accumulators that a pack of elements becomes
    load_wide, store_wide = wide(jit, spread)

    @jit
    def fill_wide(acc, source, n):
        i = thread() * BYTES
        while i < n * size_of:
            store_wide(acc + i * spread, widen_pack(get(source + i, n * size_of - i)))
            i += threads() * BYTES

    @jit
    def fill(c, acc, source, n):
        """Set n accumulators to n elements."""
        if widens:
            fill_wide(acc, source, n)
        elif acc != source:
            copy(acc, source, n * size_of)
        sync()

    @jit
    def finish_wide(c, to, acc, n):
        i = thread() * BYTES
        while i < n * size_of:
            value = load_wide(acc + i * spread) if widens else get(acc + i, n * size_of - i)
            put_back(to + i, finish_pack(value, ranks(c)), n * size_of - i)
            i += threads() * BYTES

    @jit
    def finish_to(c, to, acc, n):
        """Store n accumulators as elements of the result: here, and only here, rounding and AVG's division happen."""
        if finishes:
            finish_wide(c, to, acc, n)
        elif to != acc:
            copy(to, acc, n * size_of)
        sync()

    @jit
    def slice_of(count, parts):
        """Return the elements of a part of a message, in whole packs; the last ones may have less."""
        unit = BYTES // size_of
        return (count + parts * unit - 1) // (parts * unit) * unit

    @jit
    def part_at(c, count, parts, k):
        """Return where part k of a message begins."""
        return min(k * slice_of(count, parts), count)

    @jit
    def middle(lo, hi):
        """Return where the upper half of a range begins, on a pack's boundary of it; the lower half is the larger."""
        unit = BYTES // size_of
        return min(lo + ((hi - lo + 1) // 2 + unit - 1) // unit * unit, hi)

    named = (
        itemsize, width, area, epoch_at, tag_after, begin, advance, go_on, renew, half, in_vain, flag, tell, wait_flags,
        signal_all, wait_signals, told, heap_of, offset, accumulators, private, outward, get, put_back, beyond,
        load_four, copy, fill, finish_to, slice_of, part_at, middle,
    )  # fmt: skip
    return SimpleNamespace(
        **vars(f)
        | {verb.py_func.__name__: verb for verb in named}
        | shared
        | {"log2": ptx.log2}
        | {"load": load, "store": store, "take": take, "give": give}
    )


def wide(jit: Any, spread: int) -> tuple[Any, Any]:
    """Return what loads and stores the accumulators of a pack of elements, `spread` packs."""
    load_pack, store_pack = ptx.load_pack, ptx.store_pack

    @jit
    def load_two(at):
        return load_pack(at) + load_pack(at + 16)

    @jit
    def store_two(at, acc):
        store_pack(at, acc[:2])
        store_pack(at + 16, acc[2:])

    @jit
    def load_four(at):
        return load_two(at) + load_two(at + 32)

    @jit
    def store_four(at, acc):
        store_two(at, acc[:4])
        store_two(at + 32, acc[4:])

    return {1: (load_pack, store_pack), 2: (load_two, store_two), 4: (load_four, store_four)}[spread]
