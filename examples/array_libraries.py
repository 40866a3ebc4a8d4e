"""NumPy, torch or CuPy for the same program: what they call alike is used by its name, the rest is here."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Step = Callable[[Any, Any], tuple[Any, Any]]


class OfNumpy:
    """Arrays of the host.

    Attributes
    ----------
    library
        The module, with NumPy's names for what computes.
    in_graph
        Whether `repeated` captures.
    """

    library: Any = np
    in_graph = False

    def array(self, values: Any) -> Any:
        """Copy a NumPy array to where this library computes."""
        return values

    def numpy(self, values: Any) -> NDArray[Any]:
        """Copy an array back."""
        return values

    def view(self, buffer: Any) -> Any:
        """Look at nvcoll's buffer as an array of this library, without a copy."""
        return buffer

    def stream(self) -> Any:
        """The stream on which the library works now, where it has one."""
        return None

    def repeated(self, step: Step) -> Step:
        """Make a step that is taken again and again faster, where that is possible."""
        return step


class OfCupy(OfNumpy):
    """Arrays of CuPy, on one GPU."""

    def __init__(self, device: int) -> None:
        import cupy

        cupy.cuda.Device(device).use()
        self.library = cupy

    def array(self, values: Any) -> Any:
        return self.library.asarray(values)

    def numpy(self, values: Any) -> NDArray[Any]:
        return self.library.asnumpy(values)

    def view(self, buffer: Any) -> Any:
        return self.library.asarray(buffer)

    def stream(self) -> Any:
        return self.library.cuda.get_current_stream()


class OfTorch(OfNumpy):
    """Arrays of torch, on one GPU."""

    in_graph = True

    def __init__(self, device: Any) -> None:
        import torch

        torch.set_default_device(device)  # for what `library.arange` and its like make
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)  # whose streams are the current ones, and for graphs
        self.library, self.device = torch, device

    def array(self, values: Any) -> Any:
        return self.library.asarray(values, device=self.device)

    def numpy(self, values: Any) -> NDArray[Any]:
        return values.cpu().numpy()

    def view(self, buffer: Any) -> Any:
        return self.library.from_dlpack(buffer)

    def stream(self) -> Any:
        return self.library.cuda.current_stream()

    def repeated(self, step: Step) -> Step:
        """Capture a step in a CUDA graph for each length of its arguments; the first of a length runs to warm up."""
        graphs: dict[int, Any] = {}

        def run(*given: Any) -> tuple[Any, Any]:
            length = len(given[0])
            if length not in graphs:
                graphs[length] = None
                return step(*given)
            if graphs[length] is None:
                graph, inputs = self.library.cuda.CUDAGraph(), [values.clone() for values in given]
                # thread-local: other threads of this process may use CUDA meanwhile
                with self.library.cuda.graph(graph, capture_error_mode="thread_local"):
                    results = step(*inputs)
                graphs[length] = graph, inputs, results
            graph, inputs, results = graphs[length]
            for place, values in zip(inputs, given, strict=True):
                place.copy_(values)
            graph.replay()
            return results  # the same memory every time: use them before the next step

        return run


def library_of(buffer: Any) -> OfNumpy:
    """Find what to compute with beside a buffer of nvcoll's: NumPy on a host, torch or else CuPy on a GPU."""
    if isinstance(buffer, np.ndarray):
        return OfNumpy()
    device = buffer.__dlpack_device__()[1]
    try:
        return OfTorch(f"cuda:{device}")
    except ImportError:
        return OfCupy(device)
