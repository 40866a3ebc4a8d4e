"""Calls one after another, launched by the host, with pauses of each rank's own; results are looked at in batches.

Needs no torch, and runs on hosts too. A rank looks at its results after every batch, and goes on when it likes: nothing
but the calls themselves keeps it from running ahead. From time to time the ranks meet on the host, compare the digests
of their results, and agree whether the time is over.
"""

import time
import zlib
from functools import lru_cache

import numpy as np

from nvcoll.backends import driver
from nvcoll.ops import DATATYPES, OPS
from tests.gpu.calls import Shown
from tests.gpu.soak.calls import Delays, Faults, agree, prepare
from tests.oracle import SMALLEST, random_data, reduce_all, roundings, rounds

PERIOD = 65537  # elements after which data repeat; a prime, so that no block of a message looks like another
FILL = 0xA5
MOST_SHIFT = 64  # bytes by which arrays are off their best alignment


class HostRoom:
    """Memory of the host for one array."""

    def __init__(self, comm, nbytes, symmetric):
        self.memory = comm.empty(nbytes, np.uint8) if symmetric else np.empty(nbytes, np.uint8)

    def part(self, first, nbytes):
        return self.memory[first : first + nbytes]

    def write(self, first, data):
        np.asarray(self.part(first, data.nbytes))[:] = data.view(np.uint8)

    def clear(self, first, nbytes):
        np.asarray(self.part(first, nbytes))[:] = FILL

    def read(self, first, nbytes):
        return np.array(self.part(first, nbytes))

    def free(self):
        if hasattr(self.memory, "free"):
            self.memory.free()


class GpuRoom:
    """Memory of this rank's GPU for one array."""

    def __init__(self, comm, nbytes, symmetric):
        self.gpu, self.stream = comm._world.device, comm.stream
        self.buffer = comm.empty(nbytes, np.uint8) if symmetric else None
        with self.gpu:
            self.address = self.buffer.address if symmetric else driver.allocate(nbytes)

    def part(self, first, nbytes):
        if self.buffer is not None:
            return self.buffer[first : first + nbytes]
        return Shown(self.address + first, nbytes)

    def write(self, first, data):
        with self.gpu:
            driver.copy(self.address + first, data.ctypes.data, data.nbytes, self.stream)

    def clear(self, first, nbytes):
        with self.gpu:
            driver.memset(self.address + first, FILL, nbytes, self.stream)

    def read(self, first, nbytes):
        data = np.empty(nbytes, np.uint8)
        with self.gpu:
            driver.copy(data.ctypes.data, self.address + first, nbytes, self.stream)
        return data

    def free(self):
        if self.buffer is not None:
            self.buffer.free()
        else:
            with self.gpu:
                driver.free(self.address)


class Values:
    """What this rank puts in for a datatype and operator, and what must come out, in messages of any length."""

    def __init__(self, seed, rank, size, datatype, op):
        seeds = [[seed, zlib.crc32(f"{datatype} {op}".encode()), one] for one in range(size)]
        given = [random_data(np.random.default_rng(one), datatype, op, PERIOD) for one in seeds]
        self.dtype, self.mine, self.expected = DATATYPES[datatype].dtype, given[rank], reduce_all(given, op, datatype)
        self.allowed = None  # the very values
        if rounds(DATATYPES[datatype], OPS[op]):
            total = sum(np.abs(one.astype(self.expected.dtype)) for one in given) / (size if op == "AVG" else 1)
            relative, absolute = roundings(DATATYPES[datatype], OPS[op], size, total)
            self.allowed = relative * np.abs(self.expected) + absolute + SMALLEST[datatype]

    def data(self, start, count):
        return repeated(self.mine, start, count)

    def wrong(self, result, start):
        """Return the indices of wrong elements."""
        values, expected = result.astype(self.expected.dtype), repeated(self.expected, start, result.size)
        if self.allowed is None:
            return np.flatnonzero(values != expected)
        return np.flatnonzero(~(np.abs(values - expected) <= repeated(self.allowed, start, result.size)))


def repeated(values, start, count):
    """Elements of a periodic sequence."""
    return np.resize(np.roll(values, -start), count)


class Batch:
    """Calls that are made one after the other, and their memory."""

    def __init__(self, comm, options):
        self.comm, self.options = comm, options
        room = GpuRoom if comm.target == "cuda" else HostRoom
        nbytes = options.largest + 2 * MOST_SHIFT
        self.rooms = [
            [[room(comm, nbytes, kind) for kind in (True, False)] for _ in range(2)] for _ in range(options.slots)
        ]
        self.delays = Delays(options.seed, comm.rank)
        self.values = lru_cache(maxsize=256)(
            lambda datatype, op: Values(options.seed, comm.rank, comm.size, datatype, op)
        )

    def run(self, first, calls):
        """Make calls, of which `first` is the number of the first; yield (call, result, its wrong elements)."""
        rng, queued = self.delays.rng, []
        for slot, (number, call) in enumerate(enumerate(calls, first)):
            values, start = self.values(call.datatype, call.op), 977 * number % PERIOD
            send, recv = (rng.choice(kinds) for kinds in self.rooms[slot])
            at = [rng.randrange(MOST_SHIFT // values.dtype.itemsize) * values.dtype.itemsize for _ in range(2)]
            send.write(at[0], values.data(start, call.count))
            if call.in_place:
                recv, at[1] = send, at[0]
            else:
                recv.clear(at[1], call.nbytes)
            parts = [one.part(place, call.nbytes) for one, place in zip((send, recv), at, strict=True)]
            queued.append((call, values, start, parts, recv, at[1]))
        begun = time.perf_counter()
        for call, _, _, parts, _, _ in queued:
            if self.delays.happens(0.2):
                time.sleep(self.delays.seconds(self.options.sleep))
            specs = [[part, call.count, DATATYPES[call.datatype]] for part in (parts[:1] if call.in_place else parts)]
            self.comm.Allreduce(*specs, op=OPS[call.op], algorithm=call.algorithm)
        results = [(recv.read(place, call.nbytes), values, start) for call, values, start, _, recv, place in queued]
        self.seconds = time.perf_counter() - begun
        for call, (result, values, start) in zip(calls, results, strict=True):
            yield call, result, values.wrong(result.view(values.dtype), start)

    def free(self):
        for room in (one for slot in self.rooms for kinds in slot for one in kinds):
            room.free()


def looked_at(batch, first, calls, faults):
    """Make the calls of a batch and note what is wrong; return the digests of the results."""
    digests = []
    try:
        for number, (call, result, wrong) in enumerate(batch.run(first, calls), first):
            digests.append(zlib.crc32(result))
            if wrong.size:
                where = f"call {number}: {call}: {wrong.size} wrong elements, the first at {wrong[0]}"
                faults.add(where, wrong.size)
    except Exception as exc:
        faults.add(f"calls {first} to {first + len(calls) - 1}: {type(exc).__name__}: {exc}", 0)
        raise
    return digests


def soak(comm, options, calls):
    """Make the calls, or as many as the time allows; return what the summary says and the number of faults."""
    prepare(comm, calls)
    batch, faults = Batch(comm, options), Faults("eager", comm.rank)
    agree(comm)  # memory is had and given back while nothing runs, lest it wait for a rank that shares the GPU
    start, said, done, seconds, late, differing = time.monotonic(), time.monotonic(), 0, 0.0, False, 0
    while done < len(calls) and not late:
        some, digests = calls[done : done + options.meet], []
        for first in range(0, len(some), options.slots):
            digests += looked_at(batch, done + first, some[first : first + options.slots], faults)
            seconds += batch.seconds
        told = agree(comm, late=time.monotonic() - start > options.seconds, digests=digests)
        late = any(one["late"] for one in told)
        for number, (call, *its) in enumerate(zip(some, *(one["digests"] for one in told), strict=True), done):
            if len(set(its)) > 1 and comm.rank == 0:
                differing += 1
                faults.add(f"call {number}: {call}: ranks have different results", 0)
        done += len(some)
        if comm.rank == 0 and time.monotonic() - said > options.every:
            said = time.monotonic()
            print(f"eager: {done} calls after {said - start:.0f} s, {faults.number} faults", flush=True)
    batch.free()
    line = f"eager: {done} of {len(calls)} calls{' (time is up)' if done < len(calls) else ''}, "
    line += f"{sum(one['elements'] for one in agree(comm, elements=int(faults.elements)))} wrong elements, "
    line += f"{differing} results that differ between ranks, {time.monotonic() - start:.1f} s, "
    line += f"{seconds / max(1, done) * 1e6:.1f} us a call with pauses and copies"
    return line, faults.number
