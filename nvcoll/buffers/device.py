"""DeviceBuffer: an array on the symmetric heap of a GPU, in the forms in which other libraries take it."""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np

from nvcoll._plan import DLPACK_VERSION, DeviceSpan, dlpack_capsule
from nvcoll.errors import ArgumentError, StateError
from nvcoll.ops import Datatype, as_datatype

from .array import Allocation
from .device_memory import DeviceOwner, Driver, Gpu
from .dlpack import CUDA, DLPACK_TYPES
from .streams import as_stream, refuse_capture


class DeviceBuffer(DeviceSpan):
    """An array on the symmetric heap of a GPU, which verbs use where it lies; made by ``comm.empty`` and its kin.

    It holds memory, and leaves computing to other libraries, which take it without a copy: ``torch.from_dlpack(buf)``,
    ``cupy.asarray(buf)``, ``numba.cuda.as_cuda_array(buf)``, ``jax.dlpack.from_dlpack(buf)``. Slices along the first
    axis, and `reshape`, are views. Views and what other libraries made of it share its memory and keep it alive, so
    dropping the buffer while they exist is safe. Elements lie in C order.

    After `free`, and after the communicator is finalized, the buffer and its views raise StateError, and what other
    libraries made of them must not be used: its memory may be gone or belong to another buffer.

    Notes
    -----
    The buffer is bound to no stream. What nvcoll writes is ordered on the stream that the call was given, and another
    library sees it in work on that stream, or after it was synchronised. Through DLPack a library names its own stream,
    where work comes after the calls made before; ``__cuda_array_interface__`` puts nothing in order.
    """

    __slots__ = ("__weakref__", "_datatype", "_owner", "_shape", "_whole")

    _datatype: Datatype
    _owner: DeviceOwner
    _shape: tuple[int, ...]
    _whole: bool

    def __new__(  # noqa: D102
        cls, owner: DeviceOwner, offset: int, shape: tuple[int, ...], datatype: Datatype, whole: bool = False
    ) -> Self:
        self = super().__new__(cls, owner, offset, math.prod(shape), datatype.itemsize, datatype.code)
        self._owner, self._shape, self._datatype, self._whole = owner, shape, datatype, whole
        return self

    @classmethod
    def on(
        cls,
        allocation: Allocation,
        shape: int | Iterable[int],
        dtype: object,
        gpu: Gpu,
        driver: Driver,
        stream: int = 0,
        precede: Callable[[int], None] = lambda stream: None,
        check: Callable[[str], None] = lambda verb: None,
    ) -> "DeviceBuffer":
        """Make an array on an allocation, without touching its contents.

        Parameters
        ----------
        allocation
            Memory of at least the array's size.
        shape
            Shape of the array, or its length.
        dtype
            Anything `as_datatype` takes.
        gpu
            Where the memory is: a ``nvcoll.backends.driver.Device``.
        driver
            What copies: the module ``nvcoll.backends.driver``.
        stream
            Where copies go that name no stream: the legacy default stream, if not told otherwise.
        precede, check
            As for `DeviceOwner`.

        Returns
        -------
        DeviceBuffer
            At the allocation's address. It owns the allocation from here on.

        Raises
        ------
        ArgumentError, DatatypeError
            If the allocation is too small for the array, or the type is not supported.
        """
        datatype = as_datatype(dtype, "DeviceBuffer.on", "dtype")
        dims = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
        needed = datatype.itemsize * math.prod(dims)
        if min(dims, default=0) < 0 or needed > allocation.nbytes:
            raise ArgumentError(
                f"DeviceBuffer.on: shape {dims} of {datatype.name} needs {needed} bytes, expected lengths of 0 or more "
                f"and no more than the {allocation.nbytes} bytes of the allocation; allocate more"
            )
        return cls(DeviceOwner(allocation, gpu, driver, stream, precede, check), 0, dims, datatype, whole=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of the elements; bfloat16 and 8-bit floats are those of ml_dtypes."""
        return self._datatype.dtype

    @property
    def datatype(self) -> Datatype:
        """Type of the elements, as verbs name it."""
        return self._datatype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self._shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.count

    @property
    def device(self) -> int:
        """Ordinal of the GPU."""
        return self._owner.device

    @property
    def address(self) -> int:
        """Of the first element, on the GPU."""
        self._refuse_freed("address")
        return super().address

    @property
    def freed(self) -> bool:
        """Whether the memory was given back, by `free` or with the communicator."""
        return self._owner.freed

    def free(self) -> None:
        """Give the memory back to the heap. Collective: every rank calls it, in the same order.

        Raises
        ------
        StateError
            If the buffer was freed before, or is a view, or torch or CuPy captures a graph on its current stream.
        TimeoutError, PeerLostError, MismatchError
            If a rank does not come, has ended, or frees another buffer.

        Notes
        -----
        Work on the GPU that uses the memory must be done: synchronise its stream before. Where the ranks fail to agree,
        the error passes through and the buffer stays as it was.
        """
        if not self._whole:
            raise StateError("free: this is a view of a DeviceBuffer, expected a whole one; free what comm.empty gave")
        self._refuse_freed("free")
        refuse_capture("free")
        self._owner.allocation.free()
        self._owner.end()

    def _queue(self, stream: Any, verb: str) -> int:
        """Return the stream of a copy, which is waited for."""
        refuse_capture(verb)
        return self._owner.stream if stream is None else as_stream(stream, self, verb)

    def _refuse_freed(self, verb: str) -> None:
        if self._owner.freed:
            raise StateError(f"{verb}: the DeviceBuffer was freed, expected a living one; allocate with comm.empty")

    def __enter__(self) -> Self:
        self._refuse_freed("with")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error the other ranks may never come to a collective free: leave the memory to the garbage collector.
        if kind is None and not self.freed:
            self.free()

    def __repr__(self) -> str:
        if self.freed:
            return f"<nvcoll.DeviceBuffer of {self._datatype.name}, freed>"
        what = f"{self._shape} of {self._datatype.name} on GPU {self.device}"
        return f"<nvcoll.DeviceBuffer {what}, symmetric at {self._owner.allocation.offset + self.offset:#x}>"

    def __len__(self) -> int:
        if not self._shape:
            raise TypeError("len: the DeviceBuffer has no axes, expected one or more; its size is 1")
        return self._shape[0]

    def __getitem__(self, key: Any) -> "DeviceBuffer":
        """Return a view: of a slice along the first axis, or of one of its elements."""
        if key is Ellipsis:
            return self.reshape(self._shape)
        if not self._shape:
            raise IndexError("[]: the DeviceBuffer has no axes, expected one or more; reshape it to (1,)")
        length, rest = self._shape[0], self._shape[1:]
        if isinstance(key, slice):
            first, end, step = key.indices(length)
            if step != 1:
                raise IndexError(f"[]: the slice has a step of {step}, expected 1; slice the array of another library")
            return self._view(first, (max(0, end - first), *rest))
        if isinstance(key, bool) or not hasattr(type(key), "__index__"):
            raise IndexError(
                f"[]: the index is of type {type(key).__name__}, expected an integer or a slice of the first axis; "
                "index the array of another library"
            )
        index = operator.index(key)
        if not -length <= index < length:
            raise IndexError(f"[]: the index is {index}, expected one for an axis of {length}; count from 0")
        return self._view(index % length, rest)

    def _view(self, first: int, shape: tuple[int, ...]) -> "DeviceBuffer":
        """Return an array that begins at an element of the first axis."""
        self._refuse_freed("[]")
        offset = self.offset + first * math.prod(self._shape[1:]) * self.itemsize
        return DeviceBuffer(self._owner, offset, shape, self._datatype)

    def reshape(self, *shape: Any) -> "DeviceBuffer":
        """Return a view of another shape.

        Parameters
        ----------
        *shape
            Lengths of the axes, one of which may be -1, or a tuple of them.

        Returns
        -------
        DeviceBuffer

        Raises
        ------
        ArgumentError
            If the shape has another number of elements.
        """
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], Iterable) else shape
        dims = [operator.index(length) for length in given]
        if dims.count(-1) == 1:
            known = -math.prod(dims)
            if known > 0:
                dims[dims.index(-1)] = self.size // known
        if min(dims, default=0) < 0 or math.prod(dims) != self.size:
            raise ArgumentError(f"reshape: shape is {tuple(given)}, expected one of {self.size} elements; keep that")
        self._refuse_freed("reshape")
        return DeviceBuffer(self._owner, self.offset, tuple(dims), self._datatype)

    def copy_from(self, host_array: Any, stream: Any = None) -> None:
        """Copy an array of the host into this one.

        Parameters
        ----------
        host_array
            Anything ``numpy.asarray`` takes, of the same shape. Its elements are converted to `dtype`.
        stream
            The copy comes after what was queued there, and after the calls made so far; None is the legacy default
            stream, or the communicator's own where it has one (`Comm.stream`). It is done on return.

        Raises
        ------
        ArgumentError
            If the shapes differ.
        StateError
            If the buffer was freed, or torch or CuPy captures a graph on its current stream.
        """
        source = np.asarray(host_array, self.dtype, order="C")
        if source.shape != self._shape:
            raise ArgumentError(
                f"copy_from: host_array has the shape {source.shape}, expected {self._shape}; pass .reshape() of it"
            )
        self._owner.copy(self.address, source.ctypes.data, self.nbytes, self._queue(stream, "copy_from"), "copy_from")

    def copy_to(self, host_array: np.ndarray[Any, Any] | None = None, stream: Any = None) -> np.ndarray[Any, Any]:
        """Copy this array to the host.

        Parameters
        ----------
        host_array
            Where to: a writable array of NumPy in C order, of the same shape and type. None makes a new one.
        stream
            The copy comes after what was queued there, and after the calls made so far; None is the legacy default
            stream, or the communicator's own where it has one (`Comm.stream`). It is done on return.

        Returns
        -------
        numpy.ndarray
            `host_array`, or the new array.

        Raises
        ------
        ArgumentError
            If `host_array` is not such an array.
        StateError
            If the buffer was freed, or torch or CuPy captures a graph on its current stream.
        TimeoutError, MismatchError
            If a call has failed, and nobody has heard of it: the array may hold anything. So do `copy_from` and `fill`.
        """
        to = np.empty(self._shape, self.dtype) if host_array is None else host_array
        fits = isinstance(to, np.ndarray) and (to.shape, to.dtype) == (self._shape, self.dtype)
        if not (fits and to.flags.c_contiguous and to.flags.writeable):
            found = f"{to.shape} of {to.dtype}" if isinstance(to, np.ndarray) else f"of type {type(to).__name__}"
            raise ArgumentError(
                f"copy_to: host_array is {found}, expected a writable NumPy array in C order, {self._shape} of "
                f"{self.dtype}; leave it out for a new one"
            )
        self._owner.copy(to.ctypes.data, self.address, self.nbytes, self._queue(stream, "copy_to"), "copy_to")
        return to

    def fill(self, value: Any, stream: Any = None) -> None:
        """Set all elements to one value.

        Parameters
        ----------
        value
            A number, converted to `dtype` as NumPy does.
        stream
            It comes after what was queued there, and after the calls made so far; None is the legacy default stream, or
            the communicator's own where it has one (`Comm.stream`). It is done on return.

        Raises
        ------
        StateError
            If the buffer was freed, or torch or CuPy captures a graph on its current stream.
        """
        self._owner.fill(self.address, np.full((), value, self.dtype), self.size, self._queue(stream, "fill"))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3, without a stream: see the class on order."""
        dtype = self.dtype
        if dtype.isbuiltin != 1:
            # An AttributeError, so that whoever looks for the interface sees that there is none and tries DLPack.
            raise AttributeError(
                f"__cuda_array_interface__: it has no name for {dtype}, expected a type of NumPy's own; use DLPack: "
                "torch.from_dlpack(buffer)"
            )
        return {
            "shape": self._shape,
            "typestr": dtype.str,
            "data": (self.address if self.size or self.freed else 0, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's (type, ordinal)."""
        return CUDA, self.device

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """Return a DLPack capsule of this memory.

        Parameters
        ----------
        stream
            The consumer's, as DLPack numbers them, where work comes after the calls made so far; -1: in no order.
        max_version
            The newest version the consumer knows; None is from before version 1.
        dl_device
            None, or the device that the buffer is on.
        copy
            False or None.

        Returns
        -------
        capsule

        Raises
        ------
        BufferError
            If a copy or another device is asked for.
        StateError
            If the buffer was freed.
        """
        if copy:
            raise BufferError("__dlpack__: copy is True, expected False or None; copy the array that you get")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            here = self.__dlpack_device__()
            raise BufferError(
                f"__dlpack__: dl_device is {tuple(dl_device)}, expected {here}, where the buffer is; move it"
            )
        if stream is not None and (isinstance(stream, bool) or not hasattr(type(stream), "__index__") or stream < -1):
            raise BufferError(f"__dlpack__: stream is {stream!r}, expected an integer, -1 or more; pass the handle")
        self._refuse_freed("__dlpack__")
        versioned = max_version is not None and max_version[0] >= DLPACK_VERSION[0]
        address = self.address if self.size else 0
        if stream != -1:
            self._owner.precede(operator.index(stream or 0))
        kind = DLPACK_TYPES[self._datatype.name]
        return dlpack_capsule(address, self._shape, kind, self.__dlpack_device__(), self._owner, versioned)

    def __array__(self, *_: Any, **__: Any) -> Any:
        # Without it NumPy would take the buffer for a sequence and make an array of objects.
        raise TypeError("numpy: the DeviceBuffer is in memory of a GPU, expected memory of the host; pass .copy_to()")
