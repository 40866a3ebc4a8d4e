"""Verbs that do not depend on the protocol: where I am, epochs, signals, waiting, and arithmetic on blocks.

Every verb but plain arithmetic takes the call `c` first, and those that communicate take the call's tag `e` next: the
epoch, shifted left by STAMP_BITS, and the call's stamp below. A flag is a tag, so flags of another call, or of a call
that does not match on another rank, are never taken for one's own.

Two halves of every area take turns by the parity of the epoch. The half of epoch k is written again in epoch
k + 2, and that is safe without any acknowledgement: a rank begins epoch k + 2 after its epoch k + 1 is complete; a
complete reduction over all ranks holds a contribution of every rank to epoch k + 1; and a rank contributes to
epoch k + 1 after it has read all it was sent in epoch k. Questions, which lie in the area of the rank that asks, keep
to the same rule: an epoch is complete for that rank when all its questions were read and answered.
"""

from types import SimpleNamespace
from typing import Any

BLOCK = 16128
"""Bytes of accumulators that are worked on at a time: half of a first-level cache, and whole lines of any protocol."""
STAMP_BITS = 24
"""Bits of a tag that tell calls of the same epoch apart; the other 40, on GPUs 39, are for the epoch."""


def part_at(c: Any, count: int, parts: int, k: int) -> int:
    """Return where part k of a message begins: parts are of the same size, but for the last."""
    each = (count + parts - 1) // parts
    return min(k * each, count)


def around(place: int, n: int) -> int:
    """Return a place modulo n, for places below 2 n: a division takes long."""
    return place - n if place >= n else place


def without(p: int, place: int) -> int:
    """Return a place as it is counted where place p is left out: nobody needs a slot for what is its own."""
    return place - 1 if place > p else place


def everyone(c: Any, place: int) -> int:
    """Return the rank at a place among all ranks."""
    return place


def middle(lo: int, hi: int) -> int:
    """Return where the upper half of a range begins; the lower half is the larger."""
    return (lo + hi + 1) // 2


def log2(n: int) -> int:
    """Return how often n can be halved: the steps of recursive doubling over n ranks, or the power of two below."""
    k = 0
    while n >> (k + 1) > 0:
        k += 1
    return k


def fold(me: int, extra: int) -> int:
    """Return my place when ranks 0 .. 2 extra - 1 have folded in pairs, so that a power of two of them is left."""
    return me // 2 if me < 2 * extra else me - extra


def unfold(place: int, extra: int) -> int:
    """Return which rank has a place after folding; of a pair, it is the even one."""
    return 2 * place if place < extra else place + extra


def heaps(jit: Any, area: Any, rank: Any, heap: Any, heap_size: Any) -> tuple[Any, Any]:
    """Return ``heap_of`` and ``offset``, of a target's own fields."""

    @jit
    def heap_of(c, p):
        """Return where rank p's symmetric heap begins: heaps and areas lie at the same distance on all ranks."""
        return area(c, p) - area(c, rank(c)) + heap(c)

    @jit
    def offset(c, address, nbytes):
        """Return where in my symmetric heap an array lies, or -1 if it does not."""
        at = address - heap(c)
        if at < 0 or at + nbytes > heap_size(c):
            return -1
        return at

    return heap_of, offset


def verbs(t: Any) -> SimpleNamespace:
    """Return the verbs, built on the primitives of target `t`."""
    f, jit = t.field, t.jit
    load, store, load_acquire, store_release = t.load, t.store, t.load_acquire, t.store_release
    fence, copy, pause = t.fence, t.copy, t.pause
    call2, call3, call4, call5 = t.call2, t.call3, t.call4, t.call5
    world, rank, ranks, peers, epoch, stamp = f.world, f.rank, f.ranks, f.peers, f.epoch, f.stamp
    spin, wait_slowly, wake, bell, error = f.spin, f.wait, f.wake, f.bell, f.error
    flags, flags_half, line = f.flags, f.flags_half, t.line
    itemsize, width, reduce, widen, finish = f.itemsize, f.width, f.reduce, f.widen, f.finish
    workspace, blocks, heap, heap_size = f.workspace, f.blocks, f.heap, f.heap_size

    @jit
    def begin(c):
        """Open the next epoch and return its tag."""
        now = load(epoch(c)) + 1  # grow the epoch, never zero it: a late peer may still read the old flag
        store(epoch(c), now)
        return (now << STAMP_BITS) | stamp(c)

    @jit
    def half(e):
        return (e >> STAMP_BITS) & 1

    @jit
    def area(c, p):
        """Return the address of rank p's area of this communicator."""
        return load(peers(c) + 8 * p)

    @jit
    def notify(c, p):
        """Wake rank p if it sleeps. Stores come before the look at its doorbell: see wait_slowly for the other side."""
        fence()
        at = area(c, p) + bell(c)
        if load(at) != 0:
            call2(wake(c), world(c), at)

    @jit
    def wait(c, word, expected):
        """Wait until a word of my area has the expected value, or the call has failed."""
        for _ in range(spin(c)):
            if load_acquire(word) == expected:
                return
            pause()
        call3(wait_slowly(c), world(c), word, expected)

    @jit
    def flag(c, e, p, slot):
        """Return the address of a flag: a line of rank p's area."""
        return area(c, p) + flags(c) + half(e) * flags_half(c) + slot * line

    @jit
    def signal(c, e, p, slot, first, second):
        """Tell rank p that I am here, with two values."""
        if error(c) == 0:
            at = flag(c, e, p, slot)
            store(at + 8, first)
            store(at + 16, second)
            store_release(at, e)
            notify(c, p)

    @jit
    def wait_signal(c, e, slot):
        """Wait for a signal and return its values."""
        at = flag(c, e, rank(c), slot)
        wait(c, at, e)
        return load(at + 8), load(at + 16)

    heap_of, offset = heaps(jit, area, rank, heap, heap_size)

    @jit
    def accumulators(c, recv):
        """Return where partial results are kept: the result itself, unless they are wider than its elements."""
        return recv if widen(c) == 0 else workspace(c)

    @jit
    def fill(c, acc, source, n):
        """Set n accumulators to n elements."""
        if widen(c) != 0:
            call4(widen(c), acc, source, n, 0)
        elif acc != source:
            copy(acc, source, n * width(c))

    @jit
    def finish_to(c, to, acc, n):
        """Store n accumulators as elements of the result: here, and only here, rounding and AVG's division happen."""
        if finish(c) != 0:
            call4(finish(c), to, acc, n, ranks(c))
        elif to != acc:
            copy(to, acc, n * width(c))

    @jit
    def combine_as(c, widener, size, sources, first, k, acc, also, n):
        """Reduce n operands of `size` bytes, which `widener` makes accumulators of, 0 if they are that already."""
        step = BLOCK // width(c)
        for block in range((n + step - 1) // step):  # a range with a step could raise
            lo = block * step
            m = min(step, n - lo)
            to = acc + lo * width(c)
            left = load(sources) + (first + lo) * size
            if widener != 0:
                wide = to if k == 1 else blocks(c)
                call4(widener, wide, left, m, 0)
                left = wide
            elif k == 1 and left != to:
                copy(to, left, m * width(c))
            for j in range(1, k):
                right = load(sources + 8 * j) + (first + lo) * size
                if widener != 0:
                    call4(widener, blocks(c) + BLOCK, right, m, 0)
                    right = blocks(c) + BLOCK
                last = j == k - 1
                out = to if last else blocks(c)
                call5(reduce(c), out, also + lo * width(c) if last else out, left, right, m)
                left = out

    @jit
    def combine(c, sources, first, k, acc, also, n):
        """Reduce n elements, from `first` on, of the k arrays in a table, in its order, into n accumulators.

        The accumulators may be one of the arrays: a block is stored after all its operands were read. Those of more
        than one array are stored in a second place `also`, which is `acc` where there is none.
        """
        combine_as(c, widen(c), itemsize(c), sources, first, k, acc, also, n)

    @jit
    def combine_partials(c, sources, k, acc, n):
        """Reduce n accumulators of each of the k arrays in a table, in its order, into n, which may be one of them."""
        combine_as(c, 0, width(c), sources, 0, k, acc, acc, n)

    @jit
    def combine_one(c, lower, acc, data, n):
        """Reduce n accumulators at `data` into mine, from the left if they are a lower place's."""
        if lower:
            call5(reduce(c), acc, acc, data, acc, n)
        else:
            call5(reduce(c), acc, acc, acc, data, n)

    return SimpleNamespace(
        BLOCK=BLOCK,
        part_at=jit(part_at),
        around=jit(around),
        everyone=jit(everyone),
        middle=jit(middle),
        log2=jit(log2),
        fold=jit(fold),
        unfold=jit(unfold),
        without=jit(without),
        begin=begin,
        half=half,
        area=area,
        notify=notify,
        wait=wait,
        flag=flag,
        signal=signal,
        wait_signal=wait_signal,
        heap_of=heap_of,
        offset=offset,
        accumulators=accumulators,
        fill=fill,
        finish_to=finish_to,
        combine=combine,
        combine_partials=combine_partials,
        combine_one=combine_one,
    )
