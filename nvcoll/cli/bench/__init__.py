"""Tell how long a collective takes, beside the libraries it competes with.

Every line is checked before it is timed: all ranks reduce random data, and each compares what it got with a reference
in float64. A wrong answer is never timed; its line says WRONG, and the exit status is 1. The timed calls reduce zeros:
in place, sums of anything else double at every call and soon overflow.

Where ranks have GPUs, calls are timed there: as replays of CUDA graphs or, with --eager, as what a call costs the host.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvcoll import settings
from nvcoll.cli import info
from nvcoll.cli.bench import gpu, report, run
from nvcoll.cli.bench.contestants import BUFFERS, PEERS, Arrays, Nvcoll
from nvcoll.cli.bench.field import Field
from nvcoll.cli.bench.gpu.clock import ExchangingRanks
from nvcoll.cli.bench.gpu.contestants import BUFFERS as GPU_BUFFERS
from nvcoll.cli.bench.gpu.peers import PEERS as GPU_PEERS
from nvcoll.cli.bench.measure import Budget, Ranks
from nvcoll.errors import ArgumentError
from nvcoll.ops import DATATYPES, OPS

VERBS = ("allreduce",)
PICTURES = (".png", ".pdf", ".svg")


def size(text: str) -> int:
    """Return ``64K`` as 65536.

    Raises
    ------
    argparse.ArgumentTypeError
        `text` is no size.
    """
    accepted, parse = settings.KINDS["bytes"]
    try:
        return int(parse(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {accepted}, got {text!r}") from None


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
    parser.add_argument("verb", choices=VERBS, help="the collective")
    parser.add_argument("-n", type=int, metavar="RANKS", help="start so many ranks on this host, as `nvcoll run` does")
    parser.add_argument("--min", type=size, default=8, metavar="BYTES", help="smallest size (default 8)")
    parser.add_argument("--max", type=size, default=64 << 20, metavar="BYTES", help="largest size (default 64M)")
    parser.add_argument("--factor", type=float, default=2, help="from one size to the next (default 2)")
    parser.add_argument(
        "--dtype",
        choices=tuple(DATATYPES),
        default="float32",
        metavar="TYPE",
        help="bfloat16, int32, ... (default float32)",
    )
    parser.add_argument("--op", choices=tuple(OPS), default="SUM", help="operator (default SUM)")
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
    if args.n is not None and info.bootstrap(os.environ)["kind"] == "single":
        return _launch(args.n)
    from nvcoll import COMM_WORLD

    rank = COMM_WORLD.rank
    try:
        return bench(COMM_WORLD, args)
    except ArgumentError as error:  # the same on all ranks: one of them says it
        if rank == 0:
            print(f"nvcoll bench: {error}", file=sys.stderr, flush=True)
        COMM_WORLD.Barrier()  # a launcher may end all ranks when the first of them ends
        return 2


def _say(text: str) -> None:
    print(text, flush=True)


def bench(comm: Any, args: argparse.Namespace, say: Callable[[str], object] = _say) -> int:
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
        The options cannot be used; the message says what to type.
    """
    if args.n not in (None, comm.size):
        raise ArgumentError(f"-n is {args.n}, and the launcher has started {comm.size} ranks; leave -n out")
    workload = _workload(args)
    on_gpus = comm.target == "cuda"
    algorithms = _algorithms(comm, args.verb, args.algorithm)
    tell = say if comm.rank == 0 else _nothing
    if on_gpus:
        _check_files(ExchangingRanks(comm), args)
        field = gpu.field(comm, args, workload, algorithms)
    else:
        _check_files(Ranks(comm), args)
        field = _on_hosts(comm, args, workload, algorithms)
    document = {**report.document(args.verb, args.op, comm, _options(args), field.versions), **field.facts}
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
    if comm.rank == 0:
        _write(args, document, rows)
    wrong = any(row.wrong for row in rows)
    if wrong and comm.rank > 0:
        print(f"nvcoll bench: rank {comm.rank}: some answers were wrong", file=sys.stderr, flush=True)
    field.ranks.barrier()  # a launcher may end all ranks when the first of them ends
    return int(wrong)


def _on_hosts(comm: Any, args: argparse.Namespace, workload: run.Workload, algorithms: list[str | None]) -> Field:
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


def _nothing(text: str) -> None:
    """Take the place of `_say` on all ranks but one."""


def _launch(size: int) -> int:
    """Start this command again on `size` ranks; they find a launcher and do not come here."""
    from nvcoll.cli import main as command_line

    return command_line(["run", "-n", str(size), "--", sys.executable, "-P", "-m", "nvcoll", *sys.argv[1:]])


def _workload(args: argparse.Namespace) -> run.Workload:
    op, datatype = OPS[args.op], DATATYPES[args.dtype]
    if reason := op.supports(datatype):
        raise ArgumentError(f"--op {op.name} --dtype {datatype.name}: {reason}")
    if not args.time > 0:
        raise ArgumentError(f"--time is {args.time:g} seconds; give a number above 0, such as 0.3")
    if args.iters is not None and args.iters < 1:
        raise ArgumentError(f"--iters is {args.iters}; give 1 call or more")
    counts = run.counts(args.min, args.max, args.factor, datatype.itemsize)
    return run.Workload(counts, datatype, op, Budget(args.time, args.iters))


def _check_files(ranks: Ranks, args: argparse.Namespace) -> None:
    """Refuse files that rank 0 will not be able to write: before the measurement, not after it."""
    reason = ""
    if ranks.comm.rank == 0:
        if args.plot and args.plot.suffix not in PICTURES:
            reason = f"--plot {args.plot.name} has no suffix of a picture; end it in {', '.join(PICTURES)}"
        elif args.plot and importlib.util.find_spec("matplotlib") is None:
            reason = '--plot needs matplotlib; pip install "nvcoll[bench]"'
        for path in filter(None, (args.json, args.plot)):
            if not path.parent.is_dir():
                reason = f"there is no folder {path.parent} for {path.name}; make it first"
    if any(ranks.largest([bool(reason)])):
        raise ArgumentError(reason or "rank 0 cannot write the files that were asked for")


def _algorithms(comm: Any, verb: str, asked: Sequence[str] | None) -> list[str | None]:
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


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if not callable(value)
    }


def _write(args: argparse.Namespace, document: dict[str, Any], rows: list[report.Row]) -> None:
    if args.json:
        whole = {**document, "rows": [row.fields() for row in rows], "geometric_means": report.means(rows)}
        args.json.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.plot:
        from nvcoll.cli.bench import plot

        host = document["machine"]
        place = f"{host['cpu_model']}, {host['physical_cores']} cores"
        if "gpu" in document:
            place = f"{', '.join(document['gpu']['names'])} ({document['gpu']['mode']})"
        title = f"{args.verb} {args.op} {args.dtype}, {document['ranks']} ranks on {place}"
        plot.save(args.plot, rows, title)
