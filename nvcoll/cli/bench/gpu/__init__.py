"""The benchmark on GPUs: who takes part there, and how they are timed."""

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from nvcoll.cli.bench.field import Field
from nvcoll.cli.bench.gpu import floors, peers, report
from nvcoll.cli.bench.gpu.clock import CALLS, Eager, ExchangingRanks, Graphs
from nvcoll.cli.bench.gpu.contestants import BUFFERS, Nvcoll
from nvcoll.cli.bench.gpu.stage import Stage
from nvcoll.cli.bench.run import Workload
from nvcoll.errors import ArgumentError


def field(comm: Any, args: argparse.Namespace, workload: Workload, algorithms: Sequence[str | None]) -> Field:
    """Set up what `args` asks for on the GPUs of `comm`; collective.

    Parameters
    ----------
    comm
        A communicator of ranks on GPUs.
    args
        As parsed by the benchmark's parser.
    workload
        What is measured.
    algorithms
        Of nvcoll: one line each.

    Returns
    -------
    Field

    Raises
    ------
    ArgumentError
        The options cannot be used on GPUs, or torch is missing.
    """
    kinds = list(dict.fromkeys(args.buffer or BUFFERS[:1]))
    names = list(dict.fromkeys(args.compare or ()))
    for kind in kinds:
        if kind not in BUFFERS:
            raise ArgumentError(f"--buffer {kind} is for ranks on hosts; take one of {', '.join(BUFFERS)}")
    for name in names:
        if name not in peers.PEERS:
            raise ArgumentError(f"--compare {name} is for ranks on hosts; take one of {', '.join(peers.PEERS)}")
    ranks = ExchangingRanks(comm)
    stage = Stage(comm, max(workload.counts), workload.datatype)
    gpus = ranks.exchange(stage.facts())
    launch = max(ranks.exchange(floors.bare_launch(stage))) * 1e6 if args.eager else None
    ranks.barrier()
    least = None if args.eager else floors.least_call(stage, ranks, gpus)
    copies = ranks.exchange(floors.copy_bandwidth(stage, gpus) if comm.rank == 0 else None)[0]
    invited, left_out, group = peers.invite(ranks, stage, workload.op, names, gpus)
    own = [Nvcoll(stage, workload.op, kind, algorithm) for kind in kinds for algorithm in algorithms]
    facts = {
        "explanation": [*(report.EAGER if args.eager else report.GRAPHS), report.CHECKED],
        "left_out": left_out,
        "gpu": {
            "names": dict(Counter(gpu["name"] for gpu in gpus)),
            "ranks": gpus,
            "mode": "eager" if args.eager else "replays of CUDA graphs",
            "calls": workload.budget.calls or CALLS,
            "launch_us": launch,
            "exchange_us": None if least is None else least * 1e6,
            "copy_gbs": copies[0],
            "copy_between": copies[1],
        },
    }

    def free() -> None:
        stage.synchronize()
        ranks.barrier()
        if group is not None:
            group.close()
        stage.free()

    return Field(
        ranks=ranks,
        own=own,
        peers=invited,
        versions={peer.name.partition("/")[0]: peer.version for peer in invited},
        clock=Eager(stage) if args.eager else Graphs(stage),
        free=free,
        facts=facts,
        lines=report.header(facts),
        heading=report.heading,
        line=report.line,
        finish=partial(report.merged, eager=args.eager, link=copies[0]),
    )
