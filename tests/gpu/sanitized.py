"""A few small calls of every algorithm, checked, for tools under which kernels are many times slower; see sanitize.sh.

    python3 -m tests.gpu.sanitized threads --ranks 3        # ranks that are threads of this process and share a GPU
    nvcoll run -n 2 -- python3 -m tests.gpu.sanitized processes

The last line is "sanitized: all right", and the number of calls; exit status 1 if a result is wrong. With --spoil, one
call writes to memory that was given back, which shows whether a tool looks at all.
"""

import argparse
import itertools
import os
import sys
import traceback

import nvcoll
from nvcoll.backends import driver
from nvcoll.planning import candidates
from tests.algorithms.calls import GUARD, PLACES, Call, fault, inputs
from tests.gpu.calls import judge, make
from tests.gpu.kernels import PAIRS
from tests.gpu.soak.calls import agree, compile_kernels, kernels_of

COUNTS = (1021, 1, 4093, 16)
KINDS = (PAIRS[0], PAIRS[1], PAIRS[5], PAIRS[2])  # sentinels, rounding, tails of single bytes, flags
NUMBER = 2  # of kinds for each algorithm, unless told otherwise


def calls_of(algorithms, number, limit):
    """Return calls: arrays of every kind, at odd addresses too, in turns of lengths without a common factor."""
    counts, places = itertools.cycle(COUNTS), itertools.cycle(PLACES[:7])
    names = [name for name in candidates() if {name, name.split("/")[0]} & set(algorithms or candidates())]
    calls = [Call(name, *kind, next(counts), (next(places),)) for name in names for kind in KINDS[:number]]
    return calls[:limit]


def threads(calls, compile_first, ranks):
    gpu = driver.Device(0)
    if compile_first:
        compile_kernels(kernels_of(calls), gpu.arch, False)
    judge(gpu, calls, ranks)


def processes(calls, compile_first):
    """Make the calls on this rank of `COMM_WORLD` and judge its own results; the ranks compare digests."""
    comm = nvcoll.COMM_WORLD
    gpu = comm._world.device
    if compile_first and comm.rank == 0:
        compile_kernels(kernels_of(calls), gpu.arch, comm._world.planner.remote)
    agree(comm)
    room = max(call.nbytes for call in calls) + 4 * GUARD
    room += -room % 256
    with gpu:
        plain = driver.allocate(2 * room * comm.size)
    mine = make(comm, calls, 0, gpu, plain, room)
    comm.Barrier()
    with gpu:
        driver.free(plain)
    told = agree(comm, results=[one if isinstance(one, str) else one.tobytes().hex() for one in mine])
    for number, call in enumerate(calls):
        given = [inputs(call, number, rank) for rank in range(comm.size)]
        found = fault(call, [mine[number]], given, tuple(map(len, comm._world.topology.nodes)), ordered=False)
        if found is None and len({one["results"][number] for one in told}) > 1:
            found = "ranks have different results"
        assert found is None, f"call {number}, {call}: {found}"
    return comm.size


def spoil(comm):
    """Let a call write its result to memory that was given back."""
    x = comm.zeros(1024, "float32")
    comm.Allreduce(x, algorithm="one_shot/simple")
    comm.Barrier()
    [plan] = comm._calls._kept.values()
    with comm._world.device:
        gone = driver.allocate(1 << 20)
        driver.free(gone)
        plan.run(x.address, gone, comm.stream)
        driver.stream_synchronize(comm.stream)


def main(arguments):
    parser = argparse.ArgumentParser("tests.gpu.sanitized", description=__doc__.partition("\n")[0])
    parser.add_argument("form", choices=("threads", "processes"))
    parser.add_argument("--ranks", type=int, default=2, help="threads: how many (2)")
    parser.add_argument("--algorithms", type=lambda text: text.split(","), help="ring,nvrar/simple,... (all)")
    parser.add_argument("--kinds", type=int, default=NUMBER, help=f"kinds of data, of {len(KINDS)} ({NUMBER})")
    parser.add_argument("--limit", type=int, help="calls at most")
    parser.add_argument("--compile", action="store_true", help="compile what is not in the cache on all cores, before")
    parser.add_argument("--spoil", action="store_true", help="only a call that writes where it must not")
    options = parser.parse_args(arguments)
    if options.spoil:
        if options.form == "threads":
            nvcoll.emulate(options.ranks, device=0).run(spoil)
        else:
            spoil(nvcoll.COMM_WORLD)
        return
    calls, ranks = calls_of(options.algorithms, options.kinds, options.limit), options.ranks
    if options.form == "threads":
        threads(calls, options.compile, ranks)
    else:
        ranks = processes(calls, options.compile)
    print(f"sanitized: all right, {len(calls)} calls on {ranks} ranks", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no orderly end: kernels of others may be waiting still
