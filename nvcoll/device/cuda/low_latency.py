"""The low-latency protocol on GPUs: every word shows by itself whether it has arrived, so data need no signal.

Two forms. Where all ranks are near, floats travel as they are, in memory that otherwise holds a sentinel: all ones, a
NaN whose payload means nothing; that very NaN is sent as another one, which its sender reduces, too (`as_sent`).
Integers have no value to spare: half of every 8 bytes is a flag made of the tag and the data. Between GPUs, loads and
stores of 8 bytes are whole, and that is all that is relied upon. A network may write in any order and grain, and the
form with flags bears that: a flag fits its own data only.

Who has read a pack clears it, so between calls all this memory is empty: of sentinels, or of zeros. A half is written
again after its reader has gone on to another epoch, or has ended its launch, hence after it was cleared.
"""

from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from nvcoll.device.common import STAMP_BITS
from nvcoll.device.cuda import ptx
from nvcoll.device.cuda.packs import BYTES, unchanged
from nvcoll.device.cuda.ptx import I64, PACK

EMPTY = -1
"""All ones."""


def sentinels(jit: Any, lane: int) -> SimpleNamespace:
    """Return the form for floats, of lanes of 4 or 8 bytes in which a NaN of all ones can be told from data."""
    load_shared, store_shared = ptx.load_shared, ptx.store_shared
    half, pair = ir.IntType(32), ir.VectorType(I64, 2)

    def lanes_of(builder: Any, pack: Any, scalar: Any) -> Any:
        packed = ir.Constant(pair, ir.Undefined)
        for k in range(2):
            packed = builder.insert_element(packed, builder.extract_value(pack, k), ir.Constant(half, k))
        return builder.bitcast(packed, ir.VectorType(scalar, 8 * BYTES // scalar.width))

    @intrinsic
    def missing(typing: Any, got: Any, e: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = lanes_of(builder, args[0], half)
            words = [builder.extract_element(value, ir.Constant(half, k)) for k in range(BYTES // 4)]
            if lane == 8:  # a lane is empty if both of its words are
                words = [builder.and_(*words[:2]), builder.and_(*words[2:])]
            while len(words) > 1:  # the largest one, in pairs: comparisons in a row take longer
                pairs = zip(words[::2], words[1::2], strict=True)
                words = [builder.select(builder.icmp_unsigned(">", a, b), a, b) for a, b in pairs]
            return builder.icmp_unsigned("==", words[0], ir.Constant(half, EMPTY))

        return types.boolean(PACK, types.int64), emit

    @intrinsic
    def as_sent(typing: Any, pack: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = lanes_of(builder, args[0], ir.IntType(8 * lane))
            empty, other = (
                ir.Constant(value.type, [bits] * value.type.count) for bits in (EMPTY, (1 << 8 * lane - 1) - 1)
            )
            value = builder.bitcast(builder.select(builder.icmp_unsigned("==", value, empty), other, value), pair)
            words = [builder.extract_element(value, ir.Constant(half, k)) for k in range(2)]
            return context.make_tuple(builder, PACK, words)

        return PACK(PACK), emit

    @jit
    def push(at, pack, e):
        store_shared(at, as_sent(pack))

    @jit
    def clear(at):
        store_shared(at, (EMPTY, EMPTY))

    @jit
    def data_of(got):
        return got

    return SimpleNamespace(
        spread=1, push=push, look=load_shared, missing=missing, clear=clear, data_of=data_of, as_sent=as_sent
    )  # fmt: skip


def flags(jit: Any) -> SimpleNamespace:
    """Return the form for every type: 4 bytes of data and 4 of flag in each word.

    The flag is made of the call's tag and a multiple of the data: where one half has arrived before the other, or comes
    from a rank that calls something else, it does not fit.
    """
    load_shared, store_shared = ptx.load_shared, ptx.store_shared
    low = 0xFFFFFFFF
    factor = 0x9E3779B1  # odd, so that different data give different flags

    @jit
    def flag_of(e):
        return ((e >> STAMP_BITS) * factor + e) & low | 1  # never 0, which is empty

    @jit
    def word_of(data, flag):
        return data | (flag + data * factor) << 32

    @jit
    def unfit(word, flag):
        """Return 0 if a word's flag is the one of its data."""
        return (word >> 32 ^ flag + (word & low) * factor) & low

    @jit
    def push(at, pack, e):
        flag = flag_of(e)
        store_shared(at, (word_of(pack[0] & low, flag), word_of((pack[0] >> 32) & low, flag)))
        store_shared(at + 16, (word_of(pack[1] & low, flag), word_of((pack[1] >> 32) & low, flag)))

    @jit
    def look(at):
        return load_shared(at) + load_shared(at + 16)

    @jit
    def missing(got, e):
        flag = flag_of(e)
        return unfit(got[0], flag) | unfit(got[1], flag) | unfit(got[2], flag) | unfit(got[3], flag) != 0

    @jit
    def clear(at):
        store_shared(at, (0, 0))
        store_shared(at + 16, (0, 0))

    @jit
    def data_of(got):
        return ((got[0] & low) | (got[1] << 32), (got[2] & low) | (got[3] << 32))

    return SimpleNamespace(
        spread=2, push=push, look=look, missing=missing, clear=clear, data_of=data_of, as_sent=unchanged(jit)
    )  # fmt: skip


def protocol(jit: Any, v: SimpleNamespace, a: SimpleNamespace, deep: bool, remote: bool) -> SimpleNamespace:
    """Return ``put_data``, ``put_end``, ``arrival`` and what reads packs that arrive."""
    if a.accumulator.startswith(("float", "complex")) and not remote:
        form = sentinels(jit, 8 if a.accumulator in ("float64", "complex128") else 4)
        base = v.cells
    else:
        form = flags(jit)
        base = v.lines
    area, half, rank, in_vain, outward, stride, slots_half, slots_block = (
        v.area, v.half, v.rank, v.in_vain, v.outward, v.stride, v.slots_half, v.slots_block,
    )  # fmt: skip
    get, beyond, load_four = v.get, v.beyond, v.load_four
    push, look, missing, clear, data_of, spread = (
        form.push, form.look, form.missing, form.clear, form.data_of, form.spread,
    )  # fmt: skip
    thread, threads, block, leave = ptx.thread, ptx.threads, ptx.block, ptx.leave

    @jit
    def slot_in(c, p, slot):
        """Return where a slot lies in the first half."""
        return area(c, p) + base(c) + block() * slots_block(c) + slot * stride(c)

    @jit
    def slot_at(c, e, p, slot):
        return slot_in(c, p, slot) + half(e) * slots_half(c)

    @jit
    def store_part(c, e, to, source, nbytes):
        """Write bytes to an address in the form in which they travel."""
        i = thread() * BYTES
        step = threads() * BYTES
        if deep and source & (BYTES - 1) == 0:
            while i + step + BYTES <= nbytes:  # two to four packs under way at a time
                i1, i2, i3, after = beyond(i, step, nbytes)
                first, second, third, fourth = load_four(source, i, i1, i2, i3)
                push(to + i * spread, first, e)
                push(to + i1 * spread, second, e)
                if i2 != i:
                    push(to + i2 * spread, third, e)
                if i3 != i:
                    push(to + i3 * spread, fourth, e)
                i = after
        while i < nbytes:
            push(to + i * spread, get(source + i, nbytes - i), e)
            i += step

    @jit
    def put_data(c, e, p, slot, source, nbytes):
        """Write bytes into a slot of rank p."""
        store_part(c, e, outward(c, e, slot_at(c, e, p, slot)), source, nbytes)

    @jit
    def put_end(c, e, p, slot):
        """Nothing to tell: packs speak for themselves."""

    @jit
    def arrival(c, e, slot, nbytes):
        """Return where a slot of mine lies; `settle` and `settle_four` wait for its packs."""
        return slot_at(c, e, rank(c), slot)

    @jit
    def arrivals(c, e, k, me, slot, nbytes):
        """Return where the first of my slots from k places but `me` lies."""
        return slot_at(c, e, rank(c), slot)

    @jit
    def pack_at(at, i):
        """Return the address of pack i (in bytes) of a slot."""
        return at + i * spread

    @jit
    def settle(c, e, where, got):
        """Wait until a pack that was looked at is there, clear it, and return it."""
        polls, since = 0, 0
        while missing(got, e):
            if not deep:  # there, registers do not suffice for more than one look
                got = look(where)  # three looks for each count: counting takes as long as a look
                if not missing(got, e):
                    break  # at once, for whatever is tested again after the look that found the data is waited for
                got = look(where)
                if not missing(got, e):
                    break
            polls, since, gone = in_vain(c, e, polls, since)
            if gone:
                leave()
            got = look(where)
        clear(where)
        return data_of(got)

    @jit
    def settle_four(c, e, w0, w1, w2, w3, a0, a1, a2, a3):
        """Wait until four packs that were looked at are there; clear them, and return them. Some may be the same.

        One loop for all: code that is seldom run stands once, and packs are looked at together.
        """
        polls, since = 0, 0
        while missing(a0, e) or missing(a1, e) or missing(a2, e) or missing(a3, e):
            polls, since, gone = in_vain(c, e, polls, since)
            if gone:
                leave()
            a0, a1, a2, a3 = look(w0), look(w1), look(w2), look(w3)
        clear(w0)
        clear(w1)
        clear(w2)
        clear(w3)
        return data_of(a0), data_of(a1), data_of(a2), data_of(a3)

    return SimpleNamespace(
        put_data=put_data, put_end=put_end, arrival=arrival, arrivals=arrivals, pack_at=pack_at, look=look,
        settle=settle, settle_four=settle_four, as_sent=form.as_sent,
        push=push, slot_in=slot_in, slot_at=slot_at, store_part=store_part, spread=spread, signals=False,
    )  # fmt: skip
