"""A CUDA graph of calls, replayed very often: inputs are made, and every element of every result checked, on the GPU.

Inputs change from call to call and from replay to replay, by a counter in the GPU's memory that each replay increases;
so what an earlier call has left behind is wrong. Graphs of the same calls differ in where this rank pauses on the GPU,
and each rank takes any of them for a replay. There is nothing between calls; the ranks meet on the host only now and
then, to agree whether the time is over.
"""

import threading
import time
from functools import cache

from nvcoll.errors import ArgumentError
from nvcoll.ops import OPS
from tests.gpu.soak.calls import Delays, Faults, agree, prepare

DATATYPES = ("float32", "bfloat16", "int32", "float16", "float64", "int64")  # small whole numbers are exact in them
OPERATORS = ("SUM", "MAX", "MIN")
BETWEEN = 16  # calls that the host launches between replays, in turns
EVERY = 5  # replays between two of them
LOOK = 20  # replays between two looks at what was found wrong
GRAPHS = 3
KINDS = 8  # inputs are below, before each rank adds its own number
CYCLES = 400_000  # of the longest pause on the GPU, some 200 us
SHIFT = 64  # bytes by which arrays are off their best alignment
NONE = 2**31 - 1  # no element was wrong
CAPTURE = threading.Lock()  # ranks that are threads capture in turns, as torch wants it


def able(datatypes, ops):
    """Return the datatypes and operators that this part knows to check."""
    return [one for one in datatypes if one in DATATYPES], [one for one in ops if one in OPERATORS]


@cache
def load():
    """Import torch, before anything else is; return it, or why there is none."""
    from nvcoll.cli.bench.gpu.stage import load_torch

    try:
        return load_torch(), None
    except ArgumentError as error:
        return None, str(error)


def missing(comm):
    """Return why this part cannot run, or None."""
    return "the ranks are not on GPUs" if comm.target != "cuda" else load()[1]


def own(rank):
    """What a rank adds to its inputs: no two ranks' numbers, nor those of any four, can be mistaken in a sum."""
    return rank * rank % 50


class Checked:
    """Calls between the making of their inputs and the check of their results, all on torch's current stream."""

    def __init__(self, comm, torch, calls, seed):
        self.comm, self.torch, self.calls = comm, torch, calls
        self.device = torch.device("cuda", comm._world.device.ordinal)
        torch.cuda.set_device(self.device)
        self.delays = Delays(seed, comm.rank)
        numbers = [own(rank) for rank in range(comm.size)]
        self.sum, self.most, self.least = sum(numbers), max(numbers), min(numbers)
        most, nbytes = max(call.count for call in calls), max(call.nbytes for call in calls) + SHIFT
        nbytes += -nbytes % 64
        self.buffers = [comm.empty(nbytes, "uint8") for _ in range(2)]
        self.rooms = [[torch.from_dlpack(one), self.bytes(nbytes)] for one in self.buffers]  # on the heap, and not
        self.wanted = self.bytes(nbytes)
        shuffled = torch.randperm(most, generator=torch.Generator().manual_seed(seed))
        self.pattern = (shuffled % KINDS).to(torch.int32).to(self.device)
        self.index = torch.arange(most, dtype=torch.int32, device=self.device)
        turns = (self.index + comm.rank) % comm.size  # ranks change roles from element to element
        self.mine = torch.tensor(numbers, dtype=torch.int32, device=self.device)[turns.long()]
        self.values, self.other = torch.empty_like(self.pattern), torch.empty_like(self.pattern)
        self.turn = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.none = torch.full((), NONE, dtype=torch.int32, device=self.device)
        self.counts = torch.zeros(len(calls), dtype=torch.int64, device=self.device)
        self.first = torch.full((len(calls),), NONE, dtype=torch.int32, device=self.device)
        self.places = [self.place(call) for call in calls]
        self.wait()

    def bytes(self, number):
        return self.torch.empty(number, dtype=self.torch.uint8, device=self.device)

    def part(self, room, first, call):
        return room[first : first + call.nbytes].view(getattr(self.torch, call.datatype))

    def place(self, call):
        """Return the arrays of a call, somewhere in memory of either kind; they differ between ranks."""
        rng, itemsize = self.delays.rng, call.nbytes // call.count
        arrays = [
            self.part(rng.choice(kinds), rng.randrange(SHIFT // itemsize) * itemsize, call) for kinds in self.rooms
        ]
        return arrays[:1] * 2 if call.in_place else arrays

    def next_turn(self):
        self.turn.add_(1)

    def wait(self):
        """Wait for what this rank has queued, not for others that share the GPU."""
        self.torch.cuda.current_stream(self.device).synchronize()

    def rehearse(self):
        """Do all but the reductions: torch gets memory and loads kernels, which might wait for what other ranks run."""
        for number in range(len(self.calls)):
            self.make(number, reduce=False)
        self.forget()

    def forget(self):
        """Count what is wrong anew."""
        self.counts.zero_()
        self.first.fill_(NONE)
        self.wait()

    def make(self, number, reduce=True):
        """Queue a call: pause or not, fill the input, reduce, compare."""
        torch, call, (send, recv) = self.torch, self.calls[number], self.places[number]
        values, other = self.values[: call.count], self.other[: call.count]
        if self.delays.happens(0.1):
            torch.cuda._sleep(1 + int(self.delays.seconds(CYCLES)))
        torch.add(self.pattern[: call.count], self.turn, out=values)
        values.add_(number).bitwise_and_(KINDS - 1)
        torch.add(values, self.mine[: call.count], out=other)
        send.copy_(other)
        if not call.in_place:
            recv.fill_(-1)  # no result is negative
        if reduce:
            arrays = (send,) if call.in_place else (send, recv)
            self.comm.Allreduce(*arrays, op=OPS[call.op], algorithm=call.algorithm)
        if call.op == "SUM":
            torch.mul(values, self.comm.size, out=other)
            other.add_(self.sum)
        else:
            torch.add(values, self.most if call.op == "MAX" else self.least, out=other)
        wanted = self.part(self.wanted, 0, call)
        wanted.copy_(other)
        bad = torch.ne(recv, wanted)
        self.counts[number].add_(bad.sum())
        first = torch.where(bad, self.index[: call.count], self.none).amin()
        self.first[number].copy_(torch.minimum(self.first[number], first))

    def look(self, faults, where):
        """Wait for what was queued, tell what was wrong in it, and begin to count anew."""
        self.wait()  # not inside a copy: the driver would keep other threads from launching what this one waits for
        counts, first = self.counts.tolist(), self.first.tolist()
        for number, call in enumerate(self.calls):
            if counts[number]:
                told = f"{counts[number]} wrong elements, the first at {first[number]}"
                faults.add(f"call {number}: {call}: {told}, {where}", counts[number])
        if any(counts):
            self.forget()

    def capture(self, number, stream):
        """Return a graph of the first calls."""
        graph = self.torch.cuda.CUDAGraph()
        with CAPTURE, self.torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.next_turn()
            for one in range(number):
                self.make(one)
        return graph

    def free(self):
        self.torch.cuda.synchronize()
        self.places, self.rooms = [], []
        for buffer in self.buffers:
            buffer.free()


def soak(comm, options, calls):
    """Replay graphs of all calls but the last few, which come between replays; return the summary and the faults."""
    torch, _ = load()
    prepare(comm, calls)
    checked, faults = Checked(comm, torch, calls, options.seed), Faults("graph", comm.rank)
    # Emulated ranks have a stream of their own, where their calls go.
    device = checked.device
    stream = torch.cuda.ExternalStream(comm.stream, device) if comm.stream else torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            checked.rehearse()
            agree(comm)
            for number in range(len(calls)):
                checked.next_turn()
                checked.make(number)
            checked.look(faults, "before any replay")
        agree(comm)  # a capture may wait for the GPU, and that for another rank
        graphs = [checked.capture(len(calls) - BETWEEN, stream) for _ in range(GRAPHS)]
        agree(comm)
        with torch.cuda.stream(stream):
            checked.rehearse()  # torch has given memory back
            agree(comm)
            line = replay(comm, options, checked, graphs, faults)
        comm.Barrier()  # a replay that failed is known to the next call only
    except Exception as exc:
        faults.add(f"{type(exc).__name__}: {exc}", 0)
        raise
    del graphs
    checked.free()
    elements = sum(one["elements"] for one in agree(comm, elements=faults.elements))
    return f"graph: {line}, {elements} wrong elements", faults.number


def replay(comm, options, checked, graphs, faults):
    """Replay until the calls are done or the time is over; return what was done, in words."""
    size = len(checked.calls) - BETWEEN
    replays, delays = -(-options.graph_calls // size), checked.delays
    start = said = time.monotonic()
    done, others, late = 0, 0, False
    while done < replays and not late:
        if delays.happens(0.2):
            time.sleep(delays.seconds(options.sleep))
        delays.rng.choice(graphs).replay()
        done += 1
        if done % EVERY == 0:
            checked.next_turn()
            checked.make(size + others % BETWEEN)
            others += 1
        if done % LOOK == 0 or done == replays:
            checked.look(faults, f"in replays {(done - 1) // LOOK * LOOK} to {done - 1}")
            late = any(one["late"] for one in agree(comm, late=time.monotonic() - start > options.seconds))
            if comm.rank == 0 and time.monotonic() - said > options.every:
                said = time.monotonic()
                print(f"graph: {done * size} calls after {said - start:.0f} s, {faults.number} faults", flush=True)
    seconds = time.monotonic() - start
    return (
        f"{done * size} calls in {done} replays{' (time is up)' if done < replays else ''} and {others} between them, "
        f"{seconds:.1f} s, {seconds / (done * size + others) * 1e6:.1f} us a call with pauses and checks"
    )
