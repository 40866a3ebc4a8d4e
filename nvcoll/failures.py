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
    boards = state.boards()
    who = _namer(world)
    where = f"{told.verb.capitalize()} (call {state.sequence} on rank {world.rank})"
    if kind == "peer failed":  # what it failed for is the cause here too
        kind, about = boards[peer][4]
        if kind == "timeout":
            vain = f"{who(peer)} waited in vain for {who(about) if about >= 0 else 'data'}"
            return _timeout(f"{where}: {vain} until its NVCOLL_TIMEOUT was over", world)
        if kind != "peer lost":
            return PeerLostError(f"{where}: {who(peer)} gave up in its call {boards[peer][0]}; see its exception")
        peer = about
    if kind == "timeout":
        return _timeout(f"{where}: no answer within the timeout of NVCOLL_TIMEOUT", world)
    if kind == "mismatch":
        mine, its = (describe_signature(*boards[p][1:3]) for p in (_place(world), peer))
        return MismatchError(f"{where}: this rank calls {mine}; {who(peer)} calls {its}; make the calls agree")
    if kind == "peer lost":
        how = "has left" if boards[peer][3] == "left" else "has ended"
        return PeerLostError(
            f"{where}: {who(peer)} {how} in or before call {state.sequence}; see its output, and start all ranks anew"
        )
    return Error(f"{where}: {kind}")


def _timeout(what: str, world: Any) -> TimeoutError:
    """Return the error that names the ranks which have not begun this call."""
    state, who = world.planner.state, _namer(world)
    missing = [who(p) for p, board in enumerate(state.boards()) if board[0] < state.sequence]
    late = f"did not arrive: {', '.join(missing)}" if missing else "all ranks have arrived by now"
    return TimeoutError(f"{what}; {late}. See what those ranks do, or raise NVCOLL_TIMEOUT if they are only slow")


def _place(world: Any) -> int:
    return int(world.heap.memory.place)


def _namer(world: Any) -> Any:
    """Return a function that names the rank at a place in the shared memory."""
    members = world.heap.memory.members
    return lambda place: f"rank {members[place]}"
