"""The process: whether it has begun and ended, its clock and its host, as mpi4py tells them."""

import sys
import time

import pytest

import nvcoll


def test_it_is_finalized_from_finalize_to_the_next_use(run_command):
    program = """
import atexit
atexit.register(lambda: print(MPI.Is_initialized(), MPI.Is_finalized()))  # runs after what nvcoll registers below
import nvcoll as MPI
def look():
    print(MPI.Is_initialized(), MPI.Is_finalized())
look()
MPI.COMM_SELF.Barrier()
MPI.Finalize()
look()
MPI.Init()
look()
MPI.Finalize()
look()
MPI.COMM_WORLD.size
"""
    status, output = run_command([sys.executable, "-c", program])
    assert status == 0, output
    told = [tuple(line.split()) for line in output.splitlines()]
    began, over, alive = ("False", "False"), ("False", "True"), ("True", "False")
    assert told == [began, over, alive, over, over]


def test_the_clock():
    before, ours, after = time.monotonic(), nvcoll.Wtime(), time.monotonic()
    assert before <= ours <= after
    assert 0 < nvcoll.Wtick() < 1e-3


def test_the_host_is_mpi4py_s(run_command):
    pytest.importorskip("mpi4py")
    program = "from mpi4py import MPI; print(MPI.Get_processor_name())"
    assert run_command([sys.executable, "-c", program]) == (0, nvcoll.Get_processor_name() + "\n")


def test_what_is_freed_as_the_interpreter_ends(run_command):
    program = """
import numpy as np
from nvcoll import COMM_WORLD
class Solver:
    def __init__(self):
        self.comm = COMM_WORLD.Dup()
        self.request = self.comm.Allreduce_init(np.ones(3))
    def __del__(self):
        self.request.Free()
        self.comm.Free()
solver = Solver()
"""
    assert run_command([sys.executable, "-c", program]) == (0, "")


def test_no_communicator_comes_to_life_as_the_interpreter_ends(run_command):
    program = """
import os
from nvcoll import COMM_WORLD
class Late:
    comm, write = COMM_WORLD, os.write
    def __del__(self):
        try:
            self.comm.Barrier()
        except Exception as error:
            self.write(1, f"{type(error).__name__} {error}".encode())
late = Late()
late.comm.Barrier()
"""
    text = "StateError COMM_WORLD: the interpreter ends; make calls before that"
    assert run_command([sys.executable, "-c", program]) == (0, text)


def test_a_forked_child_ends_in_silence(run_command):
    program = """
import os, sys
from nvcoll import COMM_WORLD
x = COMM_WORLD.zeros(3)
if os.fork() == 0:
    sys.exit(0)
sys.exit(os.wait()[1])
"""
    assert run_command([sys.executable, "-c", program]) == (0, "")


def test_closed_standard_streams_are_not_taken_by_what_is_opened(run_ranks):
    program = """
import os
names = lambda: [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
kept = os.dup(1)
os.closerange(0, 3)
from nvcoll import COMM_WORLD
COMM_WORLD.Barrier()
os.write(kept, " ".join(names()).encode())
"""
    assert run_ranks(program, 2).stdout == ["/dev/null /dev/null /dev/null"] * 2
