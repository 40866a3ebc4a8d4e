"""Judgement on the arguments of verbs, before anything is sent; that on memory is in `buffers`."""

import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from nvcoll.buffers import Spec, check_pair, is_in_place, parse
from nvcoll.errors import ArgumentError, DatatypeError
from nvcoll.ops import Datatype, Op, as_datatype, as_op, mpi_module

MOST_ELEMENTS = 2**59
"""Elements of an array, so that the bytes of the widest type fit an address."""
MOST_AXES = 64
"""Of an array, for NumPy."""

INFO_NULL = None
"""No hints, for verbs that take mpi4py's."""


def is_theirs(value: object, kind: str) -> bool:
    """Tell whether it is an object of mpi4py's class of that name."""
    mpi = mpi_module()
    return mpi is not None and isinstance(value, getattr(mpi, kind))


def judge_info(verb: str, info: Any) -> None:
    """Check that `info` is what mpi4py has hints in, or None; none of them concerns nvcoll."""
    if info is not None and not is_theirs(info, "Info"):
        _refuse(verb, "info", info, "an Info of mpi4py, or None", "no hint concerns nvcoll")


def judge_status(verb: str, status: Any) -> None:
    """Refuse what is neither None nor a status of mpi4py: a number of seconds, for example."""
    if status is not None and not is_theirs(status, "Status"):
        _refuse(verb, "status", status, "None, or a Status of mpi4py", "it tells nothing of a collective call")


def judge_statuses(verb: str, statuses: Any) -> None:
    """Refuse what is neither None nor a list, into which mpi4py puts those of several requests."""
    if statuses is not None and not isinstance(statuses, list):
        wanted = "None, or a list for those of mpi4py"
        _refuse(verb, "statuses", statuses, wanted, "they tell nothing of collective calls")


def _refuse(verb: str, name: str, value: object, expected: str, why: str) -> NoReturn:
    """Refuse an argument without which nvcoll does the same."""
    raise ArgumentError(
        f"{verb}: {name} is of type {type(value).__name__}, expected {expected}; leave it out, for {why}"
    )


def same_handle(one: Any, other: object, ours: type, name: str) -> bool:
    """Tell whether two handles are equal: the same object, or both false, as what has ended or been freed is.

    The other one is of the class `ours`, or of mpi4py's of that name.
    """
    if one is other or one:
        return one is other
    return (isinstance(other, ours) or is_theirs(other, name)) and not other


def dimensions(verb: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as whole numbers whose product fits an address."""
    try:
        dims = tuple(operator.index(length) for length in np.atleast_1d(np.asarray(shape, dtype=object)))
    except TypeError:
        raise ArgumentError(f"{verb}: shape is {shape!r}, expected whole numbers; give a length or a tuple") from None
    if min(dims, default=0) < 0:
        raise ArgumentError(f"{verb}: shape {shape} has a negative dimension; give sizes of 0 or more")
    if len(dims) > MOST_AXES:
        raise ArgumentError(f"{verb}: shape has {len(dims)} dimensions; give {MOST_AXES} at most, as NumPy takes")
    if math.prod(length or 1 for length in dims) >= MOST_ELEMENTS:  # NumPy asks it of arrays without elements, too
        raise ArgumentError(f"{verb}: shape {dims} has more elements than addresses; give a product below 2**59")
    return dims


def elements(
    verb: str, name: str, datatype: Datatype | None, make: Callable[[np.dtype[Any] | None], np.ndarray]
) -> np.ndarray:
    """Return an array that `make` makes of an argument, for the dtype of a datatype or, without one, for any."""
    try:
        return make(datatype.dtype if datatype else None)
    except (TypeError, ValueError, OverflowError) as exc:
        wanted = f"what {datatype.name} can hold" if datatype else "an array of numbers"
        message = f"{verb}: {name} is refused by NumPy ({exc}), expected {wanted}; pass such values, or another dtype"
        raise ArgumentError(message) from exc


def judge(verb: str, sendbuf: Any, recvbuf: Any, op: Any, stream: Any) -> tuple[Spec, Spec, Op]:
    """Check the arguments of an all-reduce; in place, both specs are the same."""
    if stream is not None:
        raise ArgumentError(f"{verb}: stream is given, and arrays of the host have none; leave it out")
    return judge_buffers(verb, *in_place(verb, sendbuf, recvbuf), op, parse)


def in_place(verb: str, sendbuf: Any, recvbuf: Any) -> tuple[Any, Any, str]:
    """Return both buffers of a call, in place the same one twice, and the name under which the second was given."""
    if is_in_place(sendbuf) or (sendbuf is None and recvbuf is not None):  # mpi4py takes None so, too
        if recvbuf is None:
            raise ArgumentError(f"{verb}: sendbuf is IN_PLACE and recvbuf missing; pass the array as recvbuf")
        return recvbuf, recvbuf, "recvbuf"
    if recvbuf is None or is_in_place(recvbuf):
        return sendbuf, sendbuf, "sendbuf"
    return sendbuf, recvbuf, "recvbuf"


def judge_buffers(
    verb: str, sendbuf: Any, recvbuf: Any, name: str, op: Any, parse: Callable[[str, str, Any, bool], Spec]
) -> tuple[Spec, Spec, Op]:
    """Check buffers, as of `in_place`, which `parse` finds, and operator; in place, both specs are the same."""
    recv = parse(verb, name, recvbuf, True)
    send = recv
    if recvbuf is not sendbuf:
        send = parse(verb, "sendbuf", sendbuf, False)
        check_pair(verb, send, recv)
    handle = as_op(op, verb)
    if reason := handle.supports(recv.datatype):
        raise DatatypeError(f"{verb}: {reason}")
    return send, recv, handle


def judge_verb(asked: str, verb: Any) -> None:
    """Refuse what is no collective that there is."""
    if not isinstance(verb, str) or verb.lower() != "allreduce":
        raise ArgumentError(f"{asked}: verb is {verb!r}, expected 'allreduce'")


def judge_explain(verb: str, nbytes: Any, dtype: Any, op: Any) -> tuple[int, Datatype, Op]:
    """Check the arguments of `explain`; return the count, the datatype and the operator."""
    judge_verb("explain", verb)
    datatype, handle = as_datatype(dtype, "explain", "dtype"), as_op(op, "explain")
    if reason := handle.supports(datatype):
        raise DatatypeError(f"explain: {reason}")
    if not hasattr(nbytes, "__index__") or nbytes < 0 or nbytes % datatype.itemsize:
        raise ArgumentError(
            f"explain: nbytes is {nbytes!r}, expected a whole number, 0 or more, and a multiple of the "
            f"{datatype.itemsize} bytes of {datatype.name}; pass count * itemsize"
        )
    return nbytes // datatype.itemsize, datatype, handle


def integer(verb: str, name: str, value: Any) -> int:
    """Return an argument as an integer of 64 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{verb}: {name} is {value!r}, expected an integer") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise ArgumentError(f"{verb}: {name} is {number}, expected an integer of 64 bits")
    return number
