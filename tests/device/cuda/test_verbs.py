"""Verbs and schedules of the CUDA target as they stand, run by threads of Python in many orders: no GPU is needed."""

import itertools
import random
from collections import Counter
from functools import reduce
from itertools import accumulate

import pytest

from nvcoll.algorithms import ALGORITHMS, Shape
from nvcoll.device.cuda.layout import LAST
from nvcoll.planning import candidates
from tests.device.cuda.machine import BLOCKS, FIELDS, WORD, World, machine, signed
from tests.gpu.kernels import REACHING

WORLDS = [(2,), (5,), (9,), (1, 1), (1, 1, 1), (2, 2), (1, 3), (4, 1), (2, 1, 2)]
COUNTS = [1, 2, 3, 7, 12, 23, 40]
STRIDES = 1024, 2048
IN_ORDER = [name for name in candidates() if name.startswith(("one_shot", "two_shot", "nvrar_one_hop"))]


def calls_for(turn):
    """Calls of different sizes, pieces and places of slots: rests of packs, of rows, of pieces."""
    rng = random.Random(turn)
    return [(rng.choice(COUNTS), rng.choice((2, 4, 10, 100)), rng.choice(STRIDES)) for _ in range(8)]


def pieces(calls):
    """How many pieces each block has of all calls."""
    found = [0] * BLOCKS
    for count, capacity, _ in calls:
        part = World.part(count)
        for block in range(BLOCKS):
            found[block] += -(-max(0, min(part, count - part * block)) // capacity)
    return found


def value(call, rank, i):
    return (call + 1) * 7**rank + i * (rank + 1)


def run_and_check(world, calls, seed):
    """Make calls; every rank has the sums, and no thread has given up."""
    for (call, rank), result in world.run(calls, value, seed=seed).items():
        right = [sum(value(call, r, i) for r in world.ranks) for i in range(calls[call][0])]
        assert result == right, f"call {call} on rank {rank} of {world.node_sizes}"
    assert not world.ended


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", candidates())
def test_results_are_right_and_slots_are_left_clean(name, deep):
    for turn, (node_sizes, widens) in enumerate(zip(WORLDS, itertools.cycle((False, True)), strict=False)):
        with machine() as gpus:
            form = {"deep": deep, "widens": widens, "threads": 1 + turn % 3, "symmetric": turn % 3 > 0}
            world = World(gpus, *name.split("/"), node_sizes, **form)
            calls = calls_for(f"{name} {turn}")
            run_and_check(world, calls, turn)
            if ALGORITHMS[name.split("/")[0]].rounds:
                assert [world.epochs(rank) for rank in world.ranks] == [pieces(calls)] * len(world.ranks)
            shape = Shape(node_sizes, 1, WORD, (1 + widens) * WORD, min(node_sizes))
            assert world.reached(STRIDES[-1]) <= ALGORITHMS[name.split("/")[0]].slots(shape).number
            assert not any(world.arrived(rank, FIELDS["lines"], FIELDS["data"]) for rank in world.ranks)


@pytest.mark.parametrize("name", candidates())
def test_epochs_begin_anew_after_the_last_one(name):
    with machine() as gpus:
        world = World(gpus, *name.split("/"), (1, 2))
        for rank, block in itertools.product(world.ranks, range(BLOCKS)):
            gpus.memory[world.epoch_at(rank, block)] = LAST - 3
        run_and_check(world, calls_for(name), 0)
        assert all(0 < epoch < 1000 for rank in world.ranks for epoch in world.epochs(rank))


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", REACHING)
def test_results_are_right_where_other_nodes_are_reached_by_puts(name, deep):
    for turn, node_sizes in enumerate([(1, 1), (1, 1, 1), (2, 2), (1, 3), (4, 1), (2, 1, 2)]):
        with machine() as gpus:
            world = World(gpus, *name.split("/"), node_sizes, deep=deep, threads=1 + turn % 3, far=True)
            run_and_check(world, calls_for(f"{name} {turn}"), turn)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", IN_ORDER)
@pytest.mark.parametrize("ranks", range(2, 8))
def test_contributions_are_reduced_in_the_order_of_ranks_and_of_nodes(name, deep, ranks):
    def combine(left, right):
        return signed(left * 1_000_003 + right)

    by_nodes = name.startswith("nvrar_one_hop")
    count = 16 * ranks + 3  # slices in which a deep thread has four packs, and a rest
    for node_sizes, symmetric in itertools.product([(1,) * ranks, (2,) * ranks] if by_nodes else [(ranks,)], (0, 1)):
        if symmetric and name != "two_shot/simple":
            continue
        with machine() as gpus:
            form = {"deep": deep, "combine": combine, "threads": 1, "symmetric": symmetric}
            world = World(gpus, *name.split("/"), node_sizes, **form)
            results = world.run([(count, 100, 1024)] * 2, lambda call, rank, i: 10 * rank + i)
        starts = accumulate(node_sizes, initial=0)
        nodes = [range(start, start + size) for start, size in zip(starts, node_sizes, strict=False)]
        inside = [[reduce(combine, (10 * rank + i for rank in node)) for node in nodes] for i in range(count)]
        right = [reduce(combine, partials) for partials in inside]
        assert all(result == right for result in results.values())


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", candidates())
def test_what_goes_over_a_link_goes_once(name, deep):
    for node_sizes, count in itertools.product([(2,), (2, 2)], (7, 26, 29)):
        with machine() as gpus:
            world = World(gpus, *name.split("/"), node_sizes, deep=deep)
            world.run([(count, 100, 2048)], value)
            sent = Counter(world.sent())
            assert sent
            assert max(sent.values()) == 1


@pytest.mark.parametrize("name", candidates())
def test_where_a_rank_does_not_come_every_block_loses_threads(name):
    ticks = itertools.count(0, 10**9)
    with machine(clock=lambda: next(ticks)) as gpus:
        world = World(gpus, *name.split("/"), (2, 2), timeout=5 * 10**9)
        world.run([(8, 100, 1024)], value, ranks=[0, 1, 3])
        assert {place[:2] for place in world.ended} == set(itertools.product((0, 1, 3), range(BLOCKS)))


@pytest.mark.parametrize(
    ("name", "far"), [*((name, False) for name in candidates()), *((name, True) for name in REACHING)]
)
def test_a_rank_that_has_failed_sends_nothing(name, far):
    node_sizes = (1, 1) if far else (2, 2)  # where three nodes fold, the first one sends nothing anyway
    for failed in (False, True):
        ticks = itertools.count(0, 10**9)
        with machine(clock=lambda ticks=ticks: next(ticks)) as gpus:
            world = World(gpus, *name.split("/"), node_sizes, timeout=5 * 10**9, far=far)
            if failed:
                world.fail(0)
            world.run([(8, 100, 1024)], value, ranks=[0])
            assert any(world.arrived(rank) for rank in world.ranks[1:]) is not failed
            assert {place[:2] for place in world.ended} == {(0, block) for block in range(BLOCKS)}


@pytest.mark.parametrize("name", [f"{name}/low_latency" for name, one in ALGORITHMS.items() if one.opens])
def test_the_epoch_is_counted_before_a_call_waits(name):
    for node_sizes, far in itertools.product([(2,), (1, 1), (1, 1, 1), (2, 2), (2, 1)], (False, True)):
        with machine() as gpus:
            world = World(gpus, *name.split("/"), node_sizes, far=far)
            world.run([(8, 100, 1024)], value)
            first_looks = {place[:2]: before for place, before in gpus.looked.items() if place[2] == 0}
            assert len(first_looks) == len(world.ranks) * BLOCKS
            for (rank, block), before in first_looks.items():
                assert gpus.stored.index((rank, world.epoch_at(rank, block))) < before


@pytest.mark.parametrize("name", candidates())
def test_histories_are_the_same_if_calls_are(name):
    with machine() as gpus:
        world = World(gpus, *name.split("/"), (2, 1))
        world.run(calls_for(name), value, stamp=lambda call, rank: 5 + call)
        assert len(set(world.histories())) == 1
        [(first, second), *_] = world.histories()
        assert second == -first != 0


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", candidates())
def test_a_barrier_compares_histories_while_it_is_a_call_itself(name, deep):
    for node_sizes in [(2,), (1, 1), (2, 2), (1, 1, 1), (9,), (2, 2, 2)]:
        with machine() as gpus:
            greatest = {"combine": lambda left, right: max(signed(left), signed(right))}
            world = World(gpus, *name.split("/"), node_sizes, deep=deep, **greatest)
            world.run([(8, 100, 1024)] * 3, value)
            assert {first + second for first, second in world.compare_histories()} == {0}, node_sizes


@pytest.mark.parametrize("stamps", [(5, 5, 6), (6, 5, 5)])
def test_a_history_tells_of_another_call_and_of_another_order(stamps):
    with machine() as gpus:
        one = World(gpus, "one_shot", "simple", (1,))
        one.run([(8, 100, 1024)] * 3, value, stamp=lambda call, rank: (5, 6, 5)[call])
        [history] = one.histories()
    with machine() as gpus:
        other = World(gpus, "one_shot", "simple", (1,))
        other.run([(8, 100, 1024)] * 3, value, stamp=lambda call, rank: stamps[call])
        assert other.histories() != [history]
