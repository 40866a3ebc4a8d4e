"""Choices among arguments of kernels."""

import pytest

from nvcoll.device.cuda.layout import NEAR
from nvcoll.device.cuda.ptx import pick


@pytest.mark.parametrize("index", range(NEAR))
def test_a_tree_of_choices_finds_each_of_the_near_ranks(index):
    bits = [bool(index >> k & 1) for k in range(NEAR.bit_length() - 1)]
    assert pick(list(range(NEAR)), bits, lambda bit, one, other: one if bit else other) == index


def test_every_value_has_an_index():
    with pytest.raises(ValueError, match="zip"):
        pick([1, 2, 3], [True, False], lambda bit, one, other: one)
