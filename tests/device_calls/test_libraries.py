"""Calls on arrays of libraries that have a current stream: where they go, and what the library is told of them."""

import sys
from types import SimpleNamespace

import pytest

import nvcoll
from tests.buffers.gpu import CudaInterface, on_gpu
from tests.fake_device_world import reduce, values


@pytest.fixture
def torch(monkeypatch):
    """A torch whose tensors are on GPU 3."""

    class Tensor:
        is_cuda, layout, device = True, None, SimpleNamespace(type="cuda", index=3)
        requires_grad = is_conj = is_neg = False

        def __init__(self, values):
            self.values, self.recorded = values, []
            self.shape, self.dtype, self.record_stream = values.shape, values.dtype, self.recorded.append
            self.numel, self.data_ptr = lambda: values.size, lambda: values.ctypes.data
            self.element_size, self.is_contiguous = lambda: values.itemsize, lambda: True

    class Stream(SimpleNamespace):
        __module__ = "torch.cuda.streams"

    torch = SimpleNamespace(Tensor=Tensor, strided=None, current=Stream(cuda_stream=77), capturing=False)
    torch.cuda = SimpleNamespace(
        current_stream=lambda device=None: torch.current,
        is_initialized=lambda: True,
        is_current_stream_capturing=lambda: torch.capturing,
        ExternalStream=lambda handle, device: (handle, device.index) if handle else "one of its own",
        default_stream=lambda device: (0, device.index),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr("nvcoll.buffers.device_specs.refuse_uncomputed", lambda *args: None)
    return torch


def streams(world):
    return [stream for plan in world.planner.plans for *_, stream in plan.launched]


def test_the_stream_of_either_array(world, calls, torch):
    tensor, buffer = torch.Tensor(values()), on_gpu(values())
    for args in [(tensor,), (tensor, buffer), (buffer, tensor), (buffer,)]:
        reduce(calls, *args)
    assert streams(world) == [77, 77, 77, 0]
    assert tensor.recorded == []  # torch knows that stream


def test_a_persistent_request_goes_where_the_library_works_when_it_is_begun(world, calls, torch, monkeypatch):
    monkeypatch.setattr("nvcoll.device_calls.OnStream", lambda *args: SimpleNamespace(record=recorded.append))
    recorded = []
    start = calls.begin("Allreduce_init", torch.Tensor(values()), None, nvcoll.SUM, None, None)
    for torch.current.cuda_stream in (77, 78):
        start()
    assert streams(world) == recorded == [77, 78]
    x, torch.capturing = on_gpu(values()), True
    world.capturing.add(78)
    with pytest.raises(nvcoll.StateError, match=r"^Allreduce_init: the stream is being captured"):
        start()
    named = calls.begin("Allreduce_init", x, None, nvcoll.SUM, 5, None)
    torch.current.cuda_stream = 5
    named()
    assert streams(world) == recorded == [77, 78, 5]


def test_barriers_come_after_what_the_library_has_replayed(world, calls, torch):
    calls.barrier()
    torch.current.cuda_stream = 0
    calls.barrier()
    world.stream = 99  # of an emulated rank
    calls.barrier()
    assert streams(world) == world.planner.waited == [77, 0, 99]


def test_streams_that_differ(world, calls, torch):
    other = CudaInterface(values(), stream=5)
    with pytest.raises(nvcoll.ArgumentError, match=r"^Allreduce: the arrays .* \(0x5, 0x4d\), expected one"):
        reduce(calls, torch.Tensor(values()), other)
    assert world.planner.plans == []
    reduce(calls, torch.Tensor(values()), other, stream=5)
    torch.current.cuda_stream = 0
    reduce(calls, torch.Tensor(values()), CudaInterface(values(), stream=1))  # two names of one stream
    assert streams(world) == [5, 1]


@pytest.mark.parametrize(("stream", "known"), [(88, 88), (1, 0), (0, 0)])
def test_torch_keeps_memory_that_another_stream_uses(world, calls, torch, stream, known):
    send, recv = torch.Tensor(values()), torch.Tensor(values())
    reduce(calls, send, recv, stream=stream)
    assert send.recorded == recv.recorded == [(known, 3)]


def test_torch_need_not_keep_memory_of_others(world, calls, torch):
    def refuse(stream):
        raise RuntimeError("no memory of this allocator")

    tensor = torch.Tensor(values())
    tensor.record_stream = refuse
    reduce(calls, tensor, stream=88)
    assert streams(world) == [88]


def test_torch_keeps_memory_that_the_stream_of_an_emulated_rank_uses(world, calls, torch):
    world.stream = 99
    tensor = torch.Tensor(values())
    reduce(calls, tensor)
    assert tensor.recorded == [(99, 3)]


def test_a_call_that_would_not_become_part_of_the_graph(world, calls, torch):
    x, torch.capturing = on_gpu(values()), True
    with pytest.raises(nvcoll.StateError) as caught:
        reduce(calls, x)
    assert str(caught.value) == (
        "Allreduce: a graph is being captured on the current stream of torch, and this call would go to another "
        "one; name the stream with stream="
    )
    assert world.planner.plans == []
    reduce(calls, torch.Tensor(values()))
    reduce(calls, x, stream=77)
    reduce(calls, x, stream=5)  # whoever names one means it
    assert streams(world) == [77, 77, 5]
