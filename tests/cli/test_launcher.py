"""What the launcher of `nvcoll run` does with processes that are none of its ranks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
        name = Path(f"/proc/{process.pid}/comm").read_bytes()
        yield name.strip()
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
