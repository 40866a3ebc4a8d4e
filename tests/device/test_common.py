"""The arithmetic that schedules share; it is the same text for every target."""

from itertools import pairwise

import pytest

from nvcoll.algorithms._registry import folds, power_below, steps
from nvcoll.device.common import fold, log2, part_at, unfold, without


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 63, 64, 65, 1001])
def test_parts_join_to_the_whole_and_none_is_larger_than_the_first(count, parts):
    ends = [part_at(None, count, parts, k) for k in range(parts + 1)]
    assert (ends[0], ends[1], ends[-1]) == (0, -(-count // parts), count)
    sizes = [hi - lo for lo, hi in pairwise(ends)]
    assert sizes == sorted(sizes, reverse=True)


def test_doublings_are_what_slots_are_made_for():
    assert [log2(n) for n in range(1, 10)] == [0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert all(log2(n) == steps(n) for n in range(1, 300))


@pytest.mark.parametrize("n", range(1, 34))
def test_who_is_left_after_folding_has_one_place_each(n):
    extra = n - power_below(n)
    assert folds(n) == (extra > 0)
    left = [rank for rank in range(n) if rank >= 2 * extra or rank % 2 == 0]
    assert [fold(rank, extra) for rank in left] == list(range(power_below(n)))
    assert [unfold(place, extra) for place in range(power_below(n))] == left


@pytest.mark.parametrize("n", range(1, 9))
def test_places_without_one_s_own_are_counted_from_0_in_their_order(n):
    for me in range(n):
        assert [without(me, place) for place in range(n) if place != me] == list(range(n - 1))
