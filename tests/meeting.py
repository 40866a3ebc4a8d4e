"""Ranks that meet: threads that join a server, and processes with the variables of a launcher."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from nvcoll import settings
from nvcoll._bootstrap import connect


def join(server, rank, size=None, key=None, timeout=10):
    """Connect as a rank, as `nvcoll run` would have it."""
    return connect(
        settings.read(
            {
                "NVCOLL_RANK": str(rank),
                "NVCOLL_SIZE": str(size or server.size),
                "NVCOLL_RENDEZVOUS": server.address,
                "NVCOLL_KEY": key or server.key,
                "NVCOLL_TIMEOUT": str(timeout),
            }
        )
    )


def together(*calls):
    """Call all of them at the same time; return results, or the exceptions that were raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def gather(ranks, *data):
    return together(*[lambda exchange=e, given=d: exchange.allgather(given) for e, d in zip(ranks, data, strict=True)])


# The start of every program: connect, and tell in one line of JSON what happened.
PROGRAM = """
import json, os, signal, sys, time
from nvcoll import settings
from nvcoll._bootstrap import connect
from nvcoll.errors import Error

def tell(*facts):
    sys.stdout.write(json.dumps(facts) + "\\n")
    sys.stdout.flush()

def attempt(call, *args):
    start = time.monotonic()
    try:
        return [part.decode() for part in call(*args)]
    except Error as error:
        return [type(error).__name__, str(error), time.monotonic() - start]

exchange = connect(settings.read())
rank = exchange.rank
"""


@contextlib.contextmanager
def starting():
    """Start programs with variables of their own; return (process, told), where told() reads a line of JSON."""
    with contextlib.ExitStack() as stack:

        def start(code, environs):
            started = []
            for environ in environs:
                process = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM + code],
                    env=os.environ | environ,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                stack.enter_context(process)
                stack.callback(kill, process.pid)
                started.append((process, lambda out=process.stdout: json.loads(out.readline())))
            return started

        yield start


def kill(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def as_run(server, **others):
    return [
        {
            "NVCOLL_RANK": str(rank),
            "NVCOLL_SIZE": str(server.size),
            "NVCOLL_RENDEZVOUS": server.address,
            "NVCOLL_KEY": server.key,
            **others,
        }
        for rank in range(server.size)
    ]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def as_torchrun(size, **others):
    port = str(free_port())
    return [
        {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **others}
        for rank in range(size)
    ]


# What nvcoll uses of torch: a store whose keys are files.
TORCH = """
import os, pathlib

class TCPStore:
    def __init__(self, host, port, is_master, timeout):
        assert (host, port, is_master) == (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), False)
        assert timeout.total_seconds() > 0
        self.folder = pathlib.Path(__file__).parent

    def _path(self, key):
        return self.folder / key.replace("/", "_")

    def set(self, key, value):
        self._path(key + ".new").write_bytes(value)
        self._path(key + ".new").rename(self._path(key))

    def check(self, keys):
        return all(self._path(key).exists() for key in keys)

    def get(self, key):
        return self._path(key).read_bytes()

    def delete_key(self, key):
        self._path(key).unlink(missing_ok=True)

def is_available():
    return True

def is_initialized():
    return False
"""


def as_torchrun_with_a_store(size, folder):
    """Variables of ranks for which torchrun holds a store: files in `folder`, which has our torch too."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/distributed.py").write_text(TORCH)
    return as_torchrun(size, TORCHELASTIC_USE_AGENT_STORE="True", PYTHONPATH=str(folder), NVCOLL_TIMEOUT="10")
