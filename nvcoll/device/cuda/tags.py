"""Calls that do not match are noticed where data carry no tag: ranks tell each other their tags besides.

In the low-latency protocol floats travel alone, so a call that sends as many packs, but of another count, datatype or
operator, would pass for a call that matches. A rank stores its tag on the others before its data, and nobody waits for
it: what has come is looked at in the next call, of any protocol. Two tags of one epoch that differ are a mismatch.

A tag's place goes by the parity of its epoch. Nobody begins epoch k + 1 before this rank has taken part in k: when it
begins k, the others' tags of k - 1 have not been written over, and all but always they have come.

Block 0 does it, by its last threads: the first ones have the data of small messages. Each tells one rank and looks at
one; in a block of fewer threads than ranks some pairs are left out. What is loaded as a call begins is used at its end,
and takes no time.
"""

from types import SimpleNamespace
from typing import Any

from nvcoll.device.common import STAMP_BITS
from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.layout import TAGS, TAGS_RANK


def verbs(jit: Any, v: SimpleNamespace) -> SimpleNamespace:
    """Return ``show``, ``look_around`` and ``judge``, on the verbs of `common`."""
    rank, size, peers, board, report = v.rank, v.size, v.peers, v.board, v.report
    half, around, epoch_at, fail = v.half, v.around, v.epoch_at, v.fail
    thread, threads, block = ptx.thread, ptx.threads, ptx.block
    load, load_relaxed, store_relaxed = ptx.load, ptx.load_relaxed, ptx.store_relaxed

    @jit
    def peer(c, onward):
        """Return whom this thread tells, or looks at (`onward`); -1: none."""
        distance = threads() - thread()
        if block() != 0 or distance >= size(c):
            return -1
        return around(rank(c) + (distance if onward else size(c) - distance), size(c))

    @jit
    def tag_of(q, parity):
        """Return where a tag of rank q lies in an area."""
        return TAGS + TAGS_RANK * q + 8 * parity

    @jit
    def show(c, e):
        """Tell another rank the tag of the call that begins."""
        p = peer(c, False)
        if p >= 0 and e >= 0:
            store_relaxed(load(peers(c) + 8 * p) + tag_of(rank(c), half(e)), e)

    @jit
    def look_around(c, e):
        """Return the tag of the call before, and what has come of another rank's; equal where there is none."""
        q = peer(c, True)
        if q < 0:
            return 0, 0
        return load(epoch_at(c, 0)), load_relaxed(board(c) + tag_of(q, 1 - half(e)))

    @jit
    def judge(c, mine, its):
        """Let this rank fail if two tags are of one epoch and differ."""
        if 0 < mine ^ its < 1 << STAMP_BITS:
            store_relaxed(report(c) + 8, peer(c, True) + 1)
            fail(c)

    return SimpleNamespace(show=show, look_around=look_around, judge=judge)
