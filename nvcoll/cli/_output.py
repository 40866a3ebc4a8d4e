"""What ranks write, copied line by line to this process's own output, whose reader may be slow or stand still.

Nothing here waits for that reader, so that signals and the ends of ranks are attended to meanwhile.
"""

import os
import select
import stat
from typing import IO

LONGEST_LINE = 1 << 16
"""Bytes of a line without an end that are written as one."""
MOST = 1 << 20
"""Bytes that are held for an output; ranks are read from when there is less."""


class Outlet:
    """An output of this process, and what is held for it.

    Parameters
    ----------
    descriptor
        Its file descriptor. Others may have the file too, so its flags stay as they are: pieces are so small that a
        pipe takes them whole when `select` says that it takes any.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.held = bytearray()
        self._piece = MOST if stat.S_ISREG(os.fstat(descriptor).st_mode) else select.PIPE_BUF

    @property
    def full(self) -> bool:
        """Whether no more should be put."""
        return len(self.held) >= MOST

    def put(self, data: bytes) -> None:
        """Hold bytes until they are written."""
        self.held += data

    def write(self) -> None:
        """Write a piece of what is held, whole lines if one fits: others may write there between two pieces."""
        piece = self.held[: self._piece]
        end = piece.rfind(b"\n") + 1
        try:
            written = os.write(self.descriptor, piece[:end] if end else piece)
        except BlockingIOError:  # others have made it so that no write waits
            return
        del self.held[:written]


class Lines:
    """An output of a rank.

    Parameters
    ----------
    rank
        Is put in front of each line.
    source
        Where the rank's lines are read from. From now on no read waits.
    outlet
        Where they go.
    """

    def __init__(self, rank: int, source: IO[bytes], outlet: Outlet) -> None:
        self.source, self.outlet = source, outlet
        self._mark = f"[{rank}] ".encode()
        self._begun = b""
        os.set_blocking(source.fileno(), False)

    def copy(self) -> int | None:
        """Copy what has come, of a line that is too long a part; return how many bytes: 0 at the end, None so far."""
        try:
            data = os.read(self.source.fileno(), LONGEST_LINE)
        except BlockingIOError:
            return None
        *lines, self._begun = (self._begun + data).split(b"\n")
        if self._begun and (not data or len(self._begun) >= LONGEST_LINE):
            lines.append(self._begun)
            self._begun = b""
        self._put(lines)
        return len(data)

    def end(self) -> None:
        """Copy what is still there, and the rest of a line whose end does not come: who could write it is no rank."""
        for _ in range(MOST // LONGEST_LINE):  # more than a pipe holds comes from a daemon that goes on
            if not self.copy():
                break
        self._put([self._begun] if self._begun else [])
        self._begun = b""

    def _put(self, lines: list[bytes]) -> None:
        self.outlet.put(b"".join(self._mark + line + b"\n" for line in lines))


def outlets(descriptors: tuple[int, int]) -> list[Outlet]:
    """Return an outlet for each of two descriptors: one for both where they are the same file, to keep lines whole."""
    one = Outlet(descriptors[0])
    return [one, one if os.path.sameopenfile(*descriptors) else Outlet(descriptors[1])]
