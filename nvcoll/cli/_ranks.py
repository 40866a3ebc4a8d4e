"""Commands that every rank runs: under a launcher as they are, else on ranks that the command starts itself."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from nvcoll.cli import info
from nvcoll.errors import ArgumentError


def on_ranks(command: str, args: argparse.Namespace, work: Callable[[Any, argparse.Namespace], int]) -> int:
    """Do `work` on all ranks; without a launcher, on as many as ``args.n`` says.

    Parameters
    ----------
    command
        Name of the subcommand, for messages.
    args
        Its arguments.
    work
        Called with `COMM_WORLD` and `args`; collective. An `ArgumentError` is raised on all ranks or on none.

    Returns
    -------
    int
        What `work` returns, or 2 if it raised `ArgumentError`.
    """
    if args.n is not None and info.bootstrap(os.environ)["kind"] == "single":
        return _launch(args.n)
    from nvcoll import COMM_WORLD

    rank = COMM_WORLD.rank
    try:
        return work(COMM_WORLD, args)
    except ArgumentError as error:  # the same on all ranks: one of them says it
        if rank == 0:
            print(f"nvcoll {command}: {error}", file=sys.stderr, flush=True)
        COMM_WORLD.Barrier()  # a launcher may end all ranks when the first of them ends
        return 2


def _launch(size: int) -> int:
    """Start this command again on `size` ranks; they find a launcher and do not come here."""
    from nvcoll.cli import main as command_line

    return command_line(["run", "-n", str(size), "--", sys.executable, "-P", "-m", "nvcoll", *sys.argv[1:]])


def say(text: str) -> None:
    """Write a line at once."""
    print(text, flush=True)


def nothing(text: str) -> None:
    """Take the place of `say` on all ranks but one."""
