"""Buffer: a NumPy array on the symmetric heap, and the end of its memory."""

import math
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import GetSetDescriptorType, MethodDescriptorType
from typing import Any, Protocol, Self

import numpy as np

from nvcoll.errors import ArgumentError, StateError
from nvcoll.ops import as_datatype


class Allocation(Protocol):
    """A piece of the symmetric heap, as a backend gives it."""

    @property
    def address(self) -> int:
        """Of its first byte, in this process."""

    @property
    def offset(self) -> int:
        """Of its first byte, in the heap: the same on every rank."""

    @property
    def nbytes(self) -> int:
        """Its size, at least what was asked for."""

    def free(self) -> None:
        """Give the memory back. Collective."""

    def drop(self) -> None:
        """Queue the memory to be given back at the next collective allocation.

        Called by the garbage collector, hence at any point of any thread: it takes no lock, and
        communicates with nobody.
        """


class Owner:
    """Holds an allocation for the arrays on it; its end is the end of the last view.

    ``__array_interface__`` lets NumPy keep this object as the base of the bytes it describes.
    """

    __slots__ = ("__array_interface__", "__weakref__", "allocation", "buffer", "freed")

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        self.freed = False
        self.buffer: Callable[[], Buffer | None] = lambda: None  # a weak reference, once there is one
        self.__array_interface__ = {
            "shape": (allocation.nbytes,),
            "typestr": "|u1",
            "data": (allocation.address, False),
            "version": 3,
        }
        remember(self)

    def end(self) -> None:
        """Take the memory away from the Buffer, which must not point to what is no longer its own."""
        self.freed = True
        buffer = self.buffer()
        if buffer is not None:
            # Unpickling's door: the one way to exchange an array's memory, here for none.
            buffer.__setstate__((1, (0,), buffer.dtype, False, b""))  # type: ignore[arg-type]

    def __del__(self) -> None:
        # At exit the communicator gives everything back; its parts may be gone by now.
        if not self.freed and not sys.is_finalizing():
            self.allocation.drop()


class Holder(Protocol):
    """What holds an allocation for arrays: `Owner`, and its counterpart on GPUs."""

    allocation: Allocation

    @property
    def freed(self) -> bool:
        """Whether the memory is theirs no more."""

    def end(self) -> None:
        """Take the memory away from the arrays."""


_owners: weakref.WeakSet[Holder] = weakref.WeakSet()
_lock = threading.Lock()  # emulated ranks are threads; a set must not grow while another looks through it


def remember(owner: Holder) -> None:
    """Let `invalidate` know of an owner."""
    with _lock:
        _owners.add(owner)


def invalidate(address: int, nbytes: int) -> bool:
    """Make freed Buffers of those that lie in a range of addresses, which is about to be unmapped.

    Parameters
    ----------
    address, nbytes
        The memory of a heap. Views into it must not be used from here on: verbs refuse them where they look for it,
        which those that have seen a call of the same kind do not.

    Returns
    -------
    bool
        Whether Buffers, or views of them, live on: they refer to their allocations.
    """
    with _lock:
        found = [owner for owner in _owners if address <= owner.allocation.address < address + nbytes]
    for owner in found:
        if not owner.freed:
            owner.end()
    return bool(found)


class Buffer(np.ndarray[Any, Any]):
    """An array on the symmetric heap, which verbs use where it lies; made by ``comm.empty`` and its kin.

    It is a NumPy array in every respect but these: `free` gives the memory back; in-place operators
    keep it a Buffer; and what is made from it (slices and other views, copies, results of arithmetic,
    pickles) is a plain array. Views share its memory and keep it alive, so dropping the Buffer
    while views exist is safe. A forked child shares its memory too, and does not get a copy of it.

    After `free`, and after the communicator is finalized, views made earlier must not be used: their
    memory may be gone or belong to another buffer. The freed Buffer itself holds no elements.
    """

    # Set by `on` alone: whatever NumPy derives from a Buffer has none, and is turned into a plain array.
    _owner: Owner | None = None

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

        Returns
        -------
        Buffer
            C-contiguous, at the allocation's address. It owns the allocation from here on.

        Raises
        ------
        ArgumentError
            If the allocation is too small for the array.
        DatatypeError
            If the type is not supported.
        """
        datatype = as_datatype(dtype, "Buffer.on", "dtype")
        dims = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
        if min(dims, default=0) < 0:
            raise ArgumentError(
                f"Buffer.on: shape is {dims}, expected lengths of 0 or more; give the lengths of the axes"
            )
        needed = datatype.itemsize * math.prod(dims)
        if needed > allocation.nbytes:
            raise ArgumentError(
                f"Buffer.on: shape {dims} of {datatype.name} needs {needed} bytes, "
                f"the allocation has {allocation.nbytes}; allocate more"
            )
        owner = Owner(allocation)
        self = super().__new__(cls, dims, datatype.dtype, buffer=np.asarray(owner))
        self._owner, owner.buffer = owner, weakref.ref(self)
        return self

    @property
    def freed(self) -> bool:
        """Whether the memory was given back, by `free` or with the communicator."""
        return self._owner is not None and self._owner.freed

    def free(self) -> None:
        """Give the memory back to the heap. Collective: every rank calls it, in the same order.

        Raises
        ------
        StateError
            If the buffer was freed before.
        TimeoutError, PeerLostError, MismatchError
            If a rank does not come, has ended, or frees another buffer.

        Notes
        -----
        Where the ranks fail to agree, the error passes through and the buffer stays as it was.
        """
        if self._owner is None:
            raise StateError("free: this is no Buffer of its own but made from one; take what comm.empty returned")
        self._refuse_freed("free")
        self._owner.allocation.free()
        self._owner.end()

    def _refuse_freed(self, verb: str) -> None:
        if self.freed:
            raise StateError(f"{verb}: the Buffer was freed; allocate another with comm.empty")

    def __enter__(self) -> Self:
        self._refuse_freed("with")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error the other ranks may never come to a collective free: leave the memory to the garbage collector.
        if kind is None and not self.freed:
            self.free()

    def __repr__(self) -> str:
        if self.freed:
            return f"<nvcoll.Buffer of {self.dtype}, freed>"
        text = np.array_repr(self)
        if self._owner is None:
            return text
        return f"{text[:-1]}, symmetric at {self._owner.allocation.offset:#x})"

    def __getitem__(self, key: Any) -> Any:
        return _plain(super().__getitem__(key))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Compute on plain arrays; what was given as ``out`` (``buf += 1``) comes back as it was."""
        out = kwargs.pop("out", None)
        arrays = [_bare(value) for value in inputs]
        kwargs = {name: _bare(value) for name, value in kwargs.items()}
        if out is None:
            return getattr(ufunc, method)(*arrays, **kwargs)
        result = getattr(ufunc, method)(*arrays, out=tuple(_bare(value) for value in out), **kwargs)
        if not isinstance(result, tuple):
            return out[0]
        return tuple(made if given is None else given for given, made in zip(out, result, strict=True))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Turn what NumPy's functions make of a Buffer (``numpy.zeros_like``) into plain arrays."""
        result = super().__array_function__(func, types, args, kwargs)
        return type(result)(map(_plain, result)) if type(result) in {list, tuple} else _plain(result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare(self).__reduce_ex__(protocol)


def _plain(value: Any) -> Any:
    """Return an array that NumPy derived from a Buffer as a plain one, and everything else as it is."""
    return np.ndarray.view(value, np.ndarray) if isinstance(value, Buffer) and value._owner is None else value


def _bare(value: Any) -> Any:
    """Return a Buffer as a plain array on the same memory, and everything else as it is."""
    if not isinstance(value, Buffer):
        return value
    value._refuse_freed("arithmetic")
    return np.ndarray.view(value, np.ndarray)


def _plain_method(name: str, inherited: Any) -> Any:
    """Return a method of ndarray, made to return plain arrays."""

    def method(self: Buffer, *args: Any, **kwargs: Any) -> Any:
        result = inherited(self, *args, **kwargs)
        return tuple(map(_plain, result)) if type(result) is tuple else _plain(result)

    method.__name__, method.__qualname__, method.__doc__ = name, f"Buffer.{name}", inherited.__doc__
    return method


def _plain_attribute(inherited: Any) -> property:
    """Return a view that ndarray has as an attribute, made plain; assigning to it works as before."""
    return property(lambda self: _plain(inherited.__get__(self)), inherited.__set__, doc=inherited.__doc__)


for _name, _member in vars(np.ndarray).items():
    if isinstance(_member, MethodDescriptorType) and (_name[0] != "_" or _name in {"__copy__", "__deepcopy__"}):
        setattr(Buffer, _name, _plain_method(_name, _member))
    elif isinstance(_member, GetSetDescriptorType) and _name in {"T", "mT", "real", "imag"}:
        setattr(Buffer, _name, _plain_attribute(_member))
