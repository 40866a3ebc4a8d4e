"""What went wrong in a call on a GPU, in words; the counterpart of `nvcoll.failures`. It is known after the fact."""

from typing import Any

from nvcoll._plan import BROKEN
from nvcoll.device.common import STAMP_BITS
from nvcoll.errors import Error, MismatchError, StateError, TimeoutError


def failure(world: Any, verb: str) -> Exception:
    """Return the error of the call that failed on the GPU; once, for the communicator is of no use from then on.

    Parameters
    ----------
    world
        The world whose call failed.
    verb
        What the user calls now, for the message.
    """
    if world.raised:
        return StateError(BROKEN)
    state = world.planner.state
    try:
        boards = world.planner.area.boards()
    except Error:  # the context is lost: what has happened is told, if not whose fault it is
        boards = [None] * world.size
    world.raised = True
    tag = boards[world.rank] or 0
    others = {rank: its for rank, its in enumerate(boards) if rank != world.rank and its is not None}
    missing = [rank for rank, its in others.items() if its >> STAMP_BITS < tag >> STAMP_BITS]
    odd = [rank for rank, its in others.items() if its >> STAMP_BITS == tag >> STAMP_BITS and its != tag]
    calls = f"a call up to number {state.sequence}, or a replay of one,"
    where = f"{verb}: {calls} failed on the GPU of rank {world.rank}{world.of}"
    if odd:
        return MismatchError(
            f"{where}: rank {', rank '.join(map(str, odd))} calls something else (count, datatype, operator or "
            "algorithm, or Barrier); make the calls agree"
        )
    if missing:
        late = f"did not arrive: rank {', rank '.join(map(str, missing))}"
    elif None not in boards:
        late = "all have arrived by now"
    else:
        late = "those that can be seen from here have arrived by now" if others else "none can be seen from here"
    return TimeoutError(
        f"{where}: no answer within NVCOLL_TIMEOUT ({world.planner.timeout:g} s); {late}. See what those ranks do, "
        "or raise NVCOLL_TIMEOUT if they are only slow"
    )


def raise_unheard(world: Any, verb: str) -> None:
    """Raise what has failed in a call that has ended, unless the user has heard of it.

    That of any communicator of this rank counts: their calls use the same buffers.
    """
    whole = world.whole or world
    for one in (whole, *whole._parts):
        if one.planner.state.reported and not one.raised:
            raise failure(one, verb)
