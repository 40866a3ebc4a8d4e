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
"""The way to a rank whose memory can be stored to. Others' is twice their number, and 1 if NVSHMEM has mapped them."""


def ways(jit: Any, v: SimpleNamespace, w: SimpleNamespace) -> SimpleNamespace:
    """Return how ranks are reached.

    ``stored_to(c, p)`` tells whether rank p can be stored to, ``way(c, p)`` returns how it is reached (`STORED_TO`),
    and ``places(c, e, slot)`` where what goes to a slot of a far rank is staged, and my own counterpart of that slot.
    """
    area, half, rank, number, slot_at = v.area, v.half, v.rank, jit(number_of), w.slot_at
    stage, stride, slots_half, slots_block, block = v.cells, v.stride, v.slots_half, v.slots_block, ptx.block

    @jit
    def stored_to(c, p):
        return area(c, p) > 0

    @jit
    def way(c, p):
        there = area(c, p)
        if there > 0:
            return STORED_TO
        near = mapped(area(c, rank(c)), number(there))
        return 2 * number(there) + (1 if near != 0 else 0)

    @jit
    def places(c, e, slot):
        staged = area(c, rank(c)) + stage(c) + half(e) * slots_half(c) + block() * slots_block(c) + slot * stride(c)
        return staged, slot_at(c, e, rank(c), slot)

    return SimpleNamespace(stored_to=stored_to, way=way, places=places)


def over(
    jit: Any, v: SimpleNamespace, w: SimpleNamespace, put_near: Any, store_part: Any, ways: SimpleNamespace
) -> Any:
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
    ways
        What `ways` gives, or `opening.known_ways`.
    """
    stored_to, way, places = ways.stored_to, ways.way, ways.places
    flag, rank, spread, signals = v.flag, v.rank, w.spread, w.signals
    sync, meet, fence, thread = ptx.sync, ptx.meet, ptx.fence, ptx.thread

    @jit
    def put_far(c, e, p, slot, source, nbytes):
        """Stage bytes and begin to put them. With a negative tag, none: earlier puts may still read the stage."""
        meet(e)
        staged, to = places(c, e, slot)
        there = way(c, p)  # asked for before it is needed: the answer takes as long as to stage
        store_part(c, e, staged, source, nbytes)
        if there & 1 == 0:  # the network reads what all threads of the block have stored; a copy by them needs no fence
            sync()
            if thread() == 0:
                fence()
        if signals:
            begin_put_signal(to, staged, nbytes, flag(c, e, rank(c), slot), e, there >> 1)
        else:
            begin_put(to, staged, (nbytes + BYTES - 1 & -BYTES) * spread, there >> 1)

    @jit
    def put(c, e, p, slot, source, nbytes):
        if stored_to(c, p):
            put_near(c, e, p, slot, source, nbytes)
        elif nbytes > 0:
            put_far(c, e, p, slot, source, nbytes)

    return put
