"""The vocabulary of schedules on GPUs, and the kernel that hands each block its part of the message."""

from types import SimpleNamespace
from typing import Any

from nvcoll.device.cuda import common, low_latency, packs, ptx, simple
from nvcoll.device.cuda import remote as far
from nvcoll.device.cuda.layout import deepens
from nvcoll.device.cuda.opening import (
    TAG,
    known_ways,
    opening_of,
    own_storer,
    plain_opening,
    plain_storer,
    sharing_at_once,
    without_openers,
)
from nvcoll.device.cuda.packs import BYTES
from nvcoll.device.cuda.together import together
from nvcoll.device.groups import puts_in_turn, sharing, waits_in_turn

PROTOCOLS = {"low_latency": low_latency.protocol, "simple": simple.protocol}
"""Protocol -> factory of its verbs."""


def vocabulary(jit: Any, a: SimpleNamespace, protocol: str, deep: bool, remote: bool = False) -> SimpleNamespace:
    """Return every verb and field that a schedule may use, bound to an operator, a datatype and a protocol.

    In ``shallow`` there are the same for threads that have one pack under way at a time.

    Parameters
    ----------
    jit
        Decorator of device functions.
    a
        What `packs.arithmetic` gives.
    protocol
        A name in `PROTOCOLS`.
    deep
        Whether a thread has up to four packs under way at a time. That takes registers and code, so it is for messages
        that give each thread as many, and for types whose packs have few elements.
    remote
        Whether some ranks are far: see `nvcoll.device.cuda.remote`. All kernels of a world must agree on it.
    """
    v = common.verbs(jit, a, packs.partial(a.unit), deep)
    w = PROTOCOLS[protocol](jit, v, a, deep, remote)
    put_data, put_end, arrival, arrivals, pack_at, look, settle, settle_four, as_sent = (
        w.put_data, w.put_end, w.arrival, w.arrivals, w.pack_at, w.look, w.settle, w.settle_four, w.as_sent,
    )  # fmt: skip
    get, put_back, beyond, load_four, ranks, around, without = (
        v.get, v.put_back, v.beyond, v.load_four, v.ranks, v.around, v.without,
    )  # fmt: skip
    widen, reduce, reduce_pack, finish, stride = a.widen, a.reduce, a.reduce_pack, a.finish, v.stride
    load, load_shared = ptx.load, ptx.load_shared
    itemsize, width, accumulates, several, ordered = (
        a.itemsize, a.width, a.words // 2, deepens(a.itemsize), a.ordered,
    )  # fmt: skip
    thread, threads, store_pack, meet = ptx.thread, ptx.threads, ptx.store_pack, ptx.meet
    _, store_wide = common.wide(jit, accumulates)

    @jit
    def put(c, e, p, slot, source, nbytes):
        """Write bytes into a slot of rank p, so that their arrival can be seen."""
        put_data(c, e, p, slot, source, nbytes)
        put_end(c, e, p, slot)

    @jit
    def one(c, e, at, i):
        """Wait for a pack of a slot and return it."""
        where = pack_at(at, i)
        return settle(c, e, where, look(where))

    @jit
    def four(c, e, at, i, i1, i2, i3):
        """Wait for four packs of a slot and return them."""
        w0, w1, w2, w3 = pack_at(at, i), pack_at(at, i1), pack_at(at, i2), pack_at(at, i3)
        return settle_four(c, e, w0, w1, w2, w3, look(w0), look(w1), look(w2), look(w3))

    @jit
    def wait_copy(c, e, slot, to, nbytes):
        """Wait for bytes and store them."""
        at = arrival(c, e, slot, nbytes)
        i = thread() * BYTES
        step = threads() * BYTES
        if deep and to & (BYTES - 1) == 0:
            while i + step + BYTES <= nbytes:
                i1, i2, i3, after = beyond(i, step, nbytes)
                first, second, third, fourth = four(c, e, at, i, i1, i2, i3)
                store_pack(to + i, first)
                store_pack(to + i1, second)
                store_pack(to + i2, third)
                store_pack(to + i3, fourth)
                i = after
        while i < nbytes:
            put_back(to + i, one(c, e, at, i), nbytes - i)
            i += step
        meet(e)

    @jit
    def wait_reduce(c, e, lower, slot, acc, n):
        """Wait for n accumulators and reduce them into mine, from the left if they are a lower place's."""
        nbytes = n * width
        at = arrival(c, e, slot, nbytes)
        i = thread() * BYTES
        while i < nbytes:
            mine = as_sent(get(acc + i, nbytes - i))  # before the wait
            left, right = mine, one(c, e, at, i)
            if ordered and lower:  # else to exchange them would take time for nothing
                left, right = right, left
            put_back(acc + i, reduce_pack(left, right), nbytes - i)
            i += threads() * BYTES
        meet(e)

    def gathering(lift, combine):
        """Make what reduces pack i of all contributions, in order: mine is `own`. `lift` makes accumulators of one.

        All ranks must reduce the same bits, so mine are those that the others get.
        """

        @jit
        def add(me, acc, own, slot, got):
            """Reduce what has come in a slot, and before it my own contribution, if that is next."""
            if me != 0:
                if slot == 0:
                    return lift(got)
                if slot == me:
                    acc = combine(acc, lift(own))
            return combine(acc, lift(got))

        @jit
        def gather(c, e, k, me, at, own, i):
            own = as_sent(own)
            if k == 2:  # the shortest way for the pair
                left, right = own, one(c, e, at, i)
                if ordered and me != 0:
                    left, right = right, left
                return combine(lift(left), lift(right))
            acc = lift(own)  # which counts only where I am the first
            slot, last = 0, k - 2
            while several and slot < last:  # two to four are looked at together, though they come from different ranks
                w0 = pack_at(at + slot * stride(c), i)
                w1 = pack_at(at + (slot + 1) * stride(c), i)
                w2 = pack_at(at + (slot + 2) * stride(c), i) if slot + 2 <= last else w0
                w3 = pack_at(at + (slot + 3) * stride(c), i) if slot + 3 <= last else w0
                a0, a1, a2, a3 = settle_four(c, e, w0, w1, w2, w3, look(w0), look(w1), look(w2), look(w3))
                acc = add(me, add(me, acc, own, slot, a0), own, slot + 1, a1)
                if w2 != w0:  # to tell it by addresses takes fewer registers
                    acc = add(me, acc, own, slot + 2, a2)
                if w3 != w0:
                    acc = add(me, acc, own, slot + 3, a3)
                slot += 4
            while slot <= last:
                acc = add(me, acc, own, slot, one(c, e, at + slot * stride(c), i))
                slot += 1
            if me != 0 and me == k - 1:  # after all slots
                acc = combine(acc, lift(own))
            return acc

        return gather

    gather_one, gather_partials = gathering(widen, reduce), gathering(packs.unchanged(jit), reduce_pack)

    @jit
    def wait_reduce_all(c, e, k, me, slot, mine, acc, n):
        """Wait for n elements of each of k places but mine, and reduce all in their order to accumulators."""
        nbytes = n * itemsize
        at = arrivals(c, e, k, me, slot, nbytes)
        i = thread() * BYTES
        while i < nbytes:
            total = gather_one(c, e, k, me, at, get(mine + i, nbytes - i), i)
            if accumulates == 1:
                put_back(acc + i, total[:2], nbytes - i)
            else:
                store_wide(acc + i * accumulates, total)
            i += threads() * BYTES
        meet(e)

    @jit
    def wait_reduce_partials(c, e, k, me, slot, acc, n):
        """Wait for n accumulators of each of k places but mine, and reduce all in their order into mine.

        What becomes pack i of mine is stored by the thread that has read it, here and when it was put into slots.
        """
        nbytes = n * width
        at = arrivals(c, e, k, me, slot, nbytes)
        i = thread() * BYTES
        while i < nbytes:
            total = gather_partials(c, e, k, me, at, get(acc + i, nbytes - i), i)
            put_back(acc + i, total, nbytes - i)
            i += threads() * BYTES
        meet(e)

    @jit
    def wait_reduce_finish(c, e, k, me, slot, mine, recv, n):
        """Wait for n elements of each of k places but mine, and reduce all in their order to the result.

        No barrier ends it: nothing may be sent after it before `meet`.
        """
        nbytes = n * itemsize
        at = arrivals(c, e, k, me, slot, nbytes)
        i = thread() * BYTES
        step = threads() * BYTES
        if deep and not remote and (mine | recv) & (BYTES - 1) == 0:  # with far ranks' flags, registers do not suffice
            while i + step + BYTES <= nbytes:  # four packs of a rank at a time here, not one of each of four ranks
                i1, i2, i3, after = beyond(i, step, nbytes)
                a0, a1, a2, a3 = load_four(mine, i, i1, i2, i3)
                a0, a1, a2, a3 = as_sent(a0), as_sent(a1), as_sent(a2), as_sent(a3)
                b0, b1, b2, b3 = a0, a1, a2, a3
                if me != 0:
                    b0, b1, b2, b3 = four(c, e, at, i, i1, i2, i3)
                t0, t1, t2, t3 = widen(b0), widen(b1), widen(b2), widen(b3)
                for j in range(1, k):
                    b0, b1, b2, b3 = a0, a1, a2, a3
                    if j != me:
                        b0, b1, b2, b3 = four(c, e, at + without(me, j) * stride(c), i, i1, i2, i3)
                    t0, t1, t2, t3 = (
                        reduce(t0, widen(b0)), reduce(t1, widen(b1)), reduce(t2, widen(b2)), reduce(t3, widen(b3)),
                    )  # fmt: skip
                store_pack(recv + i, finish(t0, ranks(c)))
                store_pack(recv + i1, finish(t1, ranks(c)))
                store_pack(recv + i2, finish(t2, ranks(c)))
                store_pack(recv + i3, finish(t3, ranks(c)))
                i = after
        while i < nbytes:
            total = gather_one(c, e, k, me, at, get(mine + i, nbytes - i), i)
            put_back(recv + i, finish(total, ranks(c)), nbytes - i)
            i += step

    @jit
    def reduce_direct(c, sources, targets, k, me, lo, hi):
        """Reduce elements lo to hi of the k arrays of a table, in its order, into all k arrays of another."""
        nbytes = (hi - lo) * itemsize
        base = lo * itemsize
        i = thread() * BYTES
        step = threads() * BYTES
        while deep and i + 3 * step + BYTES <= nbytes:
            at = load(sources) + base + i
            t0, t1, t2, t3 = (
                load_shared(at), load_shared(at + step), load_shared(at + 2 * step), load_shared(at + 3 * step),
            )  # fmt: skip
            s0, s1, s2, s3 = widen(t0), widen(t1), widen(t2), widen(t3)
            for j in range(1, k):
                at = load(sources + 8 * j) + base + i
                t0, t1, t2, t3 = (
                    load_shared(at), load_shared(at + step), load_shared(at + 2 * step), load_shared(at + 3 * step),
                )  # fmt: skip
                s0, s1, s2, s3 = (
                    reduce(s0, widen(t0)), reduce(s1, widen(t1)), reduce(s2, widen(t2)), reduce(s3, widen(t3)),
                )  # fmt: skip
            t0, t1, t2, t3 = finish(s0, ranks(c)), finish(s1, ranks(c)), finish(s2, ranks(c)), finish(s3, ranks(c))
            for j in range(k):
                at = load(targets + 8 * around(me + j, k)) + base + i
                store_pack(at, t0)
                store_pack(at + step, t1)
                store_pack(at + 2 * step, t2)
                store_pack(at + 3 * step, t3)
            i += 4 * step
        while i < nbytes:
            total = widen(get(load(sources) + base + i, nbytes - i))
            j = 1
            while several and not deep and j + 1 < k:  # two to four arrays are looked at together
                j2, j3 = min(j + 2, k - 1), min(j + 3, k - 1)
                t0, t1, t2, t3 = (
                    get(load(sources + 8 * j) + base + i, nbytes - i),
                    get(load(sources + 8 * j + 8) + base + i, nbytes - i),
                    get(load(sources + 8 * j2) + base + i, nbytes - i),
                    get(load(sources + 8 * j3) + base + i, nbytes - i),
                )
                total = reduce(reduce(total, widen(t0)), widen(t1))
                if j + 2 < k:
                    total = reduce(total, widen(t2))
                if j + 3 < k:
                    total = reduce(total, widen(t3))
                j += 4
            while j < k:
                total = reduce(total, widen(get(load(sources + 8 * j) + base + i, nbytes - i)))
                j += 1
            result = finish(total, ranks(c))
            for j in range(k):
                put_back(load(targets + 8 * around(me + j, k)) + base + i, result, nbytes - i)
            i += step

    at_once = not (w.signals or deep)
    store_own, put_own = (own_storer if at_once else plain_storer)(jit, v, w, put)
    ways = far.ways(jit, v, w) if remote else None
    if remote:
        put = far.over(jit, v, w, put, w.store_part, ways)
        put_own = far.over(jit, v, w, put_own, store_own, known_ways(jit, v, ways)) if at_once else put
    group_of, wait_slices = puts_in_turn(jit, v, put), waits_in_turn(jit, v, wait_copy)
    anywhere_of = group_of
    if w.signals or at_once:
        group_of, wait_slices = together(jit, v, w, one)
    if not remote:
        anywhere_of = group_of
    if at_once and not remote:
        share, reduce_shared = sharing_at_once(jit, v, a, w, gather_one)
    else:
        anyone_of = puts_in_turn(jit, v, put_own) if remote else anywhere_of
        share, reduce_shared = sharing(jit, v, anyone_of(v.everyone)[1], wait_reduce_finish)
    opening = opening_of(jit, v, w, ways) if at_once else plain_opening(jit, v)
    own = {"group_of": group_of, "anywhere_of": anywhere_of, "wait_slices": wait_slices}
    own |= {"put": put, "put_own": put_own, "wait_copy": wait_copy, "wait_reduce": wait_reduce}
    own |= {"wait_reduce_all": wait_reduce_all, "wait_reduce_finish": wait_reduce_finish, "jit": jit}
    own |= {"share": share, "reduce_shared": reduce_shared, "opening": opening, "count_epoch": opening.count_epoch}
    own |= {"wait_reduce_partials": wait_reduce_partials, "reduce_direct": reduce_direct}
    own |= {"thread": thread, "threads": threads, "any_of": ptx.any_of, "meet": meet}
    own |= {"signals": w.signals}
    found = SimpleNamespace(**{**vars(v), **own})
    # A launch begins in one form: what begins a schedule is not for the middle of one.
    found.shallow = without_openers(vocabulary(jit, a, protocol, False, remote)) if deep else found
    return found


def entry(
    jit: Any, v: SimpleNamespace, a: SimpleNamespace, text: Any, rounds: bool, overlap: bool, opens: bool = False
) -> Any:
    """Return the kernel: each block runs the schedule on its part of the message, in pieces that fit its slots.

    A piece is a complete reduction with an epoch of its own, whose tag `begin` gives to the schedule. Schedules that
    cut messages themselves (not `rounds`) get the whole part, and may begin and end epochs. Where GPUs can (`overlap`),
    the next kernel of the stream is brought in while this one runs, and waits for its end before it touches memory.
    Schedules that begin with `share` or `put_own` (`opens`) find loaded what these send, and count their epochs by
    `count_epoch`; those of others are counted here. Parameters are the fields of a call, in their order.
    """
    block, thread, await_predecessor, let_successor, prefetch, settled = (
        ptx.block, ptx.thread, ptx.await_predecessor, ptx.let_successor, ptx.prefetch, ptx.settled,
    )  # fmt: skip
    itemsize, unit = a.itemsize, BYTES // a.itemsize
    epoch_at, begin, opening = v.epoch_at, v.begin, v.opening if opens else plain_opening(jit, v)
    prepare, foresee, start, renew, advance = (
        opening.prepare, opening.foresee, opening.start, opening.renew, opening.advance,
    )  # fmt: skip
    known = v if opens else without_openers(v)
    kernel = jit(text(SimpleNamespace(**{**vars(known), "begin": ptx.field(TAG)}) if rounds else known))

    def whole(
        send, recv, count, part, capacity, stride, stamp, ranks, rank, size, nodes, node, local_rank, node_size, slices,
        members, owners, peers, state, report, timeout, board, flags, flags_half, flags_block, cells, lines, data,
        slots_half, slots_block, workspace, workspace_block, heap, heap_size, peer0, peer1, peer2, peer3, peer4, peer5,
        peer6, peer7,
    ):  # fmt: skip
        c = (
            send, recv, count, part, capacity, stride, stamp, ranks, rank, size, nodes, node, local_rank, node_size,
            slices, members, owners, peers, state, report, timeout, board, flags, flags_half, flags_block, cells, lines,
            data, slots_half, slots_block, workspace, workspace_block, heap, heap_size, peer0, peer1, peer2, peer3,
            peer4, peer5, peer6, peer7,
        )  # fmt: skip
        first = block() * part
        last = min(first + part, count)
        piece = min(capacity, last - first) if rounds else last - first
        shift = first * itemsize
        at, ready = settled(send + shift + thread() * BYTES), prepare(c)
        if overlap and first + thread() * unit < last:
            prefetch(at)
            prefetch(epoch_at(c, block()))
        while first < last:
            mine = piece * itemsize - thread() * BYTES
            foreseen = foresee(c, at, mine)
            if overlap:
                # In the loop, for compilers compute in front of it what all pieces need; only the first one waits.
                # Blocks without a part do not wait: block 0 has one, and the kernel ends no sooner.
                await_predecessor()
                let_successor()  # not before: a stream whose kernels wait in a row would keep those of another away
            begun = start(c, ready, foreseen, at, mine)
            kernel(c + begun, send + shift, recv + shift, piece)
            first += piece
            if first < last:
                renew(c, begun[0])
                at += piece * itemsize
                shift += piece * itemsize
                piece = min(capacity, last - first)
            else:
                advance(c, begun[0] if rounds else begin(c))

    return whole
