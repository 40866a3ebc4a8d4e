"""Memory of emulated ranks: what ended on a GPU is given back, but not while ranks run that might wait for it."""

import gc

import pytest

from nvcoll.backends.driver import Device
from nvcoll.backends.emulated import on_gpu, reserve_on
from tests.fake_cuda import MEMORY, FakeDriver, install


@pytest.fixture
def driver(monkeypatch):
    found = FakeDriver()
    install(monkeypatch, found)
    return found


def test_memory_goes_with_the_emulation(driver):
    with on_gpu():
        segment = reserve_on(Device(0), 2, 1 << 20)
        assert [len(taken) for taken in driver.taken.values()] == [2 << 20]
        del segment
        gc.collect()
        assert driver.taken
    assert not driver.taken


def test_memory_waits_for_the_emulation_inside_which_it_was_taken(driver):
    with on_gpu():
        with on_gpu():
            segment = reserve_on(Device(0), 2, 1 << 20)
            del segment
            gc.collect()
        assert driver.taken  # ranks of the outer one may run
    assert not driver.taken


def test_memory_that_somebody_keeps(driver):
    with on_gpu():
        segment = reserve_on(Device(0), 2, None)
    assert segment.size == MEMORY // 2
    assert driver.taken
    del segment
    gc.collect()
    with on_gpu():
        pass
    assert not driver.taken
