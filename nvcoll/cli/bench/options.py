"""Options that say what is measured; other commands that measure have them too."""

import argparse
from typing import Any

from nvcoll.cli._kinds import of_kind
from nvcoll.cli.bench import report, run
from nvcoll.cli.bench.measure import Budget
from nvcoll.errors import ArgumentError
from nvcoll.ops import DATATYPES, OPS
from nvcoll.planning import VERBS

size = of_kind("bytes")
"""Returns ``64K`` as 65536."""


def add_workload(parser: Any, most: str = "64M") -> None:
    """Add the verb, the number of ranks, and what `workload` reads but for ``--time``.

    Parameters
    ----------
    parser
        Of the command.
    most
        Default of ``--max``.
    """
    parser.add_argument("verb", choices=VERBS, help="the collective")
    parser.add_argument(
        "-n", type=of_kind("count"), metavar="RANKS", help="start so many ranks on this host, as `nvcoll run` does"
    )
    parser.add_argument("--min", type=size, default=8, metavar="BYTES", help="smallest size (default 8)")
    parser.add_argument("--max", type=size, default=size(most), metavar="BYTES", help=f"largest size (default {most})")
    parser.add_argument("--factor", type=float, default=2, help="from one size to the next (default 2)")
    parser.add_argument(
        "--dtype",
        choices=tuple(DATATYPES),
        default="float32",
        metavar="TYPE",
        help="bfloat16, int32, ... (default float32)",
    )
    parser.add_argument("--op", choices=tuple(OPS), default="SUM", help="operator (default SUM)")


def workload(comm: Any, args: argparse.Namespace, calls: int | None = None) -> run.Workload:
    """Return what the options ask for.

    Parameters
    ----------
    comm
        An nvcoll communicator.
    args
        As parsed.
    calls
        Of a batch; None fits them to ``args.time``.

    Raises
    ------
    ArgumentError
        The options cannot be used; the message says what to type.
    """
    if args.n not in (None, comm.size):
        ranks = report.counted(comm.size, "rank")
        raise ArgumentError(f"-n is {args.n}, and the launcher has started {ranks}; leave -n out")
    op, datatype = OPS[args.op], DATATYPES[args.dtype]
    if reason := op.supports(datatype):
        raise ArgumentError(f"--op {op.name} --dtype {datatype.name}: {reason}")
    if not args.time > 0:
        raise ArgumentError(f"--time is {args.time:g} seconds; give a number above 0, such as 0.3")
    if calls is not None and calls < 1:
        raise ArgumentError(f"--iters is {calls}; give 1 call or more")
    counts = run.counts(args.min, args.max, args.factor, datatype.itemsize)
    return run.Workload(counts, datatype, op, Budget(args.time, calls))
