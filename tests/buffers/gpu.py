"""A GPU whose memory is the host's, and objects that say they are on it: for tests of all that runs on no GPU."""

import ctypes
from dataclasses import dataclass, field

import numpy as np

from nvcoll._plan import dlpack_capsule
from nvcoll.buffers import DeviceBuffer
from nvcoll.buffers.dlpack import DLPACK_TYPES
from tests.buffers.memory import FakeAllocation


@dataclass
class FakeGpu:
    """Stands for a driver's Device, and knows whether it is current."""

    ordinal: int = 3
    current: bool = False

    def __enter__(self):
        self.current = True
        return self

    def __exit__(self, *exc):
        self.current = False


@dataclass
class FakeDriver:
    """Stands for the module of the driver, and writes down what it did in which stream."""

    gpu: FakeGpu
    calls: list = field(default_factory=list)

    def copy(self, to, source, nbytes, stream=0):
        assert self.gpu.current
        self.calls.append(("copy", nbytes, stream))
        ctypes.memmove(to, source, nbytes)

    def memset(self, address, byte, nbytes, stream=0):
        assert self.gpu.current
        self.calls.append(("memset", nbytes, stream))
        ctypes.memset(address, byte, nbytes)


def empty_on_gpu(shape, dtype, spare=0):
    """A DeviceBuffer on a fake allocation, and its driver."""
    gpu = FakeGpu()
    driver = FakeDriver(gpu)
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize + spare
    return DeviceBuffer.on(FakeAllocation(nbytes), shape, dtype, gpu, driver), driver


def on_gpu(values):
    """Copy an array to a DeviceBuffer."""
    buffer, _ = empty_on_gpu(values.shape, values.dtype)
    buffer.copy_from(values)
    return buffer


class CudaInterface:
    """Shows an array through ``__cuda_array_interface__`` alone."""

    def __init__(self, values, **changes):
        self.values = values
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (values.ctypes.data, not values.flags.writeable),
            "strides": None if values.flags.c_contiguous else values.strides,
            "version": 3,
            **changes,
        }


class CudaCapsule:
    """Shows an array in C order through DLPack alone, and keeps the options it was asked with."""

    def __init__(self, values, device=(2, 3), numbers=None):
        self.values, self.device = values, device
        self.numbers = numbers or DLPACK_TYPES[values.dtype.name]

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, max_version=None, **options):
        self.options = options
        values = self.values
        versioned = max_version is not None
        return dlpack_capsule(values.ctypes.data, values.shape, self.numbers, self.device, values, versioned)


class OldCudaCapsule(CudaCapsule):
    """An exporter from before DLPack 1.0."""

    def __dlpack__(self, *, stream=None):
        return super().__dlpack__(stream=stream)
