"""DLPack: capsules that NumPy reads and makes prove the layout of the structs; owners live as long as needed."""

import ctypes
import gc
import threading
import weakref

import numpy as np
import pytest

from nvcoll._plan import DLPACK_VERSION, DLPackTensor, dlpack_capsule
from nvcoll.buffers.dlpack import DLPACK_TYPES, datatype_of
from nvcoll.ops import DATATYPES

HOST = (1, 0)
OWN = [name for name in DATATYPES if DATATYPES[name].dtype.isbuiltin == 1]
SHAPES = [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 4, 1, 3)]

versions = pytest.mark.parametrize("versioned", [False, True], ids=["plain", "versioned"])
if np.lib.NumpyVersion(np.__version__) < "2.1.0":  # knows plain capsules only
    versions = pytest.mark.parametrize("versioned", [False], ids=["plain"])

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
rename = ctypes.pythonapi.PyCapsule_SetName
rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
NAMES = {False: b"dltensor", True: b"dltensor_versioned"}
DELETERS = {False: 56, True: 16}  # where the structs have them, in bytes
OFFSETS = {False: 40, True: 72}


class Owner:
    """Memory that tells when it goes."""

    def __init__(self, values):
        self.values = values


def capsule_of(values, versioned, owner=None, device=HOST):
    kind = DLPACK_TYPES[values.dtype.name]
    return dlpack_capsule(values.ctypes.data, values.shape, kind, device, owner or values, versioned)


class Exporter:
    """Hands out a capsule that was made before."""

    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack_device__(self):
        return HOST

    def __dlpack__(self, **_):
        return self.capsule


@versions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OWN)
def test_numpy_reads_what_is_made(name, shape, versioned):
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(DATATYPES[name].dtype)
    found = np.from_dlpack(Exporter(capsule_of(values, versioned)))
    assert (found.shape, found.dtype) == (values.shape, values.dtype)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, values)
    if values.size:
        assert found.ctypes.data == values.ctypes.data


@versions
@pytest.mark.parametrize("name", OWN)
def test_what_numpy_makes_is_read(name, versioned):
    values = np.arange(24).reshape(2, 3, 4).astype(DATATYPES[name].dtype)
    for array in (values, values[1:], values[:, 1], values.T, values[0, 0, 0, ...]):
        options = {"max_version": (1, 0)} if versioned else {}
        tensor = DLPackTensor(array.__dlpack__(**options))
        assert tensor.address == array.ctypes.data
        assert (tensor.shape, tensor.device) == (array.shape, HOST)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        assert tensor.strides == strides or (tensor.strides is None and array.flags.c_contiguous)
        assert datatype_of(tensor.dtype) is DATATYPES[name]
        assert not tensor.readonly


def test_read_only_memory_is_said_to_be():
    values = np.zeros(3)
    values.flags.writeable = False
    try:
        capsule = values.__dlpack__(max_version=(1, 0))
    except (TypeError, BufferError):
        pytest.skip("this NumPy cannot say so")
    assert DLPackTensor(capsule).readonly


@versions
@pytest.mark.parametrize("name", DATATYPES)
def test_what_is_made_is_read(name, versioned):
    values = np.zeros((2, 3), DATATYPES[name].dtype)
    tensor = DLPackTensor(capsule_of(values, versioned, device=(2, 7)))
    assert (tensor.address, tensor.shape, tensor.strides) == (values.ctypes.data, (2, 3), (3, 1))
    assert (tensor.device, tensor.dtype) == ((2, 7), (*DLPACK_TYPES[name], 1))
    assert datatype_of(tensor.dtype) is DATATYPES[name]


@versions
def test_the_offset_is_part_of_the_address(versioned):
    values = np.zeros(3)
    capsule = capsule_of(values, versioned)
    ctypes.c_uint64.from_address(pointer_of(capsule, NAMES[versioned]) + OFFSETS[versioned]).value = 48
    assert DLPackTensor(capsule).address == values.ctypes.data + 48


@versions
def test_absent_strides_are_none(versioned):
    capsule = capsule_of(np.zeros((2, 3)), versioned)
    ctypes.c_uint64.from_address(pointer_of(capsule, NAMES[versioned]) + OFFSETS[versioned] - 8).value = 0
    assert DLPackTensor(capsule).strides is None


@versions
@pytest.mark.parametrize("end", ["unused", "numpy", "read"])
def test_the_owner_lives_until_the_consumer_is_done(end, versioned):
    owner = Owner(np.arange(3.0))
    alive = weakref.ref(owner)
    held = capsule_of(owner.values, versioned, owner)
    del owner
    gc.collect()
    assert alive() is not None
    if end == "numpy":
        held = np.from_dlpack(Exporter(held))
    elif end == "read":
        held = DLPackTensor(held)
    gc.collect()
    assert alive() is not None
    del held
    gc.collect()
    assert alive() is None


@versions
def test_a_consumer_may_end_on_a_thread_of_its_own_without_the_interpreter(versioned):
    owner = Owner(np.arange(3.0))
    alive = weakref.ref(owner)
    capsule = capsule_of(owner.values, versioned, owner)
    managed = pointer_of(capsule, NAMES[versioned])
    used = b"used_" + NAMES[versioned]
    rename(capsule, used)
    del owner, capsule
    gc.collect()
    assert alive() is not None
    address = ctypes.c_void_p.from_address(managed + DELETERS[versioned]).value
    thread = threading.Thread(target=ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), args=(managed,))  # drops the GIL
    thread.start()
    thread.join()
    assert alive() is None


@versions
def test_a_capsule_is_taken_once(versioned):
    capsule = capsule_of(np.zeros(3), versioned)
    held = DLPackTensor(capsule)
    with pytest.raises(BufferError, match="taken before"):
        DLPackTensor(capsule)
    assert held.shape == (3,)


@pytest.mark.parametrize("other", [None, 3, "dltensor", np.zeros(3)], ids=lambda value: type(value).__name__)
def test_what_is_no_capsule_is_refused(other):
    with pytest.raises(BufferError, match="is no DLPack capsule"):
        DLPackTensor(other)


def test_another_major_version_is_refused_and_left_to_its_capsule():
    owner = Owner(np.zeros(3))
    alive = weakref.ref(owner)
    capsule = capsule_of(owner.values, True, owner)
    ctypes.c_uint32.from_address(pointer_of(capsule, NAMES[True])).value = DLPACK_VERSION[0] + 1
    with pytest.raises(BufferError, match=r"is of DLPack 2, 1 was asked for"):
        DLPackTensor(capsule)
    del owner, capsule
    gc.collect()
    assert alive() is None


def test_numbers_that_do_not_fit_are_refused():
    owner = Owner(None)
    alive = weakref.ref(owner)
    for shape, dtype in (((2**70,), (2, 32)), ((3,), (300, 32)), (("three",), (2, 32))):
        with pytest.raises((OverflowError, ValueError, TypeError)):
            dlpack_capsule(64, shape, dtype, HOST, owner, True)
    del owner
    gc.collect()
    assert alive() is None


def test_numbers_of_types_are_those_of_the_standard():
    assert DLPACK_TYPES["float32"] == (2, 32)
    assert DLPACK_TYPES["bfloat16"] == (4, 16)
    assert DLPACK_TYPES["complex64"] == (5, 64)
    assert DLPACK_TYPES["bool"] == (6, 8)
    assert len(set(DLPACK_TYPES.values())) == len(DLPACK_TYPES) == len(DATATYPES)
    assert datatype_of((2, 32, 4)) is datatype_of((2, 128, 1)) is None
