"""The vocabulary of schedules: common verbs, those of a protocol, and what is built on both."""

from types import SimpleNamespace
from typing import Any

from nvcoll.device import low_latency, simple
from nvcoll.device.groups import puts_in_turn, sharing, waits_in_turn

PROTOCOLS = {"low_latency": low_latency.protocol, "simple": simple.protocol}
"""Protocol -> factory of its verbs."""


def vocabulary(t: Any, v: Any, protocol: str) -> SimpleNamespace:
    """Return every verb and field that a schedule may use, bound to a target and a protocol.

    Parameters
    ----------
    t
        Primitives of a target.
    v
        Common verbs on them.
    protocol
        A name in `PROTOCOLS`.
    """
    p = PROTOCOLS[protocol](t, v)
    jit, load, store, copy = t.jit, t.load, t.store, t.copy
    width, itemsize, table = t.field.width, t.field.itemsize, t.field.table
    put_part, put_end, arrive = p.put_part, p.put_end, p.arrive
    combine, combine_one, combine_partials, without = v.combine, v.combine_one, v.combine_partials, v.without
    asked, answered, accumulators, finish_to = p.asked, p.answered, v.accumulators, v.finish_to

    @jit
    def put(c, e, p, slot, source, nbytes):
        """Write bytes into a slot of rank p, so that their arrival can be seen."""
        put_part(c, e, p, slot, 0, source, nbytes)
        put_end(c, e, p, slot)

    @jit
    def wait_copy(c, e, slot, to, nbytes):
        """Wait for bytes and store them."""
        copy(to, arrive(c, e, slot, nbytes), nbytes)

    @jit
    def wait_reduce(c, e, lower, slot, acc, n):
        """Wait for n accumulators and reduce them into mine, from the left if they are a lower place's."""
        combine_one(c, lower, acc, arrive(c, e, slot, n * width(c)), n)

    @jit
    def wait_all(c, e, k, me, slot, mine, n):
        """Wait for n elements of each of k places but mine, and list where they are; place `me` contributes `mine`."""
        for j in range(k):
            store(table(c) + 8 * j, mine if j == me else arrive(c, e, slot + without(me, j), n * itemsize(c)))

    @jit
    def wait_reduce_all(c, e, k, me, slot, mine, acc, n):
        """Wait for n elements of each of k places but mine, and reduce all in their order to accumulators."""
        wait_all(c, e, k, me, slot, mine, n)
        combine(c, table(c), 0, k, acc, acc, n)

    @jit
    def wait_reduce_finish(c, e, k, me, slot, mine, recv, n):
        """Do the same and store the result, rounded and divided where that is due."""
        acc = accumulators(c, recv)
        wait_reduce_all(c, e, k, me, slot, mine, acc, n)
        finish_to(c, recv, acc, n)

    @jit
    def wait_reduce_partials(c, e, k, me, slot, acc, n):
        """Wait for n accumulators of each of k places but mine, and reduce all in their order into mine."""
        for j in range(k):
            store(table(c) + 8 * j, acc if j == me else arrive(c, e, slot + without(me, j), n * width(c)))
        combine_partials(c, table(c), k, acc, n)

    @jit
    def wait_asked(c, e, k, me, mine, n):
        """Wait for n elements that each of k ranks but me asks to reduce, and list where they are, with `mine`."""
        for j in range(k):
            store(table(c) + 8 * j, mine if j == me else asked(c, e, j, n * itemsize(c)))

    @jit
    def wait_answer(c, e, p, to, nbytes):
        """Wait for rank p's answer and store it."""
        copy(to, answered(c, e, p, nbytes), nbytes)

    @jit
    def count_epoch(c, e):
        """Nothing: `begin` has counted it."""

    known = SimpleNamespace(**vars(v), itemsize=itemsize, rank=t.field.rank, size=t.field.size)
    group_of = puts_in_turn(jit, known, put)
    own = {"group_of": group_of, "anywhere_of": group_of, "wait_slices": waits_in_turn(jit, known, wait_copy)}
    share, reduce_shared = sharing(jit, known, group_of(known.everyone)[1], wait_reduce_finish)
    own |= {"share": share, "reduce_shared": reduce_shared, "count_epoch": count_epoch}
    own |= {"put": put, "put_own": put, "wait_copy": wait_copy, "wait_reduce": wait_reduce}
    own |= {"wait_all": wait_all, "wait_reduce_all": wait_reduce_all, "wait_reduce_finish": wait_reduce_finish}
    own |= {"wait_reduce_partials": wait_reduce_partials}
    own |= {"wait_asked": wait_asked, "wait_answer": wait_answer, "ask": p.ask, "answer_at": p.answer_at}
    own |= {"answer_part": p.answer_part, "answer_end": p.answer_end}
    basic = {"load": load, "store": store, "copy": copy, "jit": jit}
    # Verbs last: the fields that hold the addresses of slow paths have names that verbs need.
    return SimpleNamespace(**{**vars(t.field), **vars(v), **own, **basic})


def entry(t: Any, v: Any, text: Any, rounds: bool) -> Any:
    """Return the function that a plan calls: the schedule on the whole message, or on one piece after the other.

    A piece is what fits into scratch memory, and each is a complete reduction with an epoch of its own.
    """
    kernel = t.jit(text(v))
    send, recv, count, capacity, itemsize = v.send, v.recv, v.count, v.capacity, v.itemsize

    def whole(c):
        kernel(c, send(c), recv(c), count(c))
        return 0

    def pieces(c):
        first = 0
        while first < count(c):
            shift = first * itemsize(c)
            kernel(c, send(c) + shift, recv(c) + shift, min(capacity(c), count(c) - first))
            first += capacity(c)
        return 0

    return pieces if rounds else whole
