"""`emulate`: N ranks as threads of one process, with the same kernels and real concurrency."""

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nvcoll.backends.emulated import on_gpu
from nvcoll.comm import Comm
from nvcoll.device_failures import raise_unheard
from nvcoll.device_requests import sweep
from nvcoll.errors import ArgumentError, PeerLostError


class Emulation:
    """A world of threads; made by `emulate`.

    Parameters
    ----------
    size
        Number of ranks.
    ranks_per_node
        Ranks on each node: one number, or one for each node. None puts all on one node.
    device
        Ordinal of the GPU that they share, or None for the host.
    """

    def __init__(self, size: int, ranks_per_node: int | list[int] | tuple[int, ...] | None, device: int | None) -> None:
        self.size = _number(size, 1, f"size is {size!r}, expected 1 or more ranks")
        ordinal = f"device is {device!r}, expected the ordinal of a GPU, 0 or more; leave it out for the host"
        self.device = None if device is None else _number(device, 0, ordinal)
        self.node_sizes = _node_sizes(self.size, ranks_per_node)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``fn(comm, *args)`` on every rank, each on a thread of its own, and wait for all.

        Parameters
        ----------
        fn
            What a rank does. The GIL is free while it waits or reduces in a collective call.
        *args
            Given to every rank as they are.

        Returns
        -------
        list
            What `fn` returned, by rank.

        Raises
        ------
        Exception
            What `fn` raised on the first rank that failed by itself, with a note that names the rank. Ranks that
            failed only because that one did are not reported.
        TimeoutError, MismatchError
            A call on the GPU has failed, and the rank has not heard of it.
        """
        if not callable(fn):
            raise ArgumentError(
                f"emulate: run got a {type(fn).__name__}, expected a function, to which each rank's communicator is "
                "given; pass the function itself"
            )
        with self._on_gpu():
            return self._run(fn, args)

    @contextlib.contextmanager
    def _on_gpu(self) -> Iterator[None]:
        """Be among what runs on a GPU, if there is one."""
        if self.device is None:
            yield
            return
        sweep()  # what requests of earlier runs have left
        with on_gpu():
            yield

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        """Run all ranks. No reference to the worlds outlives it, but those of the user's own objects."""
        worlds = self._open()
        outcomes: list[Any] = [None] * self.size
        failures: list[tuple[int, BaseException]] = []
        threads = [
            threading.Thread(target=_rank, args=(k, world, fn, args, outcomes, failures), daemon=True, name=f"rank {k}")
            for k, world in enumerate(worlds)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: ranks end at their next collective call, or with the process
            begun = [thread for thread in threads if thread.ident is not None]
            held = contextlib.ExitStack()
            held.enter_context(self._on_gpu())  # until they have: what they wait for is not to wait for them
            later = threading.Thread(target=self._retire, args=(worlds, begun, held), daemon=True, name="end of a run")
            try:
                for world in worlds:
                    world.exchange.abandon()
                    (world.leave if self.device is None else world.give_up)()
            finally:  # also after another Ctrl-C
                later.start()
            raise
        self._retire(worlds)
        if failures:
            raise _first(failures)
        return outcomes

    def _retire(
        self, worlds: list[Any], threads: Sequence[threading.Thread] = (), held: contextlib.ExitStack | None = None
    ) -> None:
        """Give back what the ranks have, once these threads of theirs have ended; then leave what was entered."""
        with held or contextlib.nullcontext():
            for thread in threads:
                thread.join()
            with self._on_gpu():
                for world in worlds:
                    world.retire()

    def _open(self) -> list[Any]:
        """Open the worlds of all ranks."""
        if self.device is None:
            from nvcoll.world import open_emulated

            return list(open_emulated(self.size, self.node_sizes))
        from nvcoll.world_cuda import open_emulated_on

        return list(open_emulated_on(self.device, self.size, self.node_sizes))


def _rank(
    rank: int,
    world: Any,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    outcomes: list[Any],
    failures: list[tuple[int, BaseException]],
) -> None:
    """Run one rank; its end, by return or by exception, is told to the others so that none waits for it."""
    comm = Comm(lambda: world, f"emulated rank {rank}")
    comm._emulated = True
    try:
        outcomes[rank] = fn(comm, *args)
        if world.target == "cuda":
            world.leave()
            if not failures:  # else the calls of this rank may have failed because of that one
                raise_unheard(world, "run")
    except BaseException as exc:  # handed to the caller of run
        failures.append((rank, exc))
        world.exchange.abandon()
    finally:
        world.leave()


def _first(failures: list[tuple[int, BaseException]]) -> BaseException:
    """Choose the failure to report: one that is not the consequence of another."""
    own = [one for one in failures if not isinstance(one[1], PeerLostError)]
    rank, exc = min(own or failures, key=lambda one: one[0])
    exc.add_note(f"raised on emulated rank {rank}" + (f"; {len(own)} ranks failed" if len(own) > 1 else ""))
    return exc


def _node_sizes(size: int, ranks_per_node: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    if ranks_per_node is None:
        return (size,)
    given = None
    with contextlib.suppress(TypeError):
        given = list(ranks_per_node)  # type: ignore[arg-type]
    if given is None:  # one number
        each = _number(ranks_per_node, 1, f"ranks_per_node is {ranks_per_node!r}, expected 1 or more")
        full, rest = divmod(size, each)
        return (each,) * full + ((rest,) if rest else ())
    expected = f"ranks_per_node is {given}, expected positive numbers that add up to {size}"
    sizes = tuple(_number(each, 1, expected) for each in given)
    if sum(sizes) != size:
        raise ArgumentError(f"emulate: {expected}")
    return sizes


def _number(value: Any, least: int, expected: str) -> int:
    """Return an argument as a number; `expected` is the message of what is none, or too small."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < least:
        raise ArgumentError(f"emulate: {expected}")
    return number


def emulate(
    size: int, ranks_per_node: int | list[int] | tuple[int, ...] | None = None, device: int | None = None
) -> Emulation:
    """Emulate a world of ranks in this process: the same kernels on threads, on any number of nodes.

    Parameters
    ----------
    size
        Number of ranks, 1 or more; more than there are cores is fine.
    ranks_per_node
        Ranks on each node: one number (the last node may get fewer), or one for each node. None is one node.
    device
        Ordinal of a GPU that all ranks share, each with a stream of its own; None runs them on the host.

    Returns
    -------
    Emulation
        Its ``run(fn, *args)`` calls ``fn(comm, *args)`` on every rank.

    Raises
    ------
    ArgumentError
        If the numbers do not fit.
    DeviceError
        When it runs, if there is no such GPU.

    Examples
    --------
    >>> import numpy as np, nvcoll
    >>> def main(comm):
    ...     x = np.full(3, comm.rank + 1.0)
    ...     comm.Allreduce(x)
    ...     return x
    >>> nvcoll.emulate(4, ranks_per_node=2).run(main)[0]
    array([10., 10., 10.])
    """
    return Emulation(size, ranks_per_node, device)
