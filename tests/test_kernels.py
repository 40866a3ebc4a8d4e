"""Loaded kernels: each once, inside the context; for ranks that share a GPU, when none of them waits for a launch."""

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest

import nvcoll
from nvcoll.backends import driver, nvshmem, siblings
from nvcoll.kernels import Kernels


class Gpu:
    arch, ordinal = "sm_90", 3
    inside = 0

    def __enter__(self):
        self.inside += 1

    def __exit__(self, *exc):
        self.inside -= 1


def test_each_is_loaded_once_inside_the_context(monkeypatch, tmp_path):
    gpu, loaded = Gpu(), []

    def load_module(cubin):
        assert gpu.inside == 1
        loaded.append(cubin)
        return SimpleNamespace(function=lambda name: len(loaded))

    monkeypatch.setattr(driver, "load_module", load_module)
    monkeypatch.setattr(driver, "occupancy", lambda function, threads: gpu.inside * threads)
    kernels = Kernels(gpu, tmp_path)
    monkeypatch.setattr(kernels._cubins, "get", lambda *key: key)
    assert [kernels.get("ring", "simple", op, "int8", True) for op in ("SUM", "MAX", "SUM")] == [1, 2, 1]
    assert kernels.get("ring", "simple", "MAX", "int8", False) == 3
    assert loaded[1:] == [("ring", "simple", "MAX", "int8", "sm_90", deep, False) for deep in (True, False)]
    assert kernels.occupancy(1, 64) == 64
    assert gpu.inside == 0


def test_those_of_ranks_side_by_side_leave_room_for_other_work(monkeypatch, tmp_path):
    """And are loaded when no rank waits for a launch; once there, they are found without a look at the others."""
    gpu, roomy, quiet = Gpu(), [], []

    @contextlib.contextmanager
    def moment(ordinal, asking):
        assert asking() == ["mine"]
        quiet.append(ordinal)
        yield
        quiet.append(None)

    def load_module(cubin):
        assert quiet == [gpu.ordinal] * kernels.together
        return SimpleNamespace(function=lambda name: 5)

    monkeypatch.setattr(siblings, "quiet", moment)
    monkeypatch.setattr(driver, "load_module", load_module)
    monkeypatch.setattr(driver, "share_multiprocessors", lambda one: roomy.append((one, gpu.inside)))
    for together in (False, True):
        kernels = Kernels(gpu, tmp_path, together=together)
        monkeypatch.setattr(kernels._cubins, "get", lambda *key: key)
        assert kernels.get("ring", "simple", "SUM", "int8", True, state="mine") == 5
        assert roomy == [(5, 1)] * together
        assert kernels.get("ring", "simple", "SUM", "int8", True, state="mine") == 5
    assert quiet == [gpu.ordinal, None]


def test_who_waited_for_a_kernel_gets_it_while_others_are_loaded(monkeypatch, tmp_path):
    """To load one may take until it is launched, if a sibling on the GPU waits for that already."""
    kernels, handles, found = Kernels(Gpu(), tmp_path, together=True), [], threading.Semaphore(0)
    looks = []

    def quiet(ordinal, asking):
        looks.append(asking)
        return contextlib.nullcontext()

    def sibling():
        handles.append(kernels.get("ring", "simple", "SUM", "int8", True, state="another"))
        found.release()

    threads = [threading.Thread(target=sibling, daemon=True) for _ in range(4)]

    def load_module(op):
        for thread in threads:
            if op == "SUM":
                thread.start()
            else:
                assert found.acquire(timeout=5)
        latest = time.monotonic() + 5
        while op == "SUM" and len(looks[-1]()) < 5 and time.monotonic() < latest:
            time.sleep(0.001)
        assert looks[-1]() == ["mine", *(["another"] * 4 if op == "SUM" else [])]
        return SimpleNamespace(function=lambda name: op)

    monkeypatch.setattr(siblings, "quiet", quiet)
    monkeypatch.setattr(driver, "load_module", load_module)
    monkeypatch.setattr(driver, "share_multiprocessors", lambda function: None)
    monkeypatch.setattr(kernels._cubins, "get", lambda *key: key[2])
    for op in ("SUM", "MAX"):
        assert kernels.get("ring", "simple", op, "int8", True, state="mine") == op
    assert handles == ["SUM"] * 4


def test_a_kernel_that_could_not_be_loaded_can_be_asked_for_again(monkeypatch, tmp_path):
    answers = [nvcoll.DeviceError("out of memory"), SimpleNamespace(function=lambda name: 5)]

    def load_module(cubin):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    kernels = Kernels(Gpu(), tmp_path)
    monkeypatch.setattr(driver, "load_module", load_module)
    monkeypatch.setattr(kernels._cubins, "get", lambda *key: key)
    with pytest.raises(nvcoll.DeviceError):
        kernels.get("ring", "simple", "SUM", "int8", True)
    assert kernels.get("ring", "simple", "SUM", "int8", True) == 5


def test_those_that_reach_far_ranks_are_introduced_to_nvshmem(monkeypatch, tmp_path):
    gpu, met = Gpu(), []

    def load_module(cubin):
        assert cubin[-1] is True
        return SimpleNamespace(handle=77, function=lambda name: 5)

    monkeypatch.setattr(driver, "load_module", load_module)
    monkeypatch.setattr(nvshmem, "introduce", lambda module: met.append((module, gpu.inside)))
    kernels = Kernels(gpu, tmp_path, remote=True)
    monkeypatch.setattr(kernels._cubins, "get", lambda *key: key)
    assert [kernels.get("ring", "simple", "SUM", "int8", True) for _ in range(2)] == [5, 5]
    assert met == [(77, 1)]


def test_a_thread_that_is_interrupted_may_load_another(monkeypatch, tmp_path):
    """A handler of a signal may call anything."""
    kernels = Kernels(Gpu(), tmp_path)

    def load_module(op):
        if op == "SUM":
            assert kernels.get("ring", "simple", "MAX", "int8", True) == "MAX"
        return SimpleNamespace(function=lambda name: op)

    monkeypatch.setattr(driver, "load_module", load_module)
    monkeypatch.setattr(kernels._cubins, "get", lambda *key: key[2])
    assert [kernels.get("ring", "simple", op, "int8", True) for op in ("SUM", "MIN")] == ["SUM", "MIN"]
