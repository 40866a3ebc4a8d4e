"""What the launcher of `nvcoll run` makes of its surroundings: other processes, readers, terminals, signals."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import eventually

NVCOLL = Path(sys.executable).with_name("nvcoll")
OF_A_DAEMON = """
import os, subprocess
with open(os.environ["DAEMON"], "w") as told:
    print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, file=told)
print("the result", end="")
"""


@pytest.fixture
def other_process(tmp_path):
    """A process whose name the system cuts in the midst of a character."""
    program = tmp_path / "auswertung-ger\u00e4t"
    shutil.copy(shutil.which("sleep"), program)
    with subprocess.Popen([program, "60"]) as process:
        name = Path(f"/proc/{process.pid}/comm")
        while not name.read_bytes().startswith(b"auswertung"):  # the system sets it last, when Popen has returned
            time.sleep(0.001)
        yield name.read_bytes().strip()
        process.kill()


def test_names_of_processes_may_be_any_bytes(run_command, other_process):
    with pytest.raises(UnicodeDecodeError):
        other_process.decode()
    assert run_command([NVCOLL, "run", "-n", "2", "-c", "print('well', end='')"]) == (0, "wellwell")


def test_the_end_of_the_output_is_not_lost_to_a_daemon(run_command, tmp_path):
    status, output = run_command(
        [NVCOLL, "run", "-n", "1", "--prefix", "-c", OF_A_DAEMON], env={"DAEMON": str(tmp_path / "pid")}
    )
    subprocess.run(["kill", (tmp_path / "pid").read_text().strip()], check=True)
    assert (status, output) == (0, "[0] the result\n")


MANY = "for i in range(3000): print(i, 'x' * 100)"
SLOW = """
import sys, time
time.sleep(1)
while data := sys.stdin.buffer.read(1 << 16):
    sys.stdout.buffer.write(data)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_gets_every_line(tmp_path, blocking):
    """Also if Python's own output has no buffer, and if others have made it so that no write waits."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, blocking)
    words = [NVCOLL, "run", "-n", "3", "--prefix", "-c", MANY]
    with (tmp_path / "got").open("w") as file, subprocess.Popen([sys.executable, "-c", SLOW], stdin=ours, stdout=file):
        os.close(ours)
        environ = os.environ | {"PYTHONUNBUFFERED": "1"}
        done = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, env=environ, timeout=50, check=False)
        os.close(theirs)
    got = (tmp_path / "got").read_text()
    assert (done.returncode, done.stderr) == (0, b"")
    for rank in range(3):
        mine = [line for line in got.splitlines() if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] {i} {'x' * 100}" for i in range(3000)]


def test_a_reader_that_stands_still_keeps_no_signal_waiting(tmp_path):
    code = f"import os, signal; signal.signal(15, signal.SIG_IGN); open({str(tmp_path / 'up')!r}, 'w')\n"
    code += "while True: os.write(1, b'x' * 99 + b'\\n')"
    words = [NVCOLL, "run", "-n", "1", "--prefix", "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        eventually((tmp_path / "up").exists)
        time.sleep(0.5)  # until the pipe is full
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.wait(20) == 128 + signal.SIGKILL
        assert "killed rank 0" in process.stderr.read()


class TestGroupsOfTheirOwn:
    """`timeout` makes one for itself and what it runs."""

    RANK = "echo $$ > new$NVCOLL_RANK; mv new$NVCOLL_RANK up$NVCOLL_RANK; while :; do sleep 0.05; done"

    @pytest.fixture
    def launched(self, tmp_path):
        words = [NVCOLL, "run", "-n", "2", "--", "timeout", "50", "sh", "-c", self.RANK]
        with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            eventually(lambda: all((tmp_path / f"up{rank}").exists() for rank in range(2)))
            pids = [int((tmp_path / f"up{rank}").read_text()) for rank in range(2)]
            yield process, pids
            process.kill()
            for pid in pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)

    def test_get_the_signals(self, launched):
        process, pids = launched
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (124, 128 + signal.SIGTERM)  # as `timeout` says it, or not
        assert not any(map(alive, pids))

    def test_end_with_a_rank_that_fails(self, launched):
        process, pids = launched
        os.kill(pids[1], signal.SIGKILL)
        assert process.wait(15) == 128 + signal.SIGKILL
        assert not any(map(alive, pids))
        assert "rank 1" in process.stderr.read()

    def test_leave_nothing_behind(self, launched):
        process, pids = launched
        leader = int(Path(f"/proc/{pids[1]}/stat").read_text().rpartition(") ")[2].split()[1])
        os.kill(leader, signal.SIGKILL)
        assert process.wait(15) == 128 + signal.SIGKILL
        assert not any(map(alive, pids))


def alive(pid):
    return state(pid) not in (None, "Z")


def state(pid):
    """The letter that /proc has for it; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return None


def test_ranks_stop_and_go_on_with_the_launcher(tmp_path):
    code = f"import os, time; open({str(tmp_path)!r} + '/up' + str(os.getpid()), 'w'); time.sleep(60)"
    with subprocess.Popen([NVCOLL, "run", "-n", "2", "-c", code], process_group=0, stderr=subprocess.PIPE) as process:
        eventually(lambda: len(list(tmp_path.glob("up*"))) == 2)
        ranks = [int(path.name[2:]) for path in tmp_path.glob("up*")]
        process.send_signal(signal.SIGTSTP)  # Ctrl-Z
        eventually(lambda: [state(pid) for pid in (process.pid, *ranks)] == ["T"] * 3)
        process.send_signal(signal.SIGCONT)
        eventually(lambda: [state(pid) for pid in ranks] == ["S"] * 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def test_a_terminal_of_another_session():
    ours, theirs = pty.openpty()
    words = [NVCOLL, "run", "-n", "1", "-c", "print('well')"]
    done = subprocess.run(words, stdin=theirs, capture_output=True, text=True, start_new_session=True, check=False)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


def test_ends_of_ranks_are_noticed_where_their_signal_was_blocked(run_command):
    code = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})\n"
        "os.execv(sys.argv[1], [sys.argv[1], 'run', '-n', '2', '-c', ''])"
    )
    assert run_command([sys.executable, "-c", code, NVCOLL], timeout=20) == (0, "")


class TestInput:
    def test_goes_to_rank_0_only(self):
        words = [NVCOLL, "run", "-n", "3", "--", "sh", "-c", "echo $NVCOLL_RANK $(cat)"]
        found = subprocess.run(words, input="text", capture_output=True, text=True, timeout=20, check=True)
        assert sorted(found.stdout.splitlines()) == ["0 text", "1", "2"]

    def test_comes_from_a_terminal_too(self):
        """Ranks are no foreground processes; they would be stopped if they read from the terminal themselves."""
        ours, theirs = pty.openpty()
        # opened by the leader of a new session, it becomes the terminal of that session
        command = f"exec < {os.ttyname(theirs)}; {NVCOLL} run -n 2 -- sh -c 'read line; echo $NVCOLL_RANK $line'"
        with subprocess.Popen(
            ["sh", "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            os.write(ours, b"typed\n")
            output, _ = process.communicate(timeout=20)
        os.close(ours)
        os.close(theirs)
        assert sorted(output.splitlines()) == ["0 typed", "1"]
