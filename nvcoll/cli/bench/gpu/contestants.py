"""Contestants on a GPU: they are checked by way of arrays of the host, and timed without them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nvcoll.cli.bench import contestants
from nvcoll.cli.bench.gpu.stage import Stage
from nvcoll.ops import Op

BUFFERS = ("symmetric", "torch", "out-of-place")
Array = np.ndarray[Any, np.dtype[Any]]


class OnGpu:
    """What the contestants on a GPU have in common; `prepare` ends with `_set`.

    Attributes
    ----------
    send, recv
        Arrays of the host: what `call` sends, and where it puts the result.
    call
        Copies `send` to the GPU, reduces, and copies the result to `recv`; for the check.
    enqueue
        The reduction alone, on torch's current stream; returns before it is done. For the clock.
    """

    name: str
    stage: Stage
    send: Array
    recv: Array
    enqueue: Callable[[], object]
    call: Callable[[], object]

    def _set(self, count: int, source: Any, target: Any, enqueue: Callable[[], object]) -> None:
        """Take `source` and `target`, tensors of `count` elements, and what reduces one to the other."""
        self._source, self._target = source, target
        self.send = self.stage.mirror("send", count)
        self.recv = self.stage.mirror("recv", count)
        self.enqueue = enqueue
        self.call = self._checked

    def load(self) -> None:
        """Copy `send` to the GPU."""
        self.stage.upload(self.send, self._source)

    def _checked(self) -> None:
        self.load()
        with self.stage.current():
            self.enqueue()
        self.stage.download(self._target, self.recv)

    def close(self) -> None:
        """Give back what the contestant holds; collective."""


class Nvcoll(OnGpu, contestants.Nvcoll):
    """nvcoll with one kind of buffer and one algorithm.

    Parameters
    ----------
    stage
        Where the buffers come from.
    op
        What is computed.
    buffer
        One of `BUFFERS`; ``torch``: an ordinary tensor, in place.
    algorithm
        One of ``comm.algorithms()``; None lets nvcoll choose.
    """

    def __init__(self, stage: Stage, op: Op, buffer: str, algorithm: str | None = None) -> None:
        self.stage = stage
        self.comm = stage.comm
        self.op = op
        self.buffer = buffer
        self.algorithm = algorithm
        self.datatype = stage.datatype

    def prepare(self, count: int) -> None:
        """Make `enqueue` reduce the first `count` elements."""
        keywords: dict[str, Any] = {"op": self.op, "stream": self.stage.handle}
        if self.algorithm is not None:
            keywords["algorithm"] = self.algorithm
        if self.buffer == "torch":
            tensor = self.stage.plain()[:count]
            self._set(count, tensor, tensor, partial(self.comm.Allreduce, tensor, **keywords))
            return
        buffer, tensor = self.stage.symmetric("recv")
        if self.buffer == "out-of-place":
            other, source = self.stage.symmetric("send")
            enqueue = partial(self.comm.Allreduce, other[:count], buffer[:count], **keywords)
            self._set(count, source[:count], tensor[:count], enqueue)
            return
        self._set(count, tensor[:count], tensor[:count], partial(self.comm.Allreduce, buffer[:count], **keywords))
