"""mpi4py's lower-case verbs of requests: they also give what was received, which of a collective call is None.

Programs use them for all requests alike, whichever verb has begun the call.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar


class LowerCase:
    """The part of a request that has them."""

    __slots__ = ()

    Wait: Callable[..., Any]
    Test: Callable[..., bool]
    Waitall: ClassVar[Callable[..., Any]]
    Testall: ClassVar[Callable[..., bool]]
    Waitany: ClassVar[Callable[..., int]]
    Testany: ClassVar[Callable[..., tuple[int, bool]]]
    Waitsome: ClassVar[Callable[..., list[int] | None]]
    Testsome: ClassVar[Callable[..., list[int] | None]]

    def wait(self, status: Any = None) -> None:
        """Do as `Wait`.

        Parameters
        ----------
        status
            As for `Wait`.

        Returns
        -------
        None
            In place of a received object.
        """
        self.Wait(status)

    def test(self, status: Any = None) -> tuple[bool, None]:
        """Do as `Test`.

        Parameters
        ----------
        status
            As for `Test`.

        Returns
        -------
        (bool, None)
            What `Test` returns, and None in place of a received object.
        """
        return self.Test(status), None

    @classmethod
    def waitall(cls, requests: Iterable[Any], statuses: Any = None) -> list[None]:
        """Do as `Waitall`.

        Parameters
        ----------
        requests, statuses
            As for `Waitall`.

        Returns
        -------
        list
            None for each request, in place of a received object.
        """
        every = _kept(requests)
        cls.Waitall(every, statuses)
        return [None] * len(every)

    @classmethod
    def testall(cls, requests: Iterable[Any], statuses: Any = None) -> tuple[bool, list[None] | None]:
        """Do as `Testall`.

        Parameters
        ----------
        requests, statuses
            As for `Testall`.

        Returns
        -------
        (bool, list or None)
            What `Testall` returns, and if that is True, None for each request.
        """
        every = _kept(requests)
        ended = cls.Testall(every, statuses)
        return ended, [None] * len(every) if ended else None

    @classmethod
    def waitany(cls, requests: Iterable[Any], status: Any = None) -> tuple[int, None]:
        """Do as `Waitany`.

        Parameters
        ----------
        requests, status
            As for `Waitany`.

        Returns
        -------
        (int, None)
            What `Waitany` returns, and None in place of a received object.
        """
        return cls.Waitany(requests, status), None

    @classmethod
    def testany(cls, requests: Iterable[Any], status: Any = None) -> tuple[int, bool, None]:
        """Do as `Testany`.

        Parameters
        ----------
        requests, status
            As for `Testany`.

        Returns
        -------
        (int, bool, None)
            What `Testany` returns, and None in place of a received object.
        """
        return *cls.Testany(requests, status), None

    @classmethod
    def waitsome(cls, requests: Iterable[Any], statuses: Any = None) -> tuple[list[int] | None, list[None] | None]:
        """Do as `Waitsome`.

        Parameters
        ----------
        requests, statuses
            As for `Waitsome`.

        Returns
        -------
        (list of int or None, list or None)
            What `Waitsome` returns, and None for each place in it.
        """
        return _with_objects(cls.Waitsome(requests, statuses))

    @classmethod
    def testsome(cls, requests: Iterable[Any], statuses: Any = None) -> tuple[list[int] | None, list[None] | None]:
        """Do as `Testsome`.

        Parameters
        ----------
        requests, statuses
            As for `Testsome`.

        Returns
        -------
        (list of int or None, list or None)
            What `Testsome` returns, and None for each place in it.
        """
        return _with_objects(cls.Testsome(requests, statuses))


def _kept(requests: Any) -> Any:
    """Keep what can be gone through only once; what cannot at all is left for the verb to refuse."""
    return list(requests) if isinstance(requests, Iterable) else requests


def _with_objects(places: list[int] | None) -> tuple[list[int] | None, list[None] | None]:
    return places, None if places is None else [None] * len(places)
