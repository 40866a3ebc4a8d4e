"""What went wrong in a call that ended early, in words: who is missing, lost, or doing something else."""

from typing import Any

from nvcoll.errors import Error, MismatchError, PeerLostError, TimeoutError
from nvcoll.planning import Explanation, describe_signature


def failure(world: Any, told: Explanation) -> BaseException:
    """Return the exception for the failure that a communicator's state records.

    Parameters
    ----------
    world
        The world whose call failed.
    told
        What the call was to do.
    """
    state = world.planner.state
    interruption = state.interruption()
    if interruption is not None:
        return interruption  # type: ignore[no-any-return]
    kind, peer = state.failure
    verb, number = told.verb.capitalize(), state.sequence
    boards = state.boards()
    who = _namer(world)
    where = f"{verb} (call {number} on rank {world.rank})"
    if kind == "timeout":
        missing = [who(p) for p, board in enumerate(boards) if board[0] < number and p != _place(world)]
        late = f"did not arrive: {', '.join(missing)}" if missing else "all ranks arrived, and data did not"
        return TimeoutError(
            f"{where}: no answer within the timeout of NVCOLL_TIMEOUT; {late}. "
            "See what those ranks do, or raise NVCOLL_TIMEOUT if they are only slow"
        )
    if kind == "mismatch":
        mine, its = (describe_signature(*boards[p][1:3]) for p in (_place(world), peer))
        return MismatchError(f"{where}: this rank calls {mine}; {who(peer)} calls {its}; make the calls agree")
    if kind == "peer lost":
        how = "has left" if boards[peer][3] == "left" else "has ended"
        return PeerLostError(f"{where}: {who(peer)} {how} in or before call {number}; see its output, and start all ranks anew")
    if kind == "peer failed":
        return PeerLostError(f"{where}: {who(peer)} gave up in its call {boards[peer][0]}; see its exception")
    return Error(f"{where}: {kind}")


def _place(world: Any) -> int:
    return int(world.heap.memory.place)


def _namer(world: Any) -> Any:
    """Return a function that names the rank at a place in the shared memory."""
    members = world.heap.memory.members
    return lambda place: f"rank {members[place]}"
