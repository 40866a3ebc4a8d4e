"""Calls that do not match, in kernels whose data carry no tag and in those that come after them."""

import pytest

from nvcoll.device.common import STAMP_BITS
from nvcoll.planning import candidates
from tests.device.cuda.machine import STRIDES, WORLDS, World, machine, value

UNTAGGED = [name for name in candidates() if name.endswith("/low_latency")]


@pytest.mark.parametrize("name", UNTAGGED)
def test_data_without_tags(name):
    for turn, node_sizes in enumerate(WORLDS):
        with machine() as gpus:
            world = World(gpus, *name.split("/"), node_sizes, tagged=False, threads=1 + turn % 3)
            calls = [(count, 10, STRIDES[count % 4 // 2]) for count in (2, 40, 12, 8, 24)]
            results = world.run(calls, value, seed=turn, stamp=lambda call, rank: 5 + call)
            for (call, _), result in results.items():
                assert result == [sum(value(call, r, i) for r in world.ranks) for i in range(calls[call][0])]
            assert not world.blamed()


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("name", UNTAGGED)
def test_a_call_that_does_not_match_is_noticed_in_the_next_one(name, odd):
    for node_sizes, threads, number in [((3,), 3, 1), ((2, 1, 2), 5, 2)]:
        with machine() as gpus:
            world = World(gpus, *name.split("/"), node_sizes, tagged=False, threads=threads)
            calls = [(24, 100, 1024)] * (number + 3)  # one more, for a tag that comes late
            world.run(calls, value, stamp=lambda call, rank, odd_one=(number, odd): 5 + ((call, rank) == odd_one))
            assert not world.ended  # the calls themselves go on
            blamed = world.blamed()
            assert blamed.pop(odd) != odd
            assert blamed == dict.fromkeys(set(world.ranks) - {odd}, odd)


def test_with_fewer_threads_than_ranks_each_rank_is_seen_by_those_before_it():
    with machine() as gpus:
        world = World(gpus, "one_shot", "low_latency", (4,), tagged=False, threads=2)
        world.run([(24, 100, 1024)] * 4, value, stamp=lambda call, rank: 5 + ((call, rank) == (1, 2)))
        assert world.blamed() == {1: 2, 2: 3}


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("name", ["one_shot/simple", "one_shot/low_latency"])
def test_every_kernel_looks_at_tags_of_calls_before_it(name, tagged):
    def blamed(epoch, stamp):
        with machine() as gpus:
            world = World(gpus, *name.split("/"), (3,), threads=3, tagged=tagged)
            world.tell(0, 0, 9 << STAMP_BITS | 1)
            world.tell(2, 0, epoch << STAMP_BITS | stamp)
            world.run([(24, 100, 1024)], value)
            return world.blamed()

    assert blamed(9, 2) == {0: 2}
    assert not blamed(9, 1)
    for other in (7, 8, 10, 11):  # of another call, or not known
        assert not blamed(other, 2)
