"""Memory and order around calls that still run, beside torch, whose streams and memory are its own.

Rank 1 comes late to a call, so that what rank 0 does meanwhile could overtake it.
"""

import threading
import time

import numpy as np
import pytest

import nvcoll
from nvcoll.backends import driver
from tests.gpu.soak.graph import CAPTURE

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("loaded")]
COUNT = 1 << 18
LATE = 0.3
"""Seconds."""
CYCLES = 500_000_000
"""About as long on a GPU."""


@pytest.fixture(scope="module")
def loaded():
    """Let torch have kernels and memory: to get them later may wait for a call that waits for the rank which does."""
    rooms = [torch.empty(COUNT, device="cuda") for _ in range(32)]
    del rooms
    x = torch.ones(COUNT, device="cuda") * 2
    torch.from_dlpack(x).clone().fill_(1).add_(1)
    torch.full((COUNT,), 7.0, device="cuda")
    torch.cuda._sleep(1)
    torch.cuda.synchronize()


def on_both(work):
    """Run ``work(comm, meet)`` on two emulated ranks; rank 1 sleeps in `meet`, which both call before a collective."""
    ready = threading.Barrier(2)

    def main(comm):
        def meet():
            ready.wait(20)
            if comm.rank == 1:
                time.sleep(LATE)

        comm.Allreduce(comm.zeros(COUNT))  # the kernel is loaded
        comm.Barrier()
        return work(comm, meet)

    return nvcoll.emulate(2, device=0).run(main)


def test_what_takes_a_buffer_through_dlpack_comes_after_the_call():
    def work(comm, meet):
        x = comm.full(COUNT, comm.rank + 1)
        side = torch.cuda.Stream()
        meet()
        comm.Allreduce(x)
        with torch.cuda.stream(side):
            seen = torch.from_dlpack(x).clone()
        side.synchronize()
        return seen.unique().tolist()

    assert on_both(work) == [[3.0], [3.0]]


def test_memory_of_a_tensor_is_not_given_to_another_during_the_call():
    def work(comm, meet):
        out = torch.zeros(COUNT, device="cuda")
        torch.cuda.current_stream().synchronize()
        meet()
        sent = torch.full((COUNT,), comm.rank + 1.0, device="cuda")
        torch.cuda.current_stream().synchronize()
        place = sent.data_ptr()
        comm.Allreduce(sent, out)
        del sent
        other = torch.full((COUNT,), 7.0, device="cuda")
        torch.cuda.current_stream().synchronize()
        comm._world.settle()
        late = comm.rank == 1  # its call may be over at once
        return out.unique().tolist(), late or other.data_ptr() != place

    assert on_both(work) == [([3.0], True)] * 2


def test_memory_of_a_buffer_is_not_given_to_another_during_the_call():
    def work(comm, meet):
        dropped = comm.full(COUNT, comm.rank + 1)
        place = dropped.address
        with comm._world.device:
            side = driver.stream_create()  # where the communicator's own does not wait for it
        if comm.rank == 1:  # late on the GPU, for what comes next meets the other rank on the host
            with torch.cuda.stream(torch.cuda.ExternalStream(side)):
                torch.cuda._sleep(CYCLES)
        comm.Allreduce(dropped, stream=side)
        del dropped
        kept = [comm.zeros(COUNT) for _ in range(2)]
        comm.Barrier()
        with comm._world.device:
            driver.stream_destroy(side)
        return place in [one.address for one in kept], [one.copy_to().max().item() for one in kept]

    assert on_both(work) == [(True, [0.0, 0.0])] * 2


def test_a_graph_of_torch_is_not_missed():
    def work(comm, meet):
        x, y, graph = comm.full(COUNT, comm.rank + 1), comm.zeros(COUNT), torch.cuda.CUDAGraph()
        comm.Allreduce(x, y)
        comm.Barrier()
        y.fill(0)
        with CAPTURE, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            with pytest.raises(nvcoll.StateError, match=r"^Allreduce: a graph is being captured on the current stream"):
                comm.Allreduce(x, y)
            comm.Allreduce(x, y, stream=torch.cuda.current_stream())
        before = y.copy_to().max().item()
        meet()
        with torch.cuda.stream(torch.cuda.ExternalStream(comm.stream)):  # on the default one ranks would queue up
            graph.replay()
            torch.cuda.current_stream().synchronize()
        return before, np.unique(y.copy_to()).tolist()

    assert on_both(work) == [(0.0, [3.0])] * 2
