"""A communicator's area on a GPU: parts that are apart, tables that kernels find, boards; on a driver of the host."""

import ctypes
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from nvcoll import _topology
from nvcoll._plan import DEVICE_FIELDS
from nvcoll.algorithms import ALGORITHMS, Shape
from nvcoll.backends import device_area
from nvcoll.backends.device_area import BOARD, FLAGS, LINE, SCRATCH, DeviceArea, DeviceLayout, Footing, private_size
from nvcoll.backends.driver import Device
from nvcoll.device.cuda.layout import BLOCKS, EPOCH, EPOCHS, FAILED, HISTORY
from nvcoll.errors import AllocationError, ArgumentError
from tests.fake_cuda import CONTEXT, EVENT, Result

LOCAL = {"send", "recv", "count", "part", "capacity", "stride", "stamp", "ranks"}  # a plan gives these


class TestLayout:
    @pytest.mark.parametrize("scratch", [SCRATCH, SCRATCH + 12345, 1 << 30])
    @pytest.mark.parametrize("ranks", [1, 2, 3, 8, 33, 64])
    def test_parts_do_not_overlap(self, ranks, scratch):
        layout = DeviceLayout(ranks, scratch)
        halves = [BOARD, FLAGS, FLAGS + layout.flags_half]
        for part in (layout.cells, layout.lines, layout.data):
            halves += [part, part + layout.slots_half]
        halves.append(layout.nbytes)
        sizes = [8, layout.flags_half, layout.flags_half, *[layout.slots_half] * 6]
        assert all(first + size <= second for (first, second), size in zip(pairwise(halves), sizes, strict=True))
        assert all(place % LINE == 0 for place in halves)
        assert layout.nbytes <= scratch
        assert layout.slots_half == BLOCKS * layout.slots_block
        assert layout.slots_block % 1024 == 0

    def test_there_are_flags_for_all_slots_and_signals(self):
        for sizes in [*((n,) for n in range(2, 65)), (1, 3, 4), (8,) * 8, (1, 63)]:
            flags = DeviceLayout(sum(sizes), SCRATCH).flags_block // LINE
            slots = max(one.slots(Shape(sizes, slices=min(sizes))).number for one in ALGORITHMS.values())
            assert max(slots, 2 * sum(sizes)) <= flags  # two-shot signals with two flags a rank

    def test_too_little_is_refused(self):
        with pytest.raises(ArgumentError) as caught:
            _ = DeviceLayout(64, 8 << 20).nbytes
        assert str(caught.value) == "NVCOLL_SCRATCH: 8388608 bytes are too few for 64 ranks on GPUs; raise it"


class Memory:
    """Memory of several ranks, in the host's; rank 2 cannot be reached."""

    extent = 1 << 23
    members = (0, 1, 2)
    origins = (4, 6, 7)
    place = 1

    def __init__(self, driver):
        self.taken = [ctypes.create_string_buffer(self.extent) for _ in range(2)]

    def address(self, place):
        return ctypes.addressof(self.taken[place]) if place < 2 else 0


@pytest.fixture
def made(driver, monkeypatch):
    """An area of rank 1 of 3 on two nodes, and what kernels are told of it."""
    return make(driver, monkeypatch)


def make(driver, monkeypatch, *far, part=False):
    monkeypatch.setattr(device_area, "BLOCKS", 4)
    told = []

    def state(*args):
        told.extend(args)
        return SimpleNamespace(keep_report=lambda: None)

    monkeypatch.setattr(device_area, "DeviceState", state)
    monkeypatch.setattr(device_area, "StreamOrder", lambda *args: args)
    memory = Memory(driver)
    ctypes.memset(memory.address(1), 0x55, memory.extent)
    layout = DeviceLayout(3, 1 << 22)
    nbytes = layout.nbytes + private_size(layout) * part
    piece = SimpleNamespace(offset=4096, address=memory.address(1) + 4096, nbytes=nbytes)
    here = _topology.detect(1, [b"a", b"a", b"b"])
    footing = Footing(Device(0))
    area = DeviceArea(memory, piece, here, layout, 2.5, 1, Device(0), footing, *far)
    return SimpleNamespace(
        area=area, memory=memory, layout=layout, footing=footing, piece=piece, values=told[0], told=told[1:]
    )


def words(address, count):
    return list((ctypes.c_int64 * count).from_address(address))


class TestArea:
    def test_kernels_are_told_every_field_that_is_not_the_call_s(self, made):
        assert set(made.values) | LOCAL | {f"peer{k}" for k in range(3, 8)} == set(DEVICE_FIELDS)
        told = {"rank": 1, "size": 3, "nodes": 2, "node": 0, "local_rank": 1, "node_size": 2, "slices": 1}
        assert {name: made.values[name] for name in told} == told
        assert made.values["timeout"] == 2_500_000_000
        assert made.told[0] == (CONTEXT, EVENT)

    def test_tables(self, made):
        first, second = (made.memory.address(rank) + 4096 for rank in range(2))
        assert words(made.values["peers"], 3) == [first, second, -1 - 7]
        assert [made.values[f"peer{k}"] for k in range(3)] == [first, second, -1 - 7]
        assert words(made.values["members"], 2) == [0, 1]
        assert words(made.values["owners"], 2) == [1, -1]
        assert words(made.values["state"], 8 + 4) == [0] * 12  # epochs of four blocks behind the word of failure

    def test_far_ranks_are_numbers_of_nvshmem_even_if_they_can_be_reached(self, driver, monkeypatch):
        made = make(driver, monkeypatch, {0})
        second = made.memory.address(1) + 4096
        assert words(made.values["peers"], 3) == [-1 - 4, second, -1 - 7]
        assert [made.values[f"peer{k}"] for k in range(3)] == [-1 - 4, second, -1 - 7]
        assert made.area.boards() == [0, 0, None]

    def test_private_parts_are_apart(self, made):
        values, area = made.values, made.area
        starts = sorted((values[name], name) for name in ("peers", "members", "owners", "state", "workspace"))
        assert all(second[0] - first[0] >= 256 for first, second in pairwise(starts))
        assert starts[-1][1] == "workspace"
        assert values["workspace_block"] == made.layout.slots_block
        assert area is made.told[2]  # keeps the memory as long as kernels may use it

    def test_cells_are_empty_all_else_is_zero_and_nothing_beyond_is_touched(self, made):
        layout, at = made.layout, made.memory.address(1) + 4096
        assert set(ctypes.string_at(at, layout.cells)) == {0}
        assert set(ctypes.string_at(at + layout.cells, 2 * layout.slots_half)) == {0xFF}
        assert set(ctypes.string_at(at + layout.lines, layout.nbytes - layout.lines)) == {0}
        assert set(ctypes.string_at(at - 4096, 4096)) == {0x55}
        assert set(ctypes.string_at(at + layout.nbytes, 64)) == {0x55}

    def test_boards_of_those_that_can_be_seen(self, made):
        for rank in range(2):
            ctypes.c_int64.from_address(made.memory.address(rank) + 4096 + BOARD).value = 70 + rank
        assert made.area.boards() == [70, 71, None]

    def test_counterparts_of_what_others_can_store_to(self, made):
        mine = made.memory.address(1) + 12345
        assert [made.area.counterpart(mine, rank) for rank in range(3)] == [made.memory.address(0) + 12345, mine, 0]

    def test_histories_are_compared_by_their_greatest_words(self, made):
        area = made.area
        assert area.history == made.values["state"] + HISTORY
        for least, greatest in [(0, 0), (-7, -7), (-7, 9), (-(1 << 63), -(1 << 63)), (-(1 << 63), (1 << 63) - 1)]:
            ctypes.c_int64.from_address(area.token).value = greatest
            ctypes.c_int64.from_address(area.token + 8).value = -least
            assert area.same_history(0) is (least == greatest)

    def test_it_reports_as_kernels_do(self, made):
        report = ctypes.c_int64.from_address(made.told[1])
        assert report.value == 0
        made.area.fail()
        assert report.value != 0

    def test_it_gives_up_as_kernels_do(self, made, driver):
        state, beyond = made.values["state"], EPOCHS + EPOCH * device_area.BLOCKS
        epochs = ctypes.string_at(state, beyond + 16)
        driver.calls.clear()
        made.area.give_up()
        assert ctypes.c_int64.from_address(made.told[1]).value != 0
        told = np.frombuffer(ctypes.string_at(state, beyond), np.int64)
        expected = np.frombuffer(epochs[:beyond], np.int64).copy()
        expected[0] = expected[EPOCHS // 8 + 1 :: EPOCH // 8] = FAILED
        assert told.tolist() == expected.tolist()
        assert ctypes.string_at(state + beyond, 16) == epochs[beyond:]
        assert driver.calls.count("cuStreamCreate") == driver.calls.count("cuStreamDestroy") == 1

    def test_boards_give_the_stream_back_when_the_context_is_lost(self, made, driver):
        driver.fail["cuMemcpyAsync"] = Result.CUDA_ERROR_INVALID_VALUE
        driver.calls.clear()
        with pytest.raises(Exception, match="cuMemcpyAsync"):
            made.area.boards()
        assert driver.calls.count("cuStreamCreate") == driver.calls.count("cuStreamDestroy") == 1

    def test_it_gives_all_back_once(self, made, driver):
        assert len(driver.taken) == 2
        made.area.close()
        made.area.close()
        made.footing.close()
        assert driver.taken == {}
        assert driver.calls.count("cuEventDestroy") == driver.calls.count("cuEventCreate")

    def test_a_part_takes_nothing_of_the_driver(self, driver, monkeypatch):
        """What it would take, or give back, may wait for kernels that wait for this very rank."""
        made = make(driver, monkeypatch, part=True)
        taken = dict(driver.taken)
        assert len(taken) == 1  # for reports
        values, piece = made.values, made.piece
        start, end = piece.address + made.layout.nbytes, piece.address + piece.nbytes
        for name in ("peers", "members", "owners", "state"):
            assert start <= values[name] < values["workspace"]
        assert values["workspace"] + device_area.BLOCKS * values["workspace_block"] == end
        made.area.close()
        assert driver.taken == taken

    def test_reports_are_apart_zero_and_used_again(self, driver, monkeypatch):
        monkeypatch.setattr(device_area, "StreamOrder", lambda *args: args)
        footing, found = Footing(Device(0)), []
        for _ in range(2 * device_area.REPORTS + 1):
            found.append(footing.take_report())
            assert words(found[-1][0], device_area.REPORT // 8) == [0] * (device_area.REPORT // 8)
            ctypes.memset(found[-1][0], 1, device_area.REPORT)
        places = sorted(host for host, _ in found)
        assert all(after - at >= device_area.REPORT for at, after in pairwise(places))
        assert len(driver.taken) == 3
        footing.give_report(*found[5])
        assert footing.take_report() == found[5]
        assert words(found[5][0], 1) == [0]

    def test_what_cannot_be_told_of_takes_no_memory(self, driver, monkeypatch):
        driver.fail["cuMemHostAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(AllocationError, match="cuMemHostAlloc"):
            make(driver, monkeypatch)
        assert driver.taken == {}


def test_a_gpu_without_room(driver, monkeypatch):
    monkeypatch.setattr(device_area, "StreamOrder", lambda *args: args)
    driver.fail["cuMemAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    memory, layout = Memory(driver), DeviceLayout(3, SCRATCH)
    piece = SimpleNamespace(offset=0, address=memory.address(1), nbytes=64)
    small = SimpleNamespace(ranks=3, cells=0, nbytes=64, slots_half=1, slots_block=layout.slots_block)
    with pytest.raises(AllocationError, match="cuMemAlloc"):
        DeviceArea(memory, piece, _topology.detect(1, [b"a"] * 3), small, 1.0, 1, Device(0), Footing(Device(0)))
