"""Tell how long a collective takes, beside the libraries it competes with.

Every line is checked before it is timed: all ranks reduce random data, and each compares what it got with a reference
in float64. A wrong answer is never timed; its line says WRONG, and the exit status is 1. The timed calls reduce zeros:
in place, sums of anything else double at every call and soon overflow.

Where ranks have GPUs, calls are timed there: as replays of CUDA graphs or, with --eager, as what a call costs the host.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvcoll.cli import _files
from nvcoll.cli._ranks import nothing, on_ranks, say
from nvcoll.cli.bench import gpu, options, report, run
from nvcoll.cli.bench.contestants import BUFFERS, PEERS, Arrays, Nvcoll
from nvcoll.cli.bench.field import Field
from nvcoll.cli.bench.gpu.clock import ExchangingRanks
from nvcoll.cli.bench.gpu.contestants import BUFFERS as GPU_BUFFERS
from nvcoll.cli.bench.gpu.peers import PEERS as GPU_PEERS
from nvcoll.cli.bench.measure import Ranks
from nvcoll.errors import ArgumentError

PICTURES = (".png", ".pdf", ".svg")


def peers(text: str) -> list[str]:
    """Return ``nccl,symm_mem`` as a list of names.

    Raises
    ------
    argparse.ArgumentTypeError
        One of them is no peer.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*PEERS, *GPU_PEERS):
            raise argparse.ArgumentTypeError(f"expected names of {', '.join([*PEERS, *GPU_PEERS])}, got {name!r}")
    return names


def add_parser(subparsers: Any) -> None:
    """Add ``bench`` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="time a collective, checked, beside other libraries",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  nvcoll bench allreduce -n 2\n  nvcoll run -n 4 -- nvcoll bench allreduce --max 1M\n"
        "  mpiexec -n 2 nvcoll bench allreduce --compare mpi --json new.json --plot new.png\n"
        "  nvcoll bench allreduce -n 2 --dtype bfloat16 --compare nccl,nccl_symmetric,symm_mem    (GPUs)\n",
    )
    options.add_workload(parser)
    parser.add_argument(
        "--buffer",
        action="append",
        choices=tuple(dict.fromkeys(BUFFERS + GPU_BUFFERS)),
        help="symmetric: in place on the symmetric heap (default); numpy, on GPUs torch: in place on an ordinary "
        "array; out-of-place: from one symmetric array to another; may be repeated",
    )
    parser.add_argument(
        "--algorithm",
        action="append",
        metavar="NAME",
        help="ring/simple, or ring with all its protocols, or all; one line each; may be repeated "
        "(default: what nvcoll chooses)",
    )
    parser.add_argument("--time", type=float, default=0.3, metavar="SECONDS", help="time for a line (default 0.3)")
    parser.add_argument("--iters", type=int, metavar="CALLS", help="calls in a batch, whatever their time; on GPUs 50")
    parser.add_argument(
        "--eager", action="store_true", help="on GPUs: the host's time of a call, not replays of CUDA graphs"
    )
    parser.add_argument(
        "--compare",
        action="extend",
        type=peers,
        metavar="NAMES",
        help=f"also time these libraries, by turns: on hosts {', '.join(PEERS)}, on ordinary arrays; "
        f"on GPUs {', '.join(GPU_PEERS)}; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it, each batch too, to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw times and ratios to FILE ({', '.join(PICTURES)})"
    )


def main(args: argparse.Namespace) -> int:
    """Run ``nvcoll bench``; every rank calls it.

    Parameters
    ----------
    args
        As parsed by the parser of `add_parser`.

    Returns
    -------
    int
        0; 1 if an answer was wrong; 2 if the benchmark could not run as asked.
    """
    return on_ranks("bench", args, bench)


def bench(comm: Any, args: argparse.Namespace, say: Callable[[str], object] = say) -> int:
    """Measure what `args` asks for on `comm`; collective.

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
        The options cannot be used, or a file cannot be written; the message says what to do.
    """
    workload = options.workload(comm, args, args.iters)
    algorithms = named(comm, args.verb, args.algorithm)
    tell = say if comm.rank == 0 else nothing
    ranks_of(comm).on_first(lambda: _check_files(args))
    field = enter(comm, args, workload, algorithms)
    document = {**report.document(args.verb, args.op, comm, _settings(args), field.versions), **field.facts}
    for text in (*report.header(document), *field.lines):
        tell(f"# {text}")
    tell(field.heading(list(field.versions)))
    rows = []
    for measured in run.rows(field.ranks, workload, field.own, field.peers, field.clock):
        row = field.finish(measured)
        tell(field.line(row))
        rows.append(row)
    field.free()
    for text in report.notes(rows):
        tell(f"# {text}")
    field.ranks.on_first(lambda: _write(args, document, rows))
    wrong = any(row.wrong for row in rows)
    if wrong and comm.rank > 0:
        print(f"nvcoll bench: rank {comm.rank}: some answers were wrong", file=sys.stderr, flush=True)
    field.ranks.barrier()  # a launcher may end all ranks when the first of them ends
    return int(wrong)


def ranks_of(comm: Any) -> Ranks:
    """Return how the ranks of `comm` agree."""
    return ExchangingRanks(comm) if comm.target == "cuda" else Ranks(comm)


def named(comm: Any, verb: str, asked: Sequence[str] | None) -> list[str | None]:
    """Return the candidates that ``--algorithm`` asks for, each once; None alone if it asks for none.

    Raises
    ------
    ArgumentError
        There is no such algorithm.
    """
    if not asked:
        return [None]
    known = comm.algorithms(verb)
    found: dict[str | None, None] = {}  # an ordered set
    for given in asked:
        names = [name for name in known if given in ("all", name, name.partition("/")[0])]
        if not names:
            choices = ", ".join(dict.fromkeys(name.partition("/")[0] for name in known))
            raise ArgumentError(
                f"--algorithm {given} is unknown; take all or one of {choices}, or one as in {known[-1]}"
            )
        found.update(dict.fromkeys(names))
    return list(found)


def enter(comm: Any, args: argparse.Namespace, workload: run.Workload, algorithms: Sequence[str | None]) -> Field:
    """Set up who takes part; collective.

    Parameters
    ----------
    comm
        An nvcoll communicator.
    args
        Whose ``buffer`` (a list, or None), ``compare`` (a list, or None) and ``eager`` count here.
    workload
        What is measured.
    algorithms
        Of nvcoll: a contestant each, for each buffer; None is what nvcoll chooses.

    Raises
    ------
    ArgumentError
        This is not for ranks on hosts, or on GPUs, or something is missing.
    """
    found = gpu.field if comm.target == "cuda" else _on_hosts
    return found(comm, args, workload, algorithms)


def _on_hosts(comm: Any, args: argparse.Namespace, workload: run.Workload, algorithms: Sequence[str | None]) -> Field:
    kinds = dict.fromkeys(args.buffer or BUFFERS[:1])
    names = dict.fromkeys(args.compare or ())
    if args.eager:
        raise ArgumentError("--eager is for ranks on GPUs: calls on hosts are timed as they are made; leave it out")
    for option, given, known in ("--buffer", kinds, BUFFERS), ("--compare", names, PEERS):
        for one in given:
            if one not in known:
                raise ArgumentError(
                    f"{option} {one} is for ranks on GPUs, these are on hosts; take one of {', '.join(known)}"
                )
    arrays = Arrays(comm, max(workload.counts), workload.datatype)
    others = [PEERS[name](comm, arrays, workload.op) for name in names]
    own = [Nvcoll(comm, arrays, workload.op, kind, algorithm) for kind in kinds for algorithm in algorithms]
    versions = {name: peer.version for name, peer in zip(names, others, strict=True)}
    return Field(Ranks(comm), own, others, versions, arrays.free)


def _check_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written: before the measurement, not after it."""
    if args.json:
        _files.check("--json", args.json)
    if args.plot:
        _files.check("--plot", args.plot)
        if args.plot.suffix.lower() not in PICTURES:
            raise ArgumentError(f"--plot {args.plot.name} has no suffix of a picture; end it in {', '.join(PICTURES)}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ArgumentError('--plot needs matplotlib; pip install "nvcoll[bench]"')


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if not callable(value)
    }


def _write(args: argparse.Namespace, document: dict[str, Any], rows: list[report.Row]) -> None:
    if args.json:
        whole = {**document, "rows": [row.fields() for row in rows], "geometric_means": report.means(rows)}
        with _files.refusing("--json", args.json, "the table is above"):
            _files.replace(args.json, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    if args.plot:
        from nvcoll.cli.bench import plot

        host = document["machine"]
        place = f"{host['cpu_model']}, {host['physical_cores']} cores"
        if "gpu" in document:
            place = f"{', '.join(document['gpu']['names'])} ({document['gpu']['mode']})"
        title = f"{args.verb} {args.op} {args.dtype}, {report.counted(document['ranks'], 'rank')} on {place}"
        with _files.refusing("--plot", args.plot, "the table is above"):
            plot.save(args.plot, rows, title)
