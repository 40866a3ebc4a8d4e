"""Every kind of object that holds an array, for tests that are written once and run over all of them."""

import array
import importlib.util
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nvcoll.buffers import Buffer
from nvcoll.ops import DATATYPES


class FakeAllocation:
    """Stands for symmetric memory and writes down what is asked of it."""

    def __init__(self, nbytes, verb="empty", offset=64):
        self.memory = np.zeros(nbytes, np.uint8)
        self.address, self.nbytes, self.offset = self.memory.ctypes.data, nbytes, offset
        self.verb, self.calls = verb, []

    def free(self):
        self.calls.append("free")

    def drop(self):
        self.calls.append("drop")


class Interface:
    """Shows an array through ``__array_interface__`` alone."""

    def __init__(self, values):
        self.__array_interface__ = values.__array_interface__
        self.values = values


class Capsule:
    """Shows an array through DLPack alone, as current exporters do."""

    def __init__(self, values):
        self.values = values

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)


def on_heap(values):
    """Copy an array to a Buffer over a fake allocation."""
    buffer = Buffer.on(FakeAllocation(values.nbytes), values.shape, values.dtype)
    buffer[...] = values
    return buffer


def in_mmap(values):
    """Copy an array to anonymous memory; there are no empty ones."""
    memory = mmap.mmap(-1, values.nbytes)
    memory.write(values.tobytes())
    return memory


def in_ctypes(values):
    return (np.ctypeslib.as_ctypes_type(values.dtype) * values.size).from_buffer_copy(values)


def in_torch(values):
    import torch

    if values.dtype.isbuiltin != 1:  # of ml_dtypes
        return torch.from_numpy(values.view(f"i{values.itemsize}")).view(getattr(torch, values.dtype.name))
    return torch.from_numpy(values)


ALL = frozenset(DATATYPES)
WITH_COMPLEX = ALL - {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
PLAIN = WITH_COMPLEX - {"complex64", "complex128"}
BYTES = frozenset()  # holds bytes only: the caller names the type


@dataclass(frozen=True)
class Kind:
    """A kind of object: how to make one that holds given values, and which types it can tell by itself."""

    name: str
    make: Callable
    typed: frozenset = ALL
    writable: bool = True
    empty: bool = True

    @property
    def missing(self):
        """Whether the package it needs is not installed."""
        return self.name == "torch" and importlib.util.find_spec("torch") is None

    def __repr__(self):
        return self.name


KINDS = [
    Kind("ndarray", np.copy),
    Kind("Buffer", on_heap),
    Kind("slice of a Buffer", lambda values: on_heap(values)[...]),
    Kind("torch", lambda values: in_torch(values.copy())),
    Kind("array.array", lambda values: array.array(values.dtype.char, values.tobytes()), PLAIN - {"bool", "float16"}),
    Kind("memoryview", lambda values: memoryview(values.copy()), WITH_COMPLEX),
    Kind("ctypes", in_ctypes, PLAIN - {"float16"}),
    Kind("__array_interface__", lambda values: Interface(values.copy()), WITH_COMPLEX),
    Kind(
        "DLPack",
        lambda values: Capsule(values.copy()),
        WITH_COMPLEX,
        writable=np.lib.NumpyVersion(np.__version__) >= "2.1.0",
    ),
    Kind("bytearray", lambda values: bytearray(values.tobytes()), BYTES),
    Kind("bytes", lambda values: values.tobytes(), BYTES, writable=False),
    Kind("mmap", in_mmap, BYTES, empty=False),
]
