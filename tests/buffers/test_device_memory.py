"""Memory of a GPU: shared by views and exports, dropped with the last of them, and filled."""

import gc
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest

from nvcoll._plan import DLPackTensor
from nvcoll.buffers import DeviceBuffer, invalidate
from nvcoll.buffers.device_memory import BLOCK
from tests.buffers.gpu import empty_on_gpu
from tests.buffers.memory import FakeAllocation


def test_copies_of_nothing_touch_no_driver():
    buffer, driver = empty_on_gpu((0, 3), "f4")
    buffer.copy_from(np.empty((0, 3)))
    buffer.fill(1)
    buffer.fill(0)
    assert buffer.copy_to().shape == (0, 3)
    assert driver.calls == []


def test_a_large_fill_is_copied_on_the_gpu():
    count = 3 * BLOCK // 4 + 5
    buffer, driver = empty_on_gpu(count, "f4")
    buffer.fill(1.5, stream=4)
    assert (buffer.copy_to() == 1.5).all()
    assert driver.calls[:-1] == [("copy", nbytes, 4) for nbytes in (BLOCK, BLOCK, BLOCK + 20)]
    buffer.fill(0, stream=4)
    assert driver.calls[-1] == ("memset", 4 * count, 4)


def test_memory_is_dropped_with_the_last_that_uses_it():
    buffer = empty_on_gpu((4, 2), "f4")[0]
    allocation, view, exported = buffer.memory.allocation, buffer[1:], DLPackTensor(buffer.__dlpack__())
    alive = weakref.ref(buffer)
    del buffer
    assert alive() is None
    del view
    gc.collect()
    assert allocation.calls == []
    del exported
    gc.collect()
    assert allocation.calls == ["drop"]


def test_a_heap_that_goes_frees_its_buffers():
    first, second = (empty_on_gpu(4, "f4")[0] for _ in range(2))
    view, allocation = first[1:], first.memory.allocation
    assert invalidate(allocation.address, allocation.nbytes)
    assert first.freed
    assert view.freed
    assert not second.freed
    del first, view
    gc.collect()
    assert allocation.calls == []


def test_the_fast_route_sees_no_address_of_freed_memory():
    """What compiled code reads: the base class's own fields, not the properties that raise."""
    base = DeviceBuffer.__base__
    buffer = empty_on_gpu((4, 2), "f4")[0]
    view, start = buffer[1:], buffer.address
    assert [base.address.__get__(array) for array in (buffer, view)] == [start, start + 8]
    buffer.free()
    assert [base.address.__get__(array) for array in (buffer, view)] == [0, 0]


def test_spans_stay_in_their_memory():
    buffer = empty_on_gpu(4, "f4")[0]
    span = DeviceBuffer.__base__
    assert span(buffer.memory, 4, 3, 4, 0).nbytes == 12
    for offset, count, itemsize in ((4, 4, 4), (-4, 1, 4), (0, -1, 4), (0, 1, 0), (20, 0, 4), (0, 1 << 62, 16)):
        with pytest.raises(ValueError, match="leave memory of 16 bytes"):
            span(buffer.memory, offset, count, itemsize, 0)
    with pytest.raises(TypeError):
        span(None, 0, 1, 4, 0)


def test_the_end_of_the_interpreter_is_survived():
    program = """
from tests.buffers.gpu import empty_on_gpu
buffer, _ = empty_on_gpu(4, "f4")
capsule = buffer.__dlpack__()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, re.sub(r"\s", "", done.stderr)) == (0, "")


@pytest.mark.gpu
def test_copies_on_a_gpu():
    pytest.importorskip("cuda.bindings.driver")
    from nvcoll.backends import driver

    class Allocation(FakeAllocation):
        def __init__(self, nbytes):
            super().__init__(nbytes)
            self.address = driver.allocate(nbytes)

    gpu = driver.Device(0)
    with gpu:
        allocation = Allocation(12 << 20)
    buffer = DeviceBuffer.on(allocation, (3, 1 << 20), "float32", gpu, driver)
    values = np.random.default_rng(0).normal(size=buffer.shape).astype("f4")
    buffer.copy_from(values)
    buffer[1].fill(2.5)
    buffer[2].fill(0)
    values[1], values[2] = 2.5, 0
    np.testing.assert_array_equal(buffer.copy_to(), values)
    with gpu:
        driver.free(allocation.address)
