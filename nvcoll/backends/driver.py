"""The CUDA driver, on the cold path: contexts, memory, streams and modules. Addresses and handles are integers.

The functions work in the context that is current on the calling thread: call them inside ``with Device(ordinal):``.
Contexts are the primary ones, which torch, CuPy and Numba use too. Nothing here is kept per thread by this module, so
ranks may be threads. Without cuda-python this module imports; what needs it raises DeviceError.
"""

import ctypes
import sys
import threading
import uuid as uuid_
from functools import cache
from typing import Any, Self

from nvcoll.backends.looking import look_until
from nvcoll.errors import AllocationError, ArgumentError, DeviceError, Error

OLDEST = (13, 0)
"""Oldest CUDA version that the driver must support: that of the packages of the extra ``cuda``."""

OF_GPU = 2  # CU_MEMORYTYPE_DEVICE

CURES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free memory of the GPU or lower NVCOLL_HEAP",
    "CUDA_ERROR_NOT_INITIALIZED": "a forked child cannot use the GPU of its parent: use the 'spawn' start method",
    "CUDA_ERROR_NO_DEVICE": "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has it for itself alone: `nvidia-smi -q -d COMPUTE` tells",
    "CUDA_ERROR_INVALID_CONTEXT": "call it inside `with Device(ordinal):`",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "compile the kernel for this GPU's architecture",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "load a cubin, or install a newer driver",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "load the kernel module of the installed driver, or restart the host",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start the services of the driver, such as nvidia-fabricmanager",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel went astray, and its context with it: start the process anew",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel went astray, and its context with it: start the process anew",
}
"""Name of an error -> what to do about it."""


def available() -> str | None:
    """Return why there is no usable GPU, or None if there is one. Creates no context."""
    try:
        _driver()
        library()  # cuda-python, where it finds none, looks for it in a process of its own
        version = driver_version()
        if version < OLDEST:
            return (
                f"the NVIDIA driver supports CUDA {_dotted(version)}, {_dotted(OLDEST)} is needed; install a newer one"
            )
        return None if count() else f"the NVIDIA driver shows no GPU; {CURES['CUDA_ERROR_NO_DEVICE']}"
    except OSError as exc:
        return f"libcuda.so.1 does not load ({exc}); install the NVIDIA driver"
    except Error as exc:
        return str(exc)


def driver_version() -> tuple[int, int]:
    """Return the newest CUDA version that the driver supports, such as ``(13, 0)``."""
    version = int(_call("cuDriverGetVersion"))
    return version // 1000, version % 1000 // 10


def count() -> int:
    """Return how many GPUs this process may use."""
    _call("cuInit", 0)
    return int(_call("cuDeviceGetCount"))


def uuid(ordinal: int) -> str:
    """Return a GPU's name among all GPUs, as ``nvidia-smi -L`` writes it. Creates no context."""
    _call("cuInit", 0)
    found = _call("cuDeviceGetUuid", _call("cuDeviceGet", ordinal))
    return f"GPU-{uuid_.UUID(bytes=bytes(found.bytes))}"


class Device:
    """A GPU, with its primary context. ``with device:`` makes it current on this thread, and restores what was.

    The context is taken by the first ``with``, to ask for a name makes none; it is given back by `close` only, since
    memory in it may outlive this object.

    Parameters
    ----------
    ordinal
        Which of the GPUs that this process may use.

    Attributes
    ----------
    ordinal : int
        As given.
    name : str
        The model.
    arch : str
        The architecture, such as ``"sm_90"``.
    nbytes : int
        All of its memory.
    multiprocessors : int
        How many it has.

    Raises
    ------
    DeviceError
        There is no such GPU.
    """

    def __init__(self, ordinal: int) -> None:
        gpus = count()
        if not 0 <= ordinal < gpus:
            raise DeviceError(
                f"Device: there is no GPU {ordinal}, this process may use {gpus}; {CURES['CUDA_ERROR_NO_DEVICE']}"
            )
        self.ordinal = ordinal
        self._device = _call("cuDeviceGet", ordinal)
        self.name = _call("cuDeviceGetName", 256, self._device).split(b"\0", 1)[0].decode(errors="replace")
        self.nbytes = int(_call("cuDeviceTotalMem", self._device))
        major, minor = (self.attribute(f"compute_capability_{part}") for part in ("major", "minor"))
        self.arch = f"sm_{major}{minor}"
        self.multiprocessors = self.attribute("multiprocessor_count")
        self._lock = threading.Lock()
        self._context: Any = None

    def attribute(self, name: str) -> int:
        """Return an attribute: a name of ``CUdevice_attribute`` without its prefix, in any case.

        Raises
        ------
        ArgumentError
            There is no such attribute.
        """
        full = f"CU_DEVICE_ATTRIBUTE_{name.upper()}"
        key = getattr(_driver().CUdevice_attribute, full, None)
        if key is None:
            raise ArgumentError(f"attribute: the CUDA driver knows no {full}; see CUdevice_attribute")
        return int(_call("cuDeviceGetAttribute", key, self._device))

    def close(self) -> None:
        """Release the primary context, which ends when nobody in this process uses it any more."""
        with self._lock:
            context, self._context = self._context, None
        if context is not None:
            _call("cuDevicePrimaryCtxRelease", self._device)

    @property
    def is_open(self) -> bool:
        """Whether the context was taken and not given back."""
        return self._context is not None

    def __enter__(self) -> Self:
        with self._lock:
            if self._context is None:
                self._context = _call("cuDevicePrimaryCtxRetain", self._device)
            context = self._context
        _call("cuCtxPushCurrent", context)
        return self

    def __exit__(self, *exc: object) -> None:
        _call("cuCtxPopCurrent")

    def __repr__(self) -> str:
        return f"<Device {self.ordinal}: {self.name}, {self.arch}>"


def allocate(nbytes: int) -> int:
    """Return the address of memory of the current GPU.

    Raises
    ------
    AllocationError
        The GPU has no such room.
    """
    return int(_call("cuMemAlloc", min(nbytes, sys.maxsize)))  # the call takes no more, and the driver refuses as much


def free(address: int) -> None:
    """Free what `allocate` gave. Waits for the work of the GPU on it."""
    _call("cuMemFree", address)


def gpu_of(address: int) -> int | None:
    """Return the ordinal of the GPU that has the memory at an address; None for memory that all GPUs may use."""
    attribute = _driver().CUpointer_attribute
    try:
        of_gpu = int(_call("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)) == OF_GPU
        if not of_gpu or _call("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED, address):
            return None
    except Error:  # memory that the driver does not know may be the host's, where GPUs can use that
        return None
    # By ctypes: some versions of cuda-python answer 0 for every GPU (github.com/NVIDIA/cuda-python/issues/2928).
    ordinal = ctypes.c_int()
    ask = library().cuPointerGetAttribute
    status = ask(ctypes.byref(ordinal), int(attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL), ctypes.c_uint64(address))
    return None if status or ordinal.value < 0 else ordinal.value


def memory_info() -> tuple[int, int]:
    """Return the free and all bytes of the current GPU's memory."""
    free_bytes, all_bytes = _call("cuMemGetInfo")
    return int(free_bytes), int(all_bytes)


def host_allocate(nbytes: int) -> tuple[int, int]:
    """Return the addresses, for the host and for the GPU, of pinned host memory that all GPUs can use."""
    driver = _driver()
    host = int(_call("cuMemHostAlloc", nbytes, driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP))
    try:
        return host, int(_call("cuMemHostGetDevicePointer", host, 0))
    except Error:
        host_free(host)
        raise


def host_free(host: int) -> None:
    """Free what `host_allocate` gave, by its address for the host."""
    _call("cuMemFreeHost", host)


def memset(address: int, byte: int, nbytes: int, stream: int = 0) -> None:
    """Fill memory of a GPU, in the order of a stream, and wait until it is done."""
    if nbytes:
        stream_wait(stream)
        _call("cuMemsetD8Async", address, byte, nbytes, stream)
        stream_synchronize(stream)


def copy(to: int, source: int, nbytes: int, stream: int = 0) -> None:
    """Copy between any two addresses of hosts and GPUs, in the order of a stream, and wait until it is done.

    What was queued before is waited for first: the driver holds a lock of the context while it waits inside a copy, and
    emulated ranks need that to launch what the queue may be waiting for.
    """
    if nbytes:
        stream_wait(stream)
        _call("cuMemcpyAsync", to, source, nbytes, stream)
        stream_synchronize(stream)


def stream_create() -> int:
    """Return a new stream, which does not wait for the default stream nor it for this one."""
    return int(_call("cuStreamCreate", int(_driver().CUstream_flags.CU_STREAM_NON_BLOCKING)))


def stream_destroy(stream: int) -> None:
    """Give a stream back; work in it goes on to its end."""
    _call("cuStreamDestroy", stream)


def stream_synchronize(stream: int) -> None:
    """Wait until all work in a stream is done; 0 is the default stream."""
    _call("cuStreamSynchronize", stream)


def stream_wait(stream: int) -> None:
    """Do the same so that Ctrl-C gets through, which the main thread alone hears: look again and again."""
    if threading.current_thread() is not threading.main_thread():
        stream_synchronize(stream)
        return
    event = event_create()
    try:
        event_record(event, stream)
        look_until(lambda: event_query(event))
    finally:
        event_destroy(event)


def stream_capturing(stream: int) -> bool:
    """Tell whether what is queued on a stream becomes part of a graph."""
    active = _driver().CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
    return bool(_call("cuStreamIsCapturing", stream) == active)


def synchronize() -> None:
    """Wait until all work of the current context is done."""
    _call("cuCtxSynchronize")


def event_create() -> int:
    """Return a new event, which puts streams in order and keeps no time."""
    return int(_call("cuEventCreate", int(_driver().CUevent_flags.CU_EVENT_DISABLE_TIMING)))


def event_destroy(event: int) -> None:
    """Give an event back."""
    _call("cuEventDestroy", event)


def event_record(event: int, stream: int) -> None:
    """Let an event stand for all that was queued on a stream until now."""
    _call("cuEventRecord", event, stream)


def event_query(event: int) -> bool:
    """Tell whether what an event stands for is done; no graph that a thread captures meanwhile is spoiled."""
    driver = _driver()
    mode = _call("cuThreadExchangeStreamCaptureMode", driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        result, *_ = driver.cuEventQuery(event)
    finally:  # Ctrl-C may come in between
        driver.cuThreadExchangeStreamCaptureMode(mode)
    if int(result) == int(driver.CUresult.CUDA_ERROR_NOT_READY):
        return False
    if int(result):
        raise _error(driver, "cuEventQuery", result)
    return True


def current_context() -> int:
    """Return the handle of the context that is current on this thread."""
    return int(_call("cuCtxGetCurrent"))


class Module:
    """Kernels in the current context.

    Parameters
    ----------
    image
        A cubin.
    """

    def __init__(self, image: bytes) -> None:
        self.handle = int(_call("cuModuleLoadData", image))

    def function(self, name: str) -> int:
        """Return the handle of a kernel, which is on the GPU by then.

        Loading one may wait for all that runs in the context: too late when a sibling already waits for its launch.
        """
        function = _call("cuModuleGetFunction", self.handle, name.encode())
        _call("cuFuncLoad", function)
        return int(function)


def share_multiprocessors(function: int) -> None:
    """Let kernels that need shared memory begin beside one that needs none.

    A multiprocessor divides its memory into cache and shared memory, and does so anew only when it is idle.
    """
    carveout = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    _call("cuFuncSetAttribute", function, carveout, 100)  # per cent of what can be shared memory


def load_module(image: bytes) -> Module:
    """Load a cubin into the current context."""
    return Module(image)


def occupancy(function: int, threads: int) -> int:
    """Return how many blocks of a kernel fit on a multiprocessor, given the threads of a block."""
    return int(_call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, threads, 0))


@cache
def library() -> ctypes.CDLL:
    """Return the driver's library itself."""
    return ctypes.CDLL("libcuda.so.1")


def _driver() -> Any:
    """Return cuda-python's binding of the driver."""
    try:
        from cuda.bindings import driver
    except ImportError as exc:
        raise DeviceError(f'cuda-python is not installed ({exc}); pip install "nvcoll[cuda]"') from exc
    return driver


def _call(name: str, *args: Any) -> Any:
    """Call a function of the driver; return the value or values that it gives, or raise an error that names it."""
    driver = _driver()
    try:
        result, *values = getattr(driver, name)(*args)
    except RuntimeError as exc:  # of cuda-python: no library, or one without this function
        if type(exc).__name__ == "FunctionNotFoundError":
            raise DeviceError(f"the NVIDIA driver is too old: it lacks {name}; install a newer one") from exc
        raise DeviceError(f"libcuda.so.1 does not load ({str(exc).rstrip('.')}); install the NVIDIA driver") from exc
    if int(result):
        raise _error(driver, name, result)
    return values[0] if len(values) == 1 else tuple(values)


def _error(driver: Any, name: str, result: Any) -> DeviceError | AllocationError:
    """Return the exception for what a call returned."""
    name_and_text = (function(result)[1] for function in (driver.cuGetErrorName, driver.cuGetErrorString))
    code, text = ((told or b"unknown to the driver").decode() for told in name_and_text)
    cure = CURES.get(code)
    kind = AllocationError if code == "CUDA_ERROR_OUT_OF_MEMORY" else DeviceError
    return kind(f"{name}: {code} ({int(result)}), {text}" + (f"; {cure}" if cure else ""))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
