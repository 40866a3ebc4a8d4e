"""Calls of Allreduce on GPUs, made on emulated ranks that share one, and judged as those on hosts are.

``from tests.gpu.calls import judge``
"""

import numpy as np

import nvcoll
from nvcoll.backends import driver
from nvcoll.ops import DATATYPES, OPS
from tests.algorithms.calls import FILL, GUARD, fault, inputs


class Shown:
    """Memory of a GPU, as other libraries show theirs."""

    def __init__(self, address, nbytes):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


class Framed:
    """An array in memory of a GPU, with guards before and behind it."""

    def __init__(self, address, data, shift, stream):
        first = GUARD + shift * data.itemsize
        self.image = np.full(first + data.nbytes + GUARD, FILL, np.uint8)
        self.part = slice(first, first + data.nbytes)
        self.image[self.part] = data.view(np.uint8)
        self.address, self.stream, self.dtype = address, stream, data.dtype
        driver.copy(address, self.image.ctypes.data, self.image.nbytes, stream)

    def spec(self, call):
        return [Shown(self.address + self.part.start, call.nbytes), call.count, DATATYPES[call.datatype]]

    def read(self):
        """What the array holds now, and whether the guards are as they were."""
        now = np.empty_like(self.image)
        driver.copy(now.ctypes.data, self.address, now.nbytes, self.stream)
        data = now[self.part].copy()
        now[self.part] = self.image[self.part]
        return data.view(self.dtype), now.tobytes() == self.image.tobytes()


def make(comm, calls, seed, gpu, plain, room):
    """Make the calls on one rank; return each result, or what went wrong on this rank, as a string."""
    heap = comm.empty(2 * room + 64 * 7, np.uint8)  # symmetric arrays lie at other offsets on every rank
    places = {"symmetric": heap.address + 64 * (comm.rank % 7), "plain": plain + 2 * room * comm.rank}
    outcome = []
    with gpu:
        for number, call in enumerate(calls):
            try:
                outcome.append(make_one(comm, call, places, room, inputs(call, seed + number, comm.rank)))
            except BaseException as exc:
                exc.add_note(f"in call {number}: {call}")
                raise
    return outcome


def make_one(comm, call, places, room, data):
    place = call.places[comm.rank % len(call.places)]
    send = Framed(places[place.send], data, place.shift, comm.stream)
    recv = send
    if place.recv:
        recv = Framed(places[place.recv] + room, np.zeros_like(data), place.shift, comm.stream)
    specs = [one.spec(call) for one in ((send, recv) if place.recv else (send,))]
    comm.Allreduce(*specs, op=OPS[call.op], algorithm=call.algorithm)
    result, intact = recv.read()
    if place.recv:
        sent, also = send.read()
        if sent.tobytes() != data.tobytes():
            return f"changed its input on rank {comm.rank}"
        intact = intact and also
    return result if intact else f"wrote beyond its array on rank {comm.rank}"


def judge(gpu, calls, size, nodes=None, seed=0):
    """Make calls on emulated ranks and fail with a list of those that went wrong."""
    room = max(call.nbytes for call in calls) + 4 * GUARD
    room += -room % 256
    with gpu:  # before any kernel waits: to take memory may wait for what runs
        plain = driver.allocate(2 * room * size)
    world = nvcoll.emulate(size, nodes, device=gpu.ordinal)
    try:
        outcomes = world.run(make, calls, seed, gpu, plain, room)
    finally:
        with gpu:
            driver.free(plain)
    faults = []
    for number, (call, *results) in enumerate(zip(calls, *outcomes, strict=True)):
        given = [inputs(call, seed + number, rank) for rank in range(size)]
        # Blocks cut messages for themselves, so which ring an element takes is theirs to know.
        ordered = not (call.algorithm or "ring").startswith("ring")
        if found := fault(call, results, given, world.node_sizes, ordered):
            faults.append(f"call {number}, {call}: {found}")
    assert not faults, f"{len(faults)} of {len(calls)} calls on {world.node_sizes} ranks:\n" + "\n".join(faults[:20])
