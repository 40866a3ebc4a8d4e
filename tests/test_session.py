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
