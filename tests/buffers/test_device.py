"""DeviceBuffer: shape and views, the interfaces by which others take it, copies, and the end of its memory."""

import copy
import gc
import pickle
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from nvcoll._plan import DLPackTensor
from nvcoll.buffers import DeviceBuffer, streams
from nvcoll.buffers.dlpack import DLPACK_TYPES
from nvcoll.errors import ArgumentError, DatatypeError, StateError
from nvcoll.ops import DATATYPES
from tests.buffers.gpu import FakeGpu, empty_on_gpu, on_gpu
from tests.buffers.memory import FakeAllocation

each_datatype = pytest.mark.parametrize("name", DATATYPES)


def ladder(*shape, dtype=np.float32):
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)


@each_datatype
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)], ids=str)
def test_facts(name, shape):
    datatype = DATATYPES[name]
    buffer, _ = empty_on_gpu(shape, datatype.dtype, spare=7)
    assert (buffer.shape, buffer.ndim, buffer.size) == (shape, len(shape), int(np.prod(shape)))
    assert (buffer.dtype, buffer.datatype, buffer.itemsize) == (datatype.dtype, datatype, datatype.itemsize)
    assert buffer.nbytes == buffer.size * datatype.itemsize
    assert buffer.address == buffer.memory.allocation.address
    assert (buffer.device, buffer.code, buffer.count) == (3, datatype.code, buffer.size)
    assert not buffer.freed


def test_lengths_are_taken_for_shapes():
    buffer = DeviceBuffer.on(FakeAllocation(64), np.int64(4), "float32", FakeGpu(), None)
    assert buffer.shape == (4,)
    assert len(buffer) == 4
    with pytest.raises(TypeError, match=r"^len: .+, expected one or more; .+"):
        len(empty_on_gpu((), "f4")[0])


@pytest.mark.parametrize("shape", [(-1,), (17,)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ArgumentError, match=r"^DeviceBuffer\.on: shape .+ of float32 needs .+, expected .+; allocate"):
        DeviceBuffer.on(FakeAllocation(64), shape, "float32", FakeGpu(), None)
    with pytest.raises(DatatypeError, match=r"^DeviceBuffer\.on: dtype is"):
        DeviceBuffer.on(FakeAllocation(64), 1, "S4", FakeGpu(), None)


@pytest.mark.parametrize(
    "key", [0, -1, 3, np.int8(2), slice(None), slice(1, 3), slice(-2, None), slice(3, 1), slice(9, 12), ...], ids=str
)
def test_views_are_those_of_numpy(key):
    values = ladder(4, 2, 3)
    buffer, expected = on_gpu(values), np.asarray(values[key])
    view = buffer[key]
    assert isinstance(view, DeviceBuffer)
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view.copy_to(), expected)
    if expected.size:
        assert view.address - buffer.address == expected.ctypes.data - values.ctypes.data
    for inner in (slice(1, 2), 0):
        if view.ndim > 1 and len(view):
            np.testing.assert_array_equal(view[inner].copy_to(), expected[inner])


@pytest.mark.parametrize(
    ("key", "fact"),
    [
        (4, "the index is 4"),
        (-5, "the index is -5"),
        (slice(None, None, 2), "a step of 2"),
        ((0, 1), "of type tuple"),
        (None, "of type NoneType"),
        (1.0, "of type float"),
        (True, "of type bool"),
    ],
)
def test_what_is_no_view_is_refused(key, fact):
    with pytest.raises(IndexError, match=rf"^\[\]: .*{fact}, expected .+; .+"):
        on_gpu(ladder(4, 2))[key]
    with pytest.raises(IndexError, match="has no axes"):
        empty_on_gpu((), "f4")[0][0]


def test_iteration_ends():
    values = ladder(3, 2)
    assert [row.copy_to().tolist() for row in on_gpu(values)] == values.tolist()


@pytest.mark.parametrize("shape", [(6, 4), (24,), (2, -1), (-1,), (3, -1, 2, 1), (2, 2, 6)])
def test_reshape(shape):
    values = ladder(4, 6)
    buffer = on_gpu(values)
    for view in (buffer.reshape(shape), buffer.reshape(*shape), buffer.reshape(list(shape))):
        assert view.address == buffer.address
        np.testing.assert_array_equal(view.copy_to(), values.reshape(shape))
    np.testing.assert_array_equal(buffer[1:3].reshape(12).copy_to(), values[1:3].ravel())


@pytest.mark.parametrize("shape", [(5,), (-1, -1), (-1, 7), (-2, -12), (-1, 0), (24, 2)])
def test_reshape_refuses(shape):
    with pytest.raises(ArgumentError, match=r"^reshape: shape is .+, expected one of 24 elements; .+"):
        on_gpu(ladder(4, 6)).reshape(shape)


def test_empty_arrays_reshape():
    assert empty_on_gpu((0, 3), "f4")[0].reshape(3, 0).shape == (3, 0)


@each_datatype
def test_copies_to_the_gpu_and_back(name):
    values = ladder(2, 5, dtype=DATATYPES[name].dtype)
    buffer, driver = empty_on_gpu((2, 5), values.dtype)
    buffer.copy_from(values, stream=7)
    found = buffer.copy_to(stream=8)
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()
    to = np.empty_like(values)
    assert buffer.copy_to(to) is to
    assert to.tobytes() == values.tobytes()
    assert driver.calls == [("copy", values.nbytes, stream) for stream in (7, 8, 0)]


@pytest.mark.parametrize(
    "given", [[[1, 2, 3], [4, 5, 6]], ladder(3, 2).T, ladder(2, 6)[:, ::2], ladder(2, 3, dtype="i8")]
)
def test_copies_convert_what_they_are_given(given):
    buffer, _ = empty_on_gpu((2, 3), "f4")
    buffer.copy_from(given)
    np.testing.assert_array_equal(buffer.copy_to(), np.asarray(given, np.float32))


def test_copies_refuse_what_does_not_fit():
    buffer, _ = empty_on_gpu((2, 3), "f4")
    with pytest.raises(ArgumentError, match=r"^copy_from: host_array has the shape \(3,\), expected \(2, 3\); pass"):
        buffer.copy_from(np.zeros(3))
    with pytest.raises(TypeError, match=r"is in memory of a GPU, expected memory of the host; pass \.copy_to\(\)"):
        buffer.copy_from(empty_on_gpu((2, 3), "f4")[0])
    read_only = np.zeros((2, 3), "f4")
    read_only.flags.writeable = False
    for to in (np.zeros((3, 2), "f4"), np.zeros((2, 3)), np.zeros((3, 2), "f4").T, read_only, [[0.0] * 3] * 2):
        with pytest.raises(ArgumentError, match=r"^copy_to: host_array is .+, expected a writable .+; leave it out"):
            buffer.copy_to(to)
    for method in (buffer.fill, buffer.copy_from):
        with pytest.raises(ArgumentError, match=rf"^{method.__name__}: stream is 'high', expected"):
            method(np.zeros((2, 3)) if method == buffer.copy_from else 1, stream="high")


@each_datatype
@pytest.mark.parametrize("value", [0, 1, -3, 0.5])
def test_fill(name, value):
    dtype = DATATYPES[name].dtype
    if dtype.kind in "iub" and value != 1:
        value = abs(int(value))
    buffer, _ = empty_on_gpu((3, 7), dtype)
    buffer[1:].fill(0)
    buffer[:1].fill(value)
    assert (
        buffer.copy_to().tobytes() == np.concatenate([np.full((1, 7), value, dtype), np.zeros((2, 7), dtype)]).tobytes()
    )


def test_the_interface_of_cuda():
    buffer = on_gpu(ladder(4, 3))
    assert buffer[1:].__cuda_array_interface__ == {
        "shape": (3, 3),
        "typestr": "<f4",
        "data": (buffer.address + 12, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    assert on_gpu(ladder(0)).__cuda_array_interface__["data"] == (0, False)


@each_datatype
def test_the_interface_of_cuda_names_the_types_of_numpy(name):
    dtype = DATATYPES[name].dtype
    buffer = empty_on_gpu(3, dtype)[0]
    if dtype.isbuiltin == 1:
        assert np.dtype(buffer.__cuda_array_interface__["typestr"]) == dtype
    else:
        assert not hasattr(buffer, "__cuda_array_interface__")
        with pytest.raises(AttributeError, match=rf"no name for {name}, expected .+; use DLPack: torch\.from_dlpack"):
            buffer.__cuda_array_interface__  # noqa: B018


@each_datatype
@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 9), (2, 0)])
def test_dlpack(name, version):
    buffer = empty_on_gpu((4, 3), DATATYPES[name].dtype)[0]
    assert buffer.__dlpack_device__() == (2, 3)
    for stream in (None, -1, 1, 2, np.int64(1 << 40)):
        capsule = buffer[1:].__dlpack__(stream=stream, max_version=version, dl_device=(2, 3), copy=False)
        assert ("versioned" in repr(capsule)) == (version is not None and version >= (1, 0))
        tensor = DLPackTensor(capsule)
        assert (tensor.address, tensor.shape, tensor.strides) == (buffer[1:].address, (3, 3), (3, 1))
        assert (tensor.device, tensor.dtype, tensor.readonly) == ((2, 3), (*DLPACK_TYPES[name], 1), False)


def test_what_a_consumer_of_dlpack_queues_comes_after_the_calls():
    preceded = []
    buffer = DeviceBuffer.on(FakeAllocation(64), 16, "f4", FakeGpu(), None, precede=preceded.append)
    for stream in (None, -1, 1, 2, np.int64(1 << 40)):
        buffer[1:].__dlpack__(stream=stream)
    assert preceded == [0, 1, 2, 1 << 40]
    with pytest.raises(BufferError):
        buffer.__dlpack__(stream=5, copy=True)
    assert len(preceded) == 4


def test_copies_come_after_the_calls():
    done, gpu = [], FakeGpu()
    driver = SimpleNamespace(copy=lambda *told: done.append("copy"), memset=lambda *told: done.append("memset"))
    buffer = DeviceBuffer.on(FakeAllocation(64), 16, "f4", gpu, driver, 3, done.append)
    buffer.copy_from(np.ones(16))
    buffer[4:].copy_to(stream=5)
    buffer.fill(0, stream=6)
    assert done == [3, "copy", 5, "copy", 6, "memset"]
    buffer[:0].fill(1)
    buffer[:0].copy_to()
    assert len(done) == 6


def test_dlpack_of_nothing_has_no_address():
    buffer = empty_on_gpu((0, 3), "f4")[0]
    assert DLPackTensor(buffer.__dlpack__()).address == 0
    buffer.free()
    for ask in (buffer.__dlpack__, lambda: buffer.__cuda_array_interface__):
        with pytest.raises(StateError, match="freed"):
            ask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy": True}, "copy is True, expected False or None; copy"),
        ({"dl_device": (1, 0)}, r"dl_device is \(1, 0\), expected \(2, 3\), where the buffer is; move it"),
        ({"dl_device": (2, 0)}, r"dl_device is \(2, 0\), expected"),
        ({"stream": "high"}, "stream is 'high', expected an integer, -1 or more; pass"),
        ({"stream": -5}, "stream is -5, expected an integer, -1 or more"),
        ({"stream": True}, "stream is True"),
    ],
)
def test_dlpack_refuses(options, message):
    with pytest.raises(BufferError, match=rf"^__dlpack__: {message}"):
        empty_on_gpu(3, "f4")[0].__dlpack__(**options)


def test_numpy_makes_no_array_of_it():
    buffer = empty_on_gpu(3, "f4")[0]
    for convert in (np.asarray, np.array, lambda b: b + np.ones(3), lambda b: np.ones(3) + b):
        with pytest.raises(TypeError):
            convert(buffer)


def use(buffer):
    """All that needs living memory."""
    values = np.zeros(buffer.shape, buffer.dtype)
    return {
        "address": lambda: buffer.address,
        "slice": lambda: buffer[1:],
        "reshape": lambda: buffer.reshape(-1),
        "copy_from": lambda: buffer.copy_from(values),
        "copy_to": buffer.copy_to,
        "fill": lambda: buffer.fill(1),
        "interface": lambda: buffer.__cuda_array_interface__,
        "dlpack": buffer.__dlpack__,
        "with": buffer.__enter__,
    }


@pytest.mark.parametrize("case", use(empty_on_gpu(4, "f4")[0]))
def test_a_freed_buffer_and_its_views_refuse(case):
    buffer = empty_on_gpu((4, 2), "f4")[0]
    arrays = [buffer, buffer[1:], buffer.reshape(8)[2:]]
    buffer.free()
    for array in arrays:
        assert array.freed
        with pytest.raises(StateError, match=r"^\S+: the DeviceBuffer was freed, expected a living one; allocate"):
            use(array)[case]()
        assert repr(array) == "<nvcoll.DeviceBuffer of float32, freed>"
        assert array.shape  # what needs no memory goes on


@pytest.mark.parametrize("case", ["copy_from", "copy_to", "fill", "free"])
def test_what_waits_is_refused_where_a_graph_is_made(monkeypatch, case):
    buffer = empty_on_gpu(4, "f4")[0]
    library = type("Stream", (), {"__module__": "torch.cuda"})
    monkeypatch.setattr(streams, "captured_stream", library)
    with pytest.raises(StateError, match=rf"^{case}: torch captures a graph, expected none, for .+ call it before or"):
        ({"free": buffer.free} | use(buffer))[case]()
    assert not buffer.freed


def test_free_gives_the_memory_back_once():
    buffer = empty_on_gpu(4, "f4")[0]
    allocation = buffer.memory.allocation
    with pytest.raises(StateError, match=r"^free: this is a view of a DeviceBuffer, expected a whole one; free what"):
        buffer[:2].free()
    buffer.free()
    with pytest.raises(StateError, match=r"^free: the DeviceBuffer was freed"):
        buffer.free()
    del buffer
    gc.collect()
    assert allocation.calls == ["free"]


def test_a_block_frees_it_unless_it_raises():
    with empty_on_gpu(4, "f4")[0] as buffer:
        allocation = buffer.memory.allocation
    assert allocation.calls == ["free"]
    with pytest.raises(KeyError), empty_on_gpu(4, "f4")[0] as buffer:
        raise KeyError
    assert not buffer.freed


def test_an_error_of_the_heap_leaves_it_as_it_was():
    buffer = empty_on_gpu(4, "f4")[0]
    buffer.memory.allocation.free = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        buffer.free()
    assert not buffer.freed


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_duplicated(duplicate):
    with pytest.raises(TypeError):
        duplicate(empty_on_gpu(4, "f4")[0])


def test_repr():
    buffer = empty_on_gpu((4, 2), ml_dtypes.bfloat16)[0]
    assert repr(buffer[1:]) == "<nvcoll.DeviceBuffer (3, 2) of bfloat16 on GPU 3, symmetric at 0x44>"
