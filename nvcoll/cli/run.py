"""Start ranks on this host, without MPI: they find each other through a rendezvous on the loopback interface."""

import argparse
import contextlib
import os
import resource
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvcoll import _topology, settings
from nvcoll.cli._kinds import of_kind
from nvcoll.cli._launcher import Launcher
from nvcoll.errors import ArgumentError

EPILOG = """\
examples:
  nvcoll run -n 4 train.py --epochs 3
  nvcoll run -n 2 -m package.module
  nvcoll run -n 2 -c 'from nvcoll import COMM_WORLD; print(COMM_WORLD.rank)'
  nvcoll run -n 2 -- ./program --flag

The first rank that fails ends the others, and its exit status is returned: 128 + N if signal N killed it.
SIGINT, SIGTERM and SIGHUP are passed on. After one of the last two, a second signal or a failure, ranks have 5 s to
end before they are killed. Standard input goes to rank 0.
OMP_NUM_THREADS is set to the CPUs' share of a rank where it is not set already.
"""


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `run`."""
    parser = subparsers.add_parser(
        "run",
        help="start ranks on this host",
        description="Start N ranks of a program on this host, without MPI.",
        usage="nvcoll run [options] [script.py | -m module | -c code | -- executable] [args ...]",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cpus = _usable_cpus()
    parser.add_argument(
        "-n",
        "-np",  # what users of mpiexec type
        type=of_kind("count"),
        default=cpus,
        metavar="N",
        help=f"how many ranks (default: one a CPU, {cpus} here)",
    )
    parser.add_argument(
        "--timeout", type=of_kind("seconds"), metavar="S", help="seconds a call waits for other ranks (NVCOLL_TIMEOUT)"
    )
    parser.add_argument(
        "--env", type=_variable, action="append", default=[], metavar="NAME=VALUE", help="set a variable for the ranks"
    )
    parser.add_argument(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write whole lines that start with their rank: [2] text",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="module", help="run a module")
    parser.add_argument("-c", dest="code", nargs=argparse.REMAINDER, metavar="code", help="run program text")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="script.py", help="run a file")


def command(args: argparse.Namespace) -> list[str]:
    """Return the command line of a rank.

    Raises
    ------
    ArgumentError
        No program is named, or the script does not exist.
    """
    for flag, words in ("-m", args.module), ("-c", args.code):
        if words:
            return [sys.executable, flag, *words, *args.program]  # argparse parts the words at a --
    if args.program[:1] == ["--"] and args.program[1:]:
        return list(args.program[1:])
    if args.module is not None or args.code is not None or args.program[:1] in ([], ["--"]):
        raise ArgumentError("no program is named; name a script.py, -m module, -c code or -- executable")
    if not Path(args.program[0]).exists():
        raise ArgumentError(
            f"there is no script {args.program[0]}; a program that is not Python's goes after --: -- {args.program[0]}"
        )
    return [sys.executable, *args.program]


def variables(args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that all ranks have in common.

    Raises
    ------
    ArgumentError
        A setting in it has a value that is not accepted.
    """
    result = {name: value for name, value in environ.items() if name not in _internal()}
    result.setdefault("OMP_NUM_THREADS", str(max(1, _usable_cpus() // args.n)))
    if args.prefix:
        if sys.stdout is None or sys.stderr is None:
            raise ArgumentError(
                "--prefix: lines go to the standard output and error output, of which one is closed; redirect it, to "
                "/dev/null if nobody reads it"
            )
        result.setdefault("PYTHONUNBUFFERED", "1")  # a pipe would hold lines back until the rank ends
    if args.timeout is not None:
        result["NVCOLL_TIMEOUT"] = str(args.timeout)
    result.update(args.env)
    settings.values(result)  # a mistake is told once, not by every rank
    return result


def _usable_cpus() -> int:
    """Return how many CPUs this process may use, by its affinity and its control group's quota."""
    return _topology.detect(0, [b""], None, [_topology.usable_cpus()]).cores


def _internal() -> set[str]:
    return {variable.name for variable in settings.TABLE if variable.internal}


@contextlib.contextmanager
def _many_descriptors() -> Iterator[tuple[int, int]]:
    """Let this process have as many as it may: each rank is connected once for each of its communicators.

    Gives the limits there were, which are those of the ranks.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        yield limits
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def main(args: argparse.Namespace) -> int:
    """Start the ranks, wait for them, and return their exit status."""
    from nvcoll._bootstrap import RendezvousServer

    size, words, environ = args.n, command(args), variables(args, os.environ)
    for text in settings.unknown(environ):
        print(f"nvcoll run: {text}", file=sys.stderr, flush=True)
    key = secrets.token_hex(32)
    with (
        _many_descriptors() as limits,
        RendezvousServer(size, key) as server,
        Launcher(args.prefix, server.tell_ended) as launcher,
    ):
        for rank in range(size):
            mine = {
                "NVCOLL_RANK": str(rank),
                "NVCOLL_SIZE": str(size),
                "NVCOLL_RENDEZVOUS": server.address,
                "NVCOLL_KEY": key,
            }
            try:
                launcher.start(words, environ | mine)
                with contextlib.suppress(OSError):  # it has ended
                    resource.prlimit(launcher.ranks[-1].pid, resource.RLIMIT_NOFILE, limits)
            except OSError as error:
                print(f"nvcoll run: cannot start {words[0]}: {error.strerror}", file=sys.stderr)
                return 127 if isinstance(error, FileNotFoundError) else 126
        return launcher.wait()
