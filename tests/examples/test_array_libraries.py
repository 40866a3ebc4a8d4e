"""The network on arrays of torch: the same numbers as on NumPy's, here without a GPU, and with one where there is."""

import re
import sys

import numpy as np
import pytest

from nvcoll import emulate
from tests.examples.test_tp_mlp import DIFFERENCE, SCRIPT
from tests.gpu.devices import GPUS


class Elsewhere:
    """A symmetric buffer that is no NumPy array, with what a buffer on a GPU has."""

    def __init__(self, buffer):
        self.buffer = buffer

    def __dlpack_device__(self):
        return 2, 1

    def __dlpack__(self, **options):
        return self.buffer.__dlpack__()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.buffer.free()


class OnGpus:
    """An emulated communicator whose buffers seem to be on a GPU, and whose verbs take torch's arrays."""

    def __init__(self, comm):
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size

    def empty(self, shape, dtype):
        return Elsewhere(self.comm.empty(shape, dtype))

    def Allreduce(self, array, stream=None):
        assert stream == "stream"
        self.comm.Allreduce(array.numpy())


@pytest.fixture
def tp_mlp(load_example):
    return load_example("tp_mlp")


@pytest.fixture
def libraries(tp_mlp):
    return sys.modules[tp_mlp.library_of.__module__]


def test_arrays_of_torch_train_the_same_network(tp_mlp, libraries, monkeypatch):
    torch = pytest.importorskip("torch")

    class OnCpu(libraries.OfTorch):
        def __init__(self, device):
            assert device == "cuda:1", "that of the buffer"
            super().__init__("cpu")

        def view(self, buffer):
            return torch.from_numpy(buffer.buffer)

        def stream(self):
            return "stream"

        def repeated(self, step):
            return step

    monkeypatch.setattr(libraries, "OfTorch", OnCpu)
    options = tp_mlp.parse_options(["--dtype", "float64", "--epochs", "2", "--hidden", "7"])
    digits = tp_mlp.load("float64", 0)
    [expected] = emulate(1).run(tp_mlp.train, digits, options)
    for rank, run in enumerate(emulate(2).run(lambda comm: tp_mlp.train(OnGpus(comm), digits, options))):
        assert run.arrays.library is torch
        assert isinstance(run.test_logits, np.ndarray)
        columns = tp_mlp.columns_of(rank, 2, 7)
        assert tp_mlp.worst_deviation(run, expected, columns) <= tp_mlp.TOLERANCES["float64"]


def test_a_step_is_captured_the_second_time_and_then_replayed(libraries):
    """A stand-in for torch's graphs takes notes of what is run and what is captured."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Capture:
        def __init__(self, graph, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            log.append("capture")

        def __exit__(self, *exc):
            log.append("captured")

    class Values(list):
        def clone(self):
            return Values(self)

        def copy_(self, values):
            self[:] = values

    arrays = libraries.OfTorch.__new__(libraries.OfTorch)
    cuda = type("cuda", (), {"CUDAGraph": Graph, "graph": Capture})
    arrays.library = type("torch", (), {"cuda": cuda})
    seen = []

    def step(images, labels):
        log.append(f"step {len(images)}")
        seen.append(images)
        return "results", len(images)

    run = arrays.repeated(step)
    for length in (2, 2, 2, 1):
        assert run(Values([length] * length), Values("ab"[:length])) == ("results", length)
    assert log == ["step 2", "capture", "step 2", "captured", "replay", "replay", "step 1"]
    assert seen[1] == [2, 2]


def test_numpy_beside_a_buffer_of_the_host(libraries):
    arrays = libraries.library_of(np.zeros(3))
    assert arrays.library is np
    assert arrays.stream() is None


def test_device_gpu_insists(run_command):
    status, output = run_command([sys.executable, SCRIPT, "--device", "gpu"], env={"NVCOLL_BACKEND": "shm"})
    assert status == 1, output
    assert "--device gpu: nvcoll's ranks are on" in output


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"))])
def test_on_gpus(run_ranks, size):
    pytest.importorskip("torch")
    env = {"NVCOLL_BACKEND": "nvshmem"}
    ranks = run_ranks(SCRIPT, size, "--epochs", 3, "--device", "gpu", timeout=110, env=env)
    _, wrong, _ = DIFFERENCE.search(ranks.stdout[0]).groups()
    assert not wrong, str(ranks)
    assert "inside CUDA graphs" in ranks.stdout[0]
    assert float(re.search(r"^test accuracy (\S+) %$", ranks.stdout[0], re.MULTILINE)[1]) > 80, str(ranks)
