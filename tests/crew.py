"""Ranks without a launcher: nobody ends the others when one of them fails, so they can tell what they see."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

from nvcoll._bootstrap import RendezvousServer
from tests.conftest import segments, wait_until_empty

PRELUDE = """
import contextlib, json, os, signal, sys, threading, time
import numpy as np
import nvcoll
from nvcoll import COMM_WORLD as comm

def tell(**facts):
    os.write(1, (json.dumps(facts) + "\\n").encode())  # one write, so lines of many ranks do not mix

def attempt(call, *args, **options):
    # How a call ended: the name of what it raised or None, the message, and how long it took.
    start, kind, text = time.monotonic(), None, ""
    try:
        call(*args, **options)
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
    return {"kind": kind, "text": text, "seconds": time.monotonic() - start}

def gate():
    # Wait until the test lets this rank go on.
    os.read(0, 1)

def when_waiting(kernels, act, *args, **options):
    # Act on another thread, once this rank has begun so many kernels and had time to wait in the last.
    def watch():
        while comm._world.planner.state.sequence < kernels:
            time.sleep(0.005)
        time.sleep(0.1)
        act(*args, **options)
    thread = threading.Thread(target=watch)
    thread.start()
    return thread

@contextlib.contextmanager
def queue_held():
    # Nonblocking calls that begin in here start afterwards: so none fails before all of them have begun.
    begun = threading.Event()
    comm._world.queue.begin(begun.wait)
    try:
        yield
    finally:
        begun.set()

def total():
    # The sum over all ranks of their number plus one: shows that the communicator works.
    x = np.full(3, comm.rank + 1.0)
    comm.Allreduce(x)
    return x.tolist()
"""
"""The start of every program. A program says what it saw by ``tell``, one line of JSON a time."""

PATIENCE = 40  # seconds that a rank may take to say something, on a machine that is busy with other things


class Crew:
    """Ranks that run `program`; a context manager that kills what is left and checks that nothing else is.

    Parameters
    ----------
    program
        Source text, to which `PRELUDE` is prepended.
    n
        Number of ranks.
    **env
        Variables for all of them.
    """

    def __init__(self, program, n, **env):
        self.program, self.n, self.env = PRELUDE + program, n, env

    def __enter__(self):
        self.before = segments()
        self.server = RendezvousServer(self.n)
        self.errors = [tempfile.TemporaryFile() for _ in range(self.n)]  # noqa: SIM115 - closed at exit
        self.heard = [b""] * self.n
        self.ranks = [self._start(rank) for rank in range(self.n)]
        return self

    def _start(self, rank):
        own = {
            "NVCOLL_RANK": str(rank),
            "NVCOLL_SIZE": str(self.n),
            "NVCOLL_RENDEZVOUS": self.server.address,
            "NVCOLL_KEY": self.server.key,
        }
        return subprocess.Popen(
            [sys.executable, "-c", self.program],
            env=os.environ | self.env | own,
            stdin=subprocess.PIPE,
            bufsize=0,
            stdout=subprocess.PIPE,
            stderr=self.errors[rank],
        )

    def __exit__(self, kind, *_):
        self.kill()
        for rank in self.ranks:
            rank.stdout.close()
            rank.stdin.close()
        for errors in self.errors:
            errors.close()
        self.server.close()
        if kind is None:
            left = wait_until_empty(lambda: segments() - self.before)
            assert not left, f"left in /dev/shm: {sorted(left)}"

    def told(self, rank):
        """What a rank tells next."""
        pipe, deadline = self.ranks[rank].stdout.fileno(), time.monotonic() + PATIENCE
        while b"\n" not in self.heard[rank]:
            ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
            data = os.read(pipe, 1 << 16) if ready else b""
            assert data, f"rank {rank} {'has ended' if ready else 'says nothing'}; {self.complaints(rank)}"
            self.heard[rank] += data
        line, _, self.heard[rank] = self.heard[rank].partition(b"\n")
        return json.loads(line)

    def error_of_latecomer(self, rank):
        """The error of two calls: the first of a rank that comes late may find all that it needs, and counts then."""
        first, second = self.told(rank), self.told(rank)
        return second if first["kind"] is None else first

    def all_told(self, but=()):
        """What every rank tells next, by rank."""
        return {rank: self.told(rank) for rank in range(self.n) if rank not in but}

    def complaints(self, rank):
        """Standard error of a rank."""
        self.errors[rank].seek(0)
        return self.errors[rank].read().decode(errors="replace")

    def let_go(self, *ranks):
        """Open the next gate of these ranks, or of all."""
        for rank in ranks or range(self.n):
            with contextlib.suppress(BrokenPipeError):  # it was let go before, and has ended
                self.ranks[rank].stdin.write(b".")

    def send(self, rank, number):
        self.ranks[rank].send_signal(number)

    def wait(self, but=()):
        """Exit statuses, negative for signals, by rank."""
        return {rank: process.wait(PATIENCE) for rank, process in enumerate(self.ranks) if rank not in but}

    def kill(self):
        for rank in range(self.n):
            self.send(rank, signal.SIGKILL)
        self.wait()
