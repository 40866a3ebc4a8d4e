"""Streams: every library's object gives its handle, and what is no stream is refused with the cure."""

import ctypes
import sys
import types

import numpy as np
import pytest

from nvcoll.buffers import as_stream, captured_stream, working_stream
from nvcoll.errors import ArgumentError
from tests.buffers.gpu import CudaInterface, empty_on_gpu

HANDLE = 0x7F00_1234_5678


def thing(**attributes):
    """A class of its own with these attributes, and one of it."""
    return type("Stream", (), attributes)()


class CUstream:
    """As in the driver bindings: a value, and no other name for it."""

    def __init__(self, value):
        self.value_of_its_own = value

    def __int__(self):
        return self.value_of_its_own


class CupyStream:
    """Keeps its handle in the instance."""

    def __init__(self):
        self.ptr = HANDLE


STREAMS = {
    "integer": (HANDLE, HANDLE),
    "integer of NumPy": (np.uint64(HANDLE), HANDLE),
    "legacy default": (0, 0),
    "legacy default, by name": (1, 1),
    "the thread's default": (2, 2),
    "protocol": (thing(__cuda_stream__=lambda self: (0, HANDLE)), HANDLE),
    "protocol, as it was": (thing(__cuda_stream__=(0, HANDLE)), HANDLE),
    "protocol, default": (thing(__cuda_stream__=lambda self: (0, 0)), 0),
    "protocol with a handle of the bindings": (thing(__cuda_stream__=lambda self: (0, CUstream(HANDLE))), HANDLE),
    "protocol before others": (thing(__cuda_stream__=lambda self: (0, HANDLE), handle=3), HANDLE),
    "torch": (thing(cuda_stream=property(lambda self: HANDLE)), HANDLE),
    "cupy": (CupyStream(), HANDLE),
    "cupy, default": (thing(ptr=0), 0),
    "numba, ctypes": (thing(handle=ctypes.c_void_p(HANDLE)), HANDLE),
    "numba, default": (thing(handle=ctypes.c_void_p(0)), 0),
    "numba, bindings": (thing(handle=CUstream(HANDLE)), HANDLE),
    "bindings": (CUstream(HANDLE), HANDLE),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams(case):
    stream, handle = STREAMS[case]
    found = as_stream(stream, None)
    assert (found, type(found)) == (handle, int)
    assert as_stream(stream, empty_on_gpu(3, "f4")[0]) == handle


def raising(self):
    raise RuntimeError("stream was closed")


REFUSALS = {
    "string": ("high", r"is 'high', expected an integer handle, .+; pass the stream object itself"),
    "bool": (True, "is True, expected"),
    "float": (1.0, "is 1.0, expected"),
    "negative": (-1, "is an integer of value -1, expected a handle, from 0 to .+; leave it out"),
    "more than a word": (1 << 64, r"of value 18446744073709551616, expected a handle, from 0 to 2\*\*64 - 1;"),
    "negative in a stream": (thing(ptr=-5), r"is a \S+Stream of value -5, expected"),
    "object": (object(), r"is a builtins\.object, expected an integer handle, .+; pass the handle as an integer"),
    "list": ([], r"is a builtins\.list, expected"),
    "array": (np.zeros(3), r"is a numpy\.ndarray, expected"),
    "closed": (
        thing(__cuda_stream__=raising),
        r"Stream that gives no handle \(stream was closed\), .+; make a new one",
    ),
    "closed torch": (thing(cuda_stream=property(raising)), "gives no handle"),
    "closed cuda.core": (thing(__cuda_stream__=lambda self: (0, None)), r"gives no handle \(its handle is None\)"),
    "closed cuda.core, by its word": (
        thing(__cuda_stream__=lambda self: (0, 0), is_closed=True),
        r"gives no handle \(it was closed\)",
    ),
    "closed numba": (thing(handle=None), "gives no handle"),
    "unknown version": (thing(__cuda_stream__=lambda self: (7, 1)), r"\(version 7 of the CUDA stream protocol is not"),
    "malformed protocol": (thing(__cuda_stream__=lambda self: 7), "gives no handle"),
    "handle that is none": (thing(handle="seven"), "gives no handle"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    stream, message = REFUSALS[case]
    with pytest.raises(ArgumentError, match=r"^Allreduce: stream is .*, expected .+; .+") as caught:
        as_stream(stream, None, "Allreduce")
    assert caught.match(message)


def test_no_stream_is_the_legacy_default_where_no_library_has_a_current_one():
    assert as_stream(None, None) == 0
    assert as_stream(None, empty_on_gpu(3, "f4")[0]) == 0
    assert as_stream(None, np.zeros(3)) == 0
    assert as_stream(None) == as_stream(None, []) == 0


@pytest.mark.parametrize(("stream", "handle"), [(None, 0), (1, 1), (HANDLE, HANDLE)])
def test_no_stream_is_that_of_the_array_where_it_names_one(stream, handle):
    assert as_stream(None, CudaInterface(np.zeros(3), stream=stream)) == handle
    assert as_stream(None, CudaInterface(np.zeros(3))) == 0


def library(name, kind, **members):
    """A module that has a class of arrays."""
    module = types.ModuleType(name)
    module.cuda = types.SimpleNamespace(**members)
    setattr(module, kind, type(kind, (), {"device": 5, "is_cuda": True}))
    return module


def test_no_stream_is_torch_s_current_one_for_its_tensors(monkeypatch):
    asked = []

    def current(device):
        asked.append(device)
        return types.SimpleNamespace(cuda_stream=HANDLE)

    torch = library("torch", "Tensor", current_stream=current)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for owner in (torch.Tensor(), [torch.Tensor(), 3], (torch.Tensor(), 3, "f4")):
        assert as_stream(None, owner) == HANDLE
    assert asked == [5] * 3
    assert as_stream(3, torch.Tensor()) == 3
    torch.Tensor.is_cuda = False  # what is on a host is refused for that, later
    assert as_stream(None, torch.Tensor()) == 0
    assert as_stream(None, np.zeros(3)) == 0


def test_no_stream_is_cupy_s_current_one_for_its_arrays(monkeypatch):
    cupy = library("cupy", "ndarray", get_current_stream=CupyStream)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert as_stream(None, cupy.ndarray()) == HANDLE
    assert as_stream(None, np.zeros(3)) == 0


def test_where_libraries_work(monkeypatch):
    assert working_stream(3) == 0
    streams = types.SimpleNamespace(torch=77, cupy=88, device=3, started=True)

    def current_of_torch(device):
        assert device == 3
        return types.SimpleNamespace(cuda_stream=streams.torch)

    def current_of_cupy():
        return types.SimpleNamespace(ptr=streams.cupy, device_id=streams.device)

    torch = library("torch", "Tensor", current_stream=current_of_torch, is_initialized=lambda: streams.started)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert working_stream(3).cuda_stream == 77
    monkeypatch.setitem(sys.modules, "cupy", library("cupy", "ndarray", get_current_stream=current_of_cupy))
    assert working_stream(3).cuda_stream == 77
    streams.torch = 0
    assert working_stream(3).ptr == 88
    streams.device = 4  # of another GPU
    assert working_stream(3) == 0
    streams.device = -1  # made by somebody else
    assert working_stream(3).ptr == 88
    streams.torch, streams.started = 77, False  # to ask would start CUDA
    assert working_stream(3).ptr == 88
    streams.cupy = 1
    assert working_stream(3) == 0


def test_a_stream_that_is_captured(monkeypatch):
    assert captured_stream() is None
    stream = types.SimpleNamespace(is_capturing=lambda: capturing, ptr=HANDLE)
    state = types.SimpleNamespace(started=False, capturing=True)
    torch = library(
        "torch",
        "Tensor",
        current_stream=lambda: stream,
        is_initialized=lambda: state.started,
        is_current_stream_capturing=lambda: state.started and state.capturing,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert captured_stream() is None  # to ask would start CUDA
    state.started = True
    assert captured_stream() is stream
    state.capturing = capturing = False
    monkeypatch.setitem(sys.modules, "cupy", library("cupy", "ndarray", get_current_stream=lambda: stream))
    assert captured_stream() is None
    capturing = True
    assert captured_stream() is stream
    stream.is_capturing = raising_cuda_error
    assert captured_stream() is None  # the launch will meet it
    for stream.ptr in (0, 1):
        stream.is_capturing = pytest.fail  # of the default stream: would make a context on any GPU
        assert captured_stream() is None


def raising_cuda_error():
    raise RuntimeError("cudaErrorStreamCaptureImplicit")


@pytest.mark.gpu
def test_streams_of_libraries_on_a_gpu():
    torch = pytest.importorskip("torch")
    tensor, stream = torch.zeros(3, device="cuda"), torch.cuda.Stream()
    assert as_stream(stream, tensor) == stream.cuda_stream > 2
    with torch.cuda.stream(stream):
        assert as_stream(None, tensor) == stream.cuda_stream
    assert as_stream(None, tensor) == torch.cuda.current_stream().cuda_stream
