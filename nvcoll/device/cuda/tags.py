"""Calls that do not match are noticed where data carry no tag: ranks tell each other their tags besides.

In the low-latency protocol floats travel alone, so a call that sends as many packs, but of another count, datatype or
operator, would pass for a call that matches. A rank stores its tag on the others before its data, and nobody waits for
it: what has come is looked at in the next call, of any protocol. Two tags of one epoch that differ are a mismatch.

A tag's place goes by the parity of its epoch. Nobody begins epoch k + 1 before this rank has taken part in k: when it
begins k, the others' tags of k - 1 have not been written over. One that comes late is looked at a call later.

The host is told, and nothing else is done: the call that notices it goes on, for others wait for what it sends. They
notice it themselves.

Block 0 does it, by its last threads: the first ones have the data of small messages. Each tells one rank, and looks at
one; in a block of fewer threads than ranks some pairs are left out. Tags are loaded together with the epoch, for which
every thread must wait, so they take no time; and they are judged at once, for registers are needed later.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll.device.common import STAMP_BITS
from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.layout import TAGS, TAGS_RANK

REPORTED = 1
"""What tells the host that calls did not match."""


def verbs(jit: Any, v: SimpleNamespace) -> SimpleNamespace:
    """Return ``look_around``, ``judge`` and ``show``, on the verbs of `common`."""
    rank, size, peers, board, report = v.rank, v.size, v.peers, v.board, v.report
    half, around = v.half, v.around
    thread, threads, block = ptx.thread, ptx.threads, ptx.block
    load, load_shared, store_relaxed, fence = ptx.load, ptx.load_shared, ptx.store_relaxed, ptx.fence
    one_epoch = 1 << STAMP_BITS

    @jit
    def distance(c):
        """Return how far from this rank those are whom this thread looks at and tells; 0 is itself, -1 none."""
        last = threads() - 1 - thread()
        return last if block() == 0 and last < size(c) else -1

    @jit
    def tags_of(q):
        """Return where the tags of rank q lie in an area."""
        return TAGS + TAGS_RANK * q

    @jit
    def look_around(c):
        """Return this rank's tags and those of another one."""
        away = distance(c)
        if away < 0:
            return 0, 0, 0, 0
        q = around(rank(c) + away, size(c))
        return load_shared(board(c) + tags_of(rank(c))) + load_shared(board(c) + tags_of(q))

    @jit
    def judge(c, seen):
        """Tell the host if tags are of one epoch and differ."""
        even, odd = seen[0] ^ seen[2], seen[1] ^ seen[3]
        if 0 < even < one_epoch or 0 < odd < one_epoch:
            store_relaxed(report(c) + 8, around(rank(c) + distance(c), size(c)) + 1)
            fence()
            store_relaxed(report(c), REPORTED)

    @jit
    def show(c, e):
        """Note the tag of the call that begins, and tell it another rank."""
        away = distance(c)
        if away >= 0 and e >= 0:
            p = around(rank(c) + size(c) - away, size(c))
            store_relaxed(load(peers(c) + 8 * p) + tags_of(rank(c)) + 8 * half(e), e)

    return SimpleNamespace(look_around=look_around, judge=judge, show=show)
