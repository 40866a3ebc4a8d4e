"""Specs: all judgement on the memory that is passed to a verb.

`parse` takes what mpi4py 4.1 takes, and refuses with a reason what it cannot reduce.
"""

import contextlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from nvcoll.errors import ArgumentError, DatatypeError, StateError
from nvcoll.ops import Datatype, as_datatype, mpi_module

from .array import Buffer, Owner
from .dlpack import HOST_DEVICES
from .refusals import BACK, MAKE, gaps, no_memory, read_only, refuse_no_arrays, refuse_uncomputed

T = TypeVar("T")
DATA = (bool, int, float, complex, list, tuple)
"""What a list begins with that is no spec, but data that the caller takes for an array."""


class InPlace:
    """The type of `IN_PLACE`, which has one instance."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "nvcoll.IN_PLACE"

    def __reduce__(self) -> str:
        return "IN_PLACE"  # by name: pickle and copy give the one instance back


#: Given as one of the two buffers: the other one has the data, and the result afterwards.
IN_PLACE = InPlace()


IN_PLACES: list[object] = [IN_PLACE]
"""What stands for it: ours, and mpi4py's once it was seen."""


def is_in_place(value: object) -> bool:
    """Tell whether `value` is `IN_PLACE`, ours or mpi4py's."""
    if any(value is one for one in IN_PLACES):
        return True
    mpi = mpi_module()
    if mpi is None or value is not mpi.IN_PLACE:
        return False
    IN_PLACES.append(value)
    return True


@dataclass(frozen=True, slots=True)
class Spec:
    """Contiguous memory that a verb reads or writes.

    Attributes
    ----------
    address : int
        Of the first element. Not always a multiple of the itemsize: a slice of a bytearray begins
        anywhere. Means nothing where `count` is 0.
    count : int
        Number of elements.
    datatype : Datatype
        Their type.
    owner : object
        Keeps the memory alive, and a bytearray from being resized: hold it for the duration of a
        call, not in a cache.
    order : str
        ``"C"`` or ``"F"`` for arrays that lie in one of these orders only, else ``"A"``.
    device : int or None
        Ordinal of the GPU that has the memory; None for memory of the host, and where the object does not tell.
    """

    address: int
    count: int
    datatype: Datatype
    owner: object
    order: str = "A"
    device: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of the memory in bytes."""
        return self.count * self.datatype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether elements lie on multiples of their size, or of that of a complex number's parts."""
        size = self.datatype.itemsize // (2 if self.datatype.kind == "complex" else 1)
        return self.address % size == 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Contiguous memory of an object, before the caller's count and datatype are applied."""

    address: int
    nbytes: int
    dtype: object  # what the object says it holds; counts only if the caller gives no datatype
    readonly: bool
    owner: object
    order: str  # as in Spec, or empty where there are gaps
    device: int | None = None

    def select(self, verb: str, name: str, count: Any, displ: Any, datatype: object) -> Spec:
        """Return the part of it that a spec names."""
        foreign = isinstance(self.dtype, np.dtype) and not self.dtype.isnative
        given = self.dtype if datatype is None or foreign else datatype  # bytes are not swapped, whatever type is given
        element = as_datatype(given, verb, f"datatype of {name}")
        first, length = extent(f"{verb}: {name}", self.nbytes, element, count, displ)
        if length and not self.address:
            raise no_memory(f"{verb}: {name}", self.owner)
        start = self.address + first * element.itemsize
        return Spec(start, length, element, self.owner, self.order, self.device)


NOWHERE = Memory(0, 0, None, False, None, "A")
"""What None stands for in a spec of no elements: ``[None, 0, datatype]``."""


def is_nowhere(buf: object, count: Any, datatype: object) -> bool:
    """Tell whether a spec needs no memory, as that of a rank that has no part of the data."""
    return buf is None and datatype is not None and (count is None or count == 0)


def parse(verb: str, name: str, spec: object, writable: bool) -> Spec:
    """Find the memory that `spec` stands for.

    Parameters
    ----------
    verb, name
        The call and its argument (``"Allreduce"``, ``"recvbuf"``), for messages.
    spec
        ``buf``, ``[buf, count]``, ``[buf, datatype]``, ``[buf, count, datatype]``, or
        ``[buf, count, displ, datatype]``, as list or tuple, where count may also be ``(count, displ)``.
        Count and displacement are in elements of the datatype, which may differ from the type of
        ``buf``: its bytes are then read as that type, as in mpi4py. ``buf`` is an array of NumPy or
        torch, or any object with the buffer protocol, ``__array_interface__`` or CPU DLPack (an
        exporter that does not tell whether its memory may be written is taken for read-only).
        None with a datatype, and a count of 0 or none, is a buffer of no elements.
        Elements are taken in the order of memory: Fortran-contiguous arrays are reduced
        elementwise with arrays of the same layout on the other ranks.
    writable
        Whether the verb writes there.

    Returns
    -------
    Spec
        Address, count and datatype, and an owner that keeps the memory alive.

    Raises
    ------
    ArgumentError
        Memory that is too small, read-only or not contiguous, or a malformed spec.
    DatatypeError
        Element types, and kinds of objects, that are not supported.
    StateError
        A `Buffer` that was freed, or a view of one.
    """
    where = f"{verb}: {name}"
    buf, count, displ, datatype = unpack(where, spec, writable)
    where = where if buf is spec else f"{where}[0]"
    memory = NOWHERE if is_nowhere(buf, count, datatype) else _memory(where, buf, datatype is not None, writable)
    if writable and memory.readonly:
        raise read_only(where, buf)
    if not memory.order:
        raise gaps(where, buf, writable, "numpy.ascontiguousarray()")
    return memory.select(verb, name, count, displ, datatype)


def unpack(where: str, spec: object, writable: bool) -> tuple[object, Any, Any, object]:
    """Split a spec in buffer, count, displacement and datatype, None where not given."""
    if not isinstance(spec, list | tuple):
        return spec, None, None, None
    if not 2 <= len(spec) <= 4 or type(spec[0]) in DATA:
        raise ArgumentError(
            f"{where} is a {type(spec).__name__} of {len(spec)} items, expected an array or [buf, count, datatype]; "
            f"{MAKE if writable else 'pass numpy.array() of it'}"
        )
    buf, count, *rest = spec
    if not rest and not _may_be_count(count):
        return buf, None, None, count
    displ = rest[0] if len(rest) == 2 else None
    if isinstance(count, list | tuple) and displ is None:
        if len(count) != 2:
            raise ArgumentError(
                f"{where} has a count of {len(count)} items, expected a number; pass count or (count, displ)"
            )
        count, displ = count
    return buf, count, displ, rest[-1] if rest else None


def _may_be_count(value: object) -> bool:
    """Tell counts from datatypes; types such as ``numpy.int32`` have ``__index__`` themselves, for their instances."""
    return value is None or isinstance(value, list | tuple) or hasattr(type(value), "__index__")


def _index(where: str, what: str, value: Any) -> int:
    """Return a count or displacement as an integer that is not negative."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(
            f"{where} has a {what} of type {type(value).__name__}, expected int; pass int() of it"
        ) from None
    if number < 0:
        raise ArgumentError(f"{where} has a {what} of {number}, expected 0 or more; count elements from the start")
    return number


def extent(where: str, nbytes: int, datatype: Datatype, count: Any, displ: Any) -> tuple[int, int]:
    """Return the first element and the number of elements that a spec selects in `nbytes` of memory."""
    held, rest = divmod(nbytes, datatype.itemsize)
    first = 0 if displ is None else _index(where, "displacement", displ)
    if count is None:
        if rest:
            raise ArgumentError(
                f"{where} holds {nbytes} bytes, expected a multiple of the {datatype.itemsize} of a {datatype.name}; "
                "give a count: [buf, count, datatype]"
            )
        length = max(held - first, 0)
    else:
        length = _index(where, "count", count)
    if first + length > held:
        start = f" from element {first} on" if first else ""
        raise ArgumentError(
            f"{where} holds {held} {datatype.name}, expected {length}{start}; give a smaller count or a larger buffer"
        )
    return first, length


def _memory(where: str, buf: Any, typed: bool, writable: bool) -> Memory:
    """Find the memory of any object; `typed` where the caller gave a datatype."""
    if isinstance(buf, np.ndarray):
        return _from_array(where, buf)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buf, torch.Tensor):
        return _from_tensor(where, buf, torch.strided, writable)
    refuse_sentinels(where, buf)
    view = None
    with contextlib.suppress(TypeError, ValueError, BufferError):
        view = memoryview(buf)
    if view is None:
        return _from_protocol(where, buf, writable)
    return _from_array(where, _array_of(where, view, typed))


def refuse_sentinels(where: str, buf: object) -> None:
    """Refuse the values that stand for no memory."""
    if is_in_place(buf):
        raise ArgumentError(f"{where} is IN_PLACE, expected an array; pass IN_PLACE alone, for one of the two buffers")
    refuse_no_arrays(where, buf)


def _array_of(where: str, view: memoryview, typed: bool) -> np.ndarray[Any, Any]:
    """Return an array on the memory of a memoryview."""
    try:
        return np.asarray(view)
    except (ValueError, NotImplementedError):  # a format that NumPy has no name for
        if typed and view.c_contiguous:
            return np.frombuffer(view, np.uint8)
        raise DatatypeError(
            f"{where} has elements of format {view.format!r}, expected numbers; name their type: [buf, datatype]"
        ) from None


def _from_protocol(where: str, buf: Any, writable: bool) -> Memory:
    """Find memory through DLPack or ``__array_interface__``, and refuse what is on a GPU."""
    if hasattr(buf, "__dlpack_device__"):
        on_gpu = buf.__dlpack_device__()[0] not in HOST_DEVICES
    else:
        on_gpu = hasattr(buf, "__cuda_array_interface__")
    if on_gpu:
        raise _not_on_host(where, f"a GPU ({type(buf).__name__})", writable)
    if hasattr(buf, "__array_interface__"):
        return _from_array(where, np.asarray(buf))
    cure = MAKE if writable else "pass numpy.asarray() of it"
    if hasattr(buf, "__dlpack__"):
        try:
            return _from_array(where, np.from_dlpack(buf))
        except (BufferError, RuntimeError, TypeError) as exc:
            raise DatatypeError(
                f"{where} cannot be read through DLPack ({exc}), expected host memory of numbers; {cure}"
            ) from exc
    raise DatatypeError(
        f"{where} is of type {type(buf).__name__}, expected memory (buffer protocol, __array_interface__ or DLPack); "
        f"{cure}"
    )


def _not_on_host(where: str, device: str, writable: bool) -> DatatypeError:
    return DatatypeError(
        f"{where} is in memory of {device}, which needs the nvshmem backend, expected host memory; copy it to the host"
        f"{BACK if writable else ''}"
    )


def _from_tensor(where: str, tensor: Any, strided: object, writable: bool) -> Memory:
    """Find the memory of a torch tensor. Not through DLPack, which NumPy does not take bfloat16 from."""
    refuse_uncomputed(where, tensor, strided, writable)
    if tensor.device.type != "cpu":
        raise _not_on_host(where, str(tensor.device), writable)
    reverse = tuple(reversed(range(tensor.dim())))
    order = order_of(tensor.is_contiguous(), tensor.permute(reverse).is_contiguous())
    return Memory(tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor.dtype, False, tensor, order)


def _from_array(where: str, array: np.ndarray[Any, Any]) -> Memory:
    """Find the memory of an array."""
    _refuse_freed(where, array)
    if array.dtype.hasobject:
        raise DatatypeError(
            f"{where} holds Python objects ({array.dtype}), expected numbers; convert: x = x.astype(...)"
        )
    order = order_of(array.flags.c_contiguous, array.flags.f_contiguous)
    address = array.__array_interface__["data"][0]
    return Memory(address, array.nbytes, array.dtype, not array.flags.writeable, array, order)


def _refuse_freed(where: str, array: object) -> None:
    """Refuse a freed Buffer, and arrays that are views of one."""
    if any(one.freed for one in _lenders(array)):
        raise StateError(
            f"{where} is a Buffer that was freed, or a view of one, expected living memory; "
            "allocate another with comm.empty"
        )


def _lenders(array: object) -> Iterator[Buffer | Owner]:
    """Yield what may free the memory of an array."""
    while array is not None:
        if isinstance(array, Buffer | Owner):
            yield array
        array = array.base if isinstance(array, np.ndarray) else array.obj if isinstance(array, memoryview) else None


def while_alive(verb: str, owners: Iterable[object], call: Callable[[], T]) -> Callable[[], T]:
    """Return `call`, made to refuse once a Buffer is freed that one of `owners`, of specs, is or is a view of."""
    lenders = [one for owner in owners for one in _lenders(owner) if isinstance(one, Owner)]
    if not lenders:
        return call

    def guarded() -> T:
        for one in lenders:
            if one.freed:
                raise StateError(f"{verb}: a Buffer of this request was freed, expected living memory; make another")
        return call()

    return guarded


def order_of(c_order: bool, f_order: bool) -> str:
    """Return the order of memory, as in `Memory`."""
    return "A" if c_order and f_order else "C" if c_order else "F" if f_order else ""


def check_pair(verb: str, send: Spec, recv: Spec) -> None:
    """Check that a send and a receive buffer of one reduction belong together.

    Parameters
    ----------
    verb
        The call, for messages.
    send, recv
        What `parse` made of its sendbuf and recvbuf. The same memory is accepted: it means IN_PLACE.

    Raises
    ------
    ArgumentError
        If counts or layouts differ, or the memories overlap without being the same.
    DatatypeError
        If the types differ.
    """
    if send.datatype != recv.datatype:
        raise DatatypeError(
            f"{verb}: recvbuf holds {recv.count} {recv.datatype.name}, sendbuf {send.count} {send.datatype.name}; "
            "give both the same datatype"
        )
    if send.count != recv.count:
        raise ArgumentError(
            f"{verb}: recvbuf holds {recv.count} {recv.datatype.name}, sendbuf {send.count}; give both the same count"
        )
    if {send.order, recv.order} == {"C", "F"}:
        raise ArgumentError(
            f"{verb}: sendbuf is in {send.order} order, recvbuf in {recv.order} order, and elements are taken as they "
            "lie in memory; give both the same layout"
        )
    distance = abs(send.address - recv.address)
    if 0 < distance < send.nbytes:
        raise ArgumentError(
            f"{verb}: sendbuf and recvbuf overlap by {send.nbytes - distance} bytes; pass IN_PLACE or a copy"
        )
