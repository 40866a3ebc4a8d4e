"""Memory of emulated ranks: what ended on a GPU is given back, but not while ranks run that might wait for it."""

import contextlib
import gc

import pytest

from nvcoll.backends import emulated
from nvcoll.backends.driver import Device
from nvcoll.backends.emulated import on_gpu, reserve_on, when_none_runs
from nvcoll.errors import DeviceError
from tests.fake_cuda import MEMORY


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


def test_memory_that_somebody_keeps_is_free_for_the_emulation_after(driver):
    with on_gpu():
        segment = reserve_on(Device(0), 2, None)
    assert segment.size == MEMORY // 2
    assert driver.taken
    del segment
    gc.collect()
    with on_gpu():
        assert reserve_on(Device(0), 2, None).size == MEMORY // 2


def test_what_fails_keeps_nothing_else_from_being_given_back(driver):
    def fail():
        raise DeviceError("the context is lost")

    done = []
    with on_gpu():
        for act in (lambda: done.append(1), fail, lambda: done.append(2)):
            when_none_runs(act)
        assert done == []
    assert sorted(done) == [1, 2]


@pytest.mark.parametrize(("size", "each"), [(1, 1 << 30), (2, 1 << 30), (8, 384 << 20)])
def test_emulated_ranks_on_a_gpu_take_half_of_its_free_memory(monkeypatch, size, each):
    monkeypatch.setattr(emulated.driver, "memory_info", lambda: (6 << 30, 8 << 30))
    monkeypatch.setattr(emulated.driver, "allocate", lambda nbytes: 4096)
    monkeypatch.setattr(emulated.driver, "free", lambda address: None)
    monkeypatch.setattr(emulated, "_ended", [])
    assert emulated.reserve_on(contextlib.nullcontext(), size, None).size == each * size
    assert emulated.reserve_on(contextlib.nullcontext(), size, 5 << 20).size == (5 << 20) * size
