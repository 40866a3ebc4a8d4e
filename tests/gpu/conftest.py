"""What tests on GPUs share: kernels that are at hand, and worlds whose areas are quickly made."""

import os
from functools import partial

import pytest

from nvcoll import settings
from tests.conftest import worker_processes
from tests.gpu.devices import GPUS
from tests.gpu.kernels import EVERY_KERNEL, FAR_KERNELS, KERNELS, compile_one


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "20")
    monkeypatch.setenv("NVCOLL_HEAP", "256M")


def pytest_collection_modifyitems(items):
    """Give the first test the time that compilation takes: it may be any of those that need the kernels."""
    for item in items:
        if {"compiled", "compiled_every", "compiled_far"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def gpu():
    """The first GPU."""
    from nvcoll.backends.driver import Device

    return Device(0)


@pytest.fixture(scope="session")
def compiled(gpu):
    """Let the kernels of these tests be in the cache."""
    compile_all(gpu.arch, KERNELS, remote=False)


@pytest.fixture(scope="session")
def compiled_every(gpu):
    """Let a kernel for every type and operator be in the cache."""
    compile_all(gpu.arch, EVERY_KERNEL, remote=False)


@pytest.fixture(scope="session")
def compiled_far(gpu):
    """Let the kernels that reach far ranks be in the cache."""
    compile_all(gpu.arch, FAR_KERNELS, remote=True)


def compile_all(arch, kernels, remote):
    one = partial(compile_one, settings.read().cache_dir, arch, remote)
    with worker_processes(min(64, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(one, kernels))


@pytest.fixture
def two_gpus():
    """Skip where there is one only."""
    if GPUS < 2:
        pytest.skip(f"needs two GPUs, there is {GPUS}")
