"""Operators and datatypes: registries, names, what mixes with what, and foreign handles."""

import copy
import ctypes
import pickle
import re
import sys

import numpy as np
import pytest

import nvcoll
from nvcoll import ops
from nvcoll.errors import DatatypeError
from nvcoll.ops import DATATYPES, MPI_NAMES, OPS, as_datatype, as_op

ARITHMETIC = {"SUM", "PROD", "AVG"}
ORDER = {"MIN", "MAX"}
LOGIC = {"LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR"}
ALLOWED = {
    "bool": ORDER | LOGIC,
    "int": ARITHMETIC | ORDER | LOGIC,
    "uint": ARITHMETIC | ORDER | LOGIC,
    "float": ARITHMETIC | ORDER,
    "complex": ARITHMETIC,
}

each_datatype = pytest.mark.parametrize("datatype", DATATYPES.values(), ids=DATATYPES)
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@pytest.fixture(scope="session")
def mpi():
    """Return mpi4py.MPI, without starting MPI if nobody has: recognising a handle takes no call of MPI."""
    pytest.importorskip("mpi4py").rc.initialize = False
    return pytest.importorskip("mpi4py.MPI")


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


def test_the_registries_hold_what_the_documentation_names():
    assert " ".join(OPS) == "SUM PROD MIN MAX AVG LAND LOR LXOR BAND BOR BXOR"
    assert " ".join(DATATYPES) == (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float16 bfloat16 "
        "float32 float64 complex64 complex128"
    )


@each_op
def test_operators_are_constants_of_the_module(op):
    assert getattr(ops, op.name) is op is as_op(op)
    assert op.commutative
    assert op.Is_commutative()
    assert op.kind == {"M": "order", "L": "logical", "B": "bitwise"}.get(op.name[0], "arithmetic")


@each_datatype
def test_a_datatype_agrees_with_its_numpy_dtype(datatype):
    dtype = datatype.dtype
    assert (dtype.name, dtype.itemsize, dtype.isnative) == (datatype.name, datatype.itemsize, True)
    assert (datatype.Get_size(), datatype.size, datatype.Get_name()) == (datatype.itemsize, dtype.itemsize, dtype.name)
    kinds = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex", "V": "float"}  # V: of ml_dtypes
    assert datatype.kind == kinds[dtype.kind]


@each_datatype
def test_small_floats_accumulate_in_float32_and_all_else_in_itself(datatype):
    small = {"float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"}
    assert datatype.accumulate == ("float32" if datatype.name in small else datatype.name)


def test_codes_tell_datatypes_apart():
    assert len({datatype.code for datatype in DATATYPES.values()}) == len(DATATYPES)
    for datatype in DATATYPES.values():
        assert datatype.code & 255 == datatype.itemsize


@each_op
@each_datatype
def test_supports(op, datatype):
    reason = op.supports(datatype)
    if op.name in ALLOWED[datatype.kind] - ({"PROD"} if datatype.name.startswith("float8") else set()):
        assert reason is None
    else:
        assert re.fullmatch(rf"{op.name} is defined for .+, the buffers hold {datatype.name}; .+", reason)


@pytest.mark.parametrize("value", [*OPS.values(), *DATATYPES.values()], ids=repr)
def test_constants_cannot_be_changed_and_stay_the_same_object(value):
    with pytest.raises(AttributeError):
        value.name = "other"
    assert not hasattr(value, "__dict__")
    assert pickle.loads(pickle.dumps(value)) is value
    assert copy.deepcopy(value) is copy.copy(value) is value
    assert value.name in repr(value)


@each_datatype
def test_datatypes_are_found_by_all_their_names(datatype):
    for name in (datatype, datatype.name, datatype.dtype, datatype.dtype.type):
        assert as_datatype(name) is datatype
    assert as_datatype(np.empty(1, datatype.dtype).dtype) is datatype


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("f", "float32"),
        ("d", "float64"),
        ("e", "float16"),
        ("?", "bool"),
        ("F", "complex64"),
        ("i4", "int32"),
        ("=u2", "uint16"),
        (bool, "bool"),
        (float, "float64"),
        (complex, "complex128"),
        (ctypes.c_float, "float32"),
        (ctypes.c_uint8, "uint8"),
        (np.longlong, "int64"),
        (np.dtype("q"), "int64"),
    ],
)
def test_what_numpy_takes_for_a_dtype(given, name):
    assert as_datatype(given) is DATATYPES[name]


@pytest.mark.parametrize(
    ("name", "c_type"),
    [
        ("SHORT", ctypes.c_short),
        ("INT", ctypes.c_int),
        ("LONG", ctypes.c_long),
        ("LONG_LONG", ctypes.c_longlong),
        ("UNSIGNED_SHORT", ctypes.c_ushort),
        ("UNSIGNED", ctypes.c_uint),
        ("UNSIGNED_LONG", ctypes.c_ulong),
        ("UNSIGNED_LONG_LONG", ctypes.c_ulonglong),
        ("AINT", ctypes.c_ssize_t),
        ("FLOAT", ctypes.c_float),
        ("DOUBLE", ctypes.c_double),
        ("SIGNED_CHAR", ctypes.c_byte),
        ("UNSIGNED_CHAR", ctypes.c_ubyte),
        ("C_BOOL", ctypes.c_bool),
    ],
)
def test_c_types_have_their_width(name, c_type):
    assert getattr(ops, name).dtype == np.dtype(c_type)
    assert MPI_NAMES[name] is getattr(ops, name)


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ("no such type", "'no such type'"),
        (None, "None"),
        (3, "of type int"),
        (np.longdouble, "longdouble" if np.longdouble(0).itemsize == 8 else str(np.dtype(np.longdouble))),
        (object, "object"),
        ("S4", "|S4"),
        ("datetime64[s]", "datetime64[s]"),
        ([("x", "f4"), ("y", "f4")], "[('x', '<f4'), ('y', '<f4')]"),
    ],
)
def test_unknown_types_are_refused(given, fact):
    pattern = rf"Allreduce: recvbuf is {re.escape(fact)}, expected .+; (pass|convert:) .+"
    with pytest.raises(DatatypeError, match=pattern):
        as_datatype(given, "Allreduce", "recvbuf")


@pytest.mark.parametrize(
    ("name", "cure"),
    [("float8_e4m3fnuz", "x.to(...)"), ("complex32", "x.to(...)"), ("qint8", "x.dequantize()")],
)
def test_types_of_torch_are_refused_with_its_own_conversion(name, cure):
    dtype = type("dtype", (), {"__module__": "torch", "__repr__": lambda self: f"torch.{name}"})()
    pattern = rf"^Allreduce: recvbuf is torch\.{name}, expected one of .+; convert: x = {re.escape(cure)}$"
    with pytest.raises(DatatypeError, match=pattern):
        as_datatype(dtype, "Allreduce", "recvbuf")


def test_foreign_byte_order_is_refused_with_the_conversion():
    foreign = np.dtype("f4").newbyteorder("S")
    with pytest.raises(DatatypeError, match=r"byte order; convert: x = x\.astype\('float32'\)"):
        as_datatype(foreign)


@pytest.mark.parametrize(("given", "fact"), [(max, "builtin_function_or_method"), ("SUM", "'SUM'"), (None, "None")])
def test_what_is_no_operator_is_refused(given, fact):
    with pytest.raises(
        DatatypeError, match=rf"^Allreduce: op is .*{fact}, expected one of SUM, .+; pass .+nvcoll\.SUM$"
    ):
        as_op(given, "Allreduce")


@pytest.mark.parametrize("name", [name for name in OPS if name != "AVG"])
def test_mpi4py_operators(mpi, name):
    assert as_op(getattr(mpi, name)) is OPS[name]
    assert as_op(mpi.Op(getattr(mpi, name))) is OPS[name]  # another object, the same handle


@pytest.mark.parametrize("name", ["MINLOC", "MAXLOC", "REPLACE", "NO_OP", "OP_NULL"])
def test_mpi4py_operators_without_counterpart_are_refused(mpi, name):
    with pytest.raises(DatatypeError, match=rf"^Allreduce: op is MPI\.{name}, expected .+; reduce with mpi4py$"):
        as_op(getattr(mpi, name), "Allreduce")


@pytest.mark.parametrize("name", MPI_NAMES)
def test_mpi4py_datatypes(mpi, name):
    handle = getattr(mpi, name, mpi.DATATYPE_NULL)  # some names are younger than mpi4py 4.0
    if handle == mpi.DATATYPE_NULL:
        assert name in {"BFLOAT16", "BFLOAT16_T", "FLOAT16", "FLOAT16_T", "FLOAT32_T", "FLOAT64_T"}
    else:
        assert as_datatype(handle) is MPI_NAMES[name]
        assert as_datatype(mpi.Datatype(handle)) is MPI_NAMES[name]


@pytest.mark.parametrize("name", ["DATATYPE_NULL", "LOGICAL", "WCHAR", "FLOAT_INT", "PACKED", "LONG_DOUBLE"])
def test_mpi4py_datatypes_without_counterpart_are_refused(mpi, name):
    with pytest.raises(DatatypeError, match=rf"^Allreduce: sendbuf is MPI\.{name}, expected one of bool, .+; .+"):
        as_datatype(getattr(mpi, name), "Allreduce", "sendbuf")


def test_mpi4py_handles_that_users_made_are_refused(run_command):
    pytest.importorskip("mpi4py")
    program = """
from mpi4py import MPI
from nvcoll.ops import as_datatype, as_op
made = MPI.FLOAT.Create_contiguous(2), MPI.Op.Create(lambda a, b, datatype: None)
for convert, handle in zip((as_datatype, as_op), made):
    try:
        convert(handle)
    except TypeError as exc:
        print(exc)
    handle.Free()
"""
    status, output = run_command([sys.executable, "-c", program])
    assert status == 0, output
    assert re.search("is a derived MPI datatype, expected the type of one element; copy", output)
    assert re.search(r"op is an operator made by MPI\.Op\.Create, expected one of SUM, .+; reduce with mpi4py", output)


def test_nothing_is_imported_before_it_is_used(run_command):
    program = "import sys, nvcoll.ops as o; o.as_op(o.SUM); o.as_datatype('bfloat16'); print(*sys.modules)"
    status, output = run_command([sys.executable, "-c", program])
    assert status == 0, output
    assert not {"mpi4py", "ml_dtypes", "torch"} & set(output.split())


@each_datatype
def test_torch_datatypes(torch, datatype):
    assert as_datatype(getattr(torch, datatype.name)) is datatype


def test_torch_datatypes_without_counterpart_are_refused(torch):
    with pytest.raises(DatatypeError, match=r"is torch\.float8_e5m2fnuz, expected one of bool, "):
        as_datatype(torch.float8_e5m2fnuz)


def test_every_datatype_is_exported_by_its_mpi_name():
    assert set(nvcoll.ops.MPI_NAMES) <= set(nvcoll.__all__)
    assert all(getattr(nvcoll, name) is value for name, value in nvcoll.ops.MPI_NAMES.items())
