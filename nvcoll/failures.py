"""What went wrong in a call that ended early, in words: who is missing, lost, or doing something else."""

from typing import Any

from nvcoll.errors import Error, MismatchError, PeerLostError, StateError, TimeoutError
from nvcoll.planning import Explanation, describe_signature, verb_of


def cause(world: Any) -> tuple[str, int]:
    """Return why a communicator is unusable: the kind of failure that came first, and the place of its rank or -1.

    A rank that fails because another one did takes over the cause.
    """
    state = world.planner.state
    kind, peer = state.failure
    return state.boards()[peer][4] if kind == "peer failed" else (kind, peer)


def failure(world: Any, told: Explanation, number: int | None = None) -> BaseException:
    """Return the exception for the failure that a communicator's state records.

    Parameters
    ----------
    world
        The world whose call failed.
    told
        What the call was to do.
    number
        Which call of the user's it was, if not the same as the kernels'.
    """
    state = world.planner.state
    interruption = state.interruption()
    if interruption is not None:
        return interruption  # type: ignore[no-any-return]
    (own, peer), (kind, about) = state.failure, cause(world)
    boards = state.boards()
    who = _namer(world)
    number = number or state.sequence
    where = f"{verb_of(told.verb)} (call {number} on rank {world.rank}{world.of})"
    if kind == "timeout":
        vain = (
            f"{who(peer)} waited in vain for {who(about) if about >= 0 else 'data'} until its NVCOLL_TIMEOUT was over"
        )
        here = f"no answer within NVCOLL_TIMEOUT ({world.planner.timeout:g} s)"
        return _timeout(f"{where}: {vain if own == 'peer failed' else here}", world)
    if kind == "peer lost" and about >= 0:
        how = "has left" if boards[about][3] == "left" else "has ended"
        return PeerLostError(
            f"{where}: {who(about)} {how} in or before call {number}; see its output, and start all ranks anew"
        )
    if own == "peer failed":
        return PeerLostError(f"{where}: {who(peer)} gave up in or before call {number}; see its exception")
    if kind == "mismatch":
        mine, its = (describe_signature(*boards[p][1:3]) for p in (_place(world), peer))
        return MismatchError(f"{where}: this rank calls {mine}; {who(peer)} calls {its}; make the calls agree")
    if kind == "finalized":
        return StateError(f"{where}: another thread finalized the communicator meanwhile")
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
