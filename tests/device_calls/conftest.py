"""What the tests of calls on GPUs share: a world whose parts are faked, and its calls."""

import pytest

from nvcoll.device_calls import DeviceCalls
from tests.fake_device_world import fake_world


@pytest.fixture
def world(monkeypatch):
    return fake_world(monkeypatch)


@pytest.fixture
def calls(world):
    return DeviceCalls(world)
