"""The command `nvcoll`: each module of this package is a subcommand and offers add_parser and main."""

import argparse
import errno
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

from nvcoll import __version__
from nvcoll.errors import ArgumentError, Error

NO_OUTPUT = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What the system has against output that it cannot take. Commands tell of files that they write themselves."""


def commands() -> list[str]:
    """Return the names of the subcommands; finding them imports none."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))


def parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line, with these subcommands."""
    found = argparse.ArgumentParser(
        prog="nvcoll", description="Collectives on symmetric memory, with mpi4py's names.", allow_abbrev=False
    )
    found.add_argument("--version", action="version", version=f"nvcoll {__version__}")
    subparsers = found.add_subparsers(dest="subcommand", metavar="COMMAND", required=True)
    for name in names:
        importlib.import_module(f"nvcoll.cli.{name}").add_parser(subparsers)
        subparsers.choices[name].set_defaults(refuse=subparsers.choices[name].error)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    argv
        The words after ``nvcoll``; None: those of this process.

    Returns
    -------
    int
        0 if all went well, 2 for a mistake in the arguments or settings, 1 if the output cannot be written, else as the
        subcommand says.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = commands()
    # import only the module that is asked for: `nvcoll run` should start fast
    args, unknown = parser(argv[:1] if argv and argv[0] in known else known).parse_known_args(argv)
    if unknown:  # with the usage of the subcommand
        args.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status = int(importlib.import_module(f"nvcoll.cli.{args.subcommand}").main(args))
        print(end="", flush=True)  # what the reader does not take is told here, not as the interpreter ends
        return status
    except Error as error:
        print(f"nvcoll {args.subcommand}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in NO_OUTPUT or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        if isinstance(error, BrokenPipeError):  # as in `nvcoll info | head -1`
            return 128 + signal.SIGPIPE
        text = f"cannot write the output ({error.strerror}); make room, or redirect it"
        print(f"nvcoll {args.subcommand}: {text}", file=sys.stderr)
        return 1
