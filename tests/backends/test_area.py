"""A communicator's area: its parts are apart, and a new one is at its beginning."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from nvcoll import _topology
from nvcoll.backends.area import BELL, BOARD, EPOCH, FLAGS, LINE, Layout, open_area
from nvcoll.backends.emulated import EmulatedMemory, Hub, LocalExchange, reserve
from nvcoll.backends.heap import Heap
from nvcoll.errors import ArgumentError

SIZES = [(1, 1 << 15), (2, 40_000), (3, 100_001), (8, 1 << 20), (64, 1 << 23), (200, 8 << 20)]


@pytest.mark.parametrize(("ranks", "scratch"), SIZES)
def test_parts_are_lines_apart_and_fit(ranks, scratch):
    layout = Layout(ranks, scratch)
    parts = [BOARD, BELL, EPOCH, FLAGS, FLAGS + layout.flags_half]
    parts += [layout.lines, layout.lines + layout.lines_half, layout.data, layout.data + layout.data_half]
    parts += [layout.data + 2 * layout.data_half]
    assert all(part % LINE == 0 for part in parts)
    assert all(first < second for first, second in pairwise(parts))
    assert parts[-1] <= scratch
    assert layout.flags_half >= (2 * ranks + 64) * LINE  # two for each rank


def test_too_little_is_refused():
    with pytest.raises(ArgumentError) as caught:
        _ = Layout(64, 1 << 16).data_half
    assert str(caught.value) == (
        "NVCOLL_SCRATCH: 65536 bytes are too few for 64 ranks on a node; raise it, 8M is the default"
    )


def test_a_new_area():
    exchange = LocalExchange(Hub(1, 10), 0)
    heap = Heap(EmulatedMemory(exchange, reserve(1, 1 << 20)))
    layout, settings = Layout(1, 1 << 16), SimpleNamespace(spin=None, timeout=10)
    state = open_area(heap.memory, heap.allocate(1 << 16), _topology.detect(0, [b""]), layout, settings, 1)
    assert state.heap == (heap.memory.address(0), 1 << 20)
    assert (state.failure, state.sequence) == (None, 0)
    assert state.boards() == [(0, 0, 0, "running", ("none", -1))]
    assert state.leave()
    assert state.boards()[0][3] == "left"
    assert state.failure[0] == "finalized"
