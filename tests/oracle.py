"""What a reduction must give, in plain NumPy: the reference that every other test compares with.

``from tests.oracle import assert_reduced, random_data, reduce_all, tolerance``
"""

import numpy as np

from nvcoll.ops import DATATYPES, OPS, as_datatype, as_op

RANKS = 64  # random_data keeps the averages of integers of that many ranks free of overflow

# Spacing of numbers around 1; complex numbers have that of their parts.
EPSILON = {
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
    "complex64": 2.0**-23,
    "complex128": 2.0**-52,
}

# Smallest positive numbers: below them, results are rounded to zero.
NORMAL = {"float8_e4m3fn": 2.0**-6, "float8_e5m2": 2.0**-14, "float16": 2.0**-14}  # the others: 2**-126 or smaller
SMALLEST = {name: spacing * NORMAL.get(name, 2.0**-126) for name, spacing in EPSILON.items()}

COMBINE = {
    "SUM": np.add,
    "AVG": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,  # these two propagate NaN
    "MAX": np.maximum,
    "LAND": np.logical_and,
    "LOR": np.logical_or,
    "LXOR": np.logical_xor,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}


def supported():
    """Return all pairs of datatype and operator name that nvcoll defines: [("bool", "MIN"), ...]."""
    return [(name, op) for name in DATATYPES for op in OPS if OPS[op].supports(DATATYPES[name]) is None]


def working_dtype(datatype):
    """NumPy's dtype in which the reference computes: the same for integers and bool, the widest for floats."""
    wide = {"float": np.float64, "complex": np.complex128}.get(datatype.kind)
    return datatype.dtype if wide is None else np.dtype(wide)


def reduce_all(arrays, op, datatype):
    """Combine the arrays of all ranks.

    Integers wrap around in their own type, and their average is the wrapped sum divided towards zero. Floats are
    combined in float64, complex numbers in complex128, and not rounded to `datatype`.
    """
    op, datatype = as_op(OPS.get(op, op)), as_datatype(datatype)
    stack = np.stack([np.asarray(array).astype(working_dtype(datatype)) for array in arrays])
    if datatype.kind == "bool" and op.kind in {"logical", "bitwise", "order"}:
        return COMBINE[op.name].reduce(stack, axis=0).astype(bool)
    result = COMBINE[op.name].reduce(stack, axis=0, dtype=bool if op.kind == "logical" else stack.dtype)
    if op.name == "AVG":
        result = towards_zero(result, len(arrays)) if datatype.kind in {"int", "uint"} else result / len(arrays)
    return result.astype(stack.dtype)


def towards_zero(total, divisor):
    """Integer quotient as in C; computed without the sign, whose largest value has no counterpart in the type."""
    quotient = np.array([abs(int(value)) // divisor * (-1 if value < 0 else 1) for value in total.flat], object)
    return quotient.reshape(total.shape).astype(total.dtype)


def tolerance(datatype, op, n_ranks):
    """How far results on `random_data` may be from `reduce_all`, as both rtol and atol; 0.0 demands equality."""
    op, datatype = as_op(OPS.get(op, op)), as_datatype(datatype)
    total = 1 if op.name == "AVG" else n_ranks
    return sum(roundings(datatype, op, n_ranks, 2 * total))  # no value of random_data is above 2


def rounds(datatype, op):
    """Whether results are rounded: sums of floats; the products of random_data are powers of two."""
    return datatype.kind in {"float", "complex"} and op.name in {"SUM", "AVG"}


def roundings(datatype, op, n_ranks, total):
    """Relative error of the one rounding to `datatype`, and absolute error of combining values that add up to `total`.

    Values are combined in float32 for smaller floats, in `datatype` itself otherwise, with a rounding for each rank.
    """
    if not rounds(datatype, op):
        return 0.0, 0.0
    return EPSILON[datatype.name] / 2 * (1 + 2.0**-10), EPSILON[datatype.accumulate] * n_ranks * total


def assert_reduced(result, arrays, op, datatype):
    """Check one rank's result against the arrays that all ranks put in, element by element.

    Sums of floats may be off by what their roundings allow, whatever the order of the ranks; all else is exact.
    """
    op, datatype = as_op(OPS.get(op, op)), as_datatype(datatype)
    result, expected = np.asarray(result), reduce_all(arrays, op, datatype)
    assert result.shape == expected.shape, f"shape {result.shape}, expected {expected.shape}"
    assert result.dtype == datatype.dtype, f"dtype {result.dtype}, expected {datatype.dtype}"
    values = result.astype(expected.dtype)
    if not rounds(datatype, op):
        np.testing.assert_array_equal(values, expected)
        return
    total = sum(np.abs(np.asarray(array).astype(expected.dtype)) for array in arrays)
    relative, absolute = roundings(datatype, op, len(arrays), total / (len(arrays) if op.name == "AVG" else 1))
    error = np.abs(values - expected)
    wrong = ~(error <= relative * np.abs(expected) + absolute + SMALLEST[datatype.name])
    assert not wrong.any(), (
        f"{op.name} of {datatype.name} over {len(arrays)} ranks: {wrong.sum()} of {wrong.size} elements are wrong, "
        f"the first at {np.argmax(wrong)}: {values.flat[np.argmax(wrong)]}, expected {expected.flat[np.argmax(wrong)]}"
    )


def random_data(rng, datatype, op, count):
    """One rank's input of `count` elements, of a kind that shows errors of `op`.

    Sums and extremes of floats: values between -2 and 2, zeros of both signs among them. Products: signed powers of
    two, mostly ones, so that products of many ranks are exact and in range. Integers: the whole range of the type
    (sums and products wrap around), or a 64th of it for averages. Logical operators: half of the elements zero.
    """
    op, datatype = as_op(OPS.get(op, op)), as_datatype(datatype)
    if op.kind == "logical" or datatype.kind == "bool":
        chance = 0.5 if op.name in {"LXOR", "BXOR"} else 0.1 if op.name in {"LOR", "BOR", "MAX"} else 0.9
        return np.where(rng.random(count) < chance, integers(rng, datatype, count, 1) | 1, 0).astype(datatype.dtype)
    if datatype.kind in {"int", "uint"}:
        return integers(rng, datatype, count, RANKS if op.name == "AVG" else 1)
    if datatype.kind == "complex":
        if op.name == "PROD":
            return (powers_of_two(rng, count) * rng.choice([1, 1j], count)).astype(datatype.dtype)
        return (floats(rng, count) + 1j * floats(rng, count)).astype(datatype.dtype)
    return (powers_of_two if op.name == "PROD" else floats)(rng, count).astype(datatype.dtype)


def integers(rng, datatype, count, fraction):
    """Integers over the range of the type, or over a fraction of it; bools are 0 and 1."""
    if datatype.kind == "bool":
        return rng.integers(0, 2, count)
    info = np.iinfo(datatype.dtype)
    low, high = int(info.min / fraction), info.max // fraction
    return rng.integers(low, high, count, dtype=datatype.dtype, endpoint=True)


def floats(rng, count):
    """Values between -2 and 2 of many magnitudes, one in 16 a zero of either sign."""
    values = rng.uniform(-1, 1, count) * 2.0 ** rng.integers(-6, 2, count)
    return np.where(rng.random(count) < 1 / 16, np.copysign(0.0, values), values)


def powers_of_two(rng, count):
    """Factors of which hundreds can be multiplied without leaving the range of any float."""
    return rng.choice([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 2], count) * rng.choice([-1, 1], count)
