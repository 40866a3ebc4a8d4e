"""Measure all algorithms for a collective on this machine, and write a rules file for NVCOLL_RULES.

All candidates run at every fourth size, and between two of these those that were not several times slower than the
fastest at both. A rule covers a range of sizes in which its algorithm was within --margin of the fastest; there are as
few rules as that allows. They speak of this kind of hardware and this number of ranks and nodes only, and of ranks that
share cores or a GPU, or do not. Rules that FILE has already, or if there is no FILE those in force, stay behind them,
but for those of exactly these ranks.

Each line is checked on every rank before it is timed, as by `nvcoll bench`. After a wrong answer nothing is written,
and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvcoll import settings
from nvcoll.cli import bench
from nvcoll.cli._ranks import nothing, on_ranks, say
from nvcoll.cli.bench import options, report
from nvcoll.cli.bench.contestants import BUFFERS
from nvcoll.cli.bench.gpu.contestants import BUFFERS as GPU_BUFFERS
from nvcoll.cli.tune import launch, rulebook, summary
from nvcoll.cli.tune.race import Race
from nvcoll.cli.tune.ranges import choose, ranges
from nvcoll.errors import ArgumentError
from nvcoll.planning import candidates

Say = Callable[[str], object]


def margin(text: str) -> float:
    """Return ``3%`` as 0.03.

    Raises
    ------
    argparse.ArgumentTypeError
        `text` is no fraction below 1.
    """
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction from 0% to below 100%, such as 3%, got {text!r}")
    return number


def add_parser(subparsers: Any) -> None:
    """Add ``tune`` to the command line."""
    parser = subparsers.add_parser(
        "tune",
        help="measure which algorithm is fastest here, and write a rules file",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  nvcoll tune allreduce -n 4 --output rules.json\n"
        "  mpiexec -n 8 nvcoll tune allreduce --output rules.json\n"
        "  NVCOLL_RULES=rules.json nvcoll bench allreduce -n 4\n",
    )
    options.add_workload(parser, "16M")
    parser.add_argument(
        "--buffer",
        choices=tuple(dict.fromkeys(BUFFERS + GPU_BUFFERS)),
        default=BUFFERS[0],
        help="symmetric: in place on the symmetric heap (default); numpy, on GPUs torch: in place on an ordinary "
        "array; out-of-place: from one symmetric array to another",
    )
    parser.add_argument(
        "--algorithm",
        action="append",
        metavar="NAME",
        help="ring/simple, or ring with all its protocols: only these; may be repeated (default: all)",
    )
    parser.add_argument("--time", type=float, default=0.1, metavar="SECONDS", help="time for a line (default 0.1)")
    parser.add_argument(
        "--margin",
        type=margin,
        default=0.03,
        metavar="FRACTION",
        help="what takes at most so much longer than the fastest counts as fast as that: 3%% (default), or 0.03",
    )
    parser.add_argument("--launch", action="store_true", help="on GPUs: also the shapes of launches, all anew")
    parser.add_argument(
        "--output", type=Path, default=Path("rules.json"), metavar="FILE", help="the rules file (default rules.json)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the rules, and write nothing")


def main(args: argparse.Namespace) -> int:
    """Run ``nvcoll tune``; every rank calls it.

    Parameters
    ----------
    args
        As parsed by the parser of `add_parser`.

    Returns
    -------
    int
        0; 1 if an answer was wrong; 2 if it could not run as asked.
    """
    return on_ranks("tune", args, tune)


def tune(comm: Any, args: argparse.Namespace, say: Say = say) -> int:
    """Measure what `args` asks for on `comm`, and write the rules on rank 0; collective.

    Parameters
    ----------
    comm
        An nvcoll communicator.
    args
        As parsed by the parser of `add_parser`.
    say
        Called on rank 0 with each line of the output.

    Returns
    -------
    int
        0, or 1 if an answer was wrong.

    Raises
    ------
    ArgumentError
        The options cannot be used, or the file cannot be written; the message says what to do.
    """
    workload = options.workload(comm, args)
    _refuse(comm, args)
    tell = say if comm.rank == 0 else nothing
    # What is wrong with the file is told before the measurement.
    old: rulebook.Rules = {}
    if not args.dry_run:
        old = bench.ranks_of(comm).on_first(lambda: rulebook.read(args.output, settings.values().rules)) or {}
    alone = argparse.Namespace(buffer=[args.buffer], compare=None, eager=False)
    field = bench.enter(comm, alone, workload, bench.named(comm, args.verb, args.algorithm or ["all"]))
    document = {**report.document(args.verb, args.op, comm, {}, {}), **field.facts}
    race = Race(field, workload, args.verb)
    for text in (*report.header(document), *field.lines, *summary.left_out(race.left_out)):
        tell(f"# {text}")
    tell(field.heading(()))
    scope = rulebook.Scope.of(comm, args.verb)
    chosen, shaped = _run(race, args.margin, tell), {}
    if chosen and args.launch:
        tell("# shapes of launches, of the algorithms that were chosen:")
        shapes = launch.Shapes(field, workload, chosen)
        shaped = _run(shapes, args.margin, tell)
    field.free()
    if not chosen or (args.launch and not shaped):
        tell("# nothing is written: some answers were wrong")
        if comm.rank > 0:
            print(f"nvcoll tune: rank {comm.rank}: some answers were wrong", file=sys.stderr, flush=True)
        field.ranks.barrier()  # a launcher may end all ranks when the first of them ends
        return 1
    note = summary.note(document, args)
    new = scope.rules(ranges(chosen), note)
    merged = rulebook.merge(old, scope, new)
    for text in summary.lines(str(scope), new, chosen, race):
        tell(f"# {text}")
    if shaped:
        forms = launch.rules(ranges(shaped), note, shapes.far, shapes.launched)
        merged = launch.merge(merged, forms)
        for text in summary.lines("launch", forms, shaped, shapes):
            tell(f"# {text}")
    if not args.dry_run:
        field.ranks.on_first(lambda: rulebook.write(args.output, merged))
    tell(f"# {summary.last(args)}")
    field.ranks.barrier()
    return 0


def _refuse(comm: Any, args: argparse.Namespace) -> None:
    """Raise ArgumentError where there is nothing to measure; the same on all ranks."""
    if comm.size == 1:
        raise ArgumentError(f"algorithms are for two ranks or more, this is one; type `nvcoll tune {args.verb} -n 2`")
    if not set(comm.algorithms(args.verb)) & set(candidates(args.verb)):
        raise ArgumentError(
            "rules choose among ranks of one host, or on GPUs; these are on several nodes of hosts, which MPI joins in "
            "one way; start them on one host, with NVCOLL_RANKS_PER_NODE unset"
        )
    if args.launch:
        launch.refuse(comm)


def _run(race: Race | launch.Shapes, margin: float, tell: Say) -> dict[int, str]:
    """Measure, and return what is chosen for each size; nothing if any rank got a wrong answer."""
    field, rows = race.field, []
    for row in race.rows():
        tell(field.line(row))
        rows.append(row)
    for text in report.notes(rows):
        tell(f"# {text}")
    if any(field.ranks.largest([any(row.wrong for row in rows)])):
        return {}
    return choose(dict(sorted(race.times.items())), margin)
