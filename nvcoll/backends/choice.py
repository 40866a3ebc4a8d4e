"""Which backend a world opens on: GPUs where every rank can use one, else the host."""

from collections.abc import Callable, Sequence
from typing import Any

from nvcoll.backends import nvshmem
from nvcoll.backends.agreement import uneven
from nvcoll.errors import BootstrapError


def choose(wanted: str, reasons: Sequence[str | None], host_sizes: Sequence[int]) -> tuple[str, str]:
    """Return the backend, and why. Pure: ranks with equal arguments come to the same.

    Parameters
    ----------
    wanted
        ``NVCOLL_BACKEND``.
    reasons
        Why each rank cannot use NVSHMEM; None where it can.
    host_sizes
        How many ranks each host has.

    Raises
    ------
    BootstrapError
        NVSHMEM is wanted, and some rank cannot use it.
    """
    if wanted == "shm":
        return "shm", "NVCOLL_BACKEND asks for it"
    problem = _problem(reasons, host_sizes)
    if problem is None:
        return "nvshmem", "every rank can use a GPU and NVSHMEM"
    if wanted == "nvshmem":
        raise BootstrapError(f"NVCOLL_BACKEND=nvshmem: {problem}; or set NVCOLL_BACKEND=shm, and reduce on the hosts")
    return "shm", problem


def agree_on_backend(
    exchange: Any,
    wanted: str,
    host_sizes: Sequence[int],
    usable: Callable[[], str | None] = nvshmem.usable,
) -> tuple[str, str]:
    """Ask all ranks what they can use, and `choose`. Collective, where more than one backend comes into question.

    Parameters
    ----------
    exchange
        Byte exchange among all ranks.
    wanted
        ``NVCOLL_BACKEND``, equal on all ranks.
    host_sizes
        As for `choose`.
    usable
        Tells why this rank cannot use NVSHMEM.
    """
    reasons: list[str | None] = []
    if wanted != "shm":
        answers = exchange.allgather((usable() or "").encode())
        reasons = [answer.decode(errors="replace") or None for answer in answers]
    return choose(wanted, reasons, host_sizes)


def _problem(reasons: Sequence[str | None], host_sizes: Sequence[int]) -> str | None:
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return f"rank {rank}: {reason}"
    return uneven(host_sizes)
