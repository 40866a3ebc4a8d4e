"""Arrays on the symmetric heap of a communicator: on all its ranks, or on none."""

import math
from typing import Any

import numpy as np

from nvcoll.arguments import dimensions
from nvcoll.buffers import Buffer
from nvcoll.lifecycle import Living
from nvcoll.ops import as_datatype


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
            A NumPy array; on GPUs a `DeviceBuffer` instead. Verbs use it where it lies, without copies.

        Raises
        ------
        AllocationError
            On all ranks, if one of them has no room.
        MismatchError
            On all ranks, if they ask for different sizes.
        StateError
            An earlier call failed. On GPUs, the error of that call if none has raised it yet.

        Notes
        -----
        On GPUs it waits for this rank's calls, if they may still use memory that was dropped.
        """
        datatype = as_datatype(dtype, "empty", "dtype")
        dims = dimensions(shape)  # judged before anything is sent or taken
        if self._calls is not None:
            return self._calls.empty(dims, datatype)  # type: ignore[no-any-return]
        self._world.planner.state.demand()
        return Buffer.on(self._world.heap.allocate(math.prod(dims) * datatype.itemsize), dims, datatype)

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
        return self.full(shape, 0, dtype)

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
        """
        buffer = self.empty(shape, dtype)
        buffer.fill(fill_value)
        return buffer

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
        """
        source = np.asarray(data)
        buffer = self.empty(source.shape, source.dtype if dtype is None else dtype)
        to: Any = buffer
        if self._calls is not None:
            to.copy_from(source)
        else:
            to[...] = source
        return buffer
