"""Streams: from the stream objects of CUDA libraries to the handle that a launch takes."""

import contextlib
import operator
import sys
from typing import Any

import numpy as np

from nvcoll._plan import DeviceSpan
from nvcoll.errors import ArgumentError, StateError

LEGACY = 0
"""Handle of the legacy default stream, which waits for all streams but those that were made non-blocking."""
LEGACY_BY_NAME = 1
"""The same stream, as libraries name it to whom 0 could mean several."""
DEFAULT = (LEGACY, LEGACY_BY_NAME)
HANDLES = ("cuda_stream", "ptr", "handle")
"""Attributes in which torch, CuPy and Numba keep a stream's handle."""
EXPECTED = "an integer handle, or a stream of cuda.core, torch, CuPy or Numba"


def as_stream(stream: Any, owner: Any = None, verb: str = "as_stream") -> int:
    """Return the handle of a CUDA stream.

    Parameters
    ----------
    stream
        A handle as an integer (0 or 1: the legacy default stream, 2: the calling thread's), anything with the CUDA
        stream protocol (``__cuda_stream__``, as in cuda.core), or a stream of torch, CuPy or Numba. None is the
        current stream of the library that `owner` belongs to, where it has one, or the stream that
        ``__cuda_array_interface__`` of `owner` names, else the legacy default stream.
    owner
        The array that a call is about, or a spec of it: ``[array, count]``.
    verb
        The call, with which a message begins.

    Returns
    -------
    int
        A ``CUstream``.

    Raises
    ------
    ArgumentError
        For what is no stream, and for streams that were closed.
    """
    if stream is None:
        stream = current_stream(owner)
    if isinstance(stream, int | np.integer) and not isinstance(stream, bool):
        return _checked(int(stream), "an integer", verb)
    kind = f"a {type(stream).__module__}.{type(stream).__qualname__}"
    if isinstance(stream, bool | float | complex | str | bytes):
        raise ArgumentError(f"{verb}: stream is {stream!r}, expected {EXPECTED}; pass the stream object itself")
    try:
        handle = _handle(stream)
    except Exception as exc:
        raise ArgumentError(
            f"{verb}: stream is {kind} that gives no handle ({exc}), expected a stream that is open; make a new one"
        ) from exc
    if handle is None:
        raise ArgumentError(f"{verb}: stream is {kind}, expected {EXPECTED}; pass the handle as an integer")
    return _checked(handle, kind, verb)


def _checked(handle: int, kind: str, verb: str) -> int:
    if not 0 <= handle < 1 << 64:
        raise ArgumentError(
            f"{verb}: stream is {kind} of value {handle}, expected a handle, from 0 to 2**64 - 1; leave it out for the "
            "current stream"
        )
    return handle


def _handle(stream: Any) -> int | None:
    """Return what a stream object says its handle is; None if it is no stream."""
    if getattr(stream, "is_closed", False) is True:  # of cuda.core, where its handle would be that of the default
        raise ValueError("it was closed")
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol  # a property before it became a method
        if version != 0:
            raise ValueError(f"version {version} of the CUDA stream protocol is not known")
        return _number(handle)
    for name in HANDLES:
        if hasattr(type(stream), name) or name in getattr(stream, "__dict__", ()):
            return _number(getattr(stream, name))
    # The driver bindings' own type of handle has nothing but its value.
    return int(stream) if type(stream).__name__ in {"CUstream", "cudaStream_t"} else None


def _number(handle: Any) -> int:
    """Return a handle as a number: Numba has it in ctypes or in a type of the driver bindings."""
    if handle is None:
        raise ValueError("its handle is None")
    if hasattr(handle, "value"):
        return operator.index(handle.value or 0)
    return int(handle)


def current_stream(*arrays: Any, verb: str = "as_stream") -> Any:
    """Return the stream on which the libraries of some arrays work now, as an object where the library has one.

    Where none tells of a stream, it is the legacy default one.

    Raises
    ------
    ArgumentError
        They work on different streams.
    """
    told = [stream for one in arrays if (stream := _current(one)) is not None]
    if len(told) > 1:
        handles = [as_stream(stream, None, verb) or LEGACY_BY_NAME for stream in told]
        if len(set(handles)) > 1:
            raise ArgumentError(
                f"{verb}: the arrays are of libraries that work on different streams now "
                f"({', '.join(map(hex, handles))}), expected one; order them, and pass stream="
            )
    return told[0] if told else LEGACY


def working_stream(device: int) -> Any:
    """Return the stream on which torch, or else CuPy, works on a GPU now; the legacy default one if both do there."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and torch.cuda.is_initialized():
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream not in DEFAULT:
            return stream
    if cupy is not None:
        stream = cupy.cuda.get_current_stream()
        if stream.ptr not in DEFAULT and stream.device_id in (-1, device):  # of others' streams it does not know
            return stream
    return LEGACY


def _current(owner: Any) -> Any:
    """Return the stream on which the library of an array works now; None if it does not tell."""
    if isinstance(owner, list | tuple) and owner:
        owner = owner[0]
    if owner is None or isinstance(owner, DeviceSpan):
        return None
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(owner, torch.Tensor):
        return torch.cuda.current_stream(owner.device) if owner.is_cuda else None
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(owner, cupy.ndarray):
        return cupy.cuda.get_current_stream()
    interface = interface_of(owner)
    return interface.get("stream") if interface is not None else None


def interface_of(owner: Any) -> dict[str, Any] | None:
    """Return ``__cuda_array_interface__`` of an object; None where it has none, or not for its elements."""
    try:
        found = getattr(owner, "__cuda_array_interface__", None)
    except RuntimeError:  # from JAX, of bfloat16
        return None
    return found if isinstance(found, dict) else None


def keep_for(stream: int, *arrays: Any) -> None:
    """Keep the memory of tensors of torch from other tensors until what is queued on a stream by now is done.

    Torch gives the memory of a tensor to which nobody refers any more to the next one at once, for it knows only of
    what is queued on the stream where the tensor was made.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for tensor in {id(one): one for one in arrays}.values():  # in place, both are the same
        if isinstance(tensor, torch.Tensor):
            if stream in DEFAULT:
                its = torch.cuda.default_stream(tensor.device)
            else:
                its = torch.cuda.ExternalStream(stream, device=tensor.device)  # of 0 it makes a stream of its own
            with contextlib.suppress(RuntimeError):  # memory that is not torch's lives as long as whose it is
                tensor.record_stream(its)


def captured_stream() -> Any:
    """Return the stream of a library which captures what this thread queues there into a graph, or None."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    try:  # not contextlib, which takes longer than all else here
        if torch is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return torch.cuda.current_stream()
        if cupy is not None:
            current = cupy.cuda.get_current_stream()
            # The default stream cannot be captured, and to ask would make a context on the current GPU.
            if current.ptr not in DEFAULT and current.is_capturing():
                return current
    except RuntimeError:  # of CUDA: the launch meets it too, and says what is wrong
        return None
    return None


def refuse_capture(verb: str) -> None:
    """Raise StateError where a library's current stream is captured: what waits for the GPU would spoil the graph."""
    captured = captured_stream()
    if captured is not None:
        raise StateError(
            f"{verb}: {_library(captured)} captures a graph, expected none, for this waits for the GPU; call it before "
            "or after"
        )


def refuse_to_miss_a_graph(verb: str, queue: int) -> None:
    """Raise StateError where a library captures a graph, and a call that names no stream would not become part of it.

    It would be made once, now, and every replay would lack it.
    """
    captured = captured_stream()
    if captured is not None and as_stream(captured) != queue:
        raise StateError(
            f"{verb}: a graph is being captured on the current stream of {_library(captured)}, and this call would go "
            "to another one; name the stream with stream="
        )


def _library(stream: Any) -> str:
    return type(stream).__module__.partition(".")[0]
