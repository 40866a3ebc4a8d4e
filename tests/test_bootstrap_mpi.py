"""How ranks that an MPI launcher started find each other."""

import sys
import textwrap

import pytest

from nvcoll import settings
from nvcoll._bootstrap import connect
from nvcoll.errors import BootstrapError
from tests.conftest import OPEN_MPI, launch_command

mpi = pytest.mark.mpi

# MPICH leaves the names of its memory behind where a job is aborted; all ranks have it once MPI has begun.
FORGET_NAMES = """
        def forget_names():
            names = {line.split()[-1] for line in open("/proc/self/maps") if "/dev/shm/mpich" in line}
            for name in names:
                os.unlink(name)
"""


@mpi
def test_ranks_gather_and_come_back(run_ranks):
    code = """
        from nvcoll import settings
        from nvcoll._bootstrap import connect

        for again in range(3):
            exchange = connect(settings.read())
            rank, comm = exchange.rank, exchange.mpi_comm
            found = [exchange.allgather(b"x" * size * rank) for size in (0, 1, 100_000)]
            assert found == [[b"x" * size * r for r in range(3)] for size in (0, 1, 100_000)]
            assert (comm.Get_rank(), comm.Get_size()) == (rank, 3)
            print(exchange.kind, rank, comm.allreduce(rank))
            exchange.close()
            assert exchange.mpi_comm is None
    """
    found = run_ranks(code, 3, launcher="mpiexec")
    assert found.stdout == [f"mpi {rank} 3\n" * 3 for rank in range(3)]


@mpi
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_does_not_come_is_named(run_ranks, missing):
    code = """
        import sys, time
        from nvcoll import settings
        from nvcoll._bootstrap import connect
        from nvcoll.errors import StateError, TimeoutError

        exchange = connect(settings.read())
        exchange.allgather(b"")
        exchange.verb = "empty"
        if exchange.rank == int(sys.argv[1]):
            time.sleep(1.5)
            sys.exit()
        try:
            exchange.allgather(b"")
        except TimeoutError as error:
            print(error, flush=True)
        try:
            exchange.allgather(b"")
        except StateError as error:
            print(error, flush=True)
        exchange.close()
    """
    found = run_ranks(code, 3, missing, launcher="mpiexec", env={"NVCOLL_TIMEOUT": "0.5"})
    for rank in {0, 1, 2} - {missing}:
        late, unusable = found.stdout[rank].splitlines()
        assert late.startswith(f"empty: rank {missing} did not arrive within 0.5 s")
        assert unusable.startswith("empty: an earlier call failed")


@mpi
def test_a_rank_that_stops_when_it_was_counted_is_not_waited_for(run_ranks):
    code = """
        import time
        from nvcoll import _bootstrap, settings
        from nvcoll.errors import TimeoutError

        exchange = _bootstrap.connect(settings.read())
        exchange.allgather(b"")
        exchange.verb = "empty"
        if exchange.rank == 1:
            report = exchange._channel._report

            def report_and_stop(length, deadline):
                told = report(length, deadline)
                time.sleep(4)
                return told

            exchange._channel._report = report_and_stop
        started = time.monotonic()
        try:
            exchange.allgather(b"x" * 100_000)
        except TimeoutError as error:
            print(time.monotonic() - started < 3, error, flush=True)
        exchange.close()
    """
    found = run_ranks(code, 3, launcher="mpiexec", env={"NVCOLL_TIMEOUT": "0.5"})
    for rank in (0, 2):
        assert found.stdout[rank].startswith("True empty: a rank did not arrive within 0.5 s; all ranks must make the")


@mpi
def test_parts(run_ranks):
    code = """
        import sys, threading
        from nvcoll import settings
        from nvcoll._bootstrap import connect

        exchange = connect(settings.read())
        rank = exchange.rank
        found = exchange.split(None if rank == 2 else 1 << 40, -rank)
        again = exchange.split(rank % 2 - 2**63, 0)
        if found:
            part, members = found
            assert (part.kind, part.size, members, part.verb) == ("mpi", 3, (3, 1, 0), "Init")
            assert (part.mpi_comm.Get_rank(), part.mpi_comm.Get_size()) == (part.rank, 3)
            assert members[part.rank] == rank
            pair, both = part.split(int(part.rank == 1), 0)
            assert both == ((1,) if part.rank == 1 else (0, 2))
            other = []
            thread = threading.Thread(target=lambda: other.extend(exchange.allgather(b"all")))
            thread.start()
            for _ in range(50):
                assert part.allgather(b"%d" % rank * rank) == [b"333", b"1", b""]
            thread.join()
            assert other == [b"all"] * 4
            exchange.close()
            assert pair.allgather(b"x") == [b"x"] * pair.size
            pair.close()
            part.close()
            assert part.mpi_comm is None
        else:
            exchange.allgather(b"all")
            exchange.close()
        print(again[1], again[0].allgather(b"%d" % rank))
        again[0].close()
    """
    found = run_ranks(code, 4, launcher="mpiexec")
    assert found.stdout == ["(0, 2) [b'0', b'2']\n", "(1, 3) [b'1', b'3']\n"] * 2


@mpi
def test_a_rank_that_does_not_come_to_a_part_is_named_by_its_rank_there(run_ranks):
    code = """
        from mpi4py import MPI
        from nvcoll import settings
        from nvcoll._bootstrap import connect
        from nvcoll.errors import TimeoutError

        exchange = connect(settings.read())
        part, members = exchange.split(0, -exchange.rank)
        comm = part.mpi_comm
        part.verb = "Split"
        if exchange.rank != 2:
            part.timeout = 0.5
            try:
                part.allgather(b"")
            except TimeoutError as error:
                print(error)
        part.close(exchange.rank == 2)
        print(comm == MPI.COMM_NULL, exchange.allgather(b"x"))
        exchange.close()
    """
    found = run_ranks(code, 3, launcher="mpiexec")
    told = [text.splitlines() for text in found.stdout]
    # the part is not freed, since that is collective
    assert [lines.pop() for lines in told] == ["False [b'x', b'x', b'x']"] * 3
    assert told[2] == []
    for [late] in told[:2]:
        assert late.startswith("Split: rank 0 did not arrive within 0.5 s")


@mpi
@pytest.mark.parametrize(("whole", "part"), [(False, True), (True, False)], ids=["the part", "all"])
def test_whether_mpi_ends_is_not_for_a_part_to_say(run_ranks, whole, part):
    code = f"""
        import mpi4py
        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
        from nvcoll import _bootstrap, settings

        exchange = _bootstrap.connect(settings.read())
        part, _ = exchange.split(0, 0)
        exchange.close(failed={whole})
        part.close(failed={part})
        _bootstrap.finalize_mpi()
        print(MPI.Is_finalized())
        if not MPI.Is_finalized():
            MPI.Finalize()
    """
    assert run_ranks(code, 2, launcher="mpiexec").stdout == [f"{part}\n"] * 2


@mpi
@pytest.mark.parametrize("size", [2, 3])
def test_the_first_use_has_a_deadline_and_may_be_tried_again(run_ranks, size):
    code = """
        from mpi4py import MPI
        from nvcoll import COMM_WORLD as comm
        import nvcoll, os, time

        if MPI.COMM_WORLD.rank == 1:
            time.sleep(1.5)
        else:
            try:
                nvcoll.Init()
            except nvcoll.TimeoutError as error:
                print(error)
        os.environ["NVCOLL_TIMEOUT"] = "20"
        nvcoll.Init()
        comm.Barrier()
        print(comm.size)
    """
    found = run_ranks(code, size, launcher="mpiexec", env={"NVCOLL_TIMEOUT": "0.5"})
    others = {2: "rank 1", 3: "ranks 1, 2, or some of them,"}[size]
    late = f"Init: {others} did not arrive within 0.5 s; all ranks must make the same calls, and NVCOLL_TIMEOUT sets"
    assert found.stdout[0].startswith(late)
    assert [told.splitlines()[-1] for told in found.stdout] == [f"{size}"] * size


@mpi
def test_ranks_leave_together_only_if_all_is_well(run_ranks):
    code = """
        from mpi4py import MPI
        from nvcoll import COMM_WORLD as comm
        import nvcoll

        for late in (False, True):
            comm.Barrier()
            ours = comm._world.exchange.mpi_comm
            if late and comm.rank == 0:
                try:
                    comm.Barrier()
                except nvcoll.TimeoutError:
                    pass
            MPI.COMM_WORLD.Barrier()
            nvcoll.Finalize()
            print(ours == MPI.COMM_NULL)
    """
    found = run_ranks(code, 2, launcher="mpiexec", env={"NVCOLL_TIMEOUT": "2"})
    assert found.stdout[0] == "True\nFalse\n"


@mpi
def test_an_exception_ends_the_job_if_mpi4py_runs_the_program(run_command, tmp_path):
    code = f"""
        import os, time
        from nvcoll import COMM_WORLD as comm
        {FORGET_NAMES}
        comm.Barrier()
        if comm.rank == 1:
            forget_names()
            time.sleep(60)
        comm.Barrier()
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    command = [*launch_command("mpiexec", 2), "-m", "mpi4py", tmp_path / "program.py"]
    status, output = run_command(command, timeout=20, env={**OPEN_MPI, "NVCOLL_TIMEOUT": "2"})
    assert status
    assert "TimeoutError: Barrier (call 2 on rank 0): no answer within NVCOLL_TIMEOUT" in output


@mpi
def test_an_mpi_that_this_program_started_is_used(run_ranks):
    code = """
        from mpi4py import MPI
        import os
        for name in list(os.environ):
            if name.startswith(("PMI", "OMPI")):
                del os.environ[name]
        from nvcoll import settings
        from nvcoll._bootstrap import choose, connect
        print(*choose(settings.read()))
        print(connect(settings.read()).allgather(b"%d" % MPI.COMM_WORLD.rank))
    """
    found = run_ranks(code, 2, launcher="mpiexec")
    assert found.stdout == ["mpi mpi4py runs already, with 2 ranks\n[b'0', b'1']\n"] * 2


@mpi
@pytest.mark.parametrize("call", ["comm.Split(0, 0)", "comm.zeros(3)", "part.Free()"])
def test_what_ranks_agree_on_after_mpi_was_finalized(run_ranks, call):
    """MPI itself ends the process."""
    code = f"""
        from mpi4py import MPI
        import nvcoll
        from nvcoll import COMM_WORLD as comm
        part = comm.Dup()
        comm.Barrier()
        MPI.Finalize()
        try:
            {call}
        except nvcoll.StateError as error:
            print(error)
    """
    text = "MPI is finalized, and the ranks agree through it; finalize it after the last call\n"
    for told in run_ranks(code, 2, launcher="mpiexec").stdout:
        assert told.endswith(text)


@mpi
def test_a_launcher_of_another_library(run_command):
    code = "from nvcoll import settings, _bootstrap; _bootstrap.connect(settings.read())"
    status, output = run_command(
        [sys.executable, "-c", code], env={"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}
    )
    assert status == 1
    assert "BootstrapError: Init: Open MPI's launcher started 3 ranks, but mpi4py's library (" in output
    assert "sees 1; use the launcher of that library" in output


@mpi
@pytest.mark.parametrize(
    ("env", "whose"), [({"NVCOLL_RANK": "0", "NVCOLL_SIZE": "2"}, "nvcoll run"), ({"WORLD_SIZE": "2"}, "torchrun")]
)
def test_mpi_is_asked_for_where_another_launcher_started_the_ranks(run_command, env, whose):
    code = "from nvcoll import settings, _bootstrap; _bootstrap.connect(settings.read())"
    status, output = run_command([sys.executable, "-c", code], env={"NVCOLL_BOOTSTRAP": "mpi"} | env)
    assert status == 1
    assert f"MPI sees 1 rank, but {whose} started 2; unset NVCOLL_BOOTSTRAP" in output


@mpi
def test_finalized(run_command):
    code = (
        "from mpi4py import MPI; MPI.Finalize(); from nvcoll import settings, _bootstrap\n"
        "_bootstrap.connect(settings.read())"
    )
    status, output = run_command([sys.executable, "-c", code], env={"NVCOLL_BOOTSTRAP": "mpi"})
    assert status == 1
    assert "StateError: Init: MPI is finalized and cannot be started again" in output


@mpi
@pytest.mark.parametrize(
    ("starts", "counts", "ended"),
    [("", "3", True), ("MPI.Init()", "3", False), ("", "3 + comm.rank", True)],
    ids=["nvcoll", "the program", "nvcoll, and a call failed meanwhile"],
)
def test_who_starts_mpi_ends_it(run_ranks, starts, counts, ended):
    code = f"""
        import atexit, contextlib
        import mpi4py
        import numpy as np
        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI

        @atexit.register
        def last():
            print(MPI.Is_finalized())
            if not MPI.Is_finalized():
                MPI.Finalize()

        {starts}
        from nvcoll import COMM_WORLD as comm
        import nvcoll
        for _ in range(2):
            with contextlib.suppress(nvcoll.MismatchError):
                comm.Allreduce(np.ones({counts}))
            nvcoll.Finalize()
        print(MPI.Is_finalized())
        comm.Barrier()
    """
    assert run_ranks(code, 2, launcher="mpiexec").stdout == [f"False\n{ended}\n"] * 2


@mpi
@pytest.mark.parametrize("before", ["comm.Barrier()", "pass"], ids=["in a call", "in Init"])
def test_an_mpi_that_nvcoll_started_does_not_wait_after_a_failure(run_ranks, before):
    code = f"""
        import mpi4py, os, time
        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
        from nvcoll import COMM_WORLD as comm
        {FORGET_NAMES}
        {before}
        if "1" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK")):
            if not MPI.Is_initialized():
                MPI.Init()
            forget_names()
            time.sleep(60)
        comm.Barrier()
    """
    found = run_ranks(code, 2, launcher="mpiexec", env={"NVCOLL_TIMEOUT": "2"}, timeout=20, check=False)
    assert "did not arrive" in found.stderr


def test_a_launcher_without_mpi4py_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(BootstrapError, match=r"mpi4py does not load .* `pip install 'nvcoll\[mpich\]'`"):
        connect(settings.read({"NVCOLL_BOOTSTRAP": "mpi"}))
