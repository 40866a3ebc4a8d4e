"""`nvcoll run`: ranks of this host that start, end, and speak together."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvcoll import cli
from nvcoll.cli import run
from tests.conftest import eventually

NVCOLL = str(Path(sys.executable).with_name("nvcoll"))
CPUS = run._usable_cpus()


@pytest.fixture
def nvcoll(run_command):
    """Run `nvcoll run` with these words; return (exit status, output)."""

    def start(*words, env=None):
        return run_command([NVCOLL, "run", *words], timeout=30, env=env)

    return start


def shell(text):
    """The words that run a shell program on every rank; $R is the rank."""
    return "--", "sh", "-c", f"R=$NVCOLL_RANK; {text}"


@pytest.fixture
def started(tmp_path):
    """Start `nvcoll run` and wait until every rank has made a file named after it that holds process ids."""
    with contextlib.ExitStack() as stack:

        def start(n, text, *options):
            words = [NVCOLL, "run", "-n", str(n), *options, *shell(text)]
            process = subprocess.Popen(
                words,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            eventually(lambda: all((tmp_path / f"up{rank}").exists() for rank in range(n)))
            pids = [int(pid) for rank in range(n) for pid in (tmp_path / f"up{rank}").read_text().split()]
            return process, pids

        yield start


def running(pids):
    """Those of `pids` that run."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def parse(*words):
    """What the command line makes of these words."""
    return cli.parser(["run"]).parse_args(["run", *words])


class TestPrograms:
    @pytest.mark.parametrize(
        ("words", "command"),
        [
            (
                (__file__, "-n", "5", "--", "-c", "--prefix"),
                [sys.executable, __file__, "-n", "5", "--", "-c", "--prefix"],
            ),
            (("-m", "package.module", "-n", "x"), [sys.executable, "-m", "package.module", "-n", "x"]),
            (("-c", "1 + 1", "-m", "--"), [sys.executable, "-c", "1 + 1", "-m", "--"]),
            (("--", "echo", "--", "-n"), ["echo", "--", "-n"]),
            (("--prefix", "--", "-n"), ["-n"]),
        ],
        ids=["script", "module", "code", "executable", "like an option"],
    )
    def test_have_their_own_options(self, words, command):
        args = parse("-n", "3", *words)
        assert run.command(args) == command
        assert args.n == 3

    @pytest.mark.parametrize("words", [("-n", "3"), ("-n3",), ("-np", "3")])
    def test_how_many(self, words):
        args = parse(*words, __file__, "-np", "5")
        assert (args.n, run.command(args)) == (3, [sys.executable, __file__, "-np", "5"])

    def test_ranks_find_each_other(self, nvcoll):
        code = (
            "import os, sys; from nvcoll import settings; from nvcoll._bootstrap import connect\n"
            "e = connect(settings.read()); found = e.allgather(sys.argv[1].encode() * e.rank)\n"
            "os.write(1, f'{e.kind} {e.rank} {found}{os.linesep}'.encode())"  # in one piece
        )
        status, output = nvcoll("-n", "3", "-c", code, "-n")
        assert status == 0, output
        assert sorted(output.splitlines()) == [f"run {rank} [b'', b'-n', b'-n-n']" for rank in range(3)]


class TestEnvironment:
    def test_who_am_i(self, nvcoll):
        code = "import json, os; os.write(1, json.dumps(dict(os.environ)).encode() + bytes([10]))"  # in one piece
        inherited = {"NVCOLL_RANK": "7", "NVCOLL_SIZE": "9", "NVCOLL_KEY": "00"}  # of a run around this one
        keys = set()
        for _ in range(2):
            status, output = nvcoll("--env", "A=1", "-c", code, env=inherited)
            assert status == 0, output
            found = sorted((json.loads(line) for line in output.splitlines()), key=lambda v: int(v["NVCOLL_RANK"]))
            assert len(found) == CPUS  # by default
            assert [v["NVCOLL_RANK"] for v in found] == [str(rank) for rank in range(CPUS)]
            assert {v["NVCOLL_SIZE"] for v in found} == {str(CPUS)}
            assert {v["A"] for v in found} == {"1"}
            assert re.fullmatch(r"127\.0\.0\.1:\d+", found[0]["NVCOLL_RENDEZVOUS"])
            assert re.fullmatch("[0-9a-f]{64}", found[0]["NVCOLL_KEY"])
            keys |= {v["NVCOLL_KEY"] for v in found}
        assert len(keys) == 2  # one a run

    def test_options_set_variables(self):
        args = parse("--timeout", "7.5", "--env", "A=1=2", "--env", "B=", "--prefix", "-c", "1")
        assert run.variables(args, {"HOME": "/", "A": "0", "OMP_NUM_THREADS": "3", "NVCOLL_RANK": "1"}) == {
            "HOME": "/",
            "A": "1=2",
            "B": "",
            "NVCOLL_TIMEOUT": "7.5",
            "OMP_NUM_THREADS": "3",
            "PYTHONUNBUFFERED": "1",
        }

    def test_a_quota_counts(self, monkeypatch):
        """As in containers."""
        everything = run._topology.usable_cpus()
        monkeypatch.setattr(run._topology, "usable_cpus", lambda: (1).to_bytes(4, "little") + everything[4:])
        assert parse("x.py").n == 1
        assert run.variables(parse("-n", "1", "x.py"), {})["OMP_NUM_THREADS"] == "1"

    @pytest.mark.parametrize(("n", "threads"), [(1, CPUS), (CPUS, 1), (5 * CPUS, 1)])
    def test_threads_are_shared_out(self, n, threads):
        assert run.variables(parse("-n", str(n), "-c", "1"), {}) == {"OMP_NUM_THREADS": str(threads)}


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "status", "message"),
        [
            ((), 2, "no program is named; name a script.py, -m module, -c code or -- executable"),
            (("--",), 2, "no program is named"),
            (("-n", "2", "-m"), 2, "no program is named"),
            (("-n", "2", "nosuch.py"), 2, "there is no script nosuch.py; a program that is not Python's goes after --"),
            (("-n", "2", "--", "nosuch"), 127, "cannot start nosuch: No such file or directory"),
            (("-n", "2", "--", "/"), 126, "cannot start /: Permission denied"),
            (("--env", "NVCOLL_SPIN=x", "-c", "1"), 2, "NVCOLL_SPIN: expected a number of microseconds, or auto"),
        ],
    )
    def test_are_told_once(self, capsys, words, status, message):
        assert cli.main(["run", *words]) == status
        assert capsys.readouterr().err.count(f"nvcoll run: {message}") == 1

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("-n", "0", "-c", "1"), "argument -n/-np: expected a whole number of 1 or more, got '0'"),
            (("--timeout", "never", "-c", "1"), "argument --timeout: expected a number of seconds above 0"),
            (("--env", "A", "-c", "1"), "argument --env: expected NAME=VALUE, got 'A'"),
            (("--pre", "-c", "1"), "unrecognized arguments: --pre"),
        ],
    )
    def test_of_options(self, capsys, words, message):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["run", *words])
        told = capsys.readouterr().err
        assert message in told
        assert told.startswith("usage: nvcoll run ")

    @pytest.mark.parametrize(
        ("words", "env"), [((), {"NVCOLL_TIMOUT": "3"}), (("--env", "NVCOLL_TIMOUT=3"), {"NVCOLL_RANK": "1"})]
    )
    def test_unknown_settings_are_told_once(self, nvcoll, words, env):
        status, output = nvcoll("-n", "2", *words, "-c", "from nvcoll import COMM_WORLD; COMM_WORLD.Barrier()", env=env)
        assert status == 0, output
        assert output == "nvcoll run: NVCOLL_TIMOUT is no setting of nvcoll; did you mean NVCOLL_TIMEOUT?\n"


class TestStatus:
    def test_all_is_well(self, nvcoll):
        assert nvcoll("-n", "3", *shell("exit 0")) == (0, "")

    def test_the_first_that_fails_ends_the_others(self, nvcoll):
        start = time.monotonic()
        status, output = nvcoll("-n", "3", *shell("[ $R = 1 ] && exit 3; sleep 60"))
        assert (status, output) == (3, "nvcoll run: rank 1 ended with status 3; ending the other 2\n")
        assert time.monotonic() - start < 30

    def test_a_rank_that_ends_before_its_first_use_is_not_waited_for(self, nvcoll):
        code = "import os; from nvcoll import COMM_WORLD\nif os.environ['NVCOLL_RANK'] == '0': COMM_WORLD.Barrier()"
        status, output = nvcoll("-n", "2", "-c", code)
        assert status == 1
        assert "PeerLostError: Init: rank 1 has ended while rank 0 waited; look at its own output" in output

    def test_a_rank_may_end_before_others_if_none_waits_for_it(self, nvcoll):
        code = (
            "import os, time; from nvcoll import COMM_SELF, COMM_WORLD\nif os.environ['NVCOLL_RANK'] == '0':\n"
            "    time.sleep(0.5)\n    COMM_SELF.Barrier()"
        )
        assert nvcoll("-n", "2", "-c", code) == (0, "")

    def test_a_signal_is_128_and_its_number(self, nvcoll):
        status, output = nvcoll("-n", "2", *shell("[ $R = 1 ] && kill -SEGV $$; sleep 60"))
        assert (status, output) == (128 + 11, "nvcoll run: rank 1 was killed by SIGSEGV; ending the other 1\n")

    def test_the_cause_is_the_one_that_was_killed(self, nvcoll):
        """Rank 1 dies, and rank 0 at once complains that it did."""
        code = (
            "import os, signal\nfrom nvcoll import settings; from nvcoll._bootstrap import connect\n"
            "e = connect(settings.read()); e.allgather(b'')\n"
            "if e.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
            "e.allgather(b'')"
        )
        status, output = nvcoll("-n", "2", "-c", code)
        assert status == 128 + 9
        assert "nvcoll run: rank 1 was killed by SIGKILL, by which the kernel also ends who needs more memory" in output

    def test_what_ignores_sigterm_is_killed(self, run_command, tmp_path):
        code = (
            "import sys; from nvcoll.cli import _launcher, main; _launcher.GRACE = 0.5\n"
            "sys.exit(main(['run', '-n', '2', '--', 'sh', '-c', sys.argv[1]]))"
        )
        text = (
            "if [ $NVCOLL_RANK = 0 ]; then trap '' TERM; touch up; while :; do sleep 0.1; done; fi; "
            "while [ ! -e up ]; do sleep 0.02; done; exit 4"
        )
        status, output = run_command([sys.executable, "-c", code, text], timeout=20, cwd=tmp_path)
        assert status == 4
        assert "killed rank 0, which did not end in 0.5 s" in output


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_are_passed_on(self, started, tmp_path, number):
        text = "echo $$ > new$R; mv new$R up$R; while :; do sleep 0.05; done"
        process, _ = started(2, f"trap 'touch got$R; exit 9' {number.name[3:]}; {text}")
        process.send_signal(number)
        assert process.wait(10) == 9
        assert sorted(path.name for path in tmp_path.glob("got*")) == ["got0", "got1"]

    def test_python_ranks_end_as_by_ctrl_c(self, started):
        code = "import os, time; open('up' + os.environ['NVCOLL_RANK'], 'w').write(str(os.getpid())); time.sleep(60)"
        process, pids = started(2, f'exec {sys.executable} -c "{code}"')
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGINT
        assert re.search(r"nvcoll run: rank [01] was killed by SIGINT\n", output)
        assert not running(pids)

    def test_ranks_may_take_their_time_after_ctrl_c_but_not_after_three(self, started):
        process, pids = started(1, "trap '' INT TERM; echo $$ > new0; mv new0 up0; while :; do sleep 0.05; done")
        for _ in range(3):
            assert running(pids)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(10) == 128 + signal.SIGKILL
        assert not running(pids)

    def test_ignored_hangups_stay_ignored(self, tmp_path):
        """As under nohup."""
        command = f"trap '' HUP; exec {NVCOLL} run -n 1 -- sh -c 'kill -HUP $PPID $$; sleep 0.3; echo alive'"
        found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20, check=False)
        assert (found.returncode, found.stdout) == (0, "alive\n")


class TestNothingRemains:
    TREE = "sleep 60 & echo $$ $! > new$R; mv new$R up$R; wait"

    def test_if_the_launcher_is_killed(self, started):
        process, pids = started(2, self.TREE)
        assert len(running(pids)) == 4
        process.kill()
        eventually(lambda: not running(pids))

    def test_if_all_of_them_ignore_the_end(self, started):
        process, pids = started(1, "trap '' TERM HUP INT; echo $$ > new0; mv new0 up0; while :; do sleep 0.05; done")
        process.kill()
        eventually(lambda: not running(pids))

    def test_of_children_if_a_rank_fails(self, started, tmp_path):
        process, pids = started(
            2, f"({self.TREE}) & while [ ! -e go ]; do sleep 0.02; done; [ $R = 0 ] && exit 5; wait"
        )
        assert len(running(pids)) == 4
        (tmp_path / "go").touch()
        assert process.wait(10) == 5
        assert not running(pids)

    def test_of_children_if_all_is_well(self, started):
        process, pids = started(1, "sleep 60 & echo $! > new0; mv new0 up0; sleep 0.1")
        assert process.wait(10) == 0
        assert not running(pids)


def test_many_communicators_under_a_low_limit_of_descriptors():
    """The launcher has a connection for each rank of each; the limit of the ranks stays."""
    program = """
import resource
from nvcoll import COMM_WORLD as comm
kept = [comm.Dup() for _ in range(30)]
comm.Barrier()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    shell = f'ulimit -Sn 72; exec "{sys.executable}" -m nvcoll run -n 4 -c "$0"'
    env = os.environ | {"NVCOLL_SCRATCH": "256K"}
    done = subprocess.run(
        ["bash", "-c", shell, program], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "".join(done.stdout.split())) == (0, "72" * 4), done.stderr


class TestOutput:
    def test_lines_carry_their_rank_and_stay_whole(self, nvcoll):
        code = (
            "import os, sys\nrank = os.environ['NVCOLL_RANK']\n"
            "for line in range(200):\n    for part in range(5):\n        os.write(1, (rank * 20).encode())\n"
            "    os.write(1, b' %d\\n' % line)\nos.write(1, b'no end')"
        )
        status, output = nvcoll("-n", "3", "--prefix", "-c", code)
        assert status == 0
        for rank in range(3):
            mine = [line for line in output.splitlines() if line.startswith(f"[{rank}] ")]
            assert mine == [f"[{rank}] {str(rank) * 100} {line}" for line in range(200)] + [f"[{rank}] no end"]
        assert len(output.splitlines()) == 3 * 201

    def test_lines_come_at_once_and_errors_as_errors(self):
        code = "import sys, time; print('out'); print('err', file=sys.stderr); sys.stdin.read()"
        words = [NVCOLL, "run", "-n", "1", "--prefix", "-c", code]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, **pipes) as process:
            assert process.stdout.readline() == "[0] out\n"
            assert process.stderr.readline() == "[0] err\n"
            process.stdin.close()
            assert process.wait(10) == 0

    def test_without_prefixes_ranks_write_themselves(self, nvcoll):
        code = "import os, sys; sys.exit(os.fstat(1).st_ino == os.stat(f'/proc/{os.getppid()}/fd/1').st_ino)"
        assert nvcoll("-n", "1", "-c", code)[0] == 1
        assert nvcoll("-n", "1", "--prefix", "-c", code)[0] == 0
        assert nvcoll("-n", "1", "--prefix", "--no-prefix", "-c", code)[0] == 1

    def test_a_reader_that_leaves_ends_the_run(self):
        words = [NVCOLL, "run", "-n", "2", "--prefix", "--", "yes"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.read(1000)
            process.stdout.close()
            assert process.wait(20) == 128 + signal.SIGPIPE
            assert process.stderr.read() == b""

    def test_output_that_cannot_be_written_ends_the_run(self):
        words = [NVCOLL, "run", "-n", "2", "--prefix", "--", "yes"]
        with open("/dev/full", "wb") as full:  # noqa: PTH123 - no file, but a device
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False)
        text = "nvcoll run: cannot write the output (No space left on device); make room, or redirect it\n"
        assert (done.returncode, done.stderr) == (1, text)

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_closed_output(self, run_command, number):
        code = f"import os, sys; sys.exit(os.path.exists('/proc/self/fd/{number}'))"  # ranks inherit that it is closed
        command = f'{NVCOLL} run -n 2 {{}} -c "{code}" {number}>&-'
        assert run_command(["sh", "-c", command.format("")]) == (0, "")
        status, output = run_command(["sh", "-c", command.format("--prefix")])
        assert status == 2
        assert output.startswith("nvcoll run: --prefix: lines go to the standard output and error output, of which one")
