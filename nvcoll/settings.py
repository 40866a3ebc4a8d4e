"""Every environment variable nvcoll reads, in one table. The documentation and ``nvcoll info`` derive from it."""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvcoll.errors import ArgumentError

PREFIX = "NVCOLL_"
INHERITED = frozenset(os.environ)
"""Variables that were there when nvcoll was imported."""
BACKENDS = ("auto", "shm", "nvshmem")
BOOTSTRAPS = ("auto", "run", "torchrun", "mpi", "single")
LONGEST = 1_000_000
"""Seconds, about eleven days: poll and epoll cannot wait for much longer."""
PAGE = 4096
"""Bytes: heaps are made of whole pages, so that none is empty from this size on."""


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes
    ----------
    name
        The variable, ``NVCOLL_...``.
    field
        The attribute of `Settings` that holds its value.
    kind
        What a value looks like: a key of `KINDS`.
    default
        The text that stands for an unset variable; None where unset means "nothing".
    doc
        One sentence for the tables.
    internal
        Set by ``nvcoll run`` for its ranks, not by users.
    """

    name: str
    field: str
    kind: str
    default: str | None
    doc: str
    internal: bool = False


TABLE: tuple[Variable, ...] = (
    Variable("NVCOLL_BOOTSTRAP", "bootstrap", "bootstrap", "auto", "How the ranks find each other."),
    Variable(
        "NVCOLL_BACKEND",
        "backend",
        "backend",
        "auto",
        "Where memory is: shm, the host; nvshmem, the GPUs; auto: the GPUs if every rank can use one.",
    ),
    Variable(
        "NVCOLL_DEVICE",
        "device",
        "index or auto",
        "auto",
        "The GPU of this rank, among those it may use; auto: the ranks of a host take turns.",
    ),
    Variable(
        "NVCOLL_TIMEOUT", "timeout", "seconds", "600", "Seconds a call waits for the other ranks; then it raises."
    ),
    Variable("NVCOLL_RULES", "rules", "path", None, "A rules file to use instead of the one in the package."),
    Variable(
        "NVCOLL_RANKS_PER_NODE",
        "ranks_per_node",
        "count",
        None,
        "Split the ranks of a host into nodes of so many, which treat each other as different hosts: "
        "without GPUs, MPI must have started them.",
    ),
    Variable(
        "NVCOLL_SCRATCH", "scratch", "bytes", "8M", "Scratch memory per rank of a communicator; on GPUs at least 128M."
    ),
    Variable(
        "NVCOLL_HEAP",
        "heap",
        "pages or auto",
        "auto",
        "Heap of a rank; auto: address space for the physical memory, on GPUs a quarter of the GPU for all its ranks; "
        "for COMM_SELF and emulated ranks 1G at most, on a GPU no more than half of its free memory for all of them.",
    ),
    Variable(
        "NVCOLL_CACHE_DIR",
        "cache_dir",
        "path",
        "$XDG_CACHE_HOME/nvcoll",
        "Where compiled kernels are kept; in XDG_CACHE_HOME if that is set.",
    ),
    Variable(
        "NVCOLL_SPIN",
        "spin",
        "microseconds or auto",
        "auto",
        "How long a rank spins before it yields its core; auto: 100, or hardly at all where ranks share cores.",
    ),
    Variable(
        "NVCOLL_KEY",
        "key",
        "hex",
        None,
        "The secret that ranks prove to know, the same on all of them: for torchrun; nvcoll run makes one of its own.",
    ),
    Variable("NVCOLL_RANK", "rank", "index", None, "This process's rank.", internal=True),
    Variable("NVCOLL_SIZE", "size", "count", None, "The number of ranks.", internal=True),
    Variable("NVCOLL_RENDEZVOUS", "rendezvous", "host:port", None, "Where the ranks meet.", internal=True),
)


@dataclass(frozen=True)
class Settings:
    """The values in force, one field for each row of `TABLE`.

    `cache_dir` is None where it is not set, and the user has no home directory.
    """

    bootstrap: str
    backend: str
    device: int | None
    timeout: float
    rules: Path | None
    ranks_per_node: int | None
    scratch: int
    heap: int | None
    cache_dir: Path | None
    spin: float | None
    key: bytes | None
    rank: int | None
    size: int | None
    rendezvous: str | None


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return parse


def _seconds(text: str) -> float:
    if not 0 < float(text) <= LONGEST:  # false for NaN
        raise ValueError(text)
    return float(text)


def _microseconds(text: str) -> float:
    if not 0 <= float(text) <= LONGEST * 1e6:
        raise ValueError(text)
    return float(text)


def _whole(text: str, *, least: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise ValueError(text)
    return int(text)


def _bytes(text: str, *, least: int = 1) -> int:
    found = re.fullmatch(r"([0-9]{1,18})([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise ValueError(text)
    size = int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]
    if not least <= size < 1 << 63:
        raise ValueError(text)
    return size


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon) or not 0 < _whole(port, least=1) < 65536:
        raise ValueError(text)
    return text


def _or_auto(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "auto" else parse(text)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no home directory
        raise ValueError(text) from error


KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "bootstrap": ("one of " + ", ".join(BOOTSTRAPS), _one_of(BOOTSTRAPS)),
    "backend": ("one of " + ", ".join(BACKENDS), _one_of(BACKENDS)),
    "seconds": (f"a number of seconds above 0, at most {LONGEST:,}", _seconds),
    "microseconds or auto": ("a number of microseconds, or auto", _or_auto(_microseconds)),
    "bytes": ("a number of bytes, with K, M or G for powers of 1024", _bytes),
    "pages or auto": (
        f"a number of bytes, {PAGE} or more, with K, M or G for powers of 1024, or auto",
        _or_auto(lambda text: _bytes(text, least=PAGE)),
    ),
    "count": ("a whole number of 1 or more", lambda text: _whole(text, least=1)),
    "index or auto": ("a whole number of 0 or more, or auto", _or_auto(lambda text: _whole(text, least=0))),
    "index": ("a whole number of 0 or more", lambda text: _whole(text, least=0)),
    "path": ("a path", _path),
    "host:port": ("host:port", _address),
    "hex": ("hexadecimal digits, two a byte", bytes.fromhex),
}
"""Kind of value -> (what is accepted, in words; the parser, which raises ValueError)."""


def default_text(variable: Variable, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the text used when `variable` is unset, with ``$XDG_CACHE_HOME`` filled in."""
    if variable.default is None:
        return None
    return variable.default.replace("$XDG_CACHE_HOME", environ.get("XDG_CACHE_HOME") or "~/.cache")


def value(variable: Variable, environ: Mapping[str, str] = os.environ) -> Any:
    """Return the value of one variable, as `read` would; None if there is none, or a default that cannot be known.

    Raises
    ------
    ArgumentError
        It is not accepted.
    """
    given = environ.get(variable.name, "").strip()
    text = given or default_text(variable, environ)
    if text is None:
        return None
    accepted, parse = KINDS[variable.kind]
    try:
        return parse(text)
    except ValueError:
        if not given:  # no home directory, as in a container with a user of its own
            return None
        got = f"{len(text)} characters" if variable.kind == "hex" else repr(text)  # the key is a secret
        raise ArgumentError(f"{variable.name}: expected {accepted}, got {got}; change or unset it") from None


def let_streams_run_side_by_side(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let the CUDA driver give as many streams a queue of their own as it can, unless the user has said how many.

    Emulated ranks wait for each other: work of one must not be queued behind that of another. Only a driver that has
    not been used before in this process heeds it.
    """
    environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def unknown(environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield what to say of each variable that looks like a setting and is none.

    Ranks that `nvcoll run` has started leave out those that they got of it: it has told of them, once for all.
    """
    known = {variable.name for variable in TABLE}
    told = INHERITED if environ.get("NVCOLL_RANK") else frozenset()
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known | told:
            continue
        from difflib import get_close_matches

        # without the prefix, which would make any two names alike
        close = get_close_matches(
            name.removeprefix(PREFIX), [other.removeprefix(PREFIX) for other in sorted(known)], n=1
        )
        hint = f"did you mean {PREFIX}{close[0]}?" if close else "`nvcoll info` lists those there are"
        yield f"{name} is no setting of nvcoll; {hint}"


def values(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings, without a word about unknown variables.

    Parameters
    ----------
    environ
        The variables; an empty value counts as unset.

    Returns
    -------
    Settings
        Typed and checked.

    Raises
    ------
    ArgumentError
        A variable's value is not accepted; the message names the variable, what is accepted, and what came.
    """
    return Settings(**{variable.field: value(variable, environ) for variable in TABLE})


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return `values` for a program, which hears of `unknown` variables.

    Raises
    ------
    ArgumentError
        As for `values`.

    Warns
    -----
    RuntimeWarning
        A variable that starts with ``NVCOLL_`` is unknown.
    """
    for text in unknown(environ):
        warnings.warn(text, RuntimeWarning, stacklevel=1)  # one place for all callers, so that Python shows it once
    return values(environ)


def foreign(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the value of another library's variable; None if it is unset or empty."""
    return environ.get(name, "").strip() or None


@contextlib.contextmanager
def lend(variables: Mapping[str, str], environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Set other libraries' variables, those that the user left unset, for the time of a ``with`` block.

    The C library's environment changes too, so that native code sees them. They go afterwards: a second use may want
    other values, and child processes have nothing to do with them.
    """
    lent = {name: text for name, text in variables.items() if foreign(name, environ) is None}
    before = {name: environ[name] for name in lent if name in environ}
    environ.update(lent)
    try:
        yield
    finally:
        for name in lent:
            environ.pop(name, None)
        environ.update(before)
