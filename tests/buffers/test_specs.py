"""What verbs take as a buffer: every form of spec over every kind of object, and every refusal."""

import ctypes
import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvcoll.buffers import IN_PLACE, check_pair, is_in_place, parse, parse_device
from nvcoll.errors import ArgumentError
from nvcoll.ops import DATATYPES, FLOAT
from tests.buffers.memory import ALL, KINDS

N = 6  # elements in the tables of forms

# Name: (spec of a buffer of N elements, whether it names the type, first element, count)
FORMS = {
    "buf": (lambda buf, _: buf, False, 0, N),
    "[buf, count]": (lambda buf, _: [buf, 4], False, 0, 4),
    "[buf, numpy count]": (lambda buf, _: [buf, np.int64(4)], False, 0, 4),
    "(buf, count)": (lambda buf, _: (buf, 4), False, 0, 4),
    "[buf, 0]": (lambda buf, _: [buf, 0], False, 0, 0),
    "[buf, None]": (lambda buf, _: [buf, None], False, 0, N),
    "[buf, (count, displ)]": (lambda buf, _: [buf, (3, 2)], False, 2, 3),
    "[buf, [count, displ]]": (lambda buf, _: [buf, [3, 2]], False, 2, 3),
    "[buf, (None, displ)]": (lambda buf, _: [buf, (None, 2)], False, 2, N - 2),
    "[buf, (0, end)]": (lambda buf, _: [buf, (0, N)], False, N, 0),
    "[buf, count, None]": (lambda buf, _: [buf, 4, None], False, 0, 4),
    "[buf, datatype]": (lambda buf, datatype: [buf, datatype], True, 0, N),
    "[buf, name]": (lambda buf, datatype: [buf, datatype.name], True, 0, N),
    "[buf, dtype]": (lambda buf, datatype: [buf, datatype.dtype], True, 0, N),
    "[buf, scalar type]": (lambda buf, datatype: [buf, datatype.dtype.type], True, 0, N),
    "[buf, count, datatype]": (lambda buf, datatype: [buf, 4, datatype], True, 0, 4),
    "(buf, None, datatype)": (lambda buf, datatype: (buf, None, datatype), True, 0, N),
    "[buf, (count, displ), datatype]": (lambda buf, datatype: [buf, (3, 2), datatype], True, 2, 3),
    "[buf, count, displ, datatype]": (lambda buf, datatype: [buf, 3, 2, datatype], True, 2, 3),
}


def kinds(wanted=lambda kind: True):
    skip = pytest.mark.skip(reason="torch is not installed")
    chosen = [pytest.param(kind, id=kind.name, marks=skip if kind.missing else ()) for kind in KINDS if wanted(kind)]
    return pytest.mark.parametrize("kind", chosen)


NO_ELEMENTS = [[None, 0, FLOAT], (None, np.int64(0), FLOAT), [None, FLOAT], [None, None, FLOAT], [None, (0, 0), FLOAT]]


def numbers(datatype, count):
    return (np.arange(count) % 2 if datatype.name == "bool" else np.arange(1, count + 1)).astype(datatype.dtype)


def bytes_of(spec):
    return ctypes.string_at(spec.address, spec.nbytes)


@kinds()
@pytest.mark.parametrize("form", FORMS)
def test_forms(kind, form):
    build, names_type, first, count = FORMS[form]
    for name in (kind.typed or ALL) if names_type else kind.typed:
        datatype = DATATYPES[name]
        values = numbers(datatype, N)
        spec = parse("Allreduce", "sendbuf", build(kind.make(values), datatype), kind.writable)
        gc.collect(0)  # the spec alone keeps the memory
        assert (spec.count, spec.datatype) == (count, datatype)
        assert bytes_of(spec) == values[first : first + count].tobytes()
        assert spec.nbytes == count * datatype.itemsize
        assert spec.aligned


@kinds(lambda kind: kind.writable)
def test_the_memory_is_the_object_s_own(kind):
    buf = kind.make(numbers(FLOAT, N))
    spec = parse("Allreduce", "recvbuf", [buf, (2, 1), FLOAT], True)
    ctypes.memset(spec.address, 0, spec.nbytes)
    after = parse("Allreduce", "sendbuf", [buf, FLOAT], False)
    assert np.frombuffer(bytes_of(after), np.float32).tolist() == [1, 0, 0, 4, 5, 6]


@kinds(lambda kind: kind.empty)
def test_empty_memory(kind):
    spec = parse("Allreduce", "sendbuf", [kind.make(np.empty(0, np.float32)), FLOAT], kind.writable)
    assert (spec.count, spec.datatype) == (0, FLOAT)


@given(st.data())
@settings(max_examples=200)
def test_any_count_and_displacement(data):
    kind = data.draw(st.sampled_from([kind for kind in KINDS if not kind.missing]))
    names = sorted(kind.typed) if kind.typed else list(DATATYPES)
    datatype = DATATYPES[data.draw(st.sampled_from(names))]
    held = data.draw(st.integers(0 if kind.empty else 1, 20))
    count = data.draw(st.none() | st.integers(-2, 24))
    displ = data.draw(st.none() | st.integers(-2, 24))
    values = numbers(datatype, held)
    spec = [kind.make(values), count if displ is None else (count, displ), datatype]
    first = displ or 0
    length = held - first if count is None else count
    if min(first, length) < 0 or first + length > held:
        with pytest.raises(ArgumentError, match=r"^Allreduce: sendbuf .+, expected .+; .+"):
            parse("Allreduce", "sendbuf", spec, False)
    else:
        parsed = parse("Allreduce", "sendbuf", spec, False)
        assert bytes_of(parsed) == values[first : first + length].tobytes()


@given(st.sampled_from(list(DATATYPES)), st.integers(0, 40))
def test_bytes_are_read_as_any_type_that_divides_them(name, nbytes):
    datatype = DATATYPES[name]
    if nbytes % datatype.itemsize:
        with pytest.raises(
            ArgumentError, match=rf"holds {nbytes} bytes, expected a multiple of the {datatype.itemsize}"
        ):
            parse("Allreduce", "sendbuf", [bytes(nbytes), datatype], False)
    else:
        assert parse("Allreduce", "sendbuf", [bytes(nbytes), datatype], False).count == nbytes // datatype.itemsize
    count = nbytes // datatype.itemsize
    assert parse("Allreduce", "sendbuf", [bytes(nbytes), count, datatype], False).count == count


@pytest.mark.parametrize(
    ("buf", "order"),
    [
        (np.float32(3), "A"),
        (np.array(3.0), "A"),
        (np.zeros(5), "A"),
        (np.zeros((5, 1)), "A"),
        (np.zeros((0, 3)), "A"),
        (np.zeros((2, 3)), "C"),
        (np.zeros((2, 3)).T, "F"),
        (np.zeros((2, 3), order="F")[:, 1:], "F"),
        (memoryview(np.zeros((2, 3), order="F")), "F"),
        (np.zeros((4, 3))[1:3], "C"),
    ],
    ids=["scalar", "0-d", "1-d", "column", "empty", "C", "transposed", "F columns", "memoryview F", "rows"],
)
def test_shapes_and_orders(buf, order):
    spec = parse("Allreduce", "sendbuf", buf, False)
    assert (spec.order, spec.count) == (order, np.asarray(buf).size)


def test_odd_bytes_are_taken_and_said_to_be_unaligned():
    memory = bytearray(33)
    addresses = [parse("Allreduce", "sendbuf", [memoryview(memory)[start:], 2, FLOAT], True) for start in range(4)]
    assert [spec.aligned for spec in addresses].count(True) == 1
    complex_number = parse("Allreduce", "sendbuf", np.zeros(3)[1:].view("complex128"), True)
    assert complex_number.aligned


def test_a_bytearray_cannot_be_resized_during_the_call():
    memory = bytearray(8)
    spec = parse("Allreduce", "recvbuf", [memory, FLOAT], True)
    with pytest.raises(BufferError):
        memory.extend(b"more")
    del spec
    memory.extend(b"more")


def test_check_pair_accepts_what_belongs_together():
    values, other = np.zeros((2, 3), np.float32), np.zeros(6, np.float32)
    whole = parse("Allreduce", "sendbuf", values, False)
    for spec in (values, values.copy(), other, [other, 6], [bytearray(24), FLOAT]):
        check_pair("Allreduce", whole, parse("Allreduce", "recvbuf", spec, True))
    halves = [parse("Allreduce", "recvbuf", half, True) for half in (other[:3], other[3:])]
    check_pair("Allreduce", *halves)
    check_pair("Allreduce", *reversed(halves))
    nothing = parse("Allreduce", "sendbuf", np.zeros(0), False)
    check_pair("Allreduce", nothing, nothing)


@pytest.mark.parametrize(
    ("send", "recv", "message"),
    [
        (np.zeros(8, "f4"), np.zeros(6, "f4"), "recvbuf holds 6 float32, sendbuf 8; give both the same count"),
        (
            np.zeros(6, "f8"),
            np.zeros(6, "f4"),
            "recvbuf holds 6 float32, sendbuf 6 float64; give both the same datatype",
        ),
        (
            np.zeros((2, 3)),
            np.zeros((3, 2)).T,
            "sendbuf is in C order, recvbuf in F order, .+; give both the same layout",
        ),
    ],
    ids=["count", "datatype", "order"],
)
def test_check_pair_refuses(send, recv, message):
    specs = parse("Allreduce", "sendbuf", send, False), parse("Allreduce", "recvbuf", recv, True)
    with pytest.raises(ArgumentError, match=f"^Allreduce: {message}"):
        check_pair("Allreduce", *specs)


@pytest.mark.parametrize(("first", "second"), [(0, 2), (2, 0)])
def test_check_pair_refuses_overlap(first, second):
    memory = np.zeros(6, "f4")
    send = parse("Allreduce", "sendbuf", memory[first : first + 4], False)
    recv = parse("Allreduce", "recvbuf", memory[second : second + 4], True)
    with pytest.raises(ArgumentError, match=r"^Allreduce: sendbuf and recvbuf overlap by 8 bytes; pass IN_PLACE or .+"):
        check_pair("Allreduce", send, recv)


def test_in_place_is_one_object():
    import copy
    import pickle

    assert pickle.loads(pickle.dumps(IN_PLACE)) is copy.copy(IN_PLACE) is copy.deepcopy(IN_PLACE) is IN_PLACE
    assert is_in_place(IN_PLACE)
    assert not is_in_place(None)
    assert repr(IN_PLACE) == "nvcoll.IN_PLACE"


@pytest.mark.parametrize("spec", NO_ELEMENTS)
@pytest.mark.parametrize("parse", [parse, parse_device])
def test_none_with_a_datatype_is_no_elements(parse, spec):
    parsed = parse("Allreduce", "sendbuf", spec, True)
    assert (parsed.count, parsed.datatype, parsed.owner) == (0, FLOAT, None)
    check_pair("Allreduce", parsed, parse("Allreduce", "recvbuf", spec, True))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ([None, 1, FLOAT], r"sendbuf\[0\] is None, expected an array"),
        ([None, 0], r"sendbuf\[0\] is None, expected an array"),
        ([None, None], r"sendbuf\[0\] is None, expected an array"),
        ([None, -1, FLOAT], r"sendbuf\[0\] is None, expected an array"),
        ([None, (0, 3), FLOAT], r"sendbuf holds 0 float32, expected 0 from element 3 on"),
    ],
)
@pytest.mark.parametrize("parse", [parse, parse_device])
def test_none_is_nothing_else(parse, spec, text):
    with pytest.raises(ArgumentError, match=text):
        parse("Allreduce", "sendbuf", spec, False)
