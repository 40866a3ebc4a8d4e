"""`parse` against mpi4py itself."""

import sys
from pathlib import Path

import pytest


def test_specs_mean_what_they_mean_to_mpi4py(run_command):
    pytest.importorskip("mpi4py")
    command = [sys.executable, "-m", "tests.buffers.against_mpi4py"]
    status, output = run_command(command, cwd=Path(__file__).parents[2])
    assert status == 0, output
    taken, refused = map(int, output.split())
    assert min(taken, refused) > 500
