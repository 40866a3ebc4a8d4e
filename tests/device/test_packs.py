"""Operators on packs: every operator and type to the last bit, special values among the data, at every length."""

import ctypes
import itertools

import numpy as np
import pytest

from nvcoll import settings
from nvcoll.jit import Compiler
from nvcoll.ops import DATATYPES
from tests.oracle import COMBINE, random_data, supported

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 5)
LENGTHS = range(131)
ITSELF = [(name, op) for name, op in supported() if DATATYPES[name].accumulate == name]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.0**-140, -(2.0**-140), 3e38, -3e38]
MARGIN, FILL = 64, 0xA5

# What NumPy warns of here is what is wanted: overflow, and infinity less infinity.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def compiler():
    return Compiler(settings.read().cache_dir)


def operands(name, op):
    """Two arrays of random data and, where the type has them, all pairs of special values."""
    rng = np.random.default_rng(list(map(ord, name + op)))
    left, right = (random_data(rng, name, op, LENGTHS[-1]) for _ in range(2))
    datatype = DATATYPES[name]
    if datatype.kind in {"float", "complex"}:
        pairs = np.array(list(itertools.product(SPECIAL, repeat=2)), np.float64)
        pairs = rng.permutation(pairs)[: LENGTHS[-1] // 2].astype(reals(datatype.dtype))
        if datatype.kind == "complex":
            pairs = (pairs[:, ::-1] + 1j * np.roll(pairs, 7, axis=0)).astype(datatype.dtype) if op != "PROD" else pairs
        left[1 : 2 * len(pairs) : 2], right[1 : 2 * len(pairs) : 2] = pairs.T
    elif datatype.kind in {"int", "uint"}:
        info = np.iinfo(datatype.dtype)
        edges = np.array(list(itertools.product([info.min, info.max, 0, 1], repeat=2)), datatype.dtype)
        left[: 2 * len(edges) : 2], right[: 2 * len(edges) : 2] = edges.T
    return left, right


def reals(dtype):
    """The type of the parts of complex numbers; floats are their own."""
    return np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype


def expected(left, right, name, op):
    """The operator in NumPy, one rounding a step."""
    datatype = DATATYPES[name]
    if datatype.kind == "float" and op in {"MIN", "MAX"}:  # which zero, and which NaN, is ours to say
        keep = np.isnan(left) | ~(np.isnan(right) | ~((left < right) if op == "MIN" else (left > right)))
        return np.where(keep, left, right)
    if datatype.kind == "complex" and op == "PROD":
        (a, b), (c, d) = ((x.real.copy(), x.imag.copy()) for x in (left, right))
        result = np.empty_like(left)
        result.real, result.imag = a * c - b * d, a * d + b * c
        return result
    return COMBINE[op](left, right).astype(left.dtype)


def assert_same(found, wanted):
    """Bitwise equality; a NaN that arithmetic makes may be any."""
    parts = reals(found.dtype)
    if parts.kind == "f" and found.tobytes() != wanted.tobytes():
        found, wanted = found.copy(), wanted.copy()
        found, wanted = found.view(parts), wanted.view(parts)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        found, wanted = np.nan_to_num(found, nan=1), np.nan_to_num(wanted, nan=1)
    assert found.tobytes() == wanted.tobytes()


class Memory:
    """An array in the middle of guarded bytes, off alignment by `shift`."""

    def __init__(self, data, shift):
        self.all = np.full(data.nbytes + 2 * MARGIN + shift, FILL, np.uint8)
        self.array = self.all[MARGIN + shift : MARGIN + shift + data.nbytes].view(data.dtype)
        self.array[...] = data
        self.address = self.all.ctypes.data + MARGIN + shift
        self.shift = shift

    def guarded(self):
        first = MARGIN + self.shift
        return (self.all[:first] == FILL).all() and (self.all[first + self.array.nbytes :] == FILL).all()


@pytest.mark.parametrize(("name", "op"), ITSELF)
def test_every_length_and_alignment_into_any_of_its_operands(compiler, name, op):
    reduce = FUNCTION(compiler.reducer(op, name))
    left, right = operands(name, op)
    whole, doubled = expected(left, right, name, op), expected(left, left, name, op)
    for count, (turn, into) in itertools.product(LENGTHS, enumerate(("new", "left", "right", "both"))):
        shift = (count + turn) % 2
        a, b = Memory(left[:count], shift), Memory(right[:count], 2 * shift)
        if into == "both":
            b = a
        to = {"left": a, "right": b, "both": a}.get(into) or Memory(np.zeros_like(left[:count]), 3 * shift)
        reduce(to.address, to.address, a.address, b.address, count)
        assert_same(to.array, (doubled if into == "both" else whole)[:count])
        assert to.guarded()
        for memory, before in ((a, left), (b, right)):
            assert memory is to or memory.array.tobytes() == before[:count].tobytes()


@pytest.mark.parametrize(("name", "op"), [("float32", "SUM"), ("uint8", "BAND"), ("complex128", "PROD")])
def test_a_second_place_which_may_be_an_operand(compiler, name, op):
    reduce = FUNCTION(compiler.reducer(op, name))
    left, right = operands(name, op)
    whole = expected(left, right, name, op)
    for count, into in itertools.product(LENGTHS, ("new", "left", "right")):
        a, b = Memory(left[:count], 0), Memory(right[:count], 1)
        to = a if into == "right" else b if into == "left" else Memory(np.zeros_like(left[:count]), 2)
        also = {"left": a, "right": b}.get(into) or Memory(np.zeros_like(left[:count]), 3)
        reduce(to.address, also.address, a.address, b.address, count)
        for memory in (to, also):
            assert_same(memory.array, whole[:count])
            assert memory.guarded()


@pytest.mark.parametrize("op", ["MIN", "MAX"])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_a_nan_keeps_its_payload_and_the_lower_rank_s_wins(compiler, name, op):
    dtype = DATATYPES[name].dtype
    quiet = np.array(np.nan, dtype).view(f"u{dtype.itemsize}")
    first, second, one = (quiet | 0x123).view(dtype), (quiet | 0x456).view(dtype), np.ones((), dtype)
    pairs = [(first, second, first), (second, first, second), (first, one, first), (one, second, second)]
    left, right, wanted = (np.array([pair[k] for pair in pairs] * 40) for k in range(3))
    to = np.empty_like(left)
    FUNCTION(compiler.reducer(op, name))(to.ctypes.data, to.ctypes.data, left.ctypes.data, right.ctypes.data, len(to))
    assert to.tobytes() == wanted.tobytes()


def test_types_that_share_a_text_share_a_kernel(compiler):
    for name, op in ITSELF:
        same = "uint8" if name == "bool" else "u" + name if name.startswith("int") else name
        ordered = name.startswith("int") and op in {"MIN", "MAX"}  # only order knows of signs
        assert (compiler.reducer(op, name) == compiler.reducer(op, same)) is not ordered
    assert compiler.reducer("AVG", "float32") == compiler.reducer("SUM", "float32")
    assert compiler.reducer("PROD", "float32") != compiler.reducer("SUM", "float32")
