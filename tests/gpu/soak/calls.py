"""What both parts of the soak share: calls drawn at random, alike on all ranks, and the ranks' agreements.

``from tests.gpu.soak.calls import Call, agree, compile_kernels, draw, usable``
"""

import json
import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from nvcoll import settings
from nvcoll.ops import DATATYPES, OPS
from tests.gpu.kernels import compile_one

SMALLEST = 8  # bytes
WORKERS = 64
SHOWN = 10  # faults that a rank prints in a part; the others are counted


@dataclass(frozen=True)
class Call:
    """An all-reduce, in place or not; all that ranks must agree on."""

    algorithm: str
    datatype: str
    op: str
    count: int
    in_place: bool

    def __str__(self):
        where = "in place" if self.in_place else "out of place"
        return f"{self.algorithm}, {self.datatype} {self.op}, {self.nbytes} bytes, {where}"

    @property
    def nbytes(self):
        return self.count * DATATYPES[self.datatype].itemsize


def draw(rng, number, algorithms, datatypes, ops, largest):
    """Return calls of random sizes, as many small ones as large ones; algorithms take turns."""
    pairs = [(d, op) for d in datatypes for op in ops if OPS[op].supports(DATATYPES[d]) is None]
    calls = []
    for k in range(number):
        datatype, op = rng.choice(pairs)
        nbytes = int(math.exp(rng.uniform(math.log(SMALLEST), math.log(largest))))
        count = max(1, nbytes // DATATYPES[datatype].itemsize)
        calls.append(Call(algorithms[k % len(algorithms)], datatype, op, count, rng.random() < 0.5))
    return calls


def usable(comm, wanted):
    """Return the algorithms of that name, or with a protocol; None: all. And why others cannot serve this world."""
    candidates = comm.explain("allreduce", 4).candidates
    named = [one for one in candidates if wanted is None or {one.name, one.name.split("/")[0]} & set(wanted)]
    return [one.name for one in named if one.reason is None], {one.name: one.reason for one in named if one.reason}


def agree(comm, **facts):
    """Return what every rank says, by rank; through the host, the calls under test take no part."""
    return [json.loads(one) for one in comm._world.exchange.allgather(json.dumps(facts).encode())]


def compile_kernels(kernels, arch, remote):
    """Let kernels, as in `tests.gpu.kernels`, be in the cache: one by one they take minutes."""
    todo = sorted(kernels)
    if not todo:
        return
    work = partial(compile_one, settings.read().cache_dir, arch, remote)
    work(todo[0])  # and what all far kernels are linked with
    workers = min(WORKERS, len(todo), max(1, len(os.sched_getaffinity(0)) // 2))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(work, todo[1:]))


def kernels_of(calls, deep=lambda nbytes, datatype: False):
    """Return the kernels of calls; `deep` tells of which threads have several packs under way at a time."""
    return {(*call.algorithm.split("/"), call.op, call.datatype, deep(call.nbytes, call.datatype)) for call in calls}


def prepare(comm, calls):
    """Compile the kernels of these calls, each rank its share, and load them; collective.

    To load one later might wait for what runs on the GPU, and that for a rank which shares it.
    """
    if comm.target != "cuda":
        return
    planner = comm._world.planner
    kernels = sorted(kernels_of(calls, planner.deep))
    compile_kernels(kernels[comm.rank :: comm.size], comm._world.device.arch, planner.remote)
    agree(comm)
    for kernel in kernels:
        planner.kernels.get(*kernel)
    agree(comm)


class Delays:
    """A rank's own pauses, so that no two ranks arrive together."""

    def __init__(self, seed, rank):
        self.rng = random.Random(f"{seed} {rank}")

    def happens(self, chance):
        return self.rng.random() < chance

    def seconds(self, longest):
        return self.rng.random() * longest


class Faults:
    """What went wrong on a rank: a line for each fault, the first few at once, and counts for the summary."""

    def __init__(self, part, rank):
        self.part, self.rank, self.number, self.elements = part, rank, 0, 0

    def add(self, where, elements):
        self.number += 1
        self.elements += elements
        if self.number <= SHOWN:
            print(f"FAULT {self.part}, rank {self.rank}, {where}", flush=True)
        elif self.number == SHOWN + 1:
            print(f"FAULT {self.part}, rank {self.rank}: there are more, which are counted only", flush=True)
