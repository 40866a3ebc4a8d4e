"""The simple protocol on GPUs: a block stores data, then a thread of it, one for each rank, releases a signal."""

from types import SimpleNamespace
from typing import Any

from nvcoll.device.cuda import ptx
from nvcoll.device.cuda import remote as far
from nvcoll.device.cuda.packs import unchanged


def protocol(jit: Any, v: SimpleNamespace, a: SimpleNamespace, deep: bool, remote: bool) -> SimpleNamespace:
    """Return ``put_data``, ``put_end``, ``arrival`` and what reads packs that arrived."""
    area, half, rank, flag, copy, outward = v.area, v.half, v.rank, v.flag, v.copy, v.outward
    stride, slots, slots_half, slots_block = v.stride, v.data, v.slots_half, v.slots_block
    sync, meet, thread, threads, block, load_pack = (
        ptx.sync, ptx.meet, ptx.thread, ptx.threads, ptx.block, ptx.load_pack,
    )  # fmt: skip
    tell, wait_flags, landed = v.tell, v.wait_flags, far.landed

    @jit
    def slot_at(c, e, p, slot):
        return area(c, p) + slots(c) + half(e) * slots_half(c) + block() * slots_block(c) + slot * stride(c)

    @jit
    def store_part(c, e, to, source, nbytes):
        """Write bytes to an address as they travel."""
        copy(to, source, nbytes)

    @jit
    def put_data(c, e, p, slot, source, nbytes):
        """Write bytes into a slot of rank p."""
        copy(outward(c, e, slot_at(c, e, p, slot)), source, nbytes)

    @jit
    def put_end(c, e, p, slot):
        """Tell rank p that its slot is full: what all threads have stored before the barrier goes before the flag."""
        meet(e)
        if thread() == 0:
            tell(flag(c, e, p, slot), e)

    @jit
    def arrival(c, e, slot, nbytes):
        """Wait for a slot of mine to be filled and return where it lies."""
        if nbytes > 0:
            wait_flags(c, e, slot, 1)
            if remote:
                if thread() == 0:
                    landed(flag(c, e, rank(c), slot), e)
                sync()
        return slot_at(c, e, rank(c), slot)

    @jit
    def arrivals(c, e, k, me, slot, nbytes):
        """Wait for slots of mine from k places but `me`, and return where the first one lies."""
        if nbytes > 0:
            wait_flags(c, e, slot, k - 1)
            if remote:
                j = thread()
                while j < k - 1:  # by the thread that has seen the flag
                    landed(flag(c, e, rank(c), slot + j), e)
                    j += threads()
                sync()
        return slot_at(c, e, rank(c), slot)

    @jit
    def pack_at(at, i):
        """Return the address of pack i (in bytes) of a slot."""
        return at + i

    @jit
    def settle(c, e, where, got):
        """Return what was loaded: it is there."""
        return got

    @jit
    def settle_four(c, e, w0, w1, w2, w3, a0, a1, a2, a3):
        """Return the four packs that were loaded: they are there."""
        return a0, a1, a2, a3

    return SimpleNamespace(
        put_data=put_data, put_end=put_end, arrival=arrival, arrivals=arrivals, pack_at=pack_at,
        look=load_pack, settle=settle, settle_four=settle_four, as_sent=unchanged(jit),
        slot_at=slot_at, store_part=store_part, spread=1, signals=True,
    )  # fmt: skip
