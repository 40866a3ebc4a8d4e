"""Buffers: what may be passed to a verb, and `Buffer`, an array on the symmetric heap.

All judgement on memory stands in `parse`. It takes what mpi4py 4.1 takes and refuses, with a
reason, what mpi4py would reduce wrongly or reject with less to go by.
"""

import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from .errors import ArgumentError, DatatypeError, StateError
from .ops import Datatype, as_datatype, mpi_module


class InPlace:
    """The type of `IN_PLACE`, which has one instance."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "nvcoll.IN_PLACE"

    def __reduce__(self) -> str:
        return "IN_PLACE"  # by name: pickle and copy give the one instance back


#: Given as sendbuf: take the data from recvbuf and leave the result there.
IN_PLACE = InPlace()


def is_in_place(value: object) -> bool:
    """Tell whether `value` is `IN_PLACE`, ours or mpi4py's."""
    mpi = mpi_module()
    return value is IN_PLACE or (mpi is not None and value is mpi.IN_PLACE)


@dataclass(frozen=True, slots=True)
class Spec:
    """Memory that a verb reads or writes.

    Attributes
    ----------
    address : int
        Of the first element; a multiple of the itemsize unless the caller passed odd bytes. Means nothing where `count` is 0.
    count : int
        Number of elements.
    datatype : Datatype
        Their type.
    owner : object
        Keeps the memory alive, and a bytearray from being resized. Hold it for the duration of a
        call, not in a cache.
    order : str
        ``"C"`` or ``"F"`` for arrays whose layout is of one kind only, ``"A"`` where it is both.
    """

    address: int
    count: int
    datatype: Datatype
    owner: object
    order: str = "A"

    @property
    def nbytes(self) -> int:
        """Size of the memory in bytes."""
        return self.count * self.datatype.itemsize


@dataclass(frozen=True, slots=True)
class _Memory:
    """Contiguous memory of some object, before a count or datatype of the caller is applied."""

    address: int
    nbytes: int
    dtype: object  # what the object says it holds; judged only if the caller gives no datatype
    readonly: bool
    owner: object
    order: str


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
        torch, or any object with the buffer protocol, ``__array_interface__`` or CPU DLPack.
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
    buf, count, displ, datatype = _unpack(where, spec)
    memory = _memory(where, buf, typed=datatype is not None)
    if writable and memory.readonly:
        raise ArgumentError(
            f"{where} is read-only, and the result is written there; pass a writable array, for example {_copy_of(buf)}"
        )
    kind = as_datatype(memory.dtype if datatype is None else datatype, verb, name)
    first, length = _extent(where, memory.nbytes, kind, count, displ)
    return Spec(memory.address + first * kind.itemsize, length, kind, memory.owner, memory.order)


def _copy_of(buf: object) -> str:
    """Return the expression that turns a read-only object into a writable one."""
    if isinstance(buf, bytes):
        return "a bytearray"
    return "a .copy() of it" if hasattr(buf, "copy") else "numpy.array() of it"


def _unpack(where: str, spec: object) -> tuple[object, object, object, object]:
    """Split a spec in buffer, count, displacement and datatype, None where not given."""
    if not isinstance(spec, (list, tuple)):
        return spec, None, None, None
    items = list(spec)
    if not 2 <= len(items) <= 4:
        raise ArgumentError(
            f"{where} is a {type(spec).__name__} of {len(items)} items, expected [buf, count, datatype]; "
            "data belongs in an array: numpy.array(...)"
        )
    if len(items) == 2 and not (_is_count(items[1]) or isinstance(items[1], (list, tuple))):
        return items[0], None, None, items[1]
    buf, count = items[:2]
    datatype = items[-1] if len(items) > 2 else None
    if len(items) == 4:
        return buf, count, items[2], datatype
    if isinstance(count, (list, tuple)):
        if len(count) != 2:
            raise ArgumentError(f"{where} has a count of {len(count)} items, expected count or (count, displ)")
        return buf, count[0], count[1], datatype
    return buf, count, None, datatype


def _is_count(value: object) -> bool:
    """Tell counts from datatypes: whatever Python takes for an index, or None."""
    return value is None or hasattr(value, "__index__")


def _index(where: str, what: str, value: Any) -> int:
    """Return a count or displacement as an integer that is not negative."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{where} has {what} {value!r}, expected an integer; pass for example 4") from None
    if number < 0:
        raise ArgumentError(f"{where} has {what} {number}, expected 0 or more; give the number of elements")
    return number


def _extent(where: str, nbytes: int, datatype: Datatype, count: object, displ: object) -> tuple[int, int]:
    """Return the first element and the number of elements that a spec selects in `nbytes` of memory."""
    held, rest = divmod(nbytes, datatype.itemsize)
    first = 0 if displ is None else _index(where, "displacement", displ)
    if first > held:
        raise ArgumentError(
            f"{where} starts at element {first}, its memory holds {held} {datatype.name}; give a smaller displacement"
        )
    if count is None:
        if rest:
            raise ArgumentError(
                f"{where} holds {nbytes} bytes, not a multiple of the {datatype.itemsize} bytes of {datatype.name}; "
                "give a count: [buf, count, datatype]"
            )
        return first, held - first
    length = _index(where, "count", count)
    if first + length > held:
        start = f" from element {first} on" if first else ""
        raise ArgumentError(
            f"{where} is to hold {length} {datatype.name}{start}, its memory holds {held}; "
            "give a smaller count or a larger buffer"
        )
    return first, length


def _memory(where: str, buf: object, typed: bool) -> _Memory:
    """Find the memory of any object; `typed` where the caller gave a datatype."""
    if isinstance(buf, np.ndarray):
        return _from_array(where, buf, buf)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buf, torch.Tensor):
        return _from_tensor(where, buf)
    _refuse_sentinels(where, buf)
    try:
        view = memoryview(buf)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        return _from_protocol(where, buf)
    return _from_array(where, _array_of(where, view, typed), buf)


def _refuse_sentinels(where: str, buf: object) -> None:
    """Refuse the values that stand for no memory."""
    mpi = mpi_module()
    if buf is None:
        raise ArgumentError(f"{where} is None, expected an array; pass one, or leave the argument out if it is optional")
    if is_in_place(buf):
        raise ArgumentError(f"{where} is IN_PLACE, expected an array; only sendbuf may be IN_PLACE")
    if mpi is not None and buf is mpi.BOTTOM:
        raise ArgumentError(f"{where} is MPI.BOTTOM, expected an array; nvcoll takes no absolute addresses: pass the array")


def _array_of(where: str, view: memoryview, typed: bool) -> np.ndarray[Any, Any]:
    """Return an array on the memory of a memoryview."""
    try:
        return np.asarray(view)
    except (ValueError, NotImplementedError):  # a format that NumPy has no name for
        if typed and view.c_contiguous:
            return np.frombuffer(view, np.uint8)
        raise DatatypeError(
            f"{where} has elements of format {view.format!r}, expected numbers; "
            "name the type: [buf, datatype]"
        ) from None


def _from_protocol(where: str, buf: Any) -> _Memory:
    """Find memory through DLPack or ``__array_interface__``, and refuse what is on a GPU."""
    device = buf.__dlpack_device__()[0] if hasattr(buf, "__dlpack_device__") else 1
    # DLPack: 1 is the CPU, 3 and 11 are host memory pinned by CUDA or ROCm.
    if device not in (1, 3, 11) or hasattr(buf, "__cuda_array_interface__"):
        raise _on_gpu(where, type(buf).__name__)
    if hasattr(buf, "__dlpack__"):
        try:
            return _from_array(where, np.from_dlpack(buf), buf)
        except (BufferError, RuntimeError, TypeError) as exc:
            if not hasattr(buf, "__array_interface__"):
                raise DatatypeError(f"{where} cannot be read through DLPack ({exc}); pass a NumPy array") from exc
    if hasattr(buf, "__array_interface__"):
        return _from_array(where, np.asarray(buf), buf)
    raise DatatypeError(
        f"{where} is of type {type(buf).__name__}, expected an object with memory "
        "(buffer protocol, __array_interface__ or DLPack); convert it with numpy.asarray()"
    )


def _on_gpu(where: str, kind: str) -> DatatypeError:
    return DatatypeError(
        f"{where} ({kind}) is on a GPU, and this communicator's memory is on the host: it needs the nvshmem backend; "
        "copy the array to the host"
    )


def _from_tensor(where: str, tensor: Any) -> _Memory:
    """Find the memory of a torch tensor. Not through DLPack: NumPy's refuses bfloat16."""
    import torch

    if tensor.device.type != "cpu":
        raise _on_gpu(where, f"Tensor on {tensor.device}")
    if tensor.requires_grad:
        raise ArgumentError(f"{where} is a tensor that requires grad, and no gradient passes through; pass .detach()")
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise ArgumentError(
            f"{where} is a tensor that is sparse, or conjugated or negated lazily, expected plain memory; "
            "pass .to_dense(), .resolve_conj() or .resolve_neg()"
        )
    axes = tuple(reversed(range(tensor.dim())))
    c_order, f_order = tensor.is_contiguous(), tensor.permute(axes).is_contiguous()
    order = _order(where, c_order, f_order, tuple(tensor.shape), ".contiguous()")
    nbytes = tensor.numel() * tensor.element_size()
    return _Memory(tensor.data_ptr(), nbytes, tensor.dtype, False, tensor, order)


def _from_array(where: str, array: np.ndarray[Any, Any], buf: object) -> _Memory:
    """Find the memory of an array; `buf` is the object of the user behind it."""
    _refuse_freed(where, array)
    if array.dtype.hasobject:
        raise DatatypeError(f"{where} holds Python objects (dtype {array.dtype}), expected numbers; convert with .astype()")
    flags = array.flags
    order = _order(where, flags.c_contiguous, flags.f_contiguous, array.shape, "numpy.ascontiguousarray()")
    if not array.dtype.isnative:
        as_datatype(array.dtype, *where.split(": ", 1))  # raises with the cure, whatever datatype was given
    address = array.__array_interface__["data"][0]
    return _Memory(address, array.nbytes, array.dtype, not flags.writeable, array, order)


def _order(where: str, c_order: bool, f_order: bool, shape: tuple[int, ...], cure: str) -> str:
    """Return the layout of contiguous memory, and refuse gaps."""
    if not (c_order or f_order):
        raise ArgumentError(f"{where} of shape {shape} is not contiguous in memory; pass {cure} of it, or a copy")
    return "A" if c_order and f_order else "C" if c_order else "F"


def check_pair(verb: str, send: Spec, recv: Spec) -> None:
    """Check that a send and a receive buffer of one reduction belong together.

    Raises
    ------
    ArgumentError
        If counts, types or layouts differ, or the memories overlap without being the same.
    """
    if (send.count, send.datatype) != (recv.count, recv.datatype):
        raise ArgumentError(
            f"{verb}: recvbuf holds {recv.count} {recv.datatype.name}, sendbuf {send.count} {send.datatype.name}; "
            "give both the same count and datatype"
        )
    if {send.order, recv.order} == {"C", "F"}:
        raise ArgumentError(
            f"{verb}: sendbuf is in {send.order} order, recvbuf in {recv.order} order, and elements are taken as they lie "
            "in memory; give both the same layout"
        )
    distance = abs(send.address - recv.address)
    if 0 < distance < send.nbytes:
        raise ArgumentError(f"{verb}: sendbuf and recvbuf overlap by {send.nbytes - distance} bytes; pass IN_PLACE or a copy")


class Allocation(Protocol):
    """A piece of the symmetric heap, as a backend gives it."""

    address: int
    nbytes: int

    def free(self) -> None:
        """Give the memory back. Collective."""

    def drop(self) -> None:
        """Queue the memory to be given back at the next collective allocation. Never communicates."""


class _Owner:
    """Holds an allocation for the arrays on it; its end is the end of the last view.

    ``__array_interface__`` lets NumPy keep this object as the base of the bytes it describes.
    """

    __slots__ = ("__array_interface__", "allocation", "freed")

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.freed = False
        self.__array_interface__ = {
            "shape": (allocation.nbytes,),
            "typestr": "|u1",
            "data": (allocation.address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        # At exit the communicator gives everything back; its parts may be gone by now.
        if not self.freed and not sys.is_finalizing():
            self.allocation.drop()


class Buffer(np.ndarray[Any, Any]):
    """An array on the symmetric heap, which verbs use where it lies; made by ``comm.empty`` and its kin.

    It is a NumPy array in every respect but these: `free` gives the memory back; what is made from it
    (slices, copies, results of arithmetic) is a plain array; and in-place operators keep it a Buffer.
    Slices and other views share its memory and keep it alive, so dropping the Buffer itself while
    views exist is safe. After `free`, views made earlier must not be used: the memory may be gone
    or belong to another buffer. The freed Buffer itself holds no elements.
    """

    _owner: _Owner | None = None  # set by `on` alone: anything NumPy derives from a Buffer has none

    @classmethod
    def on(cls, allocation: Allocation, shape: int | Iterable[int], dtype: object) -> Self:
        """Make an array on an allocation, without touching its contents.

        Parameters
        ----------
        allocation
            Memory of at least the array's size.
        shape
            Shape of the array, or its length.
        dtype
            Anything `as_datatype` takes.

        Raises
        ------
        ArgumentError
            If the allocation is too small for the array.
        DatatypeError
            If the type is not supported.
        """
        kind = as_datatype(dtype, "Buffer.on", "dtype")
        dims = (operator.index(shape),) if hasattr(shape, "__index__") else tuple(shape)  # type: ignore[arg-type]
        needed = kind.itemsize * int(np.prod(dims, dtype=np.int64))
        if needed > allocation.nbytes:
            raise ArgumentError(f"Buffer.on: shape {dims} of {kind.name} needs {needed} bytes, the allocation has {allocation.nbytes}")
        owner = _Owner(allocation)
        self = super().__new__(cls, dims, kind.dtype, buffer=np.asarray(owner))
        self._owner = owner
        return self

    @property
    def freed(self) -> bool:
        """Whether `free` was called."""
        return self._owner is not None and self._owner.freed

    def free(self) -> None:
        """Give the memory back to the heap. Collective: every rank calls it, in the same order.

        Raises
        ------
        StateError
            If the buffer was freed before. Should the ranks fail to agree, the buffer stays as it was.
        """
        owner = self._alive("free")
        owner.allocation.free()
        owner.freed = True
        # From here on the array must not point to memory that is no longer ours: make it an empty one.
        self.__setstate__((1, (0,), self.dtype, False, b""))  # type: ignore[no-untyped-call]

    def _alive(self, verb: str) -> _Owner:
        """Return the owner, or raise because there is none any more."""
        if self._owner is None:
            raise StateError(f"{verb}: this array owns no symmetric memory; call it on the Buffer that comm.empty returned")
        if self._owner.freed:
            raise StateError(f"{verb}: the Buffer was freed; allocate another with comm.empty")
        return self._owner

    def __enter__(self) -> Self:
        self._alive("with")
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.freed:
            self.free()

    def __repr__(self) -> str:
        if self._owner is None:
            return repr(self.view(np.ndarray))
        if self._owner.freed:
            return f"<nvcoll.Buffer of {self.dtype}, freed>"
        allocation = self._owner.allocation
        place = getattr(allocation, "offset", allocation.address)
        return f"{np.array_repr(self)[:-1]}, symmetric at {place:#x})"

    def __getitem__(self, key: Any) -> Any:
        return _plain(super().__getitem__(key))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Compute with plain arrays; what was given as ``out`` (``buf += 1``) comes back as it was."""
        arrays = [_as_ndarray(value) for value in inputs]
        out = kwargs.get("out")
        if out is not None:
            kwargs["out"] = tuple(_as_ndarray(value) for value in out)
        result = getattr(ufunc, method)(*arrays, **kwargs)
        if out is None or result is NotImplemented:
            return result
        if not isinstance(result, tuple):
            return out[0]
        return tuple(given if given is not None else made for given, made in zip(out, result, strict=True))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super().__array_function__(func, types, args, kwargs)
        if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
            return type(result)(_plain(item) for item in result)
        return _plain(result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # pickles are plain arrays: they leave the heap


def _plain(value: Any) -> Any:
    """Return arrays that NumPy made of a Buffer as plain ones, and everything else as it is."""
    return np.ndarray.view(value, np.ndarray) if isinstance(value, Buffer) and value._owner is None else value


def _as_ndarray(value: Any) -> Any:
    """Return a Buffer as a plain array on the same memory."""
    if not isinstance(value, Buffer):
        return value
    if value.freed:
        value._alive("arithmetic")
    return np.ndarray.view(value, np.ndarray)


def _refuse_freed(where: str, array: object) -> None:
    """Refuse a freed Buffer, and arrays that are views of one."""
    while array is not None:
        if isinstance(array, Buffer) and array.freed:
            raise StateError(f"{where} is a Buffer that was freed, or a view of one; allocate another with comm.empty")
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)


def _returning_plain(name: str) -> Any:
    """Wrap a method of ndarray so that it returns a plain array."""
    inherited = getattr(np.ndarray, name)

    def method(self: Buffer, *args: Any, **kwargs: Any) -> Any:
        return _plain(inherited(self, *args, **kwargs))

    method.__name__, method.__qualname__, method.__doc__ = name, f"Buffer.{name}", inherited.__doc__
    return method


# Methods of ndarray that make or return an array without asking the hooks above.
for _name in (
    "__copy__ __deepcopy__ astype byteswap choose compress conj conjugate copy cumprod cumsum diagonal dot flatten "
    "getfield ravel repeat reshape round squeeze swapaxes take transpose view"
).split():
    setattr(Buffer, _name, _returning_plain(_name))
