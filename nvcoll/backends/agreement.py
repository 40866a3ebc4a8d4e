"""How all ranks start NVSHMEM: pure functions of what every rank told, so that all come to the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvcoll.errors import AllocationError, BootstrapError
from nvcoll.settings import PAGE

SHARE = 4
"""The ranks of a GPU take one part in so many of its memory, if NVCOLL_HEAP does not tell."""

GRAIN = 2 << 20
"""Reservations are multiples of this, and NVSHMEM gets so much for its own bookkeeping."""

LARGEST = 128 << 30
"""NVSHMEM's own default for the address space of a GPU's heap."""


def uneven(host_sizes: Sequence[int]) -> str | None:
    """Return why NVSHMEM cannot span such hosts, or None."""
    if len(set(host_sizes)) <= 1:
        return None
    sizes = ", ".join(map(str, host_sizes))
    return f"NVSHMEM needs the same number of ranks on every host, got {sizes}; start as many on each"


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others before NVSHMEM starts.

    Attributes
    ----------
    gpu
        UUID of its GPU.
    total, free
        Bytes of that GPU's memory.
    library, library_path
        NVSHMEM's version and place.
    stage
        0: NVSHMEM has not begun; 1: it knows the ranks; 2: it runs.
    limit
        ``NVSHMEM_SYMMETRIC_SIZE`` of the user.
    on_host
        Whether the user has NVSHMEM's memory on the host.
    wired
        Whether remote memory may be reached through a network: there is an adapter, or the user chose a transport.
    """

    gpu: str
    total: int
    free: int
    library: str
    library_path: str
    stage: int
    limit: int | None
    on_host: bool
    wired: bool


@dataclass(frozen=True)
class Start:
    """How all ranks start: bytes of every heap, the variables for NVSHMEM, and its stage."""

    extent: int
    variables: Mapping[str, str]
    stage: int


def plan(everyone: Sequence[Facts], host_sizes: Sequence[int], heap: int | None) -> Start:
    """Return how to start, from what all ranks told. Pure: ranks with equal arguments come to the same.

    Raises
    ------
    BootstrapError
        Versions or stages differ, or hosts, or GPUs of a host, have different numbers of ranks.
    AllocationError
        A GPU has no room for the heaps of its ranks.
    """
    backwards = [*enumerate(everyone)][::-1]  # of those that tell the same, the first rank remains
    versions = {facts.library: (rank, facts.library_path) for rank, facts in backwards}
    if len(versions) > 1:
        told = ", ".join(f"{version} on rank {rank} ({path})" for version, (rank, path) in versions.items())
        raise BootstrapError(f"NVSHMEM: all ranks need one version, found {told}; install one everywhere")
    stages = {facts.stage: rank for rank, facts in backwards}
    if len(stages) > 1:
        raise BootstrapError(
            f"NVSHMEM: it runs on rank {stages[max(stages)]} already and not on rank {stages[min(stages)]}; start it "
            "on all ranks or on none before the first use of nvcoll"
        )
    problem = uneven(host_sizes)
    if problem is not None and not max(stages):
        raise BootstrapError(problem)
    sharers = {facts.gpu: sum(other.gpu == facts.gpu for other in everyone) for facts in everyone}
    if len(host_sizes) == 1 and len(set(sharers.values())) > 1 and not max(stages):
        told = ", ".join(map(str, sharers.values()))
        raise BootstrapError(
            f"NVSHMEM needs the same number of ranks on every GPU of a host, got {told}; start as many on each, choose "
            "with NVCOLL_DEVICE, or set NVCOLL_BACKEND=shm"
        )
    if heap is None:
        parts = [facts.total // SHARE // sharers[facts.gpu] for facts in everyone]
        extent = min([*parts, *(facts.limit for facts in everyone if facts.limit)]) // GRAIN * GRAIN
    else:
        extent = heap // PAGE * PAGE
    for rank, facts in enumerate(everyone):
        taken = extent * sharers[facts.gpu]
        if taken > facts.free and not facts.on_host:
            raise AllocationError(
                f"NVSHMEM: the heaps of {sharers[facts.gpu]} ranks take {taken} bytes of the GPU of rank {rank}, "
                f"{facts.free} are free; free some or lower NVCOLL_HEAP"
            )
    variables = {
        "NVSHMEM_SYMMETRIC_SIZE": str(extent + GRAIN),
        "NVSHMEM_MAX_MEMORY_PER_GPU": str(max(LARGEST, 2 * extent)),
        "NVSHMEM_DISABLE_NVLS": "1",  # nothing here uses multicast, and setting it up costs memory and time
    }
    if len(host_sizes) == 1 and not any(facts.wired for facts in everyone):
        variables["NVSHMEM_REMOTE_TRANSPORT"] = "none"  # it would look for adapters and complain that there are none
    return Start(extent, variables, max(stages))


def size_of(text: str | None) -> int | None:
    """Read a size as NVSHMEM writes it, such as 1.5G; None where it is none, which NVSHMEM will complain of."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(float(number) * (1 << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]))
    except (KeyError, ValueError, OverflowError):
        return None
