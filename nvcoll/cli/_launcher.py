"""Local processes that live and end together.

All ranks, and what they start, share one process group. It is led by a watchman: a shell that reads from a pipe of
the launcher's and ends the group when that pipe breaks, so that nothing stays behind even if the launcher is killed.
A rank that makes a group of its own, as `timeout` does, is found by its number; the watchman does not know of it.
Only what makes itself a daemon, in a session of its own, escapes.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Self

from nvcoll._bootstrap import named
from nvcoll.cli._output import Lines, Outlet, outlets

GRACE = 5.0
"""Seconds between asking a rank to end (SIGTERM) and killing it."""

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# `read` succeeds on a line (all is well), and fails at the end of the pipe (the launcher is gone).
WATCHMAN = "trap '' INT TERM HUP; read line || { kill -TERM 0; sleep 2; kill -KILL 0; }"


class Launcher:
    """Starts ranks, passes signals on, and waits until all have ended.

    Parameters
    ----------
    prefix
        Write the ranks' lines with their rank in front; else they write to this process's output themselves.
    tell_ended
        Called with the number of every rank that has ended without a failure, while the others go on.
    """

    def __init__(self, prefix: bool, tell_ended: Callable[[int], None]) -> None:
        self.prefix = prefix
        self.tell_ended = tell_ended
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.failed: int | None = None  # the rank that failed first
        self.passed: list[int] = []  # the signals that came for us
        self.kill_at: float | None = None  # when what is still there is killed
        self._lines: list[Lines] = []  # of outputs of ranks that have not come to their end
        self._apart: set[int] = set()  # process groups that ranks have made

    def __enter__(self) -> Self:
        self._outlets = outlets((sys.stdout.fileno(), sys.stderr.fileno())) if self.prefix else []
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handlers = {number: signal.getsignal(number) for number in (*PASSED_ON, signal.SIGTSTP, signal.SIGCHLD)}
        # a signal for the group must not end the watchman: blocked, it waits until he ignores it
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        try:
            self._watchman = subprocess.Popen(
                ["/bin/sh", "-c", WATCHMAN],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
            self._old_wakeup = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
            for number in PASSED_ON:
                if self._handlers[number] is not signal.SIG_IGN:  # nohup, and a shell's background jobs
                    signal.signal(number, self._pass_on)
            if self._handlers[signal.SIGTSTP] is not signal.SIG_IGN:
                signal.signal(signal.SIGTSTP, self._suspend)
            signal.signal(signal.SIGCHLD, lambda number, frame: None)  # a handler of any kind wakes the selector
        finally:
            # whoever started us may have left SIGCHLD blocked, too
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (*PASSED_ON, signal.SIGCHLD))
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._end_group()
        try:
            if kind is None or not issubclass(kind, OSError):  # else nothing more can be written
                self._copy_rest()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Part from the watchman, and undo what `__enter__` did."""
        if self._watchman.stdin is not None:
            with contextlib.suppress(BrokenPipeError), self._watchman.stdin as pipe:
                pipe.write(b"done\n")
        self._watchman.wait()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._wake)
        os.close(self._waker)

    def start(self, command: list[str], environ: dict[str, str]) -> None:
        """Start one more rank.

        Raises
        ------
        OSError
            The program cannot be started.
        """
        rank = len(self.ranks)
        output = subprocess.PIPE if self.prefix else None
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=_input() if rank == 0 else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=self._watchman.pid,
        )
        self.ranks.append(process)
        for number in self.passed:  # they came before this rank was there
            process.send_signal(number)
        if process.stdin is not None:
            threading.Thread(target=_pump, args=(process.stdin,), daemon=True).start()
        for source, outlet in zip((process.stdout, process.stderr), self._outlets, strict=False):
            if source is not None:
                self._lines.append(Lines(rank, source, outlet))

    def wait(self) -> int:
        """Wait for all ranks; the first that fails ends the others.

        Returns
        -------
        int
            0, or the status of the rank that failed first: 128 + N if signal N killed it.
        """
        while self._running():
            self._attend(None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic()))
            self._reap()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self._kill()
        if self.failed is None:
            return 0
        status = self.ranks[self.failed].returncode
        return status if status > 0 else 128 - status

    def _running(self) -> list[int]:
        return [rank for rank, process in enumerate(self.ranks) if process.returncode is None]

    def _attend(self, timeout: float | None) -> None:
        """Wait for a signal, for what ranks write, if there is room for it, and for who takes what is held."""
        with selectors.PollSelector() as selector:  # which knows ordinary files, too
            selector.register(self._wake, selectors.EVENT_READ)
            for lines in self._lines:
                if not lines.outlet.full:
                    selector.register(lines.source, selectors.EVENT_READ, lines)
            for outlet in set(self._outlets):
                if outlet.held:
                    selector.register(outlet.descriptor, selectors.EVENT_WRITE, outlet)
            for found, _ in selector.select(timeout):
                if isinstance(found.data, Outlet):
                    found.data.write()
                elif found.data is None:
                    os.read(self._wake, 4096)
                elif found.data.copy() == 0:
                    self._lines.remove(found.data)

    def _copy_rest(self) -> None:
        """Copy what ranks have written to the end; once a signal has come, for so long only as somebody takes it."""
        for lines in self._lines:
            lines.end()
        self._lines = []
        left, since = self._held(), time.monotonic()
        while left and not (self.passed and time.monotonic() - since > GRACE):
            self._attend(GRACE if self.passed else None)
            if self._held() < left:
                left, since = self._held(), time.monotonic()

    def _held(self) -> int:
        return sum(len(outlet.held) for outlet in set(self._outlets))

    def _reap(self) -> None:
        self._find_groups()
        ended = [rank for rank in self._running() if self.ranks[rank].poll() is not None]
        for rank in ended:
            if self.ranks[rank].returncode == 0:  # one that fails ends the others
                self.tell_ended(rank)
        # of those that ended together one killed by a signal is the cause: the others complain that it is gone
        bad = sorted((self.ranks[rank].returncode > 0, rank) for rank in ended if self.ranks[rank].returncode)
        if not bad or self.failed is not None:
            return
        self.failed = bad[0][1]
        others = self._running()
        ending = f"; ending the other {len(others)}" if others and not self.passed else ""
        _say(f"rank {self.failed} {_how(self.ranks[self.failed].returncode)}{ending}")
        if not self.passed:
            self._signal(signal.SIGTERM)
        self._kill_within(GRACE)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.passed.append(number)
        if len(self.passed) == 1:
            self._signal(number)
            # who asks with SIGINT may be answered later, by a program that saves its work first
            if number != signal.SIGINT:
                self._kill_within(GRACE)
        elif len(self.passed) == 2:
            self._signal(signal.SIGTERM)
            self._kill_within(GRACE)
        else:
            self._kill_within(0.0)

    def _kill_within(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self.kill_at = at if self.kill_at is None else min(at, self.kill_at)

    def _signal(self, number: int) -> None:
        self._find_groups()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._watchman.pid, number)
        if self._apart:
            self._send(number, self._members(apart=True))

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Let the ranks stop and go on with this process: they are in no group that the terminal knows of."""
        self._find_groups()
        ranks = self._members()
        self._send(signal.SIGSTOP, ranks)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # comes back when the job goes on
        signal.signal(number, self._suspend)
        self._send(signal.SIGCONT, ranks)

    @staticmethod
    def _send(number: int, processes: list[int]) -> None:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _find_groups(self) -> None:
        """Note the process groups that ranks have made; one that has ended, but is not reaped, still tells its own."""
        for rank in self._running():
            pid = self.ranks[rank].pid
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == pid:
                    self._apart.add(pid)

    def _kill(self) -> None:
        slow = self._running()
        if slow:
            _say(f"killed {named(slow)}, which did not end in {GRACE:g} s")
        self._signal(signal.SIGKILL)
        self.kill_at = None

    def _end_group(self) -> None:
        """End what is left of the group: ranks if starting failed, and what ranks have started and left behind."""
        if not self._members():
            return
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while self._members() and time.monotonic() < deadline:
            time.sleep(0.01)
            for process in self.ranks:
                process.poll()
        if self._members():
            self._signal(signal.SIGKILL)
        for process in self.ranks:
            process.wait()

    def _members(self, *, apart: bool = False) -> list[int]:
        """Return what is in the groups of the ranks, or only in those which ranks have made."""
        ended = {process.pid for process in self.ranks if process.returncode is not None}
        groups = self._apart if apart else {*self._apart, self._watchman.pid}
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = stat.read_text(errors="replace").partition(" (")
            except OSError:  # it has ended meanwhile
                continue
            state, _, group = rest.rpartition(") ")[2].split()[:3]
            if int(group) in groups and int(pid) != self._watchman.pid and state != "Z":
                found.append((int(group), int(pid)))
        anew = {pid for group, pid in found if group == pid in ended}  # no process is called so while the group lives
        return [pid for group, pid in found if group not in anew]


def _input() -> int | None:
    """Return what rank 0 reads from: this process's input, by way of a pipe if that is a terminal.

    Ranks are in a process group of their own, which the terminal would stop if they read from it.
    """
    if not os.isatty(0):
        return None
    try:
        return subprocess.PIPE if os.tcgetpgrp(0) == os.getpgrp() else subprocess.DEVNULL
    except OSError:  # not the terminal of this session, so it stops nobody
        return None


def _pump(target: IO[bytes]) -> None:
    with contextlib.suppress(OSError), target:
        while data := os.read(0, 1 << 16):
            target.write(data)
            target.flush()


def _how(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL, by which the kernel also ends who needs more memory than there is"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # real-time signals have no names
        return f"was killed by signal {-status}"


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"nvcoll run: {text}\n")  # one write: ranks write there too
        sys.stderr.flush()
