"""A `cuda.bindings.driver` without a GPU: contexts by thread, memory of the host, and errors on demand.

What was given back is not given out again: to use it raises AssertionError here, and a signal elsewhere.
"""

import ctypes
import enum
import mmap
import sys
import threading
import types
from enum import IntEnum
from itertools import count

import pytest

Result = IntEnum(
    "Result",
    {
        "CUDA_SUCCESS": 0,
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_NO_DEVICE": 100,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_NOT_FOUND": 500,
        "CUDA_ERROR_NOT_READY": 600,
        "CUDA_ERROR_STRANGE": 99999,
    },
)
Mode = IntEnum("Mode", {"CU_STREAM_CAPTURE_MODE_GLOBAL": 0, "CU_STREAM_CAPTURE_MODE_RELAXED": 2})
MEMORY = 64 << 20
FUNCTION, MODULE, STREAM, EVENT, CONTEXT = 0x8888, 0x7777, 0xABCD0000, 0x99990000, 0xC000
"""Handles; of streams and events those of the first."""
HIDE = ctypes.CDLL(None, use_errno=True).mprotect
HIDE.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class DynamicLibNotFoundError(RuntimeError):
    """As cuda-python's."""


class FunctionNotFoundError(RuntimeError):
    """As cuda-python's."""


class Uuid:
    def __init__(self, device):
        self.bytes = bytes([device]) * 16


class FakeDriver(types.ModuleType):
    """What nvcoll calls of the driver, for `gpus` GPUs.

    Attributes
    ----------
    calls
        Names of the functions called.
    fail
        Function -> what it returns or raises instead.
    fail_once
        Function, and which of its calls from now on, from 1, fails; and how.
    taken
        Address -> memory allocated and not freed.
    contexts
        Retained primary contexts, one entry a retain.
    events, streams
        Those created and not destroyed.
    wrong
        What was done to what is no more.
    recorded
        Events recorded, with their streams.
    looks
        Looks at an event before it is done.
    capturing
        Streams that are being captured.
    pointers
        Address -> what attributes of it are, by number.
    attributes
        Kernel and attribute -> what it was set to.
    """

    CUresult = Result
    CUstreamCaptureMode = Mode
    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9)
    CUpointer_attribute = types.SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE=2, CU_POINTER_ATTRIBUTE_IS_MANAGED=8, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9
    )
    CUevent_flags = types.SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstream_flags = types.SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureStatus = enum.Enum(
        "CUstreamCaptureStatus", {"CU_STREAM_CAPTURE_STATUS_NONE": 0, "CU_STREAM_CAPTURE_STATUS_ACTIVE": 1}
    )
    CUdevice_attribute = types.SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=9,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=0,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=132,
        CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR=2048,
    )

    def __init__(self, gpus=2, version=13000):
        super().__init__("cuda.bindings.driver")
        self.gpus, self.version = gpus, version
        self.calls, self.fail, self.fail_once, self.wrong = [], {}, ["", 0, Result.CUDA_ERROR_STRANGE], []
        self.taken, self.contexts, self.events, self.streams = {}, [], set(), set()
        self._gone, self._freed, self._handles = set(), {}, count()
        self.recorded, self.looks, self.capturing, self.pointers, self.attributes = [], 0, set(), {}, {}
        self.mode = Mode.CU_STREAM_CAPTURE_MODE_GLOBAL
        self._threads = threading.local()

    @property
    def stack(self):
        """Contexts pushed by this thread."""
        return self._threads.__dict__.setdefault("stack", [])

    def __getattribute__(self, name):
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return super().__getattribute__(name)
        fail = self.fail.get(name)
        if isinstance(fail, Exception):
            raise fail
        function = super().__getattribute__(name)

        def call(*args):
            self.calls.append(name)
            if self.fail_once[0] == name:
                self.fail_once[1] -= 1
                if not self.fail_once[1]:
                    return (self.fail_once[2], *([None] * 2))
            if fail is not None:
                return (fail, *([None] * 2))
            answer = function(*args)
            return answer if isinstance(answer, tuple) else (answer,)

        return call

    def cuGetErrorName(self, result):
        return Result(0), None if result == Result.CUDA_ERROR_STRANGE else Result(result).name.encode()

    def cuGetErrorString(self, result):
        return Result(0), None if result == Result.CUDA_ERROR_STRANGE else b"words on it"

    def cuInit(self, flags):
        return Result(0)

    def cuDriverGetVersion(self):
        return Result(0), self.version

    def cuDeviceGetCount(self):
        return Result(0), self.gpus

    def cuDeviceGet(self, ordinal):
        return Result(0), ordinal

    def cuDeviceGetName(self, length, device):
        return Result(0), f"Fake {device}".encode().ljust(length, b"\0")

    def cuDeviceTotalMem(self, device):
        return Result(0), MEMORY

    def cuDeviceGetUuid(self, device):
        return Result(0), Uuid(device)

    def cuDeviceGetAttribute(self, attribute, device):
        return Result(0), attribute

    def cuDevicePrimaryCtxRetain(self, device):
        self.contexts.append(device)
        return Result(0), f"context of {device}"

    def cuDevicePrimaryCtxRelease(self, device):
        self.contexts.remove(device)
        return Result(0)

    def cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return Result(0)

    def cuCtxPopCurrent(self):
        return Result(0), self.stack.pop()

    def cuCtxGetCurrent(self):
        return Result(0), CONTEXT if self.stack else 0

    def cuCtxSynchronize(self):
        return Result(0) if self.stack else Result.CUDA_ERROR_INVALID_CONTEXT

    def _demand(self, fact, what):
        """Take notes, too: what raises in a finalizer, or on some threads, is not heard of."""
        if not fact:
            self.wrong.append(what)
            raise AssertionError(what)

    def _alive(self, *handles):
        for handle in handles:
            self._demand(handle not in self._gone, f"{handle:#x} was destroyed")

    def _make(self, kind, first):
        kind.add(handle := first + next(self._handles))
        return Result(0), handle

    def _destroy(self, kind, handle):
        self._demand(handle in kind, f"{handle:#x} is destroyed twice, in which the driver crashes")
        kind.remove(handle)
        self._gone.add(handle)
        return Result(0)

    def cuEventCreate(self, flags):
        return self._make(self.events, EVENT) if flags == 2 else (Result.CUDA_ERROR_INVALID_VALUE, None)

    def cuEventDestroy(self, event):
        return self._destroy(self.events, event)

    def cuEventRecord(self, event, stream):
        self._alive(event, stream)
        self.recorded.append((event, stream))
        return Result(0) if self.stack else Result.CUDA_ERROR_INVALID_CONTEXT

    def cuThreadExchangeStreamCaptureMode(self, mode):
        self.mode, before = mode, self.mode
        return Result(0), before

    def cuEventQuery(self, event):
        self._alive(event)
        assert self.mode == Mode.CU_STREAM_CAPTURE_MODE_RELAXED, "a graph that another thread captures is spoiled"
        self.looks -= 1
        return Result.CUDA_ERROR_NOT_READY if self.looks >= 0 else Result(0)

    def _take(self, nbytes):
        if not self.stack:
            return Result.CUDA_ERROR_INVALID_CONTEXT, None
        if nbytes > MEMORY:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.taken[address] = memory
        return Result(0), address

    def _give(self, address):
        self._demand(address in self.taken, f"{address:#x} is freed, and is not the beginning of anything that lives")
        self._freed[address] = memory = self.taken.pop(address)
        memory.madvise(mmap.MADV_DONTNEED)
        HIDE(address, len(memory), 0)
        return Result(0)

    def _touch(self, address, nbytes):
        """Refuse bytes that lie in what was freed, or partly in what was not."""
        end = address + nbytes
        for start, memory in list(self._freed.items()):
            self._demand(end <= start or start + len(memory) <= address, f"{nbytes} bytes at {address:#x} were freed")
        for start, memory in list(self.taken.items()):
            apart = end <= start or start + len(memory) <= address
            inside = start <= address and end <= start + len(memory)
            self._demand(apart or inside, f"{nbytes} bytes at {address:#x} leave {len(memory)} at {start:#x}")

    def cuMemAlloc(self, nbytes):
        nbytes.to_bytes(8)  # as cuda-python, which takes nothing larger
        return self._take(nbytes)

    def cuMemFree(self, address):
        return self._give(address)

    def cuMemHostAlloc(self, nbytes, flags):
        return self._take(nbytes) if flags == 3 else (Result.CUDA_ERROR_INVALID_VALUE, None)

    def cuMemHostGetDevicePointer(self, host, flags):
        return Result(0), host + (1 << 40)

    def cuMemFreeHost(self, host):
        return self._give(host)

    def cuMemGetInfo(self):
        return Result(0), MEMORY - sum(map(len, self.taken.values())), MEMORY

    def cuPointerGetAttribute(self, attribute, address):
        told = self.pointers.get(address)
        if told is None:
            return Result.CUDA_ERROR_INVALID_VALUE, None
        return Result(0), 0 if attribute == 9 else told[attribute]  # as in versions of cuda-python

    def cuMemsetD8Async(self, address, byte, nbytes, stream):
        self._alive(stream)
        self._touch(address, nbytes)
        ctypes.memset(address, byte, nbytes)
        return Result(0)

    def cuMemcpyAsync(self, to, source, nbytes, stream):
        self._alive(stream)
        self._touch(to, nbytes)
        self._touch(source, nbytes)
        ctypes.memmove(to, source, nbytes)
        return Result(0)

    def cuStreamCreate(self, flags):
        return self._make(self.streams, STREAM) if flags == 1 else (Result.CUDA_ERROR_INVALID_VALUE, None)

    def cuStreamDestroy(self, stream):
        return self._destroy(self.streams, stream)

    def cuStreamSynchronize(self, stream):
        self._alive(stream)
        return Result(0) if stream in {0, STREAM} | self.streams else Result.CUDA_ERROR_INVALID_VALUE

    def cuStreamIsCapturing(self, stream):
        return Result(0), self.CUstreamCaptureStatus(stream in self.capturing)

    def cuModuleLoadData(self, image):
        return Result(0), MODULE

    def cuModuleGetFunction(self, module, name):
        return (Result(0), FUNCTION) if name == b"kernel" else (Result.CUDA_ERROR_NOT_FOUND, None)

    def cuFuncLoad(self, function):
        return Result(0)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.attributes[function, attribute] = value
        return Result(0)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared):
        return Result(0), 2048 // threads


class FakeLibrary:
    """What nvcoll calls of the driver's library itself; `driver` has the facts."""

    def __init__(self, driver):
        self.driver = driver

    def cuPointerGetAttribute(self, target, attribute, address):
        told = self.driver.pointers.get(address.value, {}).get(attribute)
        if told is None:
            return int(Result.CUDA_ERROR_INVALID_VALUE)
        target._obj.value = told
        return 0


def install(monkeypatch: pytest.MonkeyPatch, driver: types.ModuleType | None) -> None:
    """Let `from cuda.bindings import driver` find this one; None: no cuda-python."""
    monkeypatch.setattr("nvcoll.backends.driver.library", lambda: FakeLibrary(driver))
    bindings = types.ModuleType("cuda.bindings")
    if driver is not None:
        bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda.bindings", None if driver is None else bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    if driver is not None:
        monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
