"""Refusals of memory: a message begins with the verb and the argument, says what is and was expected, and the cure."""

import ctypes
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from nvcoll.buffers import IN_PLACE, is_in_place, parse, parse_device
from nvcoll.errors import ArgumentError, DatatypeError, StateError
from nvcoll.ops import FLOAT, MAX
from tests.buffers.gpu import CudaCapsule, CudaInterface
from tests.buffers.memory import Capsule, on_heap


class OnGPU:
    """Says that it is on a GPU, by CUDA's interface."""

    @property
    def __cuda_array_interface__(self):
        return {"data": (64, False), "shape": (3,), "typestr": "<f4", "version": 3}


class OnGPUByDLPack:
    """Says that it is on a GPU, by DLPack."""

    def __dlpack_device__(self):
        return 2, 0


class Unreadable(Capsule):
    """Has a type that NumPy does not take through DLPack."""

    def __dlpack__(self, **_):
        raise BufferError("no bfloat16 here")


def read_only(values):
    values.flags.writeable = False
    return values


def freed():
    buffer = on_heap(np.zeros(3))
    buffer.free()
    return buffer


def view_of_freed(make_view):
    buffer = on_heap(np.zeros(3))
    view = make_view(buffer)
    buffer.free()
    return view


SIX = np.zeros(6, np.float32)
FOREIGN = np.zeros(3, np.dtype("f4").newbyteorder("S"))

# Name: (spec, exception, what the message says); messages about recvbuf all have the form checked below.
REFUSALS = {
    "None": (None, ArgumentError, "recvbuf is None, expected an array; pass"),
    "operator": (MAX, ArgumentError, "recvbuf is an operator, expected an array; pass the operator as op="),
    "None in a spec": ([None, 3, FLOAT], ArgumentError, r"recvbuf\[0\] is None, expected an array"),
    "IN_PLACE": (IN_PLACE, ArgumentError, "recvbuf is IN_PLACE, .+; pass IN_PLACE alone, for one of the two buffers"),
    "number": (3.0, DatatypeError, "recvbuf is of type float, expected memory .+; make an array first, pass that"),
    "string": ("abc", DatatypeError, "recvbuf is of type str, expected memory"),
    "list of numbers": (
        [1.0, 2.0],
        ArgumentError,
        r"recvbuf is a list of 2 items, expected an array or \[buf, count, datatype\]; make an array first, pass that",
    ),
    "tuple of integers": ((1, 2, 3), ArgumentError, "recvbuf is a tuple of 3 items, expected .+; make an array"),
    "list of lists": ([[1, 2], [3, 4]], ArgumentError, "recvbuf is a list of 2 items, expected .+; make an array"),
    "long list": (
        [1.0] * 9,
        ArgumentError,
        r"is a list of 9 items, expected an array or \[buf, count, datatype\]; make",
    ),
    "short tuple": ((SIX,), ArgumentError, "is a tuple of 1 items"),
    "GPU": (
        OnGPU(),
        DatatypeError,
        r"is in memory of a GPU \(OnGPU\), which needs the nvshmem backend, .+; copy it .+ back$",
    ),
    "GPU in a spec": ([OnGPU(), 2, FLOAT], DatatypeError, "needs the nvshmem backend"),
    "GPU by DLPack": (OnGPUByDLPack(), DatatypeError, "needs the nvshmem backend"),
    "DLPack fails": (
        Unreadable(SIX),
        DatatypeError,
        r"read through DLPack \(no bfloat16 here\), expected .+; make an array first, pass that, and take the result",
    ),
    "count too large": (
        [SIX, 8],
        ArgumentError,
        "recvbuf holds 6 float32, expected 8; give a smaller count or a larger",
    ),
    "end too large": (
        [SIX, (5, 2)],
        ArgumentError,
        "recvbuf holds 6 float32, expected 5 from element 2 on; give a smaller",
    ),
    "start too large": ([SIX, (None, 7)], ArgumentError, "recvbuf holds 6 float32, expected 0 from element 7 on"),
    "other datatype": ([SIX, 6, "f8"], ArgumentError, "recvbuf holds 3 float64, expected 6"),
    "negative count": ([SIX, -1], ArgumentError, "recvbuf has a count of -1, expected 0 or more; count"),
    "negative start": ([SIX, (1, -1)], ArgumentError, "recvbuf has a displacement of -1, expected 0 or more"),
    "float count": ([SIX, 2.0, FLOAT], ArgumentError, r"recvbuf has a count of type float, expected int; pass int\(\)"),
    "array as count": ([SIX, SIX], ArgumentError, "recvbuf has a count of type ndarray"),
    "float start": ([SIX, (1, 0.5)], ArgumentError, "recvbuf has a displacement of type float"),
    "counts": ([SIX, (1, 2, 3)], ArgumentError, r"has a count of 3 items, expected .+; pass count or \(count, displ\)"),
    "half an element": (
        [bytearray(6), FLOAT],
        ArgumentError,
        "holds 6 bytes, expected a multiple of the 4 of a float32; give",
    ),
    "unknown name": ([SIX, "x17"], DatatypeError, "datatype of recvbuf is 'x17', expected a datatype; pass"),
    "float as datatype": ([SIX, 2.5], DatatypeError, "datatype of recvbuf is of type float, expected a datatype"),
    "unsupported type": (np.zeros(3, np.longdouble), DatatypeError, "datatype of recvbuf is .+, expected one of bool,"),
    "text": (np.zeros(3, "S4"), DatatypeError, r"datatype of recvbuf is \|S4, .+ bool, .+; convert: x = x\.astype\("),
    "objects": (
        np.array([None]),
        DatatypeError,
        r"recvbuf holds Python objects .+, expected numbers; convert: x = x\.astype",
    ),
    "objects with a type": ([np.array([None]), FLOAT], DatatypeError, r"recvbuf\[0\] holds Python objects"),
    "byte order": (FOREIGN, DatatypeError, r"recvbuf is .f4, expected this machine's byte order; .+'float32'"),
    "byte order with a type": ([FOREIGN, FLOAT], DatatypeError, "expected this machine's byte order"),
    "gaps": (
        SIX[::2],
        ArgumentError,
        r"recvbuf has gaps .+, expected contiguous .+; pass a .+ back: t = numpy\.ascontiguousarray\(x\); .+; x\[\.",
    ),
    "reversed": (SIX[::-1], ArgumentError, "recvbuf has gaps"),
    "gaps in a memoryview": (memoryview(bytearray(8))[::2], ArgumentError, "has gaps .+, and copy the result back$"),
    "gaps in a spec": ([SIX[::2], 3], ArgumentError, r"recvbuf\[0\] has gaps"),
    "read-only": (
        read_only(np.zeros(3)),
        ArgumentError,
        "recvbuf is read-only, expected memory .+; give a writable array as recvbuf, and take the result from there",
    ),
    "read-only, with gaps": (
        np.broadcast_to(SIX[:1], (3, 2)),
        ArgumentError,
        "recvbuf is read-only, .+; give a writable",
    ),
    "scalar": (np.float64(3), ArgumentError, "recvbuf is read-only, expected memory .+; give a writable array"),
    "bytes": ([bytes(8), FLOAT], ArgumentError, r"recvbuf\[0\] is read-only, .+; give a bytearray as recvbuf"),
    "freed": (freed(), StateError, "recvbuf is a Buffer that was freed, .+, expected .+; allocate"),
    "freed, in a spec": ([freed(), 0], StateError, "is a Buffer that was freed"),
    "slice of freed": (view_of_freed(lambda b: b[1:]), StateError, "or a view of one"),
    "reshaped freed": (view_of_freed(lambda b: b.reshape(3, 1).T), StateError, "or a view of one"),
    "array of freed": (view_of_freed(np.asarray), StateError, "or a view of one"),
    "memoryview of freed": (view_of_freed(memoryview), StateError, "or a view of one"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    spec, exception, message = REFUSALS[case]
    with pytest.raises(exception) as caught:
        parse("Allreduce", "recvbuf", spec, writable=True)
    assert re.search(message, str(caught.value))
    assert re.match(r"Allreduce: (datatype of )?recvbuf.*, expected .+; .+", str(caught.value))


# Name: (spec, the cure for memory that is only sent)
SENT = {
    "number": (3.0, "pass numpy.asarray() of it"),
    "list of numbers": ([1.0, 2.0], "pass numpy.array() of it"),
    "DLPack fails": (Unreadable(SIX), "pass numpy.asarray() of it"),
    "GPU": (OnGPU(), "copy it to the host"),
    "gaps": (SIX[::2], "pass numpy.ascontiguousarray() of it"),
    "gaps in a memoryview": (memoryview(bytearray(8))[::2], "pass numpy.ascontiguousarray() of it"),
}


@pytest.mark.parametrize("case", SENT)
def test_what_is_only_sent_may_be_sent_from_a_copy(case):
    spec, cure = SENT[case]
    with pytest.raises(
        (ArgumentError, DatatypeError), match=rf"^Allreduce: sendbuf .+, expected .+; {re.escape(cure)}$"
    ):
        parse("Allreduce", "sendbuf", spec, writable=False)


class InCupy(CudaInterface):
    """As CuPy shows its arrays."""


InCupy.__module__ = "cupy._core.core"
SQUARE = np.zeros((4, 4), np.float32)

# Name: (spec on a GPU, the cure where a result goes there, the cure where it is only sent)
GAPS = {
    "CuPy": (
        InCupy(SQUARE[::2]),
        "a contiguous copy, and copy the result back: t = cupy.ascontiguousarray(x); ...; x[...] = t",
        "cupy.ascontiguousarray() of it",
    ),
    "any": (
        CudaInterface(SQUARE[::2]),
        "a contiguous copy, and copy the result back",
        "a contiguous copy of it",
    ),
}


@pytest.mark.parametrize("case", GAPS)
def test_gaps_on_gpus(case):
    spec, *cures = GAPS[case]
    for writable, cure in zip((True, False), cures, strict=True):
        with pytest.raises(ArgumentError, match=rf"has gaps .+, expected contiguous memory; pass {re.escape(cure)}$"):
            parse_device("Allreduce", "sendbuf", spec, writable)


@pytest.mark.parametrize("spec", [SQUARE, CudaCapsule(SQUARE, (10, 0))], ids=["host", "another GPU"])
def test_what_lies_elsewhere_than_on_gpus(spec):
    for writable, back in ((True, ", and copy the result back"), (False, "")):
        with pytest.raises(DatatypeError, match=r"expected memory of a GPU.+; copy it there") as caught:
            parse_device("Allreduce", "sendbuf", spec, writable)
        assert str(caught.value).endswith(("copy it there" + back, "with .copy_from()" + back))


def test_the_cure_for_gaps_keeps_the_result():
    x = np.zeros((4, 3))
    column = x[:, 0]
    with pytest.raises(ArgumentError) as caught:
        parse("Allreduce", "recvbuf", column, writable=True)
    before, after = str(caught.value).partition("back: ")[2].split("; ...; ")
    names = {"numpy": np, "x": column}
    exec(before, names)
    names["t"] += 1
    exec(after, names)
    assert x.tolist() == [[1, 0, 0]] * 4


def test_a_format_without_a_name_in_numpy_needs_a_datatype():
    view = memoryview((ctypes.CFUNCTYPE(None) * 2)())
    message = r"recvbuf has elements of format 'X{}', expected numbers; name their type: \[buf, datatype"
    with pytest.raises(DatatypeError, match=message):
        parse("Allreduce", "recvbuf", view, writable=True)
    assert parse("Allreduce", "recvbuf", [view, "int64"], writable=True).count == 2


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda t: t.zeros(3, requires_grad=True), ArgumentError, r"requires grad, expected .+; pass \.detach\(\)"),
        (
            lambda t: t.zeros(3, device="meta"),
            DatatypeError,
            r"is a meta tensor, which has no memory, expected .+; make one with torch\.empty_like",
        ),
        (
            lambda t: t._efficientzerotensor(3),
            DatatypeError,
            r"is a Tensor without memory of its own, expected .+; pass the one that has them, such as \.to_local",
        ),
        (
            lambda t: t.eye(3).to_sparse(),
            ArgumentError,
            r"is a sparse tensor, expected .+; pass a dense copy, .+ back: t = x\.to_dense\(\); .+ = t\.to_sparse\(\)",
        ),
        (
            lambda t: t.zeros(3, dtype=t.complex64).conj(),
            ArgumentError,
            r"has not computed yet, expected .+; pass a copy, .+ back: t = x\.resolve_conj\(\).+; x\.copy_\(t\)",
        ),
        (lambda t: t.zeros(3, dtype=t.complex64).conj().imag, ArgumentError, "has not computed yet"),
        (
            lambda t: t.zeros(6)[::2],
            ArgumentError,
            r"has gaps .+, expected .+; .+ back: t = x\.contiguous\(\); \.\.\.; x\.copy_\(t\)",
        ),
        (
            lambda t: t.zeros(3, dtype=t.float8_e5m2fnuz),
            DatatypeError,
            r"is torch\.float8_e5m2fnuz, expected one of .+; convert: x = x\.to\(",
        ),
    ],
    ids=["grad", "meta", "no memory", "sparse", "conjugate", "negative", "gaps", "datatype"],
)
def test_refusals_of_tensors(make, exception, message):
    tensor = make(pytest.importorskip("torch"))
    with pytest.raises(exception, match=rf"^Allreduce: (datatype of )?recvbuf .*{message}"):
        parse("Allreduce", "recvbuf", tensor, writable=True)


def test_memory_that_is_nowhere(monkeypatch):
    """As in torch's wrappers of tensors."""

    class Wrapper:
        device, layout, requires_grad, dtype = SimpleNamespace(type="cpu"), None, False, np.dtype("f4")

        def __init__(self):
            self.is_conj = self.is_neg = lambda: False
            self.is_contiguous, self.permute = lambda: True, lambda axes: self
            self.data_ptr, self.dim, self.numel, self.element_size = lambda: 0, lambda: 1, lambda: 3, lambda: 4

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Wrapper, strided=None))
    with pytest.raises(DatatypeError, match=r"^Allreduce: sendbuf is a Wrapper without memory of its own, expected an"):
        parse("Allreduce", "sendbuf", Wrapper(), writable=False)
    assert parse("Allreduce", "sendbuf", [Wrapper(), 0], writable=False).count == 0


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (lambda t: t.eye(3).to_sparse(), ".to_dense() of it"),
        (lambda t: t.zeros(3, dtype=t.complex64).conj(), ".resolve_conj().resolve_neg() of it"),
        (lambda t: t.zeros(6)[::2], ".contiguous() of it"),
    ],
    ids=["sparse", "conjugate", "gaps"],
)
def test_tensors_that_are_only_sent_may_be_sent_from_a_copy(make, cure):
    tensor = make(pytest.importorskip("torch"))
    with pytest.raises(ArgumentError, match=rf"^Allreduce: sendbuf .+, expected .+; pass {re.escape(cure)}$"):
        parse("Allreduce", "sendbuf", tensor, writable=False)


def test_orders_of_tensors():
    torch = pytest.importorskip("torch")
    for tensor, order in ((torch.zeros(2, 3), "C"), (torch.zeros(2, 3).T, "F"), (torch.zeros(()), "A")):
        assert parse("Allreduce", "recvbuf", tensor, writable=True).order == order


def test_sentinels_of_mpi4py():
    pytest.importorskip("mpi4py").rc.initialize = False
    mpi = pytest.importorskip("mpi4py.MPI")
    assert is_in_place(mpi.IN_PLACE)
    assert not is_in_place(mpi.BOTTOM)
    with pytest.raises(ArgumentError, match=r"^Allreduce: recvbuf is IN_PLACE, expected an array; pass IN_PLACE alone"):
        parse("Allreduce", "recvbuf", mpi.IN_PLACE, writable=True)
    with pytest.raises(
        ArgumentError, match=r"^Allreduce: sendbuf\[0\] is MPI\.BOTTOM, expected an array, .+; pass the"
    ):
        parse("Allreduce", "sendbuf", [mpi.BOTTOM, 3, FLOAT], writable=False)
