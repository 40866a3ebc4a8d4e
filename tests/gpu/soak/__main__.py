"""A soak: very many all-reduces of all kinds, with ranks that arrive at random, and every result checked in full.

    mpirun --bind-to none -n 2 python3 -m tests.gpu.soak --graph-calls 100000 --calls 2000 --seconds 100
    mpirun --bind-to none -n 4 python3 -m tests.gpu.soak --graph-calls 0 --algorithms nvrar --datatypes all --ops all
    python3 -m tests.gpu.soak --emulate 8 --ranks-per-node 4 --device 0     # ranks that are threads, and share a GPU
    python3 -m tests.gpu.soak --compile far     # beforehand, where ranks are reached through a network; makes no calls

The graph part replays a CUDA graph of calls and checks on the GPU; it needs torch. The eager part runs on hosts too.
A line for each fault, a summary for each part; exit status 1 if there was any fault.
"""

import argparse
import os
import random
import sys
import time
import traceback

import nvcoll
from nvcoll._selection import LAUNCH
from nvcoll.ops import DATATYPES, OPS
from nvcoll.planning import candidates, read_rules
from nvcoll.planning_cuda import launch_shape
from nvcoll.settings import let_streams_run_side_by_side
from tests.gpu.kernels import REACHING
from tests.gpu.soak import eager, graph
from tests.gpu.soak.calls import agree, compile_kernels, draw, kernels_of, usable

DEFAULT_DATATYPES, DEFAULT_OPS = ("float32", "bfloat16", "int32"), ("SUM", "MAX")


def names(known, text, what):
    if text == "all":
        return list(known)
    found = [one for one in text.split(",") if one]
    if unknown := [one for one in found if one not in known]:
        raise argparse.ArgumentTypeError(f"there is no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    if not found:
        raise argparse.ArgumentTypeError(f"no {what} is named; leave the option out for the default")
    return found


def size(text):
    for letter, shift in (("K", 10), ("M", 20)):
        if text.upper().endswith(letter):
            return int(text[:-1]) << shift
    return int(text)


def parse(arguments):
    parser = argparse.ArgumentParser("tests.gpu.soak", description=__doc__.partition("\n")[0])
    every = [name.split("/")[0] for name in candidates()]
    algorithms = list(dict.fromkeys([*every, *candidates()]))
    add = parser.add_argument
    add("--graph-calls", type=int, default=100_000, help="calls in replays of a CUDA graph; 0: none (100000)")
    add("--graph-size", type=int, default=200, help="calls in the graph (200)")
    add("--calls", type=int, default=2000, help="calls that the host launches; 0: none (2000)")
    add("--seconds", type=float, default=100, help="most seconds for each part (100)")
    add("--algorithms", type=lambda t: names(algorithms, t, "algorithm"), help="ring,nvrar/simple,... (all that serve)")
    add("--datatypes", type=lambda t: names(DATATYPES, t, "datatype"), default=list(DEFAULT_DATATYPES), help="or all")
    add("--ops", type=lambda t: names(OPS, t, "operator"), default=list(DEFAULT_OPS), help="or all")
    add("--graph-largest", type=size, default=1 << 20, help="most bytes of a message in the graph (1M)")
    add("--largest", type=size, default=4 << 20, help="most bytes of a message that the host launches (4M)")
    add("--slots", type=int, default=6, help="calls between two looks at results; each has 2 symmetric arrays (6)")
    add("--meet", type=int, default=500, help="calls of the host after which ranks wait for each other (500)")
    add("--sleep", type=float, default=1e-3, help="longest pause of a rank between its calls, in seconds (0.001)")
    add("--every", type=float, default=15, help="seconds between lines on how far it is (15)")
    add("--seed", type=int, default=1)
    add("--emulate", type=int, metavar="N", help="N ranks that are threads of this process, instead of COMM_WORLD")
    add("--ranks-per-node", type=int, metavar="K", help="emulated ranks on each node (all on one)")
    add("--device", type=int, metavar="D", help="the GPU that emulated ranks share (none: the host)")
    add("--compile", choices=("near", "far"), help="only compile the kernels; far: those that use the network")
    return parser.parse_args(arguments)


def drawn(options, algorithms):
    """Return the calls of both parts; the same on all ranks."""
    rng = random.Random(options.seed)
    graph_types, graph_ops = graph.able(options.datatypes, options.ops)
    in_graph = []
    if options.graph_calls and graph_types and graph_ops:
        number = min(options.graph_size, options.graph_calls) + graph.BETWEEN
        in_graph = draw(rng, number, algorithms, graph_types, graph_ops, options.graph_largest)
    return in_graph, draw(rng, options.calls, algorithms, options.datatypes, options.ops, options.largest)


def only_compile(options):
    from nvcoll.backends.driver import Device

    start, far = time.monotonic(), options.compile == "far"
    launches = read_rules(None)[LAUNCH]
    wanted = set(options.algorithms or candidates())
    chosen = [name for name in candidates() if {name, name.split("/")[0]} & wanted]
    chosen = [name for name in chosen if name in REACHING or not far]
    calls = [call for part in drawn(options, chosen) for call in part]
    kernels = kernels_of(calls, lambda nbytes, datatype: launch_shape(launches, nbytes, datatype, far)[2])
    compile_kernels(kernels, Device(0).arch, far)
    print(f"compiled {len(kernels)} kernels in {time.monotonic() - start:.1f} s", flush=True)


def soak(comm, options):
    """Run both parts on a rank; return the exit status. Collective."""
    algorithms, refused = usable(comm, options.algorithms)
    first = comm.rank == 0
    say = print if first else lambda *_, **__: None
    say(f"soak: {comm.size} ranks, {comm.backend}, nodes {comm._world.topology.nodes}, seed {options.seed}", flush=True)
    for name, reason in refused.items():
        say(f"left out: {name}: {reason}", flush=True)
    if comm.size < 2 or not algorithms:
        say("FAULT soak: needs two ranks or more, and an algorithm that serves them", flush=True)
        return 1
    in_graph, one_by_one = drawn(options, algorithms)
    faults = 0
    if options.graph_calls and not in_graph:
        say(f"graph: left out: it checks {', '.join(graph.DATATYPES)} with {', '.join(graph.OPERATORS)}", flush=True)
    if in_graph:
        reason = next((one["reason"] for one in agree(comm, reason=graph.missing(comm)) if one["reason"]), None)
        if reason:
            say(f"graph: left out: {reason}", flush=True)
        else:
            line, found = graph.soak(comm, options, in_graph)
            say(line, flush=True)
            faults += found
    if one_by_one:
        line, found = eager.soak(comm, options, one_by_one)
        say(line, flush=True)
        faults += found
    comm.Barrier()
    faults = sum(one["faults"] for one in agree(comm, faults=faults))
    say(f"soak: {f'FAILED, {faults} faults' if faults else 'all right'}", flush=True)
    return 1 if faults else 0


def main(arguments):
    options = parse(arguments)
    if options.compile:
        only_compile(options)
        return 0
    if options.graph_calls:
        let_streams_run_side_by_side()  # before torch uses the driver
        graph.load()  # torch first, then nvcoll, as programs do
    try:
        if options.emulate:
            return max(nvcoll.emulate(options.emulate, options.ranks_per_node, options.device).run(soak, options))
        return soak(nvcoll.COMM_WORLD, options)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no orderly end: it might wait for the others


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
