"""The GPU of a rank as the benchmark uses it, through torch: arrays, copies, the stream, graphs and their clock."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np

from nvcoll.errors import ArgumentError
from nvcoll.ops import Datatype

Array = np.ndarray[Any, np.dtype[Any]]
Enqueue = Callable[[], object]
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""What NCCL and torch read when they start; a user who has set them otherwise keeps that."""


def load_torch() -> Any:
    """Import torch, with NVLink multicast off.

    Raises
    ------
    ArgumentError
        There is no torch that can use a GPU.
    """
    for name, value in MULTICAST_OFF.items():
        os.environ.setdefault(name, value)
    try:
        import torch
    except ImportError as exc:
        raise ArgumentError(f"the benchmark of GPUs needs torch ({exc}); pip install torch") from exc
    if not torch.cuda.is_available():
        raise ArgumentError(
            f"the benchmark of GPUs needs a torch built for CUDA, this is {torch.__version__}; install one of those"
        )
    return torch


def to_host(tensor: Any, array: Array) -> None:
    """Copy a flat tensor into a NumPy array of the same bytes; neither library need know the other's types."""
    as_bytes(array).copy_(_bytes_of(tensor))


def to_device(array: Array, tensor: Any) -> None:
    """Copy a NumPy array into a flat tensor of the same bytes."""
    _bytes_of(tensor).copy_(as_bytes(array))


def as_bytes(array: Array) -> Any:
    """Return a flat NumPy array as a tensor of bytes that shares its memory."""
    import torch

    return torch.from_numpy(array.view(np.uint8))


def _bytes_of(tensor: Any) -> Any:
    import torch

    return (torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor).view(torch.uint8)


class Stage:
    """Arrays of one length, each made at its first use, and the stream on which all contestants work.

    Parameters
    ----------
    comm
        A communicator of ranks on GPUs.
    count
        Elements of each array.
    datatype
        Their type.
    """

    def __init__(self, comm: Any, count: int, datatype: Datatype) -> None:
        self.torch = load_torch()
        self.comm = comm
        self.count = count
        self.datatype = datatype
        self._buffers: dict[str, Any] = {}
        self._tensors: dict[str, Any] = {}
        self._mirrors: dict[str, Array] = {}
        self.device = self.torch.device("cuda", self._buffer("recv").__dlpack_device__()[1])
        self.torch.cuda.set_device(self.device)
        self.stream = self.torch.cuda.Stream(self.device)

    @property
    def handle(self) -> int:
        """The stream, as CUDA's handle."""
        return int(self.stream.cuda_stream)

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the figures should know of this GPU; ``uuid`` and ``host`` tell GPUs apart."""
        properties = self.torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "uuid": str(properties.uuid),
            "host": os.uname().nodename,
        }

    def mirror(self, role: str, count: int) -> Array:
        """Return an array of the host, in which data are drawn and results compared."""
        if role not in self._mirrors:
            self._mirrors[role] = np.zeros(self.count, self.datatype.dtype)
        return self._mirrors[role][:count]

    def plain(self, name: str = "plain") -> Any:
        """Return an ordinary tensor of torch's; those that ask for the same name share it."""
        if name not in self._tensors:
            kind = getattr(self.torch, self.datatype.name)
            self._tensors[name] = self.torch.zeros(self.count, dtype=kind, device=self.device)
        return self._tensors[name]

    def symmetric(self, role: str) -> tuple[Any, Any]:
        """Return a buffer on the symmetric heap and a tensor of the same memory, one for each `role`; collective."""
        buffer = self._buffer(role)
        if role not in self._tensors:
            self._tensors[role] = self.torch.from_dlpack(buffer)
        return buffer, self._tensors[role]

    def _buffer(self, role: str) -> Any:
        if role not in self._buffers:
            self._buffers[role] = self.comm.empty(self.count, self.datatype.dtype)
        return self._buffers[role]

    def upload(self, array: Array, tensor: Any) -> None:
        """Copy to the GPU, and wait for it."""
        with self.current():
            to_device(array, tensor)
        self.stream.synchronize()

    def download(self, tensor: Any, array: Array) -> None:
        """Wait for all that was enqueued, and copy from the GPU."""
        with self.current():
            to_host(tensor, array)
        self.stream.synchronize()

    def current(self) -> AbstractContextManager[Any]:
        """Make the stream torch's current one for a while."""
        context: AbstractContextManager[Any] = self.torch.cuda.stream(self.stream)
        return context

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        self.torch.cuda.synchronize(self.device)

    def capture(self, enqueue: Enqueue, calls: int) -> Any:
        """Return a CUDA graph of so many calls, which are not run."""
        graph = self.torch.cuda.CUDAGraph()
        # thread-local: what other threads of this process do (NCCL's watchdog) must not spoil the capture
        with self.torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                enqueue()
        return graph

    def replay(self, graph: Any, times: int) -> list[float]:
        """Replay a graph so many times after once for warmth, and return the seconds that the GPU took for each.

        The replay in front lets the ranks find each other: the clock starts when its last call has ended on this rank.
        """
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        with self.current():
            graph.replay()
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
        self.synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in pairwise(events)]

    def free(self) -> None:
        """Free the symmetric arrays; collective. A second call does nothing."""
        self.synchronize()
        self._tensors.clear()
        buffers, self._buffers = self._buffers, {}
        for role in sorted(buffers):
            buffers[role].free()
