"""How ranks find each other: real processes, started by each kind of launcher."""

import errno
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from nvcoll import _bootstrap, settings
from nvcoll._bootstrap import RendezvousServer, choose, connect
from nvcoll.errors import BootstrapError, StateError
from tests.meeting import PROGRAM, as_run, as_torchrun, as_torchrun_with_a_store

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "4"}
SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5"}
RUN = {"NVCOLL_RANK": "0", "NVCOLL_SIZE": "2", "NVCOLL_RENDEZVOUS": "127.0.0.1:1", "NVCOLL_KEY": "00"}


@pytest.fixture
def server():
    with RendezvousServer(3) as server:
        yield server


class TestChoice:
    @pytest.mark.parametrize(
        ("environ", "kind", "reason"),
        [
            ({}, "single", "no launcher"),
            (RUN, "run", "NVCOLL_RENDEZVOUS"),
            (TORCHRUN, "torchrun", "MASTER_ADDR"),
            (OPEN_MPI, "mpi", "Open MPI's launcher started 3 ranks"),
            (MPICH, "mpi", "MPICH's launcher started 4 ranks"),
            (SLURM, "mpi", "Slurm's launcher started 5 ranks"),
            ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "x"}, "mpi", "PMIx"),
            ({"RANK": "0", "WORLD_SIZE": "2"}, "single", "no launcher"),
            ({**TORCHRUN, "MASTER_ADDR": ""}, "single", "no launcher"),
            ({"PMI_RANK": "0", "PMI_SIZE": "1"}, "single", "no launcher"),
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "single", "no launcher"),  # the batch script itself
            ({**RUN, **TORCHRUN, **MPICH}, "run", "NVCOLL_RENDEZVOUS"),
            ({**TORCHRUN, **MPICH}, "torchrun", "RANK"),
            ({**RUN, **MPICH, "NVCOLL_BOOTSTRAP": "mpi"}, "mpi", "NVCOLL_BOOTSTRAP=mpi"),
            ({**RUN, "NVCOLL_BOOTSTRAP": "single"}, "single", "NVCOLL_BOOTSTRAP=single"),
        ],
    )
    def test_order(self, environ, kind, reason):
        found, why = choose(settings.read(environ), environ)
        assert found == kind
        assert reason in why

    def test_a_number_that_is_none(self):
        with pytest.raises(BootstrapError, match="Init: PMI_SIZE should be a whole number, got 'many'"):
            choose(settings.read({}), {"PMI_RANK": "0", "PMI_SIZE": "many"})

    @pytest.mark.parametrize("missing", RUN)
    def test_an_incomplete_set_of_variables(self, missing):
        environ = {name: value for name, value in RUN.items() if name != missing} | {"NVCOLL_BOOTSTRAP": "run"}
        with pytest.raises(BootstrapError, match=f"Init: {missing} is not set, which `nvcoll run` does"):
            connect(settings.read(environ))

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("MASTER_PORT", "", "Init: MASTER_PORT is not set, which torchrun does"),
            ("WORLD_SIZE", "two", "Init: WORLD_SIZE should be a whole number, got 'two'"),
            ("RANK", "2", "Init: RANK=2 is not below WORLD_SIZE=2"),
        ],
    )
    def test_wrong_variables_of_torchrun(self, monkeypatch, name, value, message):
        for variable in (TORCHRUN | {name: value}).items():
            monkeypatch.setenv(*variable)
        with pytest.raises(BootstrapError, match=message):
            connect(settings.read({"NVCOLL_BOOTSTRAP": "torchrun"}))


def test_one_rank_alone():
    exchange = connect(settings.read({}))
    assert (exchange.kind, exchange.rank, exchange.size, exchange.mpi_comm) == ("single", 0, 1, None)
    assert exchange.allgather(b"x") == [b"x"]
    exchange.close()
    with pytest.raises(StateError, match="the exchange is closed"):
        exchange.allgather(b"x")


class TestProcesses:
    def test_ranks_gather_and_come_back(self, ranks, server):
        code = """
for again in range(3):
    tell(exchange.kind, [part.decode() for part in exchange.allgather(b"r%d" % rank)])
    exchange.close()
    exchange = connect(settings.read())
"""
        for _, told in ranks(code, as_run(server)):
            assert [told() for _ in range(3)] == [["run", ["r0", "r1", "r2"]]] * 3

    def test_a_killed_rank_is_named_at_once(self, ranks, server):
        code = """
exchange.allgather(b"")
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
tell(attempt(exchange.allgather, b""))
"""
        started = ranks(code, as_run(server))
        for rank in (0, 2):
            [(kind, text, seconds)] = started[rank][1]()
            assert (kind, seconds < 5) == ("PeerLostError", True)
            assert text.startswith(f"Init: rank 1 has died while rank {rank} waited; look at its own output")

    def test_a_forked_child_does_not_hide_the_death_of_its_parent(self, ranks, server):
        code = """
exchange.allgather(b"")
if rank == 1:
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
tell(attempt(exchange.allgather, b""))
"""
        [(kind, text, _)] = ranks(code, as_run(server))[0][1]()
        assert kind == "PeerLostError"
        assert "rank 1 has died" in text

    def test_a_rank_that_does_not_come_is_named(self, ranks, server):
        code = """
exchange.allgather(b"")  # all have started
exchange.timeout = 0.5
if rank == 2:
    time.sleep(100)
tell(attempt(exchange.allgather, b""))
"""
        started = ranks(code, as_run(server))
        for rank in (0, 1):
            [(kind, text, seconds)] = started[rank][1]()
            assert (kind, seconds < 5) == ("TimeoutError", True)
            assert "rank 2 did not arrive within 0.5 s" in text

    def test_the_launcher_is_gone(self, ranks):
        server = RendezvousServer(3)
        code = "tell(0)\ntime.sleep(100) if rank else tell(attempt(exchange.allgather, b''))"  # nobody answers before
        [(_, told), *_] = ranks(code, as_run(server))
        assert told() == [0]
        server.close()
        [(kind, text, _)] = told()
        assert kind == "PeerLostError"
        assert f"rank 0 lost {server.address}" in text

    def test_ctrl_c_ends_the_wait(self, ranks, server):
        [(process, told), *_] = ranks("tell(0)\ntime.sleep(100) if rank else exchange.allgather(b'')", as_run(server))
        told()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


class TestForks:
    CODE = """
if os.fork():
    os.wait()
else:
    tell(attempt(exchange.allgather, b""))
    exchange.close()
    tell(attempt(lambda: connect(settings.read()).allgather(b"")))
    tell(attempt(connect(settings.read({"NVCOLL_BOOTSTRAP": "single"})).allgather, b"alone"))
    os._exit(0)
tell([part.decode() for part in exchange.allgather(b"r%d" % rank)])
"""

    def test_a_child_is_told_that_it_is_no_rank_and_harms_none(self, ranks, server):
        for rank, (_, told) in enumerate(ranks(self.CODE, as_run(server))):
            for _ in ("allgather", "connect"):
                [(kind, text, _)] = told()
                assert kind == "StateError"
                assert f"Init: this process was forked from rank {rank} and is no rank itself" in text
                assert "NVCOLL_BOOTSTRAP=single" in text
            assert told() == [["alone"]]
            assert told() == [["r0", "r1", "r2"]]

    def test_a_child_process_that_connects_is_refused(self, ranks, server):
        code = """
import subprocess
code = "from nvcoll import settings; from nvcoll._bootstrap import connect; connect(settings.read())"
tell(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()[-1], os.getpid())
"""
        text, pid = ranks(code, as_run(server)[:1])[0][1]()
        assert f"process {pid} is rank 0 already; a child process of a rank is no rank itself" in text


class TestTorchrun:
    def test_rank_0_is_the_meeting_point(self, ranks):
        code = """
for again in range(2):
    tell(exchange.kind, [part.decode() for part in exchange.allgather(b"r%d" % rank)])
    exchange.close()
    exchange = connect(settings.read())
"""
        # rank 0 comes last: the others look for it until it is there
        environs = as_torchrun(3)[::-1]
        for _, told in ranks(code, environs):
            assert [told() for _ in range(2)] == [["torchrun", ["r0", "r1", "r2"]]] * 2

    def test_the_name_of_the_run_is_a_key(self, ranks):
        environs = as_torchrun(2)
        environs[0]["TORCHELASTIC_RUN_ID"], environs[1]["TORCHELASTIC_RUN_ID"] = "one", "other"
        _, (other, _) = ranks("time.sleep(100)", environs)
        assert other.wait(20) == 1

    @pytest.fixture
    def meet(self, monkeypatch):
        """Connect as the only rank; where it listens to all interfaces, that ends with the test."""

        def meet(host, **others):
            [environ] = as_torchrun(1, MASTER_ADDR=host, **others)
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            for _ in range(2):
                connect(settings.read(others)).close()
            started.append(_bootstrap._servers.pop((host, int(environ["MASTER_PORT"]))))
            return started[-1].address

        started = []
        yield meet
        for server in started:
            server.close()

    def test_listening_to_all_without_a_secret_is_told_once(self, meet):
        with pytest.warns(RuntimeWarning) as told:
            assert meet("127.0.0.2", TORCHELASTIC_RUN_ID="one").startswith(("[::]:", "0.0.0.0:"))
        [text] = [str(warning.message) for warning in told]
        assert text.startswith("Init: rank 0 listens on all interfaces at MASTER_PORT ")
        assert "whoever reaches that port can pass for a rank; set NVCOLL_KEY to the same random hexadecimal" in text

    def test_with_a_secret_or_on_this_host_only_there_is_nothing_to_tell(self, meet):
        assert meet("127.0.0.2", NVCOLL_KEY="c0ffee").startswith(("[::]:", "0.0.0.0:"))
        assert meet("localhost").startswith("localhost:")

    def test_the_secret_is_a_key(self, ranks):
        environs = as_torchrun(2, NVCOLL_KEY="c0ffee")
        for _, told in ranks("tell(len(exchange.allgather(b'')))", environs):
            assert told() == [2]
        environs = as_torchrun(2, NVCOLL_KEY="c0ffee")
        environs[1]["NVCOLL_KEY"] = "decade"
        _, (other, _) = ranks("time.sleep(100)", environs)
        assert other.wait(20) == 1

    def test_a_port_in_use(self, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            for name, value in as_torchrun(2)[0].items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("MASTER_PORT", str(sock.getsockname()[1]))
            with pytest.raises(BootstrapError, match=r"rank 0 cannot listen on MASTER_PORT .* in use"):
                connect(settings.read({}))

    def test_a_store_of_torchs_needs_torch(self, monkeypatch):
        for name, value in as_torchrun(2, TORCHELASTIC_USE_AGENT_STORE="True")[0].items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(sys.modules, "torch.distributed", None)
        with pytest.raises(BootstrapError, match=r"torch does not load here .*; install torch in this environment"):
            connect(settings.read({}))


class TestTorchStore:
    @pytest.fixture
    def environs(self, tmp_path):
        return as_torchrun_with_a_store(3, tmp_path)

    def test_ranks_gather_through_it_and_come_back(self, ranks, environs, tmp_path):
        code = """
for again in range(2):
    for call in range(20):
        found = exchange.allgather(b"r%d" % rank * call)
    tell(exchange.kind, [part.decode() for part in found])
    exchange.close()
    exchange = connect(settings.read())
"""
        for process, told in ranks(code, environs):
            assert [told() for _ in range(2)] == [["torchrun", ["r0" * 19, "r1" * 19, "r2" * 19]]] * 2
            process.wait(10)
        # of each session the keys of the last call remain
        assert len(list((tmp_path / "torch").glob("nvcoll_0_*"))) == 2 * 3

    def test_a_rank_that_does_not_come_is_named(self, ranks, environs):
        code = """
exchange.allgather(b"")  # all have started
exchange.verb, exchange.timeout = "free", 0.5
tell(attempt(exchange.allgather, b"")) if rank != 1 else time.sleep(100)
"""
        [(kind, text, _)] = ranks(code, environs)[2][1]()
        assert kind == "TimeoutError"
        assert text.startswith("free: rank 1 did not arrive within 0.5 s; ")

    def test_a_restarted_run_has_keys_of_its_own(self, ranks, environs, tmp_path):
        environs = [environ | {"TORCHELASTIC_RESTART_COUNT": "4"} for environ in environs]
        for _, told in ranks("tell(len(exchange.allgather(b'')))", environs):
            assert told() == [3]
        assert list((tmp_path / "torch").glob("nvcoll_4_0_*"))

    @pytest.mark.slow
    def test_under_torchrun_itself(self, tmp_path, run_command):
        torchrun = Path(sys.executable).with_name("torchrun")
        if not torchrun.exists():
            pytest.skip("torch is not installed")
        (tmp_path / "program.py").write_text(PROGRAM + "print('got', exchange.kind, exchange.allgather(b'%d' % rank))")
        status, output = run_command([torchrun, "--nproc-per-node", "2", tmp_path / "program.py"])
        assert status == 0, output
        assert output.count("got torchrun [b'0', b'1']") == 2


def test_a_process_without_descriptors_is_told_at_once(monkeypatch):
    def create_connection(address, timeout):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "create_connection", create_connection)
    told = r"^Init: rank 0 gets no more descriptors from the system \(.*Too many open files\); free what"
    with pytest.raises(BootstrapError, match=told):
        connect(settings.read(RUN))
