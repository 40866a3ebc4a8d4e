"""Buffer: a NumPy array on symmetric memory, what is derived from it, and the end of the memory."""

import copy
import gc
import itertools
import pickle
import sys

import numpy as np
import pytest

from nvcoll.buffers import Buffer, invalidate, parse
from nvcoll.errors import ArgumentError, DatatypeError, StateError
from nvcoll.ops import DATATYPES
from tests.buffers.memory import FakeAllocation, on_heap


@pytest.fixture
def allocation():
    return FakeAllocation(64)


@pytest.fixture
def buffer(allocation):
    """Return a Buffer of twelve float32, 0 to 11, in three rows; the allocation is larger."""
    made = Buffer.on(allocation, (3, 4), "float32")
    made[...] = np.arange(12).reshape(3, 4)
    return made


def is_plain(value):
    return type(value) is np.ndarray


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (0, 3), (2, 1, 3)])
@pytest.mark.parametrize("name", DATATYPES)
def test_a_buffer_lies_on_its_allocation(name, shape):
    dtype = DATATYPES[name].dtype
    allocation = FakeAllocation(200)
    buffer = Buffer.on(allocation, shape, name)
    assert (buffer.shape, buffer.dtype, buffer.flags.c_contiguous) == (shape, dtype, True)
    assert buffer.flags.writeable
    assert buffer.ctypes.data == allocation.address or not buffer.size
    buffer[...] = 1
    assert allocation.memory[: buffer.nbytes].tobytes() == np.ones(shape, dtype).tobytes()
    assert not allocation.memory[buffer.nbytes :].any()
    spec = parse("Allreduce", "recvbuf", buffer, writable=True)
    assert (spec.count, spec.datatype) == (buffer.size, DATATYPES[name])


@pytest.mark.parametrize(
    ("shape", "expected"), [(5, (5,)), (np.int64(5), (5,)), ([2, 3], (2, 3)), (np.array([2]), (2,))]
)
def test_shapes(allocation, shape, expected):
    assert Buffer.on(allocation, shape, np.float32).shape == expected


@pytest.mark.parametrize(
    ("shape", "dtype", "exception", "message"),
    [
        ((17,), "f4", ArgumentError, r"shape \(17,\) of float32 needs 68 bytes, the allocation has 64; allocate more"),
        ((-1,), "f4", ArgumentError, r"shape is \(-1,\), expected lengths of 0 or more; give"),
        ((-3, -4), "f4", ArgumentError, r"shape is \(-3, -4\)"),
        ((2,), "S4", DatatypeError, r"dtype is \|S4, expected one of bool"),
    ],
)
def test_arrays_that_cannot_be(allocation, shape, dtype, exception, message):
    with pytest.raises(exception, match=rf"^Buffer\.on: {message}"):
        Buffer.on(allocation, shape, dtype)


def test_repr_tells_that_it_is_symmetric_and_where(buffer):
    assert repr(buffer).startswith("Buffer([[ 0.,  1.,")
    assert repr(buffer).endswith("dtype=float32, symmetric at 0x40)")
    assert str(buffer) == str(np.asarray(buffer))


# What makes an array, by name; all share the test below. In `VIEWS` they share memory with the Buffer.
VIEWS = {
    "slice": lambda b: b[1:],
    "row": lambda b: b[0],
    "iteration": lambda b: next(iter(b)),
    "T": lambda b: b.T,
    "view": lambda b: b.view(),
    "view as Buffer": lambda b: b.view(Buffer),
    "view as int": lambda b: b.view(np.int32),
    "reshape": lambda b: b.reshape(-1),
    "np.reshape": lambda b: np.reshape(b, (4, 3)),
    "np.asarray": np.asarray,
    "np.split": lambda b: np.split(b, 3)[0],
    "np.broadcast_to": lambda b: np.broadcast_to(b, (2, 3, 4)),
    "np.from_dlpack": np.from_dlpack,
    "memoryview": lambda b: np.asarray(memoryview(b)),
}
COPIES = {
    "fancy index": lambda b: b[[0, 2]],
    "mask": lambda b: b[b > 3],
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "copy": lambda b: b.copy(),
    "astype": lambda b: b.astype(np.float64),
    "+": lambda b: b + 1,
    "right +": lambda b: np.ones(4) + b,
    "two": lambda b: b * b,
    "-": lambda b: -b,
    "**": lambda b: b**2,
    "@": lambda b: b @ b.T,
    "<": lambda b: b < 3,
    "divmod": lambda b: divmod(b, 2)[1],
    "ufunc": np.sqrt,
    "ufunc with where": lambda b: np.add(b, 1, where=on_heap(np.ones((3, 4), bool)), out=np.zeros((3, 4))),
    "reduce": lambda b: np.add.reduce(b, axis=0),
    "accumulate": np.add.accumulate,
    "outer": lambda b: np.multiply.outer(b, b),
    "sum": lambda b: b.sum(axis=1),
    "mean": lambda b: b.mean(axis=1),
    "np.zeros_like": np.zeros_like,
    "np.sort": np.sort,
    "np.concatenate": lambda b: np.concatenate([b, b]),
    "np.where": lambda b: np.where(b > 3, b, 0),
    "np.nonzero": lambda b: np.nonzero(b)[0],
    "np.linalg": np.linalg.pinv,
    "np.array": np.array,
}


@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_what_is_made_from_a_buffer_is_plain(buffer, name):
    same = np.array(buffer)
    made, expected = ((VIEWS | COPIES)[name](array) for array in (buffer, same))
    assert is_plain(made)
    assert np.shares_memory(made, buffer) == (name in VIEWS)
    np.testing.assert_array_equal(made, np.asarray(expected))


# Arguments for those methods of ndarray that need some.
ARGUMENTS = {
    "astype": ("f8",),
    "choose": ([0, 1],),
    "clip": (0, 1),
    "compress": ([True, False],),
    "dot": (np.ones(4),),
    "dump": None,  # writes a file
    "fill": (1,),
    "getfield": ("f4",),
    "argpartition": (1,),
    "partition": (1,),
    "put": (0, 1),
    "repeat": (2,),
    "reshape": (4, 3),
    "resize": None,  # cannot: it does not own its memory
    "searchsorted": None,  # of one dimension only
    "setfield": (1, "f4"),
    "swapaxes": (0, 1),
    "take": ([0],),
    "to_device": ("cpu",),
    "tofile": None,  # writes a file
    # The rest is gone since NumPy 2.
    "itemset": None,
    "newbyteorder": None,
    "ptp": None,
    "tostring": None,
}


@pytest.mark.parametrize("name", sorted(name for name in dir(np.ndarray) if name[0] != "_"))
def test_no_method_or_attribute_of_ndarray_gives_another_buffer(buffer, name):
    arguments = ARGUMENTS.get(name, ())
    if arguments is None:
        pytest.skip("makes no array of it")
    if name in {"item", "choose"}:
        buffer = on_heap(np.ones(1, np.int32))
    made = getattr(buffer, name)
    if callable(made):
        made = made(*arguments)
    values = made if isinstance(made, tuple) else (made,)
    assert not [value for value in values if isinstance(value, Buffer) and value is not buffer]


def add_one(buffer):
    buffer += 1
    return buffer


def multiply_twice(buffer):
    buffer *= on_heap(np.full((3, 4), 2, np.float32))
    return buffer


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add_one, lambda values: values + 1),
        (multiply_twice, lambda values: values * 2),
        (lambda b: np.add(b, 1, out=b), lambda values: values + 1),
        (lambda b: np.add(1, 1, out=(b,)), lambda values: np.full_like(values, 2)),
        (lambda b: np.divmod(b, 2, out=(b, None))[0], lambda values: values // 2),
        (lambda b: np.add.accumulate(b, out=b), np.add.accumulate),
        (lambda b: np.clip(b, 2, 4, out=b), lambda values: values.clip(2, 4)),
        (lambda b: np.matmul(b, np.eye(4, dtype="f4"), out=b), lambda values: values),
    ],
    ids=["+=", "*=", "out", "out tuple", "two outs", "accumulate", "np.clip", "@"],
)
def test_in_place_operations_keep_the_buffer(buffer, change, expected):
    values = np.array(buffer)
    assert change(buffer) is buffer
    np.testing.assert_array_equal(buffer, expected(values))


def test_assignment_and_at_write_through(buffer, allocation):
    buffer[0] = 7
    buffer[1:] += 1
    buffer[2][3] = -1
    np.add.at(buffer, ([0], [0]), 1)
    buffer.real[1, 1] = 9
    buffer.T[2, 2] = 3
    assert allocation.memory.view("f4")[:12].tolist() == [8, 7, 7, 7, 5, 9, 7, 8, 9, 10, 3, -1]


def test_single_elements_are_scalars(buffer):
    assert type(buffer[1, 2]) is type(buffer.sum()) is type(np.max(buffer)) is np.float32
    assert buffer[1, 2] == 6


def test_other_classes_of_arrays_still_rule_their_results(buffer):
    class Metres(np.ndarray):
        pass

    assert type(buffer + np.zeros(4).view(Metres)) is Metres

    class Never:
        __array_ufunc__ = None

    with pytest.raises(TypeError):
        buffer + Never()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_plain(buffer, protocol):
    again = pickle.loads(pickle.dumps(buffer, protocol))
    assert is_plain(again)
    np.testing.assert_array_equal(again, buffer)


def test_torch_sees_the_same_memory(buffer):
    torch = pytest.importorskip("torch")
    torch.from_dlpack(buffer).zero_()
    torch.from_numpy(buffer)[0] = 1
    assert buffer.sum() == 4


def test_free(buffer, allocation):
    assert not buffer.freed
    buffer.free()
    assert allocation.calls == ["free"]
    assert buffer.freed
    assert buffer.size == 0
    assert repr(buffer) == "<nvcoll.Buffer of float32, freed>"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (Buffer.free, "free: the Buffer was freed; allocate another with comm.empty"),
        (Buffer.__enter__, "with: the Buffer was freed; allocate another"),
        (lambda b: b + 1, "arithmetic: the Buffer was freed; allocate another"),
        (add_one, "arithmetic: the Buffer was freed"),
        (pickle.dumps, "arithmetic: the Buffer was freed"),
    ],
    ids=["free", "with", "+", "+=", "pickle"],
)
def test_after_free_use_is_an_error(buffer, allocation, use, message):
    buffer.free()
    with pytest.raises(StateError, match=f"^{message}"):
        use(buffer)
    assert allocation.calls == ["free"]


def test_a_freed_buffer_does_not_point_to_its_old_memory(buffer, allocation):
    before = allocation.memory.copy()
    buffer.free()
    with pytest.raises(IndexError):
        buffer[0]
    buffer[:] = 5
    np.testing.assert_array_equal(allocation.memory, before)


def test_what_is_no_buffer_of_its_own_cannot_be_freed(buffer):
    derived = np.ndarray.view(buffer, Buffer)
    with pytest.raises(StateError, match=r"^free: this is no Buffer of its own .+; take what comm\.empty returned"):
        derived.free()
    assert repr(derived) == repr(np.asarray(derived)).replace("array", "Buffer").replace("\n      ", "\n       ")


def test_if_freeing_fails_the_buffer_stays(buffer, allocation, monkeypatch):
    def fail():
        raise TimeoutError("rank 1 did not come")

    with monkeypatch.context() as patch:
        patch.setattr(allocation, "free", fail)
        with pytest.raises(TimeoutError):
            buffer.free()
    assert not buffer.freed
    assert buffer[1, 1] == 5
    buffer.free()
    assert buffer.freed


def test_invalidate_ends_the_buffers_in_a_range(allocation):
    inside, other = Buffer.on(allocation, 4, "float32"), on_heap(np.ones(4))
    views = inside[1:], np.asarray(Buffer.on(allocation, 4, "float32"))  # of the second, only the view is left
    invalidate(allocation.address, allocation.nbytes)
    assert inside.freed
    assert inside.size == 0
    for gone in (inside, *views):
        with pytest.raises(StateError):
            parse("Allreduce", "recvbuf", gone, writable=True)
    assert other.sum() == 4
    del inside, views, gone
    gc.collect()
    assert allocation.calls == []


def test_with_frees_at_its_end(allocation):
    with Buffer.on(allocation, 4, "float32") as buffer:
        assert isinstance(buffer, Buffer)
        assert not allocation.calls
    assert allocation.calls == ["free"]
    with pytest.raises(StateError, match=r"^with: the Buffer was freed"), buffer:
        pass


def test_with_allows_free_inside(allocation):
    with Buffer.on(allocation, 4, "float32") as buffer:
        buffer.free()
    assert allocation.calls == ["free"]


def test_with_leaves_an_error_alone_and_the_memory_to_the_garbage_collector(allocation):
    def fail():
        with Buffer.on(allocation, 4, "float32"):
            raise KeyError("of the user")

    with pytest.raises(KeyError):
        fail()
    gc.collect()
    assert allocation.calls == ["drop"]  # a collective free would wait for ranks that had no error


@pytest.mark.parametrize("make_view", [*VIEWS.values(), memoryview, lambda b: b.flat, lambda b: b[1:][1:].T], ids=str)
def test_views_keep_the_memory(allocation, make_view):
    view = make_view(Buffer.on(allocation, (3, 4), "float32"))
    gc.collect()
    assert allocation.calls == []
    del view
    gc.collect()
    assert allocation.calls == ["drop"]


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_do_not(allocation, make_copy):
    made = make_copy(Buffer.on(allocation, (3, 4), "float32"))
    gc.collect()
    assert made is not None
    assert allocation.calls == ["drop"]


def test_the_garbage_collector_does_not_drop_what_was_freed(allocation):
    buffer = Buffer.on(allocation, 4, "float32")
    view = buffer[1:]
    buffer.free()
    del buffer, view
    gc.collect()
    assert allocation.calls == ["free"]


def test_the_end_of_the_interpreter_is_silent(run_command):
    program = """
import builtins, numpy as np
from nvcoll.buffers import Buffer
class Allocation:
    memory = np.zeros(64, np.uint8)
    address, nbytes = memory.ctypes.data, 64
    def drop(self):
        raise RuntimeError("too late")
builtins.kept = Buffer.on(Allocation(), 4, "float32")[1:]
loop = [Buffer.on(Allocation(), 4, "float32")]
loop.append(loop)
"""
    assert run_command([sys.executable, "-c", program]) == (0, "")


def test_many_buffers_come_and_go():
    allocations = [FakeAllocation(64) for _ in range(100)]
    for allocation, name in zip(allocations, itertools.cycle(DATATYPES)):
        Buffer.on(allocation, 4, name)[1:] = 1
    gc.collect()
    assert all(allocation.calls == ["drop"] for allocation in allocations)
