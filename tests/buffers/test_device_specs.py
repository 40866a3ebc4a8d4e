"""What verbs take on GPUs: every form of spec over every kind of object, and every refusal."""

import ctypes
import gc
import re
import sys
import types
import weakref

import numpy as np
import pytest

from nvcoll.buffers import IN_PLACE, Spec, as_stream, check_pair, parse, parse_device
from nvcoll.errors import ArgumentError, DatatypeError, StateError
from nvcoll.ops import DATATYPES, FLOAT, MAX
from tests.buffers.gpu import CudaCapsule, CudaInterface, OldCudaCapsule, empty_on_gpu, on_gpu
from tests.buffers.memory import Capsule, Interface
from tests.buffers.test_specs import FORMS, N, bytes_of, numbers

OWN = frozenset(name for name in DATATYPES if DATATYPES[name].dtype.isbuiltin == 1)
ALL = frozenset(DATATYPES)

# Name: (how to make one that holds given values, types that it can tell, ordinal that it tells)
KINDS = {
    "DeviceBuffer": (on_gpu, ALL, 3),
    "view of a DeviceBuffer": (lambda values: on_gpu(values)[...], ALL, 3),
    "__cuda_array_interface__": (CudaInterface, OWN, None),
    "DLPack": (CudaCapsule, ALL, 3),
    "old DLPack": (OldCudaCapsule, ALL, 3),
    "DLPack of pinned memory": (lambda values: CudaCapsule(values, (3, 0)), ALL, None),
    "DLPack of managed memory": (lambda values: CudaCapsule(values, (13, 0)), ALL, None),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("form", FORMS)
def test_forms(kind, form):
    build, names_type, first, count = FORMS[form]
    make, typed, device = KINDS[kind]
    for name in typed:
        datatype = DATATYPES[name]
        values = numbers(datatype, N)
        for writable in (False, True):
            spec = parse_device("Allreduce", "recvbuf", build(make(values.copy()), datatype), writable)
            gc.collect(0)  # the spec alone keeps the memory
            assert (spec.count, spec.datatype, spec.device) == (count, datatype, device)
            assert bytes_of(spec) == values[first : first + count].tobytes()
        assert not names_type or name in typed


@each_kind
def test_the_memory_is_the_object_s_own_and_kept(kind):
    make, *_ = KINDS[kind]
    buf = make(numbers(FLOAT, N))
    spec = parse_device("Allreduce", "recvbuf", [buf, (2, 1), FLOAT], True)
    ctypes.memset(spec.address, 0, spec.nbytes)
    after = parse_device("Allreduce", "sendbuf", buf, False)
    assert np.frombuffer(bytes_of(after), np.float32).tolist() == [1, 0, 0, 4, 5, 6]


@each_kind
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 3, 1), (0, 3)], ids=str)
def test_shapes(kind, shape):
    make, *_ = KINDS[kind]
    values = np.ones(shape, np.float32)
    spec = parse_device("Allreduce", "recvbuf", make(values), True)
    assert (spec.count, spec.nbytes) == (values.size, values.nbytes)
    check_pair("Allreduce", spec, spec)


def test_an_exporter_is_held_as_long_as_the_spec():
    values = np.ones(3, np.float32)
    alive = weakref.ref(values)
    spec = parse_device("Allreduce", "recvbuf", CudaCapsule(values), True)
    del values
    gc.collect()
    assert alive() is not None
    del spec
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(("stream", "told"), [(None, 1), (0, 1), (1, 1), (2, 2), (1 << 40, 1 << 40)])
def test_an_exporter_is_told_the_stream(stream, told):
    for make in (CudaCapsule, OldCudaCapsule):
        buf = make(np.ones(3))
        parse_device("Allreduce", "recvbuf", buf, True, **({} if stream is None else {"stream": stream}))
        assert buf.options == {"stream": told}
    pinned = CudaCapsule(np.ones(3), (3, 0))
    parse_device("Allreduce", "recvbuf", pinned, True, stream=2)
    assert pinned.options == {}  # memory of the host has no streams


class Both(CudaCapsule):
    """Shows an array both ways."""

    def __init__(self, values, version):
        super().__init__(values)
        self.__cuda_array_interface__ = CudaInterface(values).__cuda_array_interface__ | {"version": version}


@pytest.mark.parametrize(("version", "asked"), [(2, {"stream": 7}), (3, None)])
def test_an_interface_that_orders_nothing_is_the_last_resort(version, asked):
    buf = Both(np.ones(3), version)
    spec = parse_device("Allreduce", "recvbuf", buf, True, stream=7)
    assert (spec.address, spec.count) == (buf.values.ctypes.data, 3)
    assert getattr(buf, "options", None) == asked
    alone = CudaInterface(np.ones(3), version=version)
    assert parse_device("Allreduce", "recvbuf", alone, True, stream=7).count == 3


@pytest.mark.parametrize("strides", [None, (12, 4), (12, np.int64(4))])
def test_strides_of_c_order(strides):
    buf = CudaInterface(np.ones((2, 3), np.float32), strides=strides)
    assert parse_device("Allreduce", "recvbuf", buf, True).count == 6
    single = CudaInterface(np.ones((1, 3), np.float32), strides=(999, 4))
    assert parse_device("Allreduce", "recvbuf", single, True).count == 3


def test_bytes_without_a_type_take_one():
    values = np.zeros(3, DATATYPES["bfloat16"].dtype)
    buf = CudaInterface(values.view(np.uint16), typestr="|V2")
    assert parse_device("Allreduce", "recvbuf", [buf, "bfloat16"], True).datatype is DATATYPES["bfloat16"]
    buf = CudaCapsule(np.zeros(8, np.uint8), numbers=(9, 8))
    assert parse_device("Allreduce", "recvbuf", [buf, "f4"], True).count == 2


def test_a_host_spec_has_no_device():
    assert parse("Allreduce", "recvbuf", np.zeros(3), True).device is None
    assert Spec(0, 0, FLOAT, None).device is None


class Proxy:
    """Raises where it is asked for DLPack."""

    def __init__(self, error):
        self.error = error

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        raise self.error


def read_only():
    values = np.zeros(3, np.float32)
    values.flags.writeable = False
    return values


def freed(view=lambda buffer: buffer):
    buffer = empty_on_gpu((4, 3), "f4")[0]
    found = view(buffer)
    buffer.free()
    return found


class JaxArray(CudaInterface):
    """As JAX tells of its arrays, which nobody may write."""


class JaxCapsule(CudaCapsule):
    """The same, through DLPack."""


JaxArray.__module__ = JaxCapsule.__module__ = "jaxlib._jax"


class Incomplete:
    """What an interface shows, but for a field."""

    def __init__(self, shown, field):
        self.__cuda_array_interface__ = {k: v for k, v in shown.__cuda_array_interface__.items() if k != field}


SIX = np.zeros((2, 3), np.float32)
HOST = (
    r"is in memory of the host \({}\), expected memory of a GPU, .+; copy it there .+copy_from\(\), and copy .+ back$"
)

# Name: (spec, exception, what the message says)
REFUSALS = {
    "None": (None, ArgumentError, "recvbuf is None, expected an array"),
    "operator": (MAX, ArgumentError, "recvbuf is an operator, expected an array; pass the operator as op="),
    "IN_PLACE": (IN_PLACE, ArgumentError, "recvbuf is IN_PLACE, expected an array"),
    "number": (3.5, DatatypeError, r"is of type float, expected memory of a GPU \(comm\.empty\(\), .+; pass an array"),
    "long list": ([1.0] * 9, ArgumentError, "is a list of 9 items"),
    "array of the host": (SIX, DatatypeError, HOST.format(r"numpy\.ndarray")),
    "array of the host in a spec": ([SIX, 3], DatatypeError, r"recvbuf\[0\] " + HOST.format(r"numpy\.ndarray")),
    "bfloat16 of the host": (np.zeros(3, DATATYPES["bfloat16"].dtype), DatatypeError, "is in memory of the host"),
    "bytearray": (bytearray(8), DatatypeError, HOST.format(r"builtins\.bytearray")),
    "interface of the host": (Interface(SIX), DatatypeError, HOST.format(r"tests\.Interface")),
    "DLPack of the host": (Capsule(SIX), DatatypeError, HOST.format(r"tests\.Capsule")),
    "DLPack of another GPU": (
        CudaCapsule(SIX, (10, 0)),
        DatatypeError,
        "memory of DLPack's device 10, expected .+; copy it there, and copy the result back$",
    ),
    "freed": (freed(), StateError, "is a DeviceBuffer that was freed, .+, expected living memory; allocate another"),
    "view of freed": (freed(lambda b: b[1:]), StateError, "or a view of one"),
    "freed in a spec": ([freed(), 3], StateError, r"recvbuf\[0\] is a DeviceBuffer that was freed"),
    "read-only": (
        CudaInterface(read_only()),
        ArgumentError,
        "is read-only, expected memory to write .+; give a writable",
    ),
    "JAX": (JaxArray(SIX), ArgumentError, "is read-only, .+ as recvbuf, and take the result from there$"),
    "JAX, DLPack": (JaxCapsule(SIX), ArgumentError, "is read-only"),
    "mask": (CudaInterface(SIX, mask=SIX), ArgumentError, "has a mask, expected an array without; pass its values"),
    "gaps": (CudaInterface(SIX[:, ::2]), ArgumentError, "has gaps .+, expected .+; pass a .+ result back$"),
    "neither order": (CudaInterface(np.zeros((2, 3, 2)).transpose(1, 0, 2)), ArgumentError, "has gaps"),
    "no type": (Incomplete(CudaInterface(SIX), "typestr"), DatatypeError, "cannot be read, .+; pass .+ DLPack"),
    "no data": (CudaInterface(SIX, data=None), DatatypeError, "cannot be read, expected shape, typestr, data"),
    "type of no name": (CudaInterface(SIX, typestr=None), DatatypeError, "expected a type of NumPy's own; pass"),
    "strides of another shape": (CudaInterface(SIX, strides=(4,)), DatatypeError, "cannot be read, expected shape"),
    "nowhere": (CudaInterface(SIX, data=(None, False)), DatatypeError, "cannot be read, expected shape, typestr, data"),
    "reversed": (CudaInterface(SIX[::-1]), ArgumentError, "has gaps"),
    "broadcast": (CudaInterface(np.broadcast_to(np.zeros(1), (3, 2))), ArgumentError, "is read-only"),
    "byte order": (
        CudaInterface(np.zeros(3, np.dtype("f4").newbyteorder("S"))),
        DatatypeError,
        r"expected this machine's byte order; convert",
    ),
    "type without a name": (CudaInterface(SIX, typestr="<f1"), DatatypeError, "'<f1', expected .+; pass .+ DLPack"),
    "void": (CudaInterface(SIX, typestr="|V4"), DatatypeError, r"datatype of recvbuf is .+, expected one of bool"),
    "no type of DLPack's": (
        CudaCapsule(SIX, numbers=(9, 32)),
        DatatypeError,
        'is "DLPack\'s type 9 of 32 bits", expected',
    ),
    "parts of bytes": (CudaCapsule(SIX, numbers=(17, 4)), DatatypeError, "has 1 numbers of 4 bits .+; convert"),
    "count": ([CudaCapsule(SIX), 7], ArgumentError, "recvbuf holds 6 float32, expected 7; give"),
    "displacement": ([on_gpu(SIX), (5, 2)], ArgumentError, "expected 5 from element 2 on"),
    "gradient": (
        Proxy(RuntimeError("requires gradient")),
        DatatypeError,
        r"\(requires gradient\), .+; pass \.detach.+ back$",
    ),
    "refusing exporter": (Proxy(BufferError("no")), DatatypeError, r"cannot be read through DLPack \(no\), expected"),
    "broken exporter": (Proxy(TypeError("no")), DatatypeError, r"cannot be read through DLPack \(no\), expected"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    spec, exception, message = REFUSALS[case]
    with pytest.raises(exception) as caught:
        parse_device("Allreduce", "recvbuf", spec, writable=True)
    assert re.search(message, str(caught.value))
    assert re.match(r"Allreduce: (datatype of )?recvbuf.*, expected .+; .+", str(caught.value))


class CupyArray(CudaCapsule, CudaInterface):
    """Both interfaces, of which CUDA's has bytes without a meaning for types that are not NumPy's own."""

    def __init__(self, values):
        CudaCapsule.__init__(self, values)
        CudaInterface.__init__(self, values)


class JaxArrayOfBfloat16(CudaCapsule):
    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("INVALID_ARGUMENT: __cuda_array_interface__ is not supported for bfloat16 buffers.")


@pytest.mark.parametrize("name", sorted(ALL - OWN))
@pytest.mark.parametrize("kind", [CupyArray, JaxArrayOfBfloat16])
def test_types_without_a_name_come_through_dlpack(kind, name):
    values = numbers(DATATYPES[name], N)
    spec = parse_device("Allreduce", "sendbuf", kind(values), False)
    assert (spec.datatype, spec.device, bytes_of(spec)) == (DATATYPES[name], 3, values.tobytes())
    assert as_stream(None, kind(values)) == 0


def test_what_is_only_sent_may_be_read_only():
    assert parse_device("Allreduce", "sendbuf", CudaInterface(read_only()), False).count == 3
    assert parse_device("Allreduce", "sendbuf", JaxArray(SIX), False).count == 6


class Tensor:
    """What is asked of a CUDA tensor of torch, over memory of the host."""

    def __init__(self, values, **changes):
        self.values = values
        self.device, self.dtype = types.SimpleNamespace(type="cuda", index=2), values.dtype
        self.requires_grad, self.layout = False, "strided"
        vars(self).update(changes)

    @property
    def shape(self):
        return self.values.shape

    def stride(self):
        return tuple(stride // self.values.itemsize for stride in self.values.strides)

    def is_contiguous(self):
        return self.values.flags.c_contiguous

    def is_conj(self):
        return False

    is_neg = is_conj

    def data_ptr(self):
        return self.values.ctypes.data

    def numel(self):
        return self.values.size

    def element_size(self):
        return self.values.itemsize


Tensor.__module__ = "torch"


@pytest.fixture
def torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, strided="strided"))


@pytest.mark.parametrize("show", [CudaInterface, Tensor], ids=["interface", "torch"])
def test_elements_are_taken_in_the_order_of_memory(torch, show):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array, order in ((values, "C"), (values.T, "F"), (np.asfortranarray(values), "F"), (values.ravel(), "A")):
        spec = parse_device("Allreduce", "recvbuf", show(array), True)
        assert (spec.address, spec.count, spec.order) == (array.ctypes.data, 6, order)
    one = values[:1].T  # of one axis, in truth
    assert parse_device("Allreduce", "recvbuf", CudaInterface(one, strides=one.strides), True).order == "A"


def test_tensors(torch):
    values = np.arange(6, dtype=np.float32)
    tensor = Tensor(values)
    spec = parse_device("Allreduce", "recvbuf", [tensor, (3, 2)], True)
    assert (spec.address, spec.count, spec.datatype, spec.device) == (values.ctypes.data + 8, 3, FLOAT, 2)
    assert spec.owner is tensor


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"requires_grad": True}, ArgumentError, r"requires grad, expected .+; pass \.detach\(\)"),
        ({"layout": "sparse"}, ArgumentError, r"is a sparse tensor, expected .+; .+ back: t = x\.to_dense\(\)"),
        ({"is_conj": lambda: True}, ArgumentError, "has not computed yet, expected .+; pass"),
        (
            {"is_contiguous": lambda: False, "stride": lambda: (6, 2)},
            ArgumentError,
            r"has gaps .+ back: t = x\.contiguous\(\); \.\.\.; x\.copy_\(t\)$",
        ),
        ({"device": types.SimpleNamespace(type="cpu")}, DatatypeError, HOST.format(r"torch\.Tensor")),
        (
            {"device": types.SimpleNamespace(type="xpu")},
            DatatypeError,
            "is in memory of .+, expected .+; copy it there",
        ),
        (
            {"device": types.SimpleNamespace(type="meta")},
            DatatypeError,
            "is a meta tensor, which has no memory, .+; make",
        ),
    ],
    ids=["grad", "sparse", "conjugate", "gaps", "host", "elsewhere", "meta"],
)
def test_refusals_of_tensors(torch, changes, exception, message):
    with pytest.raises(exception, match=rf"^Allreduce: recvbuf .*{message}"):
        parse_device("Allreduce", "recvbuf", Tensor(SIX, **changes), True)


@pytest.mark.gpu
def test_tensors_of_torch_on_a_gpu():
    torch = pytest.importorskip("torch")
    for dtype in (torch.bfloat16, torch.float32, torch.complex64, torch.bool):
        tensor = torch.zeros(4, 3, dtype=dtype, device="cuda")
        spec = parse_device("Allreduce", "recvbuf", tensor[1:], True)
        assert (spec.address, spec.count) == (tensor.data_ptr() + 3 * tensor.element_size(), 9)
        assert (spec.datatype.name, spec.device) == (str(dtype).removeprefix("torch."), tensor.device.index)


def test_the_host_s_verbs_refuse_device_buffers():
    with pytest.raises(DatatypeError, match=r"is in memory of a GPU \(DeviceBuffer\)"):
        parse("Allreduce", "recvbuf", empty_on_gpu(3, "f4")[0], True)
