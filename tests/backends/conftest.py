"""What the tests of backends share."""

import pytest

from tests.fake_cuda import FakeDriver, install


@pytest.fixture
def driver(monkeypatch):
    """A driver of GPUs whose memory is the host's."""
    found = FakeDriver()
    install(monkeypatch, found)
    return found
