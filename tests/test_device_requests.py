"""Requests on GPUs, on a driver that takes notes."""

import gc
import weakref

import pytest

from nvcoll import device_requests
from nvcoll.backends import looking
from nvcoll.backends.driver import Device
from nvcoll.device_requests import OnStream
from nvcoll.errors import DeviceError, TimeoutError
from nvcoll.requests import Request
from tests.fake_cuda import EVENT, FakeDriver, Mode, Result, install


@pytest.fixture
def begun(monkeypatch):
    """What begins a call on stream 7, and the checks so far."""
    checks, fake_driver = [], FakeDriver()
    install(monkeypatch, fake_driver)

    def begin(owner=None, check=lambda: checks.append(1)):
        pending = OnStream(device, check, lambda: begin.over, (owner,))
        pending.record(7)
        return Request(pending)

    device = begin.device = Device(0)
    begin.checks, begin.driver, begin.over = checks, fake_driver, False
    yield begin
    device_requests._dropped.clear()


def test_the_event_stands_for_what_the_stream_holds(begun):
    begun()
    assert begun.driver.recorded == [(EVENT, 7)]
    assert begun.driver.stack == []


def test_looks_until_the_event_is_done(begun):
    begun.driver.looks = 3
    request = begun()
    assert not request.Test()
    assert begun.checks == []
    request.Wait()
    assert begun.checks == [1]
    assert begun.driver.looks < 0
    assert request.Test()


def test_sleeps_between_looks_after_a_while(begun, monkeypatch):
    naps = []
    monkeypatch.setattr(looking, "IMPATIENT", 2)
    monkeypatch.setattr(looking.time, "sleep", naps.append)
    begun.driver.looks = 5
    begun().Wait()
    assert naps == [0, 0, *[looking.NAP] * 3]


def test_interruptions_leave_it_pending(begun, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(looking.time, "sleep", interrupt)
    begun.driver.looks = 3
    request = begun()
    with pytest.raises(KeyboardInterrupt):
        request.Wait()
    begun.driver.looks = 0
    request.Wait()
    assert begun.checks == [1]


def test_what_failed_on_the_gpu_is_raised_once(begun):
    def check():
        raise TimeoutError("rank 1 did not come")

    request = begun(check=check)
    with pytest.raises(TimeoutError, match="did not come"):
        request.Test()
    assert request.Test()


def test_buffers_live_until_its_end(begun):
    class Owner:
        alive = 0

        def __init__(self):
            Owner.alive += 1

        def __del__(self):
            Owner.alive -= 1

    request = begun(Owner())
    gc.collect()
    assert Owner.alive == 1
    request.Wait()
    gc.collect()
    assert Owner.alive == 0


def test_buffers_of_a_request_that_is_dropped_live_until_its_end(begun):
    owner = set()
    alive = weakref.ref(owner)
    begun(owner)  # nobody waits for it
    del owner
    for _ in range(2):
        begun.driver.looks = 1  # at the one that was dropped
        begun().Wait()
        assert alive() is not None
    begun().Wait()
    assert alive() is None


def test_buffers_of_a_request_that_is_dropped_live_on_where_the_driver_tells_nothing(begun):
    owner = set()
    alive = weakref.ref(owner)
    begun(owner)
    del owner
    begun.driver.fail["cuEventQuery"] = Result.CUDA_ERROR_INVALID_VALUE
    begun()
    assert alive() is not None
    begun.driver.fail.clear()
    begun()
    assert alive() is None


def test_graphs_that_other_threads_capture_are_not_spoiled(begun):
    begun().Test()
    assert begun.driver.mode == Mode.CU_STREAM_CAPTURE_MODE_GLOBAL  # as before; the fake minds what it is meanwhile


def test_what_was_dropped_goes_with_the_context(begun):
    begun.driver.looks = 99
    begun(set())
    begun.device.close()
    begun.driver.looks = 0
    begun()
    assert len(device_requests._dropped) == 1  # the second one's


def test_after_the_end_of_the_communicator_the_driver_is_left_alone(begun):
    request = begun()
    begun.over = True
    begun.device.close()
    begun.driver.calls.clear()
    assert request.Test()
    del request
    gc.collect()
    assert begun.checks == [1]
    assert begun.driver.calls == []


def test_the_event_is_given_back(begun):
    begun().Wait()
    gc.collect()
    assert begun.driver.calls.count("cuEventDestroy") == 1


def test_errors_of_the_driver_are_told(begun):
    request = begun()
    begun.driver.fail["cuEventQuery"] = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DeviceError, match=r"^cuEventQuery: CUDA_ERROR_INVALID_VALUE"):
        request.Test()
    assert request.Test(), "it is inactive: the context is lost, and every later look would fail as well"
    request.Free()
