"""Files that are written when a measurement is over: what can be known of them before it is told before it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nvcoll.errors import ArgumentError


@contextlib.contextmanager
def refusing(option: str, path: Path, cure: str) -> Iterator[None]:
    """Make an ArgumentError of what the system has against writing a file.

    Parameters
    ----------
    option
        Where the file is named, for the message.
    path
        The file.
    cure
        The end of the message.
    """
    try:
        yield
    except OSError as exc:
        raise ArgumentError(f"{option}: cannot write {path} ({exc.strerror or exc}); {cure}") from exc


def replace(path: Path, text: str) -> None:
    """Write a file, and leave one that is there as it is unless all of the new one could be written."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a pipe, for instance
        path.write_text(text, encoding="utf-8")
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def check(option: str, path: Path) -> None:
    """Raise ArgumentError if a file cannot be written, as far as that is known before it is tried.

    Parameters
    ----------
    option
        Where the file is named, for the message.
    path
        The file.
    """
    with refusing(option, path, "name another file"):
        if path.is_dir():
            raise ArgumentError(f"{option}: {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ArgumentError(f"{option}: there is no folder {path.parent} for {path.name}; make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ArgumentError(f"{option}: {path} may not be written; name another file")
