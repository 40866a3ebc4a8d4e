"""Arrays of other libraries on GPUs, in real processes: memory shared with a buffer, calls on their streams, graphs."""

import importlib.util
import sys

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
ENV = {"NVCOLL_BACKEND": "nvshmem", "NVCOLL_HEAP": "512M", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

START = """
import numpy as np
from nvcoll import COMM_WORLD as comm

buffer = comm.zeros((3, 5), "float32")
mine = comm.rank + 1.0
"""
PROGRAMS = {
    "cupy": """
import cupy

cupy.cuda.Device(buffer.device).use()
x = cupy.asarray(buffer)
assert x.data.ptr == buffer.address
x += mine
comm.Allreduce(buffer)
assert (cupy.asnumpy(x) == 3).all()

y = cupy.full((40, 25), mine, order="F")
cupy.cuda.get_current_stream().synchronize()
stream = cupy.cuda.Stream(non_blocking=True)
with stream:
    y *= 2
    comm.Allreduce(y)  # on the current stream
    y += 1
    stream.begin_capture()
    comm.Allreduce(y)
    y /= 2
    y += 1
    graph = stream.end_capture()
    for _ in range(100):
        graph.launch(stream)
stream.synchronize()
assert (cupy.asnumpy(y) == 107).all(), y
""",
    "numba": """
from numba import cuda

cuda.select_device(buffer.device)
x = cuda.as_cuda_array(buffer)
assert x.device_ctypes_pointer.value == buffer.address
x.copy_to_device(np.full((3, 5), mine, np.float32))
comm.Allreduce(x)
assert (x.copy_to_host() == 3).all()
y = cuda.to_device(np.full(1000, mine))
comm.Allreduce(y)
assert (y.copy_to_host() == 3).all()
""",
    "jax": """
import jax

x = jax.dlpack.from_dlpack(buffer)
assert x.unsafe_buffer_pointer() == buffer.address
y = jax.numpy.full(1000, mine, "bfloat16", device=jax.devices()[buffer.device])
result = comm.empty(1000, "bfloat16")
comm.Allreduce(y, result)
assert (result.copy_to() == 3).all()
""",
    "torch": """
import torch

torch.cuda.set_device(buffer.device)
x = torch.from_dlpack(buffer)
assert x.data_ptr() == buffer.address
x += mine
comm.Allreduce(buffer)
assert (x == 3).all()
y = torch.full((40, 25), mine, device="cuda", dtype=torch.bfloat16).T
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
comm.Allreduce(y, stream=side)
side.synchronize()
assert (y == 3).all()

from nvcoll import StateError

z = torch.full((1000,), mine, device="cuda")
comm.Allreduce(z.clone())
request = comm.Allreduce_init(z)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    for call in (request.Start, comm.Barrier, lambda: comm.empty(3)):
        try:
            call()
        except StateError:
            continue
        raise SystemExit(f"{call} was not refused in a capture")
    comm.Allreduce(z)
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(50):
        graph.replay()
    comm.Barrier()  # on this stream, behind the replays
    z.fill_(mine)
    request.Start()  # on this stream, behind the filling
    request.Wait()
assert (z == 3).all()
""",
}


@pytest.mark.parametrize("library", PROGRAMS)
def test_memory_streams_and_graphs(run_ranks, two_gpus, library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    run_ranks(START + PROGRAMS[library], 2, timeout=100, env=ENV)


def test_ranks_that_torchrun_starts(run_command, tmp_path, two_gpus):
    pytest.importorskip("torch", reason="torchrun is not installed")
    program = tmp_path / "program.py"
    program.write_text(f"{START}buffer.fill(mine)\ncomm.Allreduce(buffer)\nassert (buffer.copy_to() == 3).all()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    status, text = run_command(command, timeout=100, env=ENV)
    assert status == 0, text
