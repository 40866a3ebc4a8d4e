"""Which ranks share a host."""

import os
import subprocess
import sys

import pytest

from nvcoll._bootstrap import host_identity

TELL = "from nvcoll._bootstrap import host_identity; print(host_identity().hex())"
# What a host without shared memory says, on the last rank only.
WITHOUT = """
import os
stat = os.stat
def missing(path, *args, **options):
    return stat("/no such folder" if path == "/dev/shm" else path, *args, **options)
if os.environ["NVCOLL_RANK"] == "2":
    os.stat = missing
import nvcoll
try:
    nvcoll.Init()
except nvcoll.BootstrapError as error:
    print(error)
"""


def test_processes_of_a_host_have_the_same_identity():
    run = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True)
    assert bytes.fromhex(run.stdout) == host_identity()


def test_another_shm_is_another_identity():
    if os.geteuid() != 0:
        pytest.skip("a new mount needs root")
    command = 'mount -t tmpfs none /dev/shm && exec "$@"'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", sys.executable, "-c", TELL],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        pytest.skip(f"no namespaces here: {run.stderr}")
    assert bytes.fromhex(run.stdout) != host_identity()


def test_a_host_without_shared_memory_is_told_to_all_ranks(run_ranks):
    text = (
        "Init: ranks cannot share memory: rank 2: No such file or directory: /dev/shm, in which ranks share memory; "
        "mount a tmpfs there\n"
    )
    assert run_ranks(WITHOUT, 3).stdout == [text] * 3
