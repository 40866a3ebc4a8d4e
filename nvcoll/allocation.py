"""Arrays on the symmetric heap of a communicator: on all its ranks, or on none."""

import math
from typing import Any

import numpy as np

from nvcoll.arguments import dimensions, elements
from nvcoll.buffers import Buffer
from nvcoll.lifecycle import Living
from nvcoll.ops import Datatype, as_datatype


class Allocating(Living):
    """The part of a communicator that gives memory: `Comm` adds the verbs."""

    def empty(self, shape: Any, dtype: Any = np.float32) -> Buffer:
        """Allocate an array on the symmetric heap, contents undefined. Collective: same size and order on all ranks.

        Parameters
        ----------
        shape
            Shape of the array, or its length.
        dtype
            A NumPy dtype, or a datatype of nvcoll or mpi4py. If left out float32, where NumPy has float64.

        Returns
        -------
        Buffer
            A NumPy array; on GPUs a `DeviceBuffer` instead. Verbs need not copy it to memory that others reach.

        Raises
        ------
        AllocationError
            On all ranks, if one of them has no room.
        MismatchError
            On all ranks, if they ask for different sizes.
        TimeoutError, PeerLostError
            A rank does not come, or has ended.
        StateError
            An earlier call failed. On GPUs, the error of that call if none has raised it yet; and while torch or CuPy
            captures a graph on its current stream.

        Notes
        -----
        On GPUs it waits for this rank's calls, if they may still use memory that was dropped.
        """
        return self._allocate("empty", dimensions("empty", shape), as_datatype(dtype, "empty", "dtype"))

    def zeros(self, shape: Any, dtype: Any = np.float32) -> Buffer:
        """Allocate an array of zeros on the symmetric heap. Collective; see `empty`.

        Parameters
        ----------
        shape, dtype
            As for `empty`: float32 if left out.

        Returns
        -------
        Buffer
        """
        return self._full("zeros", shape, 0, dtype)

    def full(self, shape: Any, fill_value: Any, dtype: Any = np.float32) -> Buffer:
        """Allocate an array of one value on the symmetric heap. Collective; see `empty`.

        Parameters
        ----------
        shape, dtype
            As for `empty`: float32 if left out, whatever the type of `fill_value`.
        fill_value
            The value of every element, rounded to that type.

        Returns
        -------
        Buffer

        Raises
        ------
        ArgumentError
            `fill_value` is not one number that the type can hold; nothing was allocated.
        """
        return self._full("full", shape, fill_value, dtype)

    def array(self, data: Any, dtype: Any = None) -> Buffer:
        """Copy an array to the symmetric heap. Collective; see `empty`.

        Parameters
        ----------
        data
            Anything ``numpy.asarray`` takes, of the same size on all ranks.
        dtype
            Type of the elements; None is that of `data`.

        Returns
        -------
        Buffer

        Raises
        ------
        ArgumentError
            `data` cannot become an array of that type; nothing was allocated.
        """
        datatype = None if dtype is None else as_datatype(dtype, "array", "dtype")
        source = elements("array", "data", datatype, lambda kind: np.asarray(np.asarray(data), kind))
        buffer = self._allocate("array", source.shape, datatype or as_datatype(source.dtype, "array", "dtype"))
        to: Any = buffer
        if self._calls is not None:
            to.copy_from(source)
        else:
            to[...] = source
        return buffer

    def _full(self, verb: str, shape: Any, value: Any, dtype: Any) -> Buffer:
        """Allocate an array of one value."""
        dims, datatype = dimensions(verb, shape), as_datatype(dtype, verb, "dtype")
        one = elements(verb, "fill_value", datatype, lambda kind: np.asarray(value, kind).reshape(()))
        buffer = self._allocate(verb, dims, datatype)
        buffer.fill(one)
        return buffer

    def _allocate(self, verb: str, dims: tuple[int, ...], datatype: Datatype) -> Buffer:
        """Allocate for a verb, all of whose arguments were judged: from here on something is sent, and taken."""
        if self._calls is not None:
            return self._calls.allocate(verb, dims, datatype)  # type: ignore[no-any-return]
        self._world.planner.state.demand()
        return Buffer.on(self._world.heap.allocate(math.prod(dims) * datatype.itemsize, verb), dims, datatype)
