"""Plans on GPUs: launches whose blocks all run at the same time, and pieces that fit the slots of a block."""

import itertools
from types import SimpleNamespace

import pytest

import nvcoll
from nvcoll import planning_cuda
from nvcoll._selection import BLOCK_SIZES, LAUNCH
from nvcoll.algorithms import ALGORITHMS, Shape
from nvcoll.backends.device_area import SCRATCH, DeviceLayout
from nvcoll.device.cuda.layout import BLOCKS
from nvcoll.jit_cuda import THREADS as MOST_THREADS
from nvcoll.ops import AVG, DATATYPES, FLOAT, SUM
from nvcoll.planning import candidates
from nvcoll.planning_cuda import PACK, DevicePlanner
from tests.algorithms import schedule

H200 = 132  # multiprocessors
WORLDS = [*((n,) for n in range(2, 65)), (1, 1), (1, 3, 4), (2, 2, 3), (8,) * 8, (1, 63)]
SIZES = [0, 1, 4, 1000, 4096, 1 << 16, 1 << 20, 100_000_001, 1 << 33]


class FakeKernels:
    """Stands for `Kernels`: a multiprocessor holds `registers` blocks of 64 threads, and fewer larger ones."""

    def __init__(self, registers=16, together=False):
        self.registers = registers
        self.together = together
        self.asked = []

    def get(self, *key, state):
        assert state == "state"
        self.asked.append(key)
        return 0xF00

    def occupancy(self, function, threads):
        return self.registers * 64 // threads


LAUNCHES = [
    {"upto": 1 << 20, "threads": 64},
    {"upto": 1 << 24, "far": True, "threads": 512, "blocks": 8},
    {"upto": 1 << 24, "threads": 512},
    {"threads": 256, "deep": True},
]


def planner(
    node_sizes, sharers=1, multiprocessors=H200, kernels=None, scratch=SCRATCH, remote=False, launches=LAUNCHES
):
    layout, topology = DeviceLayout(sum(node_sizes), scratch), SimpleNamespace(node_sizes=node_sizes)
    area = SimpleNamespace(state="state", layout=layout)
    kernels = kernels or FakeKernels()
    return DevicePlanner(
        area, topology, min(node_sizes), {LAUNCH: launches}, kernels, sharers, multiprocessors, 1.0, remote
    )


class TestGrid:
    @pytest.mark.parametrize("sharers", [1, 2, 3, 7, 64, 132])
    def test_the_blocks_of_all_that_share_a_gpu_run_at_the_same_time(self, sharers):
        for multiprocessors, registers, nbytes in itertools.product((46, 108, H200, 160), (8, 11, 16), SIZES):
            if registers * 64 // MOST_THREADS * multiprocessors < sharers:
                continue
            one = planner((2,), sharers, multiprocessors, FakeKernels(registers))
            blocks, threads = one.grid(nbytes, 0)
            assert threads in BLOCK_SIZES
            assert threads <= MOST_THREADS
            assert 1 <= blocks <= BLOCKS
            assert blocks * sharers <= registers * 64 // threads * multiprocessors

    @pytest.mark.parametrize("sharers", [1, 2, 3, 7, 64, 116, 117])
    def test_where_ranks_run_side_by_side_there_is_room_for_what_else_they_run(self, sharers):
        for nbytes in SIZES:
            blocks, _ = planner((2,), sharers, kernels=FakeKernels(together=True)).grid(nbytes, 0)
            assert blocks * sharers <= H200 - H200 // 8 or blocks == 1
            assert blocks <= planner((2,), sharers).grid(nbytes, 0)[0]

    def test_no_more_threads_than_there_is_to_do(self):
        one = planner((2,))
        assert one.grid(1, 0) == (1, 64)
        assert one.grid(64 * PACK, 0) == (1, 64)
        assert one.grid(64 * PACK + 1, 0) == (2, 64)
        assert one.grid(128 * 64 * PACK, 0) == (128, 64)
        assert one.grid(1 << 30, 0) == (BLOCKS, 256)

    def test_threads_have_the_same_number_of_packs(self):
        one = planner((2,))
        assert one.grid(BLOCKS * 64 * PACK, 0) == (BLOCKS, 64)
        assert one.grid(BLOCKS * 64 * PACK + 1, 0) == (BLOCKS // 2 + 1, 64)
        assert one.grid(8 << 20, 0) == (256, 512)  # of 2 * H200 that fit

    def test_small_blocks_grow_where_not_as_many_fit(self):
        eight = [{"threads": 8}]
        one = planner((2,), launches=eight)
        assert one.grid(BLOCKS * 8 * PACK, 0) == (BLOCKS, 8)
        assert one.grid(BLOCKS * 8 * PACK + 1, 0) == (BLOCKS // 2 + 1, 16)
        one = planner((2,), 2, kernels=FakeKernels(together=True), launches=eight)
        most = (H200 - H200 // 8) // 2
        assert one.grid(most * 8 * PACK, 0) == (most, 8)
        assert one.grid(most * 64 * PACK, 0) == (most, 64)
        assert one.grid(most * 64 * PACK + 1, 0) == (most // 2 + 1, 64)  # of two packs a thread
        assert planner((2,), launches=[{"threads": 8, "blocks": 4}]).grid(1 << 16, 0) == (4, 8)

    def test_through_a_network_a_slice_of_the_message_counts(self):
        one = planner((4, 4), remote=True)
        blocks, threads = planner((1, 1), remote=True).grid(1 << 20, 0)
        assert one.grid(4 << 20, 0) == (blocks, min(4 * threads, MOST_THREADS))  # but of all slices in a node
        assert planner((3, 3), remote=True).grid(100, 0) == (1, 3 * 64)
        assert not one.deep(1 << 26, "float32")
        assert one.deep((1 << 26) + 4, "bfloat16")
        assert planner((4, 4)).deep((1 << 24) + 4, "int32")

    def test_types_of_one_byte_have_more_threads_instead_of_more_packs(self):
        one = planner((2,))
        assert one.deep(1 << 25, "int16")
        assert one.grid(1 << 25, 0, "int16")[1] == 256
        for datatype in ("int8", "uint8", "float8_e5m2"):
            assert not one.deep(1 << 25, datatype)
            assert one.grid(1 << 25, 0, datatype)[1] == MOST_THREADS

    def test_rules_may_limit_the_blocks(self):
        assert planner((1, 1), remote=True).grid(8 << 20, 0) == (8, 512)
        assert planner((1, 1), remote=True).grid(1 << 20, 0) == planner((2,)).grid(1 << 20, 0)

    def test_more_ranks_on_a_gpu_than_it_can_run_are_refused(self):
        one = planner((200,), sharers=200, kernels=FakeKernels(8))
        assert one.grid(4, 0) == (1, 64)
        with pytest.raises(nvcoll.ArgumentError) as caught:
            one.grid(8 << 20, 0)
        assert str(caught.value) == (
            "Allreduce: 200 ranks share a GPU that runs 132 blocks of a kernel at a time; start 132 ranks at most on it"
        )


class TestPieces:
    def cut(self, one, nbytes, datatype=FLOAT, algorithm="one_shot/low_latency"):
        """Return the bytes of a block's part, of a piece, and of a row of packs."""
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning_cuda, "DevicePlan", lambda *args: made.append(args))
            count = nbytes // datatype.itemsize
            one.plan(one.explain("allreduce", count, datatype, SUM, algorithm), datatype, SUM)
        [(_, _, call, _, threads, *_)] = made
        row = threads * PACK * (4 if one.deep(nbytes, datatype.name) else 1)
        return call["part"] * datatype.itemsize, call["capacity"] * datatype.itemsize, row

    def test_there_are_as_few_as_fit(self):
        one = planner((2,))
        for power, datatype in itertools.product(range(3, 31), (FLOAT, DATATYPES["bfloat16"])):
            part, piece, _ = self.cut(one, 1 << power, datatype)
            most = one.layout.slots_block // PACK * PACK  # a slot takes all that a block has: there is one peer
            assert piece <= most
            assert -(-part // piece) == -(-part // most)

    def test_they_are_alike_or_whole_rows(self):
        one = planner((2,))
        for nbytes in (3 << 20, 8 << 20, 16 << 20, 64 << 20, 100_000_000, 256 << 20):
            part, piece, row = self.cut(one, nbytes)
            pieces = -(-part // piece)
            assert piece % row == 0
            assert piece - row < -(-part // pieces)

    @pytest.mark.parametrize(
        ("ranks", "algorithm"), [(64, "recursive_doubling/low_latency"), (8, "ring/simple"), (8, "two_shot/simple")]
    )
    def test_they_are_alike_in_packs_where_no_row_fits_and_where_they_are_cut_further(self, ranks, algorithm):
        for nbytes in (20 << 20, 64 << 20, 100_000_000):
            part, piece, row = self.cut(planner((ranks,)), nbytes, algorithm=algorithm)
            assert piece % PACK == 0
            assert piece - PACK < -(-part // -(-part // piece))
            assert piece < row or algorithm != "recursive_doubling/low_latency"


@pytest.mark.parametrize("name", candidates())
def test_pieces_are_whole_packs_and_fit_their_slots(name):
    base, protocol = name.split("/")
    for node_sizes, datatype in itertools.product(WORLDS, DATATYPES.values()):
        one = planner(node_sizes)
        shape = one.shape(1 << 30, datatype)
        capacity, stride = one.capacity(base, protocol, shape), one._stride(base, shape)
        slots = ALGORITHMS[base].slots(shape)
        unit = max(1, PACK // datatype.itemsize)
        spread = 1 if protocol == "simple" or datatype.kind in {"float", "complex"} else 2  # flags lie beside integers
        part = -(-capacity // (slots.parts * unit)) * unit
        assert capacity > 0
        assert capacity % unit == 0
        assert stride % PACK == 0
        assert slots.number * stride <= one.layout.slots_block
        assert part * slots.width * spread <= stride, f"{capacity} {datatype.name} on {node_sizes}"
        assert capacity * slots.width <= one.layout.slots_block  # so much is there for accumulators


@pytest.mark.parametrize("name", [name for name in candidates() if not name.startswith("two_shot")])
def test_where_some_ranks_are_far_there_is_a_flag_beside_all_data(name):
    base, protocol = name.split("/")
    spread = 2 if protocol == "low_latency" else 1
    for node_sizes, datatype in itertools.product([(1, 1), (2, 2), (1, 3, 4), (8,) * 8], DATATYPES.values()):
        one = planner(node_sizes, remote=True)
        shape = one.shape(1 << 30, datatype)
        capacity, stride = one.capacity(base, protocol, shape), one._stride(base, shape)
        sent = schedule.run(base, 0, one.shape(capacity, datatype), capacity, target="cuda").sent
        assert capacity > 0
        assert max(-(-nbytes // PACK) * PACK for *_, nbytes in sent) * spread <= stride


def test_no_slot_is_staged_twice_unless_with_the_same_data():
    """What goes to far ranks, those of other nodes, has one place for each slot."""
    names = {name.split("/")[0] for name in candidates()}
    for name, node_sizes in itertools.product(names, [(1, 1), (2, 2), (1, 3, 4), (3, 3, 3), (1,) * 5, (2,) * 8]):
        one = planner(node_sizes, remote=True)
        shape = one.shape(960, FLOAT)
        if ALGORITHMS[name].supports(shape):
            continue
        node_of = [node for node, ranks in enumerate(node_sizes) for _ in range(ranks)]
        staged = {}
        for rank in range(shape.size):
            notes = schedule.run(name, rank, shape, 960, target="cuda")
            for (epoch, p, slot, nbytes), source in zip(notes.sent, notes.sources, strict=True):
                if node_of[p] != node_of[rank]:
                    assert staged.setdefault((rank, epoch, slot), (source, nbytes)) == (source, nbytes)
        assert staged


def test_ranks_that_are_far_reduce_in_no_memory_of_others():
    one = planner((2, 2), remote=True)
    told = one.explain("allreduce", 1 << 20, FLOAT, SUM)
    refused = {name.name: name.reason for name in told.candidates if name.reason}
    assert refused == dict.fromkeys(
        ("two_shot/low_latency", "two_shot/simple"), "needs ranks that can load from each other's memory"
    )
    with pytest.raises(nvcoll.ArgumentError, match="two_shot cannot serve this call: needs ranks that can load"):
        one.explain("allreduce", 1 << 20, FLOAT, SUM, "two_shot")
    assert not [one.reason for one in planner((2, 2)).explain("allreduce", 4, FLOAT, SUM).candidates if one.reason]


@pytest.mark.parametrize("datatype", ["float8_e5m2", "bfloat16", "float32", "complex128", "int8", "int64"])
@pytest.mark.parametrize("name", candidates())
def test_what_schedules_send_fits_their_slots(name, datatype):
    base, protocol = name.split("/")
    for node_sizes in [(2,), (3,), (5,), (8,), (33,), (64,), (1, 1), (1, 1, 1), (1, 3, 4), (2, 2, 3), (5, 11)]:
        one = planner(node_sizes)
        shape = one.shape(1 << 30, DATATYPES[datatype])
        capacity, stride = one.capacity(base, protocol, shape), one._stride(base, shape)
        spread = 1 if protocol == "simple" or DATATYPES[datatype].kind in {"float", "complex"} else 2
        for count in (capacity, capacity - 1, 1):
            shape = one.shape(count, DATATYPES[datatype])
            for rank in {0, shape.size // 2, shape.size - 1}:
                notes = schedule.run(base, rank, shape, capacity, target="cuda")
                assert notes.sent
                assert max(-(-nbytes // PACK) * PACK for *_, nbytes in notes.sent) * spread <= stride
                assert notes.kept <= one.layout.slots_block


def test_scratch_memory_for_any_number_of_ranks():
    assert planner((64,)).explain("allreduce", 1 << 28, FLOAT, SUM).algorithm in ALGORITHMS
    with pytest.raises(nvcoll.ArgumentError, match=r"^NVCOLL_SCRATCH: 1048576 bytes are too few for 2 ranks on GPUs"):
        planner((2,), scratch=1 << 20).explain("allreduce", 1, FLOAT, SUM)


class TestPlan:
    @pytest.fixture
    def made(self, monkeypatch):
        """Arguments of the plans that were made."""
        plans = []
        monkeypatch.setattr(planning_cuda, "DevicePlan", lambda *args: plans.append(args) or args)
        return plans

    def plan(self, one, nbytes, op=SUM, algorithm=None):
        told = one.explain("allreduce", nbytes // 4, FLOAT, op, algorithm)
        return told, one.plan(told, FLOAT, op)

    def test_of_a_call(self, made):
        one = planner((2, 2))
        told, _ = self.plan(one, 1 << 16, AVG, "ring/simple")
        [(state, function, call, blocks, threads, keep, describe, overlap)] = made
        assert (state, function, keep, describe, overlap) == ("state", 0xF00, one.kernels, told, True)
        assert one.kernels.asked == [("ring", "simple", "AVG", "float32", False)]
        assert (blocks, threads) == one.grid(1 << 16, function)
        assert (call["count"], call["ranks"]) == (1 << 14, 4)
        assert call["part"] % (PACK // 4) == 0
        assert (blocks - 1) * call["part"] < 1 << 14 <= blocks * call["part"]
        assert call["stride"] == one._stride("ring", one.shape(1 << 14, FLOAT))
        assert call["capacity"] >= call["part"]

    def test_stamps_differ_where_calls_do(self, made):
        one = planner((3,))
        for args in [(64,), (68,), (64, AVG), (64, SUM, "ring"), (64, SUM, "ring/low_latency")]:
            self.plan(one, *args)
        assert len({args[2]["stamp"] for args in made}) == len(made)

    def test_stamps_differ_where_messages_are_cut_differently(self, made):
        for one in (planner((3,)), planner((3,), multiprocessors=2), planner((3,), scratch=2 * SCRATCH)):
            self.plan(one, 1 << 20)
        assert len({args[2]["stamp"] for args in made}) == 3

    def test_threads_have_several_packs_under_way_where_there_are_many(self, made):
        one = planner((2,))
        for nbytes in (1 << 24, (1 << 24) + 4):
            self.plan(one, nbytes)
        assert [asked[-1] for asked in one.kernels.asked] == [False, True]

    def test_one_rank_copies_bytes(self, made):
        one = planner((1,))
        told, _ = self.plan(one, 400)
        assert made == [("state", 0, {"count": 400}, 1, 1, None, told)]
        assert (told.algorithm, one.kernels.asked) == ("copy", [])

    def test_ranks_that_share_a_gpu_bring_no_kernel_in_early(self, made):
        self.plan(planner((2,), sharers=2), 64)
        assert made[0][-1] is False


def test_shapes_know_accumulators():
    shape = planner((2, 3)).shape(10, DATATYPES["bfloat16"])
    assert shape == Shape((2, 3), 10, 2, 4, 2, "bfloat16")
