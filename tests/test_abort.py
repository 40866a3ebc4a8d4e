"""Abort: the process ends with the status, the others find out, and launchers end them."""

import sys
import time

import pytest

import nvcoll
from nvcoll import COMM_SELF
from nvcoll.errors import ArgumentError
from tests.crew import Crew

SOON = 20  # seconds, of a limit of 600 for those that wait

ABORT = """
import os, sys, time
import nvcoll
from nvcoll import COMM_WORLD as comm
meet, code = sys.argv[1:]
if meet == "yes":
    part = comm.Split(comm.size - 1 - comm.rank)
    comm.Barrier()
if meet == "MPI":
    from mpi4py import MPI
rank = next(os.environ[name] for name in ("NVCOLL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ)
if rank == "1":
    time.sleep(0.2)
    (part if meet == "yes" else comm).Abort(int(code))
time.sleep(600)
"""


@pytest.mark.parametrize(("meet", "code", "status"), [("yes", 7, 7), ("yes", 0, 1), ("yes", 256, 1), ("no", 300, 44)])
def test_nvcoll_run_ends_the_others_and_has_the_status(run_ranks, meet, code, status):
    ranks = run_ranks(ABORT, 3, meet, code, check=False)
    assert ranks.returncode == status
    who = "rank 0 of COMM_WORLD.Split(1)" if meet == "yes" else "a process of COMM_WORLD"
    assert f"nvcoll: {who} calls Abort({code})" in ranks.stderr
    assert f"rank 1 ended with status {status}; ending the other 2" in ranks.stderr


@pytest.mark.mpi
@pytest.mark.usefixtures("mpich_leftovers")
@pytest.mark.parametrize(("meet", "code", "status"), [("yes", 7, 7), ("yes", 0, 1), ("MPI", 44, 44)])
def test_mpiexec_ends_the_others_and_has_the_status(run_ranks, meet, code, status):
    ranks = run_ranks(ABORT, 3, meet, code, launcher="mpiexec", check=False)
    assert ranks.returncode == status, str(ranks)  # what ranks wrote last may be lost with mpiexec's own end


def test_others_that_wait_are_told_as_of_a_rank_that_was_killed():
    program = """
comm.Barrier()
if comm.rank == 1:
    gate()
    comm.Abort(5)
tell(ready=True)
tell(**attempt(comm.Barrier))
"""
    with Crew(program, 3) as crew:
        crew.all_told(but=[1])
        crew.let_go(1)
        for rank in (0, 2):
            told = crew.told(rank)
            assert told["kind"] == "PeerLostError"
            assert "rank 1 has ended" in told["text"]
            assert told["seconds"] < SOON
        assert crew.ranks[1].wait(SOON) == 5


def test_emulated_ranks_end_their_run_and_not_the_process():
    def main(comm, free, made):
        part = comm.Dup() if made else comm
        if comm.rank == 1:
            if free:
                part.Free()
            part.Abort(9)
        part.Free() if free else comm.Barrier()
        comm.Barrier()

    started = time.monotonic()
    for free, made in ((False, False), (False, True), (True, True)):
        with pytest.raises(SystemExit) as caught:
            nvcoll.emulate(3).run(main, free, made)
        assert caught.value.code == 9
    assert time.monotonic() - started < SOON


def test_it_is_this_process_that_ends(run_command):
    program = (
        "import nvcoll, atexit; atexit.register(print, 'end'); nvcoll.COMM_SELF.Barrier(); nvcoll.COMM_SELF.Abort()"
    )
    assert run_command([sys.executable, "-c", program]) == (1, "nvcoll: rank 0 of COMM_SELF calls Abort(0)\n")


def test_what_is_no_status_is_refused():
    with pytest.raises(ArgumentError, match="Abort: errorcode is 'error', expected an integer"):
        COMM_SELF.Abort("error")
