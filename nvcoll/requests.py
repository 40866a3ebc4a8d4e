"""Requests: calls that were begun, on whatever carries them out. What runs is a `Pending` of another file."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from nvcoll.arguments import is_theirs, judge_status, judge_statuses, same_handle
from nvcoll.errors import ArgumentError, StateError
from nvcoll.lower_case import LowerCase

UNDEFINED = -32766
"""What `Request.Waitany` returns if no request is active, `Request.Testany` also if none has ended: mpi4py's value."""
MAKERS = {"Request": "the nonblocking verbs return", "Prequest": "Allreduce_init returns"}
"""Where requests of each class come from, for messages."""
LONGEST_SLEEP = 0.001
"""Seconds between two looks of `Request.Waitany` and `Request.Waitsome`, at most; a sixteenth of the time waited
otherwise."""


class Pending(Protocol):
    """A call that was begun."""

    def done(self) -> bool:
        """Tell at once whether it has ended, well or not."""

    def wait(self) -> None:
        """Wait for its end, and raise what went wrong. An interruption of the wait itself leaves it pending."""


class Request(LowerCase):
    """A nonblocking call, from its begin until `Wait`, or a `Test` that returns True: so long it is active, and true.

    It keeps its buffers alive until the call has ended.

    Parameters
    ----------
    pending
        What was begun; None makes an inactive request, and another request one of the same call.
    """

    __slots__ = ("__weakref__", "_pending")

    def __init__(self, pending: "Pending | Request | None" = None) -> None:
        self._pending: Pending | None = pending._pending if isinstance(pending, Request) else pending

    def __repr__(self) -> str:
        return f"<nvcoll.{type(self).__name__}, {'inactive' if self._pending is None else 'active'}>"

    def __bool__(self) -> bool:
        """Tell whether the request is active, as mpi4py's does: ``while any(requests)`` ends."""
        return self._pending is not None

    def __eq__(self, other: object) -> bool:
        """Whether it is the same; all that are false are equal to `REQUEST_NULL`, and that to mpi4py's."""
        return same_handle(self, other, Request, "Request")

    __hash__ = object.__hash__

    def Wait(self, status: Any = None) -> Literal[True]:
        """Wait until the call has ended. Returns at once if the request is inactive.

        Parameters
        ----------
        status
            None, or mpi4py's, which is left as it is: of a collective call it tells nothing.

        Returns
        -------
        bool
            True, as in mpi4py.

        Raises
        ------
        Error
            What the call raised: see the blocking verb. The request is inactive then.
        ArgumentError
            If `status` is something else. The request is as it was.
        """
        if status is not None:
            judge_status("Wait", status)
        pending = self._pending
        if pending is not None:
            try:
                pending.wait()
            finally:
                if pending.done():  # else Ctrl-C ended the wait only
                    self._pending = None
        return True

    def Test(self, status: Any = None) -> bool:
        """Tell whether the call has ended; if so, it is as after `Wait`.

        Parameters
        ----------
        status
            As for `Wait`.

        Returns
        -------
        bool
            True also if the request is inactive.

        Raises
        ------
        Error, ArgumentError
            As for `Wait`.
        """
        if status is not None:
            judge_status("Test", status)
        return self._pending is None or (self._pending.done() and self.Wait())

    def Free(self) -> None:
        """Give up an inactive request.

        Raises
        ------
        StateError
            If the request is active: MPI does not let go of a collective call before its end.
        """
        if self._pending is not None:
            raise StateError("Free: the request is active, expected one whose call has ended; Wait for it first")

    @classmethod
    def Waitall(cls, requests: Iterable["Request"], statuses: Any = None) -> Literal[True]:
        """Wait for all requests.

        Parameters
        ----------
        requests
            Inactive ones count as ended.
        statuses
            None, or a list for those of mpi4py, which is left as it is.

        Returns
        -------
        bool
            True, as in mpi4py.

        Raises
        ------
        Error
            The error of the first one, in the order of `requests`, whose call failed. All have ended then.
        ArgumentError
            If `requests` is no list of requests, or `statuses` something else. All requests are as they were.
        """
        judge_statuses("Waitall", statuses)
        problem = None
        for request in _checked("Waitall", requests):
            try:
                request.Wait()
            except Exception as exc:
                if request._pending is not None:  # it has not ended: a handler of a signal raised this
                    raise
                problem = problem or exc
        if problem is not None:
            raise problem
        return True

    @classmethod
    def Testall(cls, requests: Iterable["Request"], statuses: Any = None) -> bool:
        """Tell whether the calls of all requests have ended; if so, it is as after `Waitall`.

        Parameters
        ----------
        requests
            Inactive ones count as ended.
        statuses
            As for `Waitall`.

        Returns
        -------
        bool
            If False, all requests are as they were.

        Raises
        ------
        Error, ArgumentError
            As for `Waitall`.
        """
        judge_statuses("Testall", statuses)
        every = _checked("Testall", requests)
        return all(one._pending is None or one._pending.done() for one in every) and cls.Waitall(every)

    @classmethod
    def Waitany(cls, requests: Iterable["Request"], status: Any = None) -> int:
        """Wait until the call of one request has ended.

        Parameters
        ----------
        requests
            Inactive ones are passed over.
        status
            As for `Wait`.

        Returns
        -------
        int
            Its place in `requests`; `UNDEFINED` if none is active.

        Raises
        ------
        Error, ArgumentError
            What its call raised, or what is refused as by `Waitall`.
        """
        judge_status("Waitany", status)
        every = _checked("Waitany", requests)
        active = {place: one for place, one in enumerate(every) if one._pending is not None}
        started = time.monotonic()
        while active:
            for place, request in active.items():
                if request.Test():
                    return place
            _pause(started)
        return UNDEFINED

    @classmethod
    def Testany(cls, requests: Iterable["Request"], status: Any = None) -> tuple[int, bool]:
        """Tell whether the call of one request has ended; if so, that one is as after `Wait`.

        Parameters
        ----------
        requests
            Inactive ones are passed over.
        status
            As for `Wait`.

        Returns
        -------
        (int, bool)
            Its place in `requests`, and True; `UNDEFINED` and False if none has ended, and True if none is active.

        Raises
        ------
        Error, ArgumentError
            What its call raised, or what is refused as by `Waitall`.
        """
        judge_status("Testany", status)
        active = False
        for place, request in enumerate(_checked("Testany", requests)):
            if request._pending is not None:
                active = True
                if request.Test():
                    return place, True
        return UNDEFINED, not active

    @classmethod
    def Waitsome(cls, requests: Iterable["Request"], statuses: Any = None) -> list[int] | None:
        """Wait until the call of one request has ended, or of several.

        Parameters
        ----------
        requests
            Inactive ones are passed over.
        statuses
            As for `Waitall`.

        Returns
        -------
        list of int or None
            Places in `requests` of all that have ended, which are as after `Wait`; None if none was active.

        Raises
        ------
        Error, ArgumentError
            As for `Waitall`; an error of those that have ended, which all are as after `Wait` then.
        """
        judge_statuses("Waitsome", statuses)
        every = _checked("Waitsome", requests)
        started = time.monotonic()
        while (ended := _end_some(every)) == []:
            _pause(started)
        return ended

    @classmethod
    def Testsome(cls, requests: Iterable["Request"], statuses: Any = None) -> list[int] | None:
        """Tell the calls of which requests have ended; those are as after `Wait`.

        Parameters
        ----------
        requests
            Inactive ones are passed over.
        statuses
            As for `Waitall`.

        Returns
        -------
        list of int or None
            Their places in `requests`, perhaps of none; None if none was active.

        Raises
        ------
        Error, ArgumentError
            As for `Waitsome`.
        """
        judge_statuses("Testsome", statuses)
        return _end_some(_checked("Testsome", requests))


REQUEST_NULL = Request()


class Prequest(Request):
    """A persistent request: a call that was judged and planned once, to be begun many times.

    Made inactive by ``Comm.Allreduce_init``; `Start` begins the call, `Wait` or `Test` ends it. It keeps its buffers
    alive until `Free`.

    Parameters
    ----------
    begin
        Begins the call; another persistent request makes one of the same call.
    """

    __slots__ = ("_begin",)

    def __init__(self, begin: "Callable[[], Pending] | Prequest") -> None:
        super().__init__(begin if isinstance(begin, Prequest) else None)
        self._begin: Callable[[], Pending] | None = begin._begin if isinstance(begin, Prequest) else begin

    def __bool__(self) -> bool:
        """Tell whether the request was not freed, active or not, as mpi4py's does."""
        return self._begin is not None

    def Start(self) -> None:
        """Begin the call, with what the buffers hold now.

        Raises
        ------
        StateError
            If the request is active, freed, or on a stream being captured, or its buffers or communicator are gone.
        """
        if self._pending is not None:
            raise StateError("Start: the request is active, expected one whose call has ended; Wait for it first")
        if self._begin is None:
            raise StateError("Start: the request was freed, expected a living one; make another with Allreduce_init")
        self._pending = self._begin()

    def Free(self) -> None:
        """Let go of the buffers and the plan; the request cannot be started again.

        Raises
        ------
        StateError
            If the request is active.
        """
        super().Free()
        self._begin = None

    @classmethod
    def Startall(cls, requests: Iterable["Prequest"]) -> None:
        """Begin the calls of all requests, in this order, which must be the same on all ranks.

        Parameters
        ----------
        requests
            Persistent requests.

        Raises
        ------
        StateError
            As for `Start`. Those before the one that is named are begun then.
        ArgumentError
            If `requests` is no list of persistent requests. None is begun.
        """
        for request in _checked("Startall", requests, kind=Prequest):
            request.Start()


def _end_some(requests: list[Request]) -> list[int] | None:
    """End all requests whose calls have ended, and return their places; None if none is active."""
    active = {place: one._pending for place, one in enumerate(requests) if one._pending is not None}
    ended = [place for place, pending in active.items() if pending.done()]
    Request.Waitall(requests[place] for place in ended)
    return ended if active else None


def _pause(started: float) -> None:
    """Leave the core to others between two looks."""
    time.sleep(min((time.monotonic() - started) / 16, LONGEST_SLEEP))


def _checked(verb: str, requests: Iterable[Any], kind: type[Any] = Request) -> list[Any]:
    """Return the requests as a list, if that is what they are. mpi4py's null request is ours, as it says itself."""
    if not isinstance(requests, Iterable):
        raise ArgumentError(
            f"{verb}: expected a list of requests, got a {type(requests).__name__}; pass [request] for a single one"
        )
    every = list(requests)
    for place, one in enumerate(every):
        if isinstance(one, kind):
            continue
        theirs = is_theirs(one, "Request")
        if theirs and not one and kind is Request:
            every[place] = REQUEST_NULL
            continue
        what, cure = f"of type {type(one).__name__}", f"pass what {MAKERS[kind.__name__]}"
        if theirs:
            what, cure = f"mpi4py's {type(one).__name__}", f"give it to mpi4py's own {verb}"
        raise ArgumentError(f"{verb}: requests[{place}] is {what}, expected nvcoll.{kind.__name__}; {cure}")
    return every
