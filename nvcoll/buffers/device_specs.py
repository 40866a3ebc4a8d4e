"""Specs on GPUs: the forms that `specs.parse` takes, over the objects that hold memory of a GPU."""

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from nvcoll._plan import DLPACK_VERSION, DLPackTensor
from nvcoll.errors import ArgumentError, DatatypeError, StateError

from .device import DeviceBuffer
from .dlpack import CUDA, CUDA_HOST, GPU_DEVICES, datatype_of
from .refusals import BACK, gaps, read_only, refuse_uncomputed
from .specs import NOWHERE, Memory, Spec, is_nowhere, order_of, refuse_sentinels, unpack
from .streams import LEGACY_BY_NAME, interface_of

TELLS_STREAM = 3
"""The first version of ``__cuda_array_interface__`` that has a stream."""


def parse_device(verb: str, name: str, spec: object, writable: bool, stream: int = LEGACY_BY_NAME) -> Spec:
    """Find the memory of a GPU that `spec` stands for.

    Parameters
    ----------
    verb, name
        The call and its argument (``"Allreduce"``, ``"recvbuf"``), for messages.
    spec
        The forms of `nvcoll.buffers.parse`, where ``buf`` is a `DeviceBuffer`, a CUDA tensor of torch, or any object
        with ``__cuda_array_interface__`` or DLPack for CUDA. Elements are taken in the order of memory.
    writable
        Whether the verb writes there.
    stream
        Where the call will run, for exporters of DLPack, who make their own work visible there.

    Returns
    -------
    Spec
        Address, count and datatype, an owner that keeps the memory alive, and the ordinal of the GPU where the object
        tells it.

    Raises
    ------
    ArgumentError
        Memory that is too small, read-only, masked or not contiguous, or a malformed spec.
    DatatypeError
        Element types and kinds of objects that are not supported, memory of the host among them.
    StateError
        A `DeviceBuffer` that was freed, or a view of one.
    """
    where = f"{verb}: {name}"
    buf, count, displ, datatype = unpack(where, spec, writable)
    where = where if buf is spec else f"{where}[0]"
    memory = NOWHERE if is_nowhere(buf, count, datatype) else _memory(where, buf, stream, writable)
    if writable and memory.readonly:
        raise read_only(where, buf)
    if not memory.order:
        raise gaps(where, buf, writable, "a contiguous copy")
    return memory.select(verb, name, count, displ, datatype)


def _memory(where: str, buf: Any, stream: int, writable: bool) -> Memory:
    """Find the memory of any object."""
    if isinstance(buf, DeviceBuffer):
        return _from_buffer(where, buf)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(buf, torch.Tensor):
        return _from_tensor(where, buf, torch.strided, writable)
    refuse_sentinels(where, buf)
    interface = interface_of(buf)
    exports = hasattr(buf, "__dlpack__") and hasattr(buf, "__dlpack_device__")
    # Before version 3, JAX's among them, the interface says nothing of what is not computed yet; DLPack sees to that.
    # And it has no names for bfloat16 and its kin, of which CuPy's shows bytes without a meaning.
    if interface is not None and not (exports and (interface.get("version", 0) < TELLS_STREAM or _nameless(interface))):
        return _from_interface(where, buf, interface)
    if exports:
        return _from_dlpack(where, buf, stream, writable)
    raise _on_host(where, buf, writable) if _is_of_host(buf) else _no_memory(where, buf)


def _from_buffer(where: str, buf: DeviceBuffer) -> Memory:
    if buf.freed:
        raise StateError(
            f"{where} is a DeviceBuffer that was freed, or a view of one, expected living memory; allocate another "
            "with comm.empty"
        )
    return Memory(buf.address, buf.nbytes, buf.datatype, False, buf, "C" if len(buf.shape) > 1 else "A", buf.device)


def _from_tensor(where: str, tensor: Any, strided: object, writable: bool) -> Memory:
    """Find the memory of a torch tensor: faster than through its exports, and CUDA's has no bfloat16."""
    refuse_uncomputed(where, tensor, strided, writable)
    if tensor.device.type == "cpu":
        raise _on_host(where, tensor, writable)
    if tensor.device.type != "cuda":
        raise _elsewhere(where, str(tensor.device), writable)
    strides = None if tensor.is_contiguous() else tensor.stride()
    order = _order(tensor.shape, strides, 1)
    nbytes = tensor.numel() * tensor.element_size()
    return Memory(tensor.data_ptr(), nbytes, tensor.dtype, False, tensor, order, tensor.device.index)


def _from_interface(where: str, buf: Any, interface: dict[str, Any]) -> Memory:
    """Read ``__cuda_array_interface__``, version 0 to 3."""
    if interface.get("mask") is not None:
        raise ArgumentError(f"{where} has a mask, expected an array without; pass its values with the masked ones set")
    try:
        shape, typestr = tuple(map(operator.index, interface["shape"])), str(interface["typestr"])
        address, readonly = operator.index(interface["data"][0] or 0), bool(interface["data"][1])
        strides = interface.get("strides")
        strides = strides if strides is None else tuple(map(operator.index, strides))
        if (strides is not None and len(strides) != len(shape)) or (not address and 0 not in shape):
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError):
        raise DatatypeError(
            f"{where} has a __cuda_array_interface__ that cannot be read, expected shape, typestr, data (address, "
            f"read-only) and perhaps strides, got {interface!r}; pass an array with DLPack"
        ) from None
    try:
        dtype = np.dtype(typestr)
    except TypeError:
        raise DatatypeError(
            f"{where} has elements of type {typestr!r}, expected a type of NumPy's own; pass an array with DLPack"
        ) from None
    order = _order(shape, strides, dtype.itemsize)
    readonly = readonly or _is_constant(buf)
    return Memory(address, math.prod(shape) * dtype.itemsize, dtype, readonly, buf, order)


def _from_dlpack(where: str, buf: Any, stream: int, writable: bool) -> Memory:
    """Take the tensor of an exporter of DLPack, which is the owner from here on."""
    kind = buf.__dlpack_device__()[0]
    if kind not in GPU_DEVICES:
        if kind == 1:
            raise _on_host(where, buf, writable)
        raise _elsewhere(where, f"DLPack's device {int(kind)}", writable)
    options = {} if kind == CUDA_HOST else {"stream": stream or LEGACY_BY_NAME}
    try:
        try:
            tensor = DLPackTensor(buf.__dlpack__(max_version=DLPACK_VERSION, **options))
        except TypeError:  # an exporter from before version 1
            tensor = DLPackTensor(buf.__dlpack__(**options))
    except (BufferError, RuntimeError, TypeError, ValueError) as exc:
        raise DatatypeError(
            f"{where} cannot be read through DLPack ({exc}), expected memory of a GPU without a gradient; pass "
            f".detach() of it, or a copy in an array of comm.empty(){BACK if writable else ''}"
        ) from exc
    code, bits, lanes = tensor.dtype
    if bits % 8 or lanes != 1:
        raise DatatypeError(
            f"{where} has {lanes} numbers of {bits} bits in an element, expected one of whole bytes; convert it"
        )
    shape, strides, itemsize = tensor.shape, tensor.strides, bits // 8
    order = _order(shape, strides, 1)
    dtype = datatype_of(tensor.dtype) or f"DLPack's type {code} of {bits} bits"
    device = tensor.device[1] if tensor.device[0] == CUDA else None
    readonly = tensor.readonly or _is_constant(buf)
    return Memory(tensor.address, math.prod(shape) * itemsize, dtype, readonly, tensor, order, device)


def _is_constant(buf: Any) -> bool:
    """Tell whether nobody may write there, whatever it says: JAX takes for granted that nobody does."""
    return type(buf).__module__.partition(".")[0] in {"jax", "jaxlib"}


def _nameless(interface: dict[str, Any]) -> bool:
    """Tell whether an interface shows bytes of which it does not say what they mean."""
    try:
        return np.dtype(str(interface.get("typestr"))).kind == "V"
    except TypeError:
        return True


def _order(shape: tuple[int, ...], strides: Sequence[int] | None, element: int) -> str:
    """Return the order of memory, as in `Memory`; strides are in units of which elements take some.

    Without strides it is C order.
    """
    if strides is None:
        return "C" if len(shape) > 1 else "A"
    axes = tuple(zip(shape, strides, strict=True))
    return order_of(_dense(axes[::-1], element), _dense(axes, element))


def _dense(axes: tuple[tuple[int, int], ...], reach: int) -> bool:
    """Tell whether elements lie one after the other, the first axis first; strides of single elements say nothing."""
    if any(length == 0 for length, _ in axes):
        return True
    for length, stride in axes:
        if length != 1 and stride != reach:
            return False
        reach *= length
    return True


def _is_of_host(buf: Any) -> bool:
    """Tell whether an object has memory of the host."""
    if hasattr(buf, "__array_interface__"):
        return True
    try:
        memoryview(buf)
    except TypeError:
        return False
    except (ValueError, BufferError):  # types without a format
        return True
    return True


def _on_host(where: str, buf: Any, writable: bool) -> DatatypeError:
    module, kind = type(buf).__module__.partition(".")[0], type(buf).__name__
    return DatatypeError(
        f"{where} is in memory of the host ({module}.{kind}), expected memory of a GPU, for the communicator is on "
        "GPUs; copy it there (torch: .cuda(), CuPy: cupy.asarray()), or to an array of comm.empty() with .copy_from()"
        f"{BACK if writable else ''}"
    )


def _elsewhere(where: str, device: str, writable: bool) -> DatatypeError:
    return DatatypeError(
        f"{where} is in memory of {device}, expected memory of a GPU of CUDA; copy it there{BACK if writable else ''}"
    )


def _no_memory(where: str, buf: Any) -> DatatypeError:
    return DatatypeError(
        f"{where} is of type {type(buf).__name__}, expected memory of a GPU (comm.empty(), torch, "
        "__cuda_array_interface__ or DLPack); pass an array"
    )
