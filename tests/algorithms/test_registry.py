"""What is known of an algorithm besides its text: the registry, slots and cost, checked against what schedules do."""

import inspect
import itertools
from collections import Counter

import pytest

from nvcoll import algorithms
from nvcoll.algorithms import ALGORITHMS, Link, Shape
from nvcoll.algorithms._doubling import doubling_slots
from nvcoll.algorithms._registry import folds, power_below, steps
from nvcoll.backends.area import LINE, Layout
from nvcoll.device.common import BLOCK
from nvcoll.device.cuda.packs import BYTES as PACK
from nvcoll.planning import candidates
from tests.algorithms import schedule

ALLREDUCE = [name for name, one in ALGORITHMS.items() if one.verb == "allreduce"]
WORLDS = [
    *((n,) for n in (*range(2, 18), 31, 33)),
    (1, 1), (2, 2), (1, 1, 1), (2, 3), (1, 3, 4), (2, 2, 3), (4,) * 5, (3, 3, 4), (1, 16), (2,) * 13,
]  # fmt: skip
COUNTS = [1, 3, 17, 65, 1000]
EVERY_TARGET = pytest.mark.parametrize("target", ["host", "cuda"])
EVERY_ALGORITHM = pytest.mark.parametrize("name", ALLREDUCE)


def test_the_registry():
    assert ALLREDUCE == [
        "halving_doubling",
        "nvrar",
        "nvrar_one_hop",
        "one_shot",
        "recursive_doubling",
        "ring",
        "two_shot",
    ]
    assert sorted(set(ALGORITHMS) - set(ALLREDUCE)) == ["node_gather", "node_scatter"]
    for name, one in ALGORITHMS.items():
        assert one.name == name
        assert one.source
        assert one.order
        assert one.__doc__ == inspect.getmodule(one.text).__doc__
        assert one.file == f"algorithms/{inspect.getmodule(one.text).__name__.rpartition('.')[2]}.py"
    assert candidates() == [f"{name}/{protocol}" for name in ALLREDUCE for protocol in ("low_latency", "simple")]


@EVERY_ALGORITHM
def test_any_call_is_supported(name):
    for sizes, count in itertools.product(WORLDS, [0, *COUNTS]):
        assert ALGORITHMS[name].supports(schedule.world(sizes, count)) is None


@pytest.mark.parametrize("itemsize_and_width", [(4, 4), (2, 4)])
@EVERY_ALGORITHM
@EVERY_TARGET
def test_what_is_sent_is_waited_for_fits_its_slot_and_makes_the_result(name, itemsize_and_width, target):
    for sizes, count in itertools.product(WORLDS, COUNTS):
        shape = schedule.world(sizes, count, *itemsize_and_width)
        notes = [schedule.run(name, rank, shape, target=target) for rank in range(shape.size)]
        check_traffic(name, shape, notes, target)
        for rank, note in enumerate(notes):
            covered = bytearray(shape.nbytes)
            for first, last in note.written:
                covered[first:last] = b"\1" * (last - first)
            assert all(covered), f"rank {rank} of {sizes} never writes some of {count} elements"
            assert len(covered) == shape.nbytes, f"rank {rank} of {sizes} writes beyond {count} elements"


@EVERY_ALGORITHM
def test_an_algorithm_that_opens_counts_its_epoch_once_on_every_rank(name):
    """Not at all, or twice, and a rank would be an epoch behind or ahead of the others."""
    for sizes, itemsize in itertools.product(WORLDS, [2, 4]):
        shape = schedule.world(sizes, 65, itemsize, 4)
        counted = {schedule.run(name, rank, shape, target="cuda").counted for rank in range(shape.size)}
        assert counted == {int(ALGORITHMS[name].opens)}, sizes


@EVERY_ALGORITHM
def test_slices_of_several_blocks(name):
    for sizes, (itemsize, width) in itertools.product([(2,), (3,), (5,), (2, 3)], [(4, 4), (2, 4), (16, 16), (1, 1)]):
        shape = schedule.world(sizes, 3 * shape_size(sizes) * BLOCK // width + 17, itemsize, width)
        check_traffic(name, shape, [schedule.run(name, rank, shape) for rank in range(shape.size)])


def check_traffic(name, shape, notes, target="host"):
    """Every slot is filled once a call, with what its owner waits for there, and is large enough for it."""
    slots = ALGORITHMS[name].slots(shape)
    rounded = (PACK if target == "cuda" else LINE) // shape.itemsize
    most = -(-shape.count // slots.parts // rounded) * rounded * slots.width
    arriving = {}
    for sender, note in enumerate(notes):
        for epoch, receiver, slot, nbytes in note.sent:
            assert receiver != sender
            assert 0 <= slot < slots.number
            assert nbytes <= most, f"{nbytes} bytes in a slot of {most}"
            assert (epoch, receiver, slot) not in arriving, f"slot {slot} of rank {receiver} is filled twice"
            arriving[epoch, receiver, slot] = sender, nbytes
    for receiver, note in enumerate(notes):
        for epoch, sender, slot, nbytes in note.awaited:
            came_from, came = arriving.pop((epoch, receiver, slot))
            assert came == nbytes
            assert sender in {None, came_from}
    assert not arriving, "data that nobody waits for"
    told = Counter((epoch, receiver, slot) for note in notes for epoch, receiver, slot in note.told)
    heard = Counter((epoch, receiver, slot) for receiver, note in enumerate(notes) for epoch, slot in note.heard)
    assert told == heard
    assert max(told.values(), default=1) == 1


@EVERY_TARGET
def test_two_shot_on_symmetric_buffers_moves_no_data_through_slots(target):
    for sizes, count in itertools.product(WORLDS, COUNTS):
        shape = schedule.world(sizes, count)
        notes = [schedule.run("two_shot", rank, shape, direct=True, target=target) for rank in range(shape.size)]
        check_traffic("two_shot", shape, notes, target)
        assert not any(note.sent or note.awaited for note in notes)
        assert all(len(note.told) == 2 * (shape.size - 1) for note in notes)  # where buffers lie, and that it is done


@EVERY_TARGET
def test_two_shot_goes_in_rounds_of_its_capacity(target):
    shape = schedule.world((3,), 1000)
    notes = [schedule.run("two_shot", rank, shape, capacity=300, target=target) for rank in range(3)]
    check_traffic("two_shot", schedule.world((3,), 300), notes, target)
    assert {epoch for note in notes for epoch, *_ in note.sent} == {2, 3, 4, 5}  # the first epoch is the agreement


def test_two_shot_with_low_latency_sends_at_once_on_gpus():
    shape = schedule.world((3,), 1000)
    notes = [schedule.run("two_shot", rank, shape, 300, True, "cuda", asks=False) for rank in range(3)]
    check_traffic("two_shot", schedule.world((3,), 300), notes, "cuda")
    assert {epoch for note in notes for epoch, *_ in note.sent} == {1, 2, 3, 4}
    assert not any(note.told or note.heard for note in notes)


@pytest.mark.parametrize("places", range(1, 70))
def test_kernels_count_the_slots_of_recursive_doubling_as_hosts_do(places):
    assert doubling_slots(places) == steps(places) + folds(places)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_there_are_flags_for_all_slots(name):
    for sizes in WORLDS:
        layout = Layout(sum(sizes), 64 << 20)
        slots = ALGORITHMS[name].slots(schedule.world(sizes))
        assert slots.number * LINE <= layout.flags_half
        assert slots.parts >= 1
    shape = schedule.world((65,))
    signals = {slot for rank in range(65) for *_, slot in schedule.run("two_shot", rank, shape, direct=True).told}
    assert (max(signals) + 1) * LINE <= Layout(65, 64 << 20).flags_half


@pytest.mark.parametrize(
    ("name", "sizes", "near", "far"),
    [
        ("one_shot", (5,), 1, 0),
        ("one_shot", (2, 3), 0, 1),
        ("two_shot", (5,), 2, 0),
        ("two_shot", (2, 3), 0, 2),
        ("ring", (5,), 8, 0),
        ("ring", (2, 3), 0, 8),
        ("recursive_doubling", (8,), 3, 0),
        ("recursive_doubling", (5,), 4, 0),  # one pair folds
        ("halving_doubling", (8,), 6, 0),
        ("halving_doubling", (5,), 6, 0),
        ("nvrar", (5,), 2, 0),
        ("nvrar", (2, 2, 2, 2), 2, 2),
        ("nvrar", (2, 2, 3), 2, 3),
        ("nvrar", (1, 1, 1, 1), 0, 2),
        ("nvrar_one_hop", (5,), 2, 0),
        ("nvrar_one_hop", (2, 2, 2, 2), 2, 1),
        ("nvrar_one_hop", (2, 2, 3), 2, 1),
        ("nvrar_one_hop", (1, 1, 1, 1), 0, 1),
    ],
)
def test_cost_counts_steps(name, sizes, near, far):
    shape = schedule.world(sizes, 1000)
    assert ALGORITHMS[name].cost(shape, Link(1, 0, 0, 0)) == near
    assert ALGORITHMS[name].cost(shape, Link(0, 0, 1, 0)) == far


@EVERY_ALGORITHM
def test_cost_counts_the_bytes_that_the_busiest_rank_sends(name):
    for sizes in [(n,) for n in (2, 3, 4, 5, 8, 16, 31)]:
        shape = schedule.world(sizes, 10_000 * shape_size(sizes))
        sent = max(sum(nbytes for *_, nbytes in schedule.run(name, r, shape).sent) for r in range(shape.size))
        cost = ALGORITHMS[name].cost(shape, Link(0, 1, 0, 1))
        assert 0.99 * sent <= cost <= 1.01 * (sent + 2 * shape.nbytes)  # folding is on the way of all


@pytest.mark.parametrize("sizes", [(2,), (1, 1)])
@pytest.mark.parametrize("name", ["nvrar", "nvrar_one_hop", "one_shot", "recursive_doubling"])
def test_cost_between_two_counts_elements_though_accumulators_are_wider(name, sizes):
    shape = schedule.world(sizes, 1000, 2, 4)
    assert sum(nbytes for *_, nbytes in schedule.run(name, 0, shape).sent) == shape.nbytes
    assert ALGORITHMS[name].cost(shape, Link(0, 1, 0, 1)) == shape.nbytes


@pytest.mark.parametrize(("name", "factors"), [("nvrar", (1, 2, 3)), ("nvrar_one_hop", (1, 3, 7))])
@pytest.mark.parametrize("width", [2, 4])
def test_cost_counts_the_bytes_between_nodes(name, factors, width):
    for nodes, factor in zip((2, 4, 8), factors, strict=True):
        shape = schedule.world((3,) * nodes, 30_000, 2, width)
        sent = sum(nbytes for _, to, _, nbytes in schedule.run(name, 0, shape).sent if to >= 3)
        assert sent == factor * 10_000 * width
        assert ALGORITHMS[name].cost(shape, Link(0, 0, 0, 1)) == sent


def shape_size(sizes):
    return Shape(sizes).size


@EVERY_ALGORITHM
def test_cost_grows_with_the_message_and_with_latency(name):
    link = Link(1e-6, 1e-9, 2e-6, 2e-9)
    for sizes in WORLDS:
        costs = [ALGORITHMS[name].cost(schedule.world(sizes, count), link) for count in (1, 10, 1000, 10**6, 10**9)]
        assert costs == sorted(costs)
        assert costs[0] > 0
        assert len(set(costs)) == len(costs)
        slower = Link(2e-6, 1e-9, 4e-6, 2e-9)
        assert ALGORITHMS[name].cost(schedule.world(sizes, 1000), slower) > costs[2]


def test_wider_accumulators_cost_more_where_they_travel():
    link = Link(0, 1, 0, 1)
    narrow, wide = (schedule.world((2, 2), 1000, 2, width) for width in (2, 4))
    for name in ("recursive_doubling", "nvrar", "nvrar_one_hop"):
        assert ALGORITHMS[name].cost(wide, link) > ALGORITHMS[name].cost(narrow, link)


def test_steps():
    assert [steps(n) for n in (1, 2, 3, 4, 7, 8, 9)] == [0, 1, 1, 2, 2, 3, 3]
    assert [power_below(n) for n in (1, 2, 3, 4, 7, 8, 9)] == [1, 2, 2, 4, 4, 8, 8]


def test_the_package_exports_every_file():
    files = {one.file.removeprefix("algorithms/").removesuffix(".py") for one in ALGORITHMS.values()}
    assert files <= set(algorithms.__all__)
