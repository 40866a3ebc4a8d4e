"""The one rounding of small floats, and the division of averages: every bit pattern, every edge."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from nvcoll import settings
from nvcoll.jit import Compiler
from nvcoll.ops import DATATYPES, OPS
from tests.oracle import towards_zero

SMALL = pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)
AVERAGED = [name for name, datatype in DATATYPES.items() if OPS["AVG"].supports(datatype) is None]
INTEGERS = [name for name in AVERAGED if DATATYPES[name].kind in {"int", "uint"}]
ITSELF = [name for name in AVERAGED if DATATYPES[name].accumulate == name]  # no wider accumulators

# NumPy warns of overflow and of signalling NaNs, and both are here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in (cast|isnan)")


@pytest.fixture(scope="module")
def compiler():
    return Compiler(settings.read().cache_dir)


def convert(address, source, dtype, extra=0):
    """Run a widener or finisher on an array."""
    to = np.empty(len(source), dtype)
    FUNCTION(address)(to.ctypes.data, source.ctypes.data, len(source), extra)
    return to


def patterns(name):
    """All values of a float of 8 or 16 bits."""
    bits = 8 * DATATYPES[name].itemsize
    return np.arange(1 << bits, dtype=f"u{bits // 8}").view(DATATYPES[name].dtype)


def assert_same_bits(found, expected):
    """Bitwise equality, but for the payloads of NaNs."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    bits = f"u{found.itemsize}"
    np.testing.assert_array_equal(found[numbers].view(bits), expected[numbers].view(bits))


@SMALL
def test_every_pattern_widens(compiler, name):
    found = convert(compiler.widener(name), patterns(name), np.float32)
    assert_same_bits(found, patterns(name).astype(np.float32))


@SMALL
def test_every_pattern_survives_widening_and_rounding(compiler, name):
    wide = convert(compiler.widener(name), patterns(name), np.float32)
    assert_same_bits(convert(compiler.finisher(name, "float32", False), wide, DATATYPES[name].dtype), patterns(name))


def close_calls(name):
    """Float32 values at and next to the middle between any two neighbours of a small float, and beyond the last."""
    values = patterns(name)
    values = np.unique(values[: len(values) // 2].astype(np.float64))
    values = values[np.isfinite(values)]
    values = np.append(values, 2 * values[-1] - values[-2])  # where infinity begins, were it a number
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf)), values.astype("f4")]
    positive = np.concatenate(near)
    return np.concatenate([positive, -positive])


@SMALL
def test_ties_round_to_even_and_all_else_to_the_nearest(compiler, name):
    source = close_calls(name)
    found = convert(compiler.finisher(name, "float32", False), source, DATATYPES[name].dtype)
    assert_same_bits(found, source.astype(DATATYPES[name].dtype))
    beyond = np.isnan if name == "float8_e4m3fn" else np.isinf  # which has no infinity
    assert beyond(found.astype("f4")).any()
    assert len(source) > 4 * 0.9 * len(patterns(name)) // 2


@SMALL
def test_random_words_round_as_numpy_rounds_them(compiler, name):
    source = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    found = convert(compiler.finisher(name, "float32", False), source, DATATYPES[name].dtype)
    assert_same_bits(found, source.astype(DATATYPES[name].dtype))


@SMALL
def test_a_nan_stays_one_whatever_its_payload(compiler, name):
    words = [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF]
    source = np.array(words * 7, np.uint32).view(np.float32)  # in a pack, and behind it
    found = convert(compiler.finisher(name, "float32", False), source, DATATYPES[name].dtype)
    assert np.isnan(found.astype("f4")).all()
    signs = np.signbit(source) & (DATATYPES[name].itemsize > 1)  # of 8 bits it has none
    np.testing.assert_array_equal(np.signbit(found.astype("f4")), signs)


@SMALL
def test_an_average_is_divided_before_it_is_rounded(compiler, name):
    # Sums of three, beyond the largest number, or near the largest float32; the averages are within the range.
    largest = float(ml_dtypes.finfo(DATATYPES[name].dtype).max)
    scale = largest if name == "bfloat16" else 3 * largest
    source = np.array([1.0, -0.7, 0.1, 0.0, 0.3], np.float32) * np.float32(scale)
    found = convert(compiler.finisher(name, "float32", True), source, DATATYPES[name].dtype, 3)
    assert np.isfinite(found.astype("f4")).all()
    assert_same_bits(found, (source / np.float32(3)).astype(DATATYPES[name].dtype))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 127, 128, 129, 130, 200, 255, 256, 257, 1000, 32768, 65536, 65537])
@pytest.mark.parametrize("name", INTEGERS)
def test_averages_of_integers_go_towards_zero(compiler, name, ranks):
    info = np.iinfo(DATATYPES[name].dtype)
    edges = {info.min, info.min + 1, -ranks - 1, -ranks, -ranks + 1, -2, -1, 0, 1, 2, ranks - 1, ranks, ranks + 1, 100}
    edges |= {info.max // 2, info.max - 1, info.max}
    small = range(max(info.min, -130), 131)
    source = np.array(sorted(v for v in {*edges, *small} if info.min <= v <= info.max), DATATYPES[name].dtype)
    found = convert(compiler.finisher(name, name, True), source, source.dtype, ranks)
    np.testing.assert_array_equal(found, towards_zero(source, ranks))


@pytest.mark.parametrize("name", sorted(set(ITSELF) - set(INTEGERS)))
def test_averages_of_floats_are_quotients(compiler, name):
    dtype = DATATYPES[name].dtype
    reals = np.dtype(f"f{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}")
    values = np.random.default_rng(1).normal(size=262).astype(reals)
    values[::17], values[5::17] = np.inf, -0.0
    for ranks in (2, 3, 7, 300):
        found = convert(compiler.finisher(name, name, True), values.view(dtype), dtype, ranks)
        assert_same_bits(found.view(reals), values / reals.type(ranks))


@pytest.mark.parametrize("name", AVERAGED)
def test_lengths_around_packs(compiler, name):
    datatype = DATATYPES[name]
    wide = np.dtype(datatype.accumulate)
    address = compiler.finisher(name, datatype.accumulate, True)
    source = np.arange(131).astype(wide)
    whole = convert(address, source, datatype.dtype, 3)
    for count in range(131):
        to = np.full(count * datatype.itemsize + 64, 0xA5, np.uint8)
        FUNCTION(address)(to.ctypes.data, source.ctypes.data, count, 3)
        assert to[: count * datatype.itemsize].tobytes() == whole[:count].tobytes()
        assert (to[count * datatype.itemsize :] == 0xA5).all()


@pytest.mark.parametrize("name", ITSELF)
def test_the_result_may_take_the_place_of_its_source(compiler, name):
    datatype = DATATYPES[name]
    source = np.arange(77).astype(datatype.dtype)
    address = compiler.finisher(name, name, True)
    expected = convert(address, source, source.dtype, 3)
    FUNCTION(address)(source.ctypes.data, source.ctypes.data, len(source), 3)
    assert source.tobytes() == expected.tobytes()
