"""What the compiler makes of operators: the same bits wherever a kernel has a copy of them."""

import re

import pytest

from nvcoll import jit_cuda


@pytest.mark.parametrize("datatype", ["complex64", "complex128"])
def test_products_are_rounded_before_they_are_added(datatype):
    ptx = jit_cuda.kernel_ptx("one_shot", "low_latency", "PROD", datatype, "sm_90", deep=False)
    assert set(re.findall(r"\b(?:mul|fma)\S*\.f\d+", ptx)) == {
        "mul.rn.f32" if datatype == "complex64" else "mul.rn.f64"
    }


@pytest.mark.parametrize(("datatype", "op"), [("float64", "SUM"), ("float64", "PROD"), ("complex128", "SUM")])
def test_a_nan_of_64_bits_is_always_the_same_one(datatype, op):
    ptx = jit_cuda.kernel_ptx("one_shot", "low_latency", op, datatype, "sm_90", deep=False)
    results = re.findall(r"(?:add|mul)\.f64 \s*(%fd\d+),", ptx)
    assert results
    assert set(results) == set(re.findall(r"setp\.nan\.f64 \s*%p\d+, (%fd\d+), \1;", ptx))
