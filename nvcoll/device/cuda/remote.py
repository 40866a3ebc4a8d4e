"""Ranks whose memory cannot be stored to: what goes to them is staged in my own memory, and NVSHMEM puts it there.

A negative number in the table of areas says that a rank is far, and what NVSHMEM calls it; stores go straight to all
others, in the same kernel. Low latency's form with flags travels as it is, for every type, and from all ranks, since a
slot cannot tell who will fill it. Simple's signal goes with its data.

What is staged lies where the cells of sentinels would, which such a world has no use for, as in the slot it is for.
Two halves by the parity of the epoch suffice: a half is written again in epoch k + 2, when epoch k + 1 is complete
here. That holds a contribution of each rank, made after the rank had read all that it was sent in epoch k: so those
puts have gone out. Nothing is put from where it lies: schedules overwrite what they have sent. Within an epoch, a slot
is staged once, or for several ranks with the same bytes.
"""

from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.packs import BYTES
from nvcoll.device.cuda.ptx import I64


def _call(builder: Any, name: str, result: Any, args: Any) -> Any:
    """Call a function of shim.cu. To those that begin to copy, all threads of the block come together."""
    kind = ir.FunctionType(result, [I64] * len(args))
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    function.attributes.add("convergent")
    return builder.call(function, args)


@intrinsic
def mapped(typing: Any, to: Any, rank: Any) -> Any:
    """Return where NVSHMEM has mapped another rank's counterpart of an address of mine, or 0."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "nvcoll_mapped", I64, args)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def begin_put(typing: Any, to: Any, source: Any, nbytes: Any, rank: Any) -> Any:
    """Begin to copy what the block has stored to another rank, at my own address of the place."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "nvcoll_put", ir.VoidType(), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@intrinsic
def begin_put_signal(typing: Any, to: Any, source: Any, nbytes: Any, flag: Any, tag: Any, rank: Any) -> Any:
    """The same, and set a flag there after the bytes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "nvcoll_put_signal", ir.VoidType(), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


@intrinsic
def landed(typing: Any, flag: Any, tag: Any) -> Any:
    """Make the data before a flag readable, which this thread has seen."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "nvcoll_landed", ir.VoidType(), args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def number_of(area: Any) -> Any:
    """Return what NVSHMEM calls a far rank, by its entry in the table of areas, or that entry by the number."""
    return -1 - area


STORED_TO = -1
"""What `askers` tell of a rank whose memory can be stored to."""


def askers(jit: Any, v: SimpleNamespace, remote: bool, known: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return twice ``stored_to(c, p)`` and ``asked(c, p)``: whether rank p can be stored to, and how it is reached.

    The answer is `STORED_TO`, or where NVSHMEM has mapped a far rank, or 0. The second two take ``known(c)`` for the
    rank after me: the answer of the first, which was asked as the call began. That brings NVSHMEM's tables into caches,
    too.
    """
    area, rank, size, around, number = v.area, v.rank, v.size, v.around, jit(number_of)

    @jit
    def stored_to_now(c, p):
        return area(c, p) > 0

    @jit
    def asked_now(c, p):
        if not remote or area(c, p) > 0:
            return STORED_TO
        return mapped(area(c, rank(c)), number(area(c, p)))

    @jit
    def stored_to_before(c, p):
        if p == around(rank(c) + 1, size(c)):
            return known(c) == STORED_TO
        return stored_to_now(c, p)

    @jit
    def asked_before(c, p):
        if p == around(rank(c) + 1, size(c)):
            return known(c)
        return asked_now(c, p)

    return (stored_to_now, asked_now), (stored_to_before, asked_before)


def over(jit: Any, v: SimpleNamespace, w: SimpleNamespace, put_near: Any, store_part: Any, ask: tuple[Any, Any]) -> Any:
    """Return ``put`` that reaches far ranks too.

    Parameters
    ----------
    jit
        Decorator of device functions.
    v
        What `common.verbs` gives.
    w
        The protocol, made for far ranks.
    put_near
        ``put`` to the others.
    store_part
        ``store_part(c, e, to, source, nbytes)`` stages bytes in the form in which they travel.
    ask
        A pair of `askers`.
    """
    stored_to, asked = ask
    area, half, flag, rank, stride, number = v.area, v.half, v.flag, v.rank, v.stride, jit(number_of)
    stage, slots_half, slots_block = v.cells, v.slots_half, v.slots_block
    slot_at, spread, signals = w.slot_at, w.spread, w.signals
    sync, meet, fence, thread, block = ptx.sync, ptx.meet, ptx.fence, ptx.thread, ptx.block

    @jit
    def stage_at(c, e, slot):
        """Return where what goes to a slot of a far rank is staged."""
        return area(c, rank(c)) + stage(c) + half(e) * slots_half(c) + block() * slots_block(c) + slot * stride(c)

    @jit
    def put_far(c, e, p, slot, source, nbytes):
        """Stage bytes and begin to put them. With a negative tag, none: earlier puts may still read the stage."""
        meet(e)
        staged, to = stage_at(c, e, slot), slot_at(c, e, rank(c), slot)
        near = asked(c, p)  # asked for before it is needed: the answer takes as long as to stage
        store_part(c, e, staged, source, nbytes)
        if near == 0:  # the network reads what all threads of the block have stored; a copy by them needs no fence
            sync()
            if thread() == 0:
                fence()
        pe = number(area(c, p))
        if signals:
            begin_put_signal(to, staged, nbytes, flag(c, e, rank(c), slot), e, pe)
        else:
            begin_put(to, staged, (nbytes + BYTES - 1) // BYTES * BYTES * spread, pe)

    @jit
    def put(c, e, p, slot, source, nbytes):
        if stored_to(c, p):
            put_near(c, e, p, slot, source, nbytes)
        elif nbytes > 0:
            put_far(c, e, p, slot, source, nbytes)

    return put
