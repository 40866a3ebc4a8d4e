"""CUDA graphs and streams: a call that was captured counts on when it is replayed, between calls that were not."""

import threading

import numpy as np
import pytest

import nvcoll
from nvcoll.backends import driver
from nvcoll.planning import candidates

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]
RANKS = 3


def tripled(values, times):
    """What in-place sums of int32 over three ranks that agree make of values: odd factors never end in zeros."""
    return (values.astype(np.int64) * pow(3, times, 1 << 32)).astype(np.uint32).view(np.int32)


def start():
    return np.arange(1, 301, dtype=np.int32)


def checked(answer):
    """The value of a call of cuda-python."""
    result, *values = answer
    assert int(result) == 0, result
    return values[0] if values else None


class Graph:
    """What `work` queues on a stream, captured."""

    def __init__(self, stream, work):
        from cuda.bindings import driver as cuda

        self.cuda, self.stream = cuda, stream
        checked(cuda.cuStreamBeginCapture(stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED))
        work()
        self.executable = checked(cuda.cuGraphInstantiate(checked(cuda.cuStreamEndCapture(stream)), 0))

    def replay(self):
        checked(self.cuda.cuGraphLaunch(self.executable, self.stream))


@pytest.mark.parametrize("algorithm", [name for name in candidates() if name.startswith(("one", "two", "ring"))])
def test_a_thousand_replays_between_other_calls(algorithm):
    ready = threading.Barrier(RANKS)

    def main(comm):
        x, y = comm.array(start()), comm.array(start())
        for one in (x, y):  # kernels are loaded before
            comm.Allreduce(one, algorithm=algorithm)
        comm.Barrier()
        with comm._world.device:
            graph = Graph(comm.stream, lambda: [comm.Allreduce(x, algorithm=algorithm) for _ in range(2)])
            ready.wait(20)  # to make a graph may wait for what runs
            for number in range(1000):
                graph.replay()
                if number % 10 == 0:
                    comm.Allreduce(y, algorithm=algorithm)
                if number % 100 == 0:
                    driver.stream_synchronize(comm.stream)
        return x.copy_to(), y.copy_to()

    for x, y in nvcoll.emulate(RANKS, device=0).run(main):
        # the first call makes the sums equal on all ranks, as they are from the beginning
        np.testing.assert_array_equal(x, tripled(start(), 2001))
        np.testing.assert_array_equal(y, tripled(start(), 101))


@pytest.mark.parametrize("algorithm", ["one_shot/low_latency", "nvrar/simple"])
def test_kernels_that_are_brought_in_before_the_one_before_has_ended(algorithm):
    """Where ranks share a GPU none is; two ranks of a few blocks leave room for it, so that one GPU suffices here."""
    ready = threading.Barrier(2)

    def main(comm):
        comm._world.planner.overlap = True
        x = comm.array((start() + comm.rank).astype(np.float32))
        y, z = comm.zeros(300, "float32"), comm.zeros(300, "float32")

        def work():
            for _ in range(50):
                comm.Allreduce(x, y, algorithm=algorithm)
                comm.Allreduce(y, z, algorithm=algorithm)

        comm.Allreduce(x, y, algorithm=algorithm)
        comm.Barrier()
        results = []
        with comm._world.device:
            graph = Graph(comm.stream, work)
            for _ in range(20):
                ready.wait(20)
                graph.replay()
                driver.stream_synchronize(comm.stream)
                results += [y.copy_to(), z.copy_to() / 2]
        return results

    for results in nvcoll.emulate(2, device=0).run(main):
        for one in results:
            np.testing.assert_array_equal(one, 2 * start() + 1)


def test_calls_on_several_streams_follow_each_other():
    def main(comm):
        x = comm.array(start())
        comm.Allreduce(x)
        comm.Barrier()
        with comm._world.device:
            streams = [driver.stream_create() for _ in range(2)] + [comm.stream]
            for number in range(60):
                comm.Allreduce(x, stream=streams[number % 3 if number < 30 else number // 10 % 3])
                if number % 10 == 0:
                    driver.stream_synchronize(streams[number % 3])
            for stream in streams:
                driver.stream_synchronize(stream)
            result = x.copy_to()
            for stream in streams[:2]:
                driver.stream_destroy(stream)
        return result

    for result in nvcoll.emulate(RANKS, device=0).run(main):
        np.testing.assert_array_equal(result, tripled(start(), 61))


def test_a_request_is_refused_where_a_graph_is_made():
    def main(comm):
        x, refused = comm.array(start()), []
        request = comm.Allreduce_init(x)
        comm.Allreduce(x)
        comm.Barrier()

        def work():
            for call in (lambda: comm.Iallreduce(x), request.Start):
                with pytest.raises(nvcoll.StateError, match="is being captured") as caught:
                    call()
                refused.append(str(caught.value).partition(":")[0])
            comm.Allreduce(x)

        with comm._world.device:
            graph = Graph(comm.stream, work)
            graph.replay()
            driver.stream_synchronize(comm.stream)
        return refused, x.copy_to()

    for refused, x in nvcoll.emulate(RANKS, device=0).run(main):
        assert refused == ["Iallreduce", "Allreduce_init"]
        np.testing.assert_array_equal(x, tripled(start(), 2))


PROGRAM = """
import torch, nvcoll
from nvcoll import COMM_WORLD as comm
comm.Barrier()
torch.cuda.set_device(comm._world.device.ordinal)
x = torch.arange(1, 301, dtype=torch.int32, device="cuda")
for place in ("plain", "symmetric"):
    y = x.clone() if place == "plain" else torch.from_dlpack(comm.array(x.cpu().numpy()))
    other = x.clone()
    comm.Allreduce(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        comm.Allreduce(y)
    torch.cuda.current_stream().wait_stream(side)
    y.copy_(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.Allreduce(y)
        y.floor_divide_(comm.size)
        y.add_(1)
    for number in range(1000):
        graph.replay()
        if number % 10 == 0:
            other.copy_(x)
            comm.Allreduce(other)
    torch.cuda.synchronize()
    assert torch.equal(y, x + 1000), (place, y)
    assert torch.equal(other, comm.size * x), (place, other)
print("right")
"""


def test_graphs_of_torch(run_ranks):
    pytest.importorskip("torch")
    ranks = run_ranks(PROGRAM, 2, timeout=110, env={"NVCOLL_BACKEND": "nvshmem"})
    assert [text.split()[-1] for text in ranks.stdout] == ["right"] * 2
