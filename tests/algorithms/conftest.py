"""Emulated ranks in these tests give up soon, and have little scratch memory: large worlds start fast."""

import pytest


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "60")
    monkeypatch.setenv("NVCOLL_SCRATCH", "1M")
