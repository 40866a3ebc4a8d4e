"""Two-shot: reduce-scatter in one step, all-gather in one step. Where memory allows, in place and without copies.

    rank      0            1            2            3            4
    step 1    every rank sends slice k of its message to rank k
              reduces a.0  reduces a.1  reduces a.2  reduces a.3  reduces a.4
    step 2    every rank sends its reduced slice to every other rank

2 (n - 1)/n M bytes leave each rank: the least there is. Any number of ranks and elements.

Between processes that share memory, data need not be sent: ranks first tell each other where in the symmetric heap
their buffers lie. If all do lie there, each rank reduces its slice from where the others have theirs and writes the
result to where they want it. If a single one does not, all go through scratch memory, in rounds. So an array of
any kind may meet an array of any other kind in one call. (On GPUs, all go there with the protocol low_latency.)
"""

from typing import Any

from nvcoll.algorithms._registry import Link, Shape, Slots, algorithm


def supports(shape: Shape) -> str | None:
    """Any call, where ranks can load from each other's memory."""
    return "needs ranks that can load from each other's memory" if shape.apart else None


def cost(shape: Shape, link: Link) -> float:
    """Two steps; all but one slice leaves a rank in each."""
    far = len(shape.node_sizes) > 1
    latency, per_byte = (link.far_latency, link.far_per_byte) if far else (link.latency, link.per_byte)
    return 2 * latency + 2 * (shape.size - 1) / shape.size * shape.nbytes * per_byte


def slots(shape: Shape) -> Slots:
    """A slot for every rank in both steps, each of a slice: on hosts, questions and answers go by the rank's number."""
    return Slots(2 * shape.size, shape.size, shape.itemsize)


@algorithm("two_shot", verb="allreduce", source="Rabenseifner 2004, in one step each", order="rank order", rounds=False)
def text(v: Any) -> Any:
    rank, size, itemsize, width, capacity, around = v.rank, v.size, v.itemsize, v.width, v.capacity, v.around
    begin, signal, wait_signal, ask, wait_asked, answer_at, answer_part, answer_end, wait_answer = (
        v.begin, v.signal, v.wait_signal, v.ask, v.wait_asked, v.answer_at, v.answer_part, v.answer_end, v.wait_answer,
    )  # fmt: skip
    offset, heap_of, finish_to, combine, blocks, error = v.offset, v.heap_of, v.finish_to, v.combine, v.blocks, v.error
    finish = v.finish
    load, store, copy, table, widen, jit, block = v.load, v.store, v.copy, v.table, v.widen, v.jit, v.BLOCK

    @jit
    def slice_at(c, count, k):
        """Return where slice k begins: slices are multiples of a cache line, but for the last."""
        unit = 64 // itemsize(c)
        each = ((count + size(c) * unit - 1) // (size(c) * unit)) * unit
        return min(k * each, count)

    @jit
    def agree(c, e, send, recv, count):
        """Exchange where the buffers lie; return whether all lie in the symmetric heap."""
        me, n = rank(c), size(c)
        nbytes = count * itemsize(c)
        from_, to = offset(c, send, nbytes), offset(c, recv, nbytes)
        for k in range(1, n):
            signal(c, e, around(me + k, n), me, from_, to)
        direct = True
        for p in range(n):
            its, its_to = (from_, to) if p == me else wait_signal(c, e, p)
            direct = direct and its >= 0 and its_to >= 0
            store(table(c) + 8 * p, heap_of(c, p) + its)
            store(table(c) + 8 * (n + p), heap_of(c, p) + its_to)
        return direct and error(c) == 0  # after a failure, the places are those of an earlier call

    @jit
    def reduce_block(c, sources, first, to, also, m):
        """Reduce a block of all sources to elements of the result, here and in a second place, if that is not `to`.

        That place should hold the operand that is read last, so that its lines are at hand when they are written. With
        more ranks than two, and where the peer does not reduce in place, a copy of the block afterwards is quicker.
        """
        plain = widen(c) == 0 and finish(c) == 0
        acc = to if widen(c) == 0 else blocks(c) + 2 * block
        combine(c, sources, first, size(c), acc, also if plain else acc, m)
        finish_to(c, to, acc, m)
        if also != to and not plain:
            copy(also, to, m * itemsize(c))

    @jit
    def in_place_at(c, p):
        """Return where rank p's buffer lies if it sends from where it receives, else 0."""
        to = load(table(c) + 8 * (size(c) + p))
        return to if to == load(table(c) + 8 * p) else 0

    @jit
    def reduce_in_place(c, lo, hi):
        """Reduce my slice from everybody's send buffer into everybody's receive buffer, a block at a time."""
        me, n, at = rank(c), size(c), itemsize(c)
        step = block // width(c)
        its = in_place_at(c, 1 - me) if n == 2 else 0
        for k in range((hi - lo + step - 1) // step):
            first = lo + k * step
            m = min(step, hi - first)
            mine = load(table(c) + 8 * (n + me)) + first * at
            reduce_block(c, table(c), first, mine, its + first * at if its != 0 else mine, m)
            for ahead in range(1 if its == 0 else n, n):
                p = around(me + ahead, n)
                copy(load(table(c) + 8 * (n + p)) + first * at, mine, m * at)

    @jit
    def one_round(c, e, send, recv, count):
        """Reduce a piece through scratch memory; a block of my slice leaves for the others while it is in the cache."""
        me, n, at = rank(c), size(c), itemsize(c)
        for k in range(1, n):
            p = around(me + k, n)
            lo, hi = slice_at(c, count, p), slice_at(c, count, p + 1)
            ask(c, e, p, send + lo * at, (hi - lo) * at)
        lo, hi = slice_at(c, count, me), slice_at(c, count, me + 1)
        wait_asked(c, e, n, me, send + lo * at, hi - lo)
        also = answer_at(c, e, 1 - me) if n == 2 else 0
        step = block // width(c)
        for k in range((hi - lo + step - 1) // step):
            first = k * step
            m = min(step, hi - lo - first)
            mine = recv + (lo + first) * at
            reduce_block(c, table(c), first, mine, also + first * at if also != 0 else mine, m)
            for ahead in range(1 if also == 0 else n, n):
                answer_part(c, e, around(me + ahead, n), first * at, mine, m * at)
        for k in range(1, n):
            answer_end(c, e, around(me + k, n))
        for k in range(1, n):
            p = around(me + n - k, n)
            lo, hi = slice_at(c, count, p), slice_at(c, count, p + 1)
            wait_answer(c, e, p, recv + lo * at, (hi - lo) * at)

    def kernel(c, send, recv, count):
        e, me, n = begin(c), rank(c), size(c)
        if agree(c, e, send, recv, count):
            reduce_in_place(c, slice_at(c, count, me), slice_at(c, count, me + 1))
            for k in range(1, n):
                signal(c, e, around(me + k, n), n + me, 0, 0)
            for p in range(n):
                if p != me:
                    wait_signal(c, e, n + p)
        else:
            first = 0
            while first < count:
                shift = first * itemsize(c)
                one_round(c, begin(c), send + shift, recv + shift, min(capacity(c), count - first))
                first += capacity(c)

    return kernel


@text.on("cuda")
def cuda_text(v: Any) -> Any:
    """On GPUs a slice is reduced in registers, from where the others have it to where they want it.

    There is no cache of blocks to work in, and thousands of packs must be under way at a time. With low latency, all
    goes through scratch memory: to ask first where buffers lie takes as long as to send.
    """
    rank, size, itemsize, capacity, without, begin, signal_all, wait_signals, told = (
        v.rank, v.size, v.itemsize, v.capacity, v.without, v.begin, v.signal_all, v.wait_signals, v.told,
    )  # fmt: skip
    offset, heap_of, part_at, reduce_direct = v.offset, v.heap_of, v.part_at, v.reduce_direct
    # Through scratch memory a thread has a pack under way: with several, both ways together need too many registers.
    wait_reduce_finish, wait_slices = v.shallow.wait_reduce_finish, v.shallow.wait_slices
    put_slices, put_all = v.shallow.group_of(v.everyone)
    table, meet, renew, jit = v.private, v.meet, v.renew, v.jit
    thread, threads, any_of, store, asks = v.thread, v.threads, v.any_of, v.store, v.signals

    @jit
    def agree(c, e, send, recv, count):
        """Exchange where the buffers lie; return whether all lie in the symmetric heap, on boundaries of packs."""
        me, n = rank(c), size(c)
        nbytes = count * itemsize(c)
        from_, to = offset(c, send, nbytes), offset(c, recv, nbytes)
        signal_all(c, e, 0, from_, to)
        wait_signals(c, e, 0)
        elsewhere = False
        p = thread()
        while p < n:  # each by a thread of its own
            its, its_to = from_, to
            if p != me:
                its, its_to = told(c, e, without(me, p))
            elsewhere = elsewhere or its < 0 or its_to < 0 or (its | its_to) & 15 != 0
            store(table(c) + 8 * p, heap_of(c, p) + its)
            store(table(c) + 8 * (n + p), heap_of(c, p) + its_to)
            p += threads()
        return not any_of(elsewhere)  # a barrier, too: all see the table

    @jit
    def one_round(c, e, send, recv, count):
        me, n, at = rank(c), size(c), itemsize(c)
        put_slices(c, e, n, me, 0, send, count)
        lo, hi = part_at(c, count, n, me), part_at(c, count, n, me + 1)
        wait_reduce_finish(c, e, n, me, 0, send + lo * at, recv + lo * at, hi - lo)
        meet(e)
        put_all(c, e, n, me, n, recv + lo * at, (hi - lo) * at)
        wait_slices(c, e, n, me, n, recv, count)

    def kernel(c, send, recv, count):
        e, me, n = begin(c), rank(c), size(c)
        if asks and agree(c, e, send, recv, count):
            lo, hi = part_at(c, count, n, me), part_at(c, count, n, me + 1)
            reduce_direct(c, table(c), table(c) + 8 * n, n, me, lo, hi)
            signal_all(c, e, n, 0, 0)
            wait_signals(c, e, n)
        else:
            first = 0
            while first < count:
                shift = first * itemsize(c)
                if asks or first > 0:
                    renew(c, e)
                    e = begin(c)
                one_round(c, e, send + shift, recv + shift, min(capacity(c), count - first))
                first += capacity(c)

    return kernel
