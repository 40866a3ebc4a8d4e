"""The reference must find what is wrong, and let pass what is right."""

import numpy as np
import pytest

from nvcoll.ops import DATATYPES, OPS
from tests.oracle import COMBINE, assert_reduced, random_data, reduce_all, supported, tolerance, towards_zero

PAIRS = pytest.mark.parametrize(("datatype", "op"), supported())
COUNT = 300


def inputs(datatype, op, n_ranks, seed=0):
    rng = np.random.default_rng(seed)
    return [random_data(rng, datatype, op, COUNT) for _ in range(n_ranks)]


def reduced(arrays, op, datatype, order=None, accumulate=None):
    """Combine as a rank would, in a given order of ranks and type."""
    datatype = DATATYPES[datatype]
    working = [arrays[rank].astype(accumulate or datatype.accumulate) for rank in order or range(len(arrays))]
    result = working[0]
    for array in working[1:]:
        result = COMBINE[op](result, array).astype(result.dtype)
    if OPS[op].kind == "logical":
        result = result != 0
    if op == "AVG":
        result = towards_zero(result, len(arrays)) if datatype.kind in {"int", "uint"} else result / len(arrays)
    return result.astype(datatype.dtype)


@PAIRS
def test_right_results_pass_in_any_order(datatype, op):
    for n_ranks in (1, 2, 3, 16, 64):
        arrays = inputs(datatype, op, n_ranks)
        expected, bound = reduce_all(arrays, op, datatype), tolerance(datatype, op, n_ranks)
        for order in (range(n_ranks), range(n_ranks - 1, -1, -1)):
            result = reduced(arrays, op, datatype, order)
            assert_reduced(result, arrays, op, datatype)
            np.testing.assert_allclose(result.astype(expected.dtype), expected, rtol=bound, atol=bound)


@PAIRS
def test_a_rank_that_is_missing_or_counted_twice_is_found(datatype, op):
    idempotent = op in {"MIN", "MAX", "LAND", "LOR", "BAND", "BOR"}
    for n_ranks in (2, 5):
        arrays = inputs(datatype, op, n_ranks)
        with pytest.raises(AssertionError):
            assert_reduced(reduced([*arrays[1:], arrays[1]], op, datatype), arrays, op, datatype)
        if not idempotent:
            with pytest.raises(AssertionError):
                assert_reduced(reduced([*arrays, arrays[0]], op, datatype), arrays, op, datatype)


@PAIRS
def test_a_single_wrong_element_is_found(datatype, op):
    arrays = inputs(datatype, op, 3)
    result = reduced(arrays, op, datatype)
    spoiled = result.copy()
    spoiled[-1:] = spoiled[-1:] == 0  # 0 becomes 1, and everything else 0
    with pytest.raises(AssertionError):
        assert_reduced(spoiled, arrays, op, datatype)


@pytest.mark.parametrize("datatype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["SUM", "AVG"])
def test_rounding_to_16_bits_at_every_step_is_found(datatype, op):
    arrays = inputs(datatype, op, 16)
    with pytest.raises(AssertionError, match="elements are wrong, the first at "):
        assert_reduced(reduced(arrays, op, datatype, accumulate=arrays[0].dtype), arrays, op, datatype)


@pytest.mark.parametrize("op", ["MIN", "MAX"])
@pytest.mark.parametrize("datatype", ["float16", "bfloat16", "float32", "float64"])
def test_nan_propagates(datatype, op):
    arrays = inputs(datatype, op, 3)
    arrays[1][7] = np.nan
    assert np.flatnonzero(np.isnan(reduce_all(arrays, op, datatype))).tolist() == [7]
    assert_reduced(reduced(arrays, op, datatype), arrays, op, datatype)
    lost = reduced(arrays, op, datatype)
    lost[7] = 0
    with pytest.raises(AssertionError):
        assert_reduced(lost, arrays, op, datatype)


@pytest.mark.parametrize(
    ("op", "datatype", "arrays", "expected"),
    [
        ("SUM", "int8", [[100], [100]], [-56]),
        ("PROD", "uint8", [[20], [20]], [144]),
        ("AVG", "int32", [[-3, 3], [0, 0]], [-1, 1]),
        ("AVG", "int64", [[-(2**63)], [0]], [-(2**62)]),
        ("AVG", "uint8", [[3], [4]], [3]),
        ("AVG", "float32", [[1], [2]], [1.5]),
        ("AVG", "complex64", [[1j], [2]], [1 + 0.5j]),
        ("LAND", "int32", [[2, 0, 4], [1, 5, 0]], [1, 0, 0]),
        ("LOR", "uint8", [[2, 0], [0, 0]], [1, 0]),
        ("LXOR", "int16", [[2, 2], [3, 0]], [0, 1]),
        ("LXOR", "bool", [[True], [True]], [False]),
        ("BXOR", "bool", [[True, True], [True, False]], [False, True]),
        ("MIN", "bool", [[True, True], [True, False]], [True, False]),
        ("BAND", "uint16", [[6], [3]], [2]),
    ],
)
def test_known_results(op, datatype, arrays, expected):
    arrays = [np.array(array, DATATYPES[datatype].dtype) for array in arrays]
    result = reduce_all(arrays, op, datatype)
    assert result.tolist() == expected
    assert result.dtype == DATATYPES[datatype].dtype or DATATYPES[datatype].kind in {"float", "complex"}


@PAIRS
def test_random_data_has_the_type_and_no_extremes(datatype, op):
    [data] = inputs(datatype, op, 1)
    assert (data.dtype, data.shape) == (DATATYPES[datatype].dtype, (COUNT,))
    assert len(np.unique(data.astype("c16"))) > 1
    assert random_data(np.random.default_rng(0), datatype, op, 0).shape == (0,)
    if DATATYPES[datatype].kind == "float":
        assert np.abs(data.astype("f8")).max() <= 2
