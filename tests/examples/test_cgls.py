"""The least-squares fit: any number of ranks gives NumPy's answer, and the comparison sees a difference."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nvcoll import emulate

SCRIPT = Path(__file__).parents[2] / "examples" / "cgls.py"
DIFFERENCE = re.compile(r"^differs by (\S+) from numpy.linalg.lstsq: equal to the tolerance of (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def cgls(load_example):
    return load_example("cgls")


def check_output(ranks, measurements, bumps):
    first, *others = ranks.stdout
    size = len(ranks.stdout)
    fewest, most = measurements // size, -(-measurements // size)
    assert f"{measurements} measurements, {fewest} to {most} a rank; {bumps} bumps\n" in first, str(ranks)
    assert re.search(r"^\d+ steps in \S+ s on the slowest rank$", first, re.MULTILINE), str(ranks)
    assert re.search(r"^residuals -\S+ to \+\S+, root mean square \S+ \(noise \S+\)$", first, re.MULTILINE), str(ranks)
    difference, tolerance = DIFFERENCE.search(first).groups()
    assert float(difference) <= float(tolerance), str(ranks)
    assert not "".join(others), f"ranks other than 0 print: {ranks}"


@pytest.mark.parametrize(("size", "measurements", "grid"), [(1, 8000, 12), (2, 8000, 12), (3, 1000, 5)])
def test_any_number_of_ranks(size, measurements, grid, run_ranks):
    ranks = run_ranks(SCRIPT, size, "--measurements", measurements, "--grid", grid, timeout=30)
    check_output(ranks, measurements, grid**2)


@pytest.mark.mpi
def test_under_mpiexec(run_ranks):
    check_output(run_ranks(SCRIPT, 2, launcher="mpiexec", timeout=30), 8000, 144)


def test_without_a_launcher(run_command):
    status, output = run_command([sys.executable, SCRIPT, "--no-check"], timeout=30)
    assert status == 0, output
    assert "differs" not in output


@pytest.mark.parametrize(("most", "text"), [(1, "1 step"), (3, "3 steps")])
def test_no_convergence_is_told_once(most, text, run_ranks):
    ranks = run_ranks(SCRIPT, 2, "--max-steps", most, check=False, timeout=30)
    assert ranks.returncode == 1, str(ranks)
    assert ranks.stderr.count(f"cgls: no convergence in {text}; give more measurements") == 1, str(ranks)


@pytest.mark.parametrize(("measurements", "grid"), [(100, 4), (2, 1)])
def test_answer_and_residuals(cgls, measurements, grid):
    """Two measurements leave a rank of three without any."""
    places, heights = cgls.measure(measurements, 1)
    matrix = cgls.bumps_at(places, grid)

    def fit(comm):
        mine = cgls.rows_of(comm.rank, comm.size, measurements)
        found = cgls.cgls(comm, matrix[mine], heights[mine], 100)
        cgls.report(comm, found, 1.0, measurements)
        return mine, found

    for mine, found in emulate(3).run(fit):
        np.testing.assert_allclose(found.residuals, heights[mine] - matrix[mine] @ found.x, atol=1e-12)
        np.testing.assert_allclose(found.x, np.linalg.lstsq(matrix, heights, rcond=None)[0], rtol=1e-9)


@pytest.mark.parametrize("wrong", [0.0, 1e-6, np.nan])
def test_wrong_answer_is_seen(cgls, wrong, capsys):
    places, heights = cgls.measure(100, 1)
    matrix = cgls.bumps_at(places, 4)

    def verdict(comm):
        fit = cgls.cgls(comm, matrix, heights, 100)
        fit.x[5] += wrong
        return cgls.agrees_with_lstsq(comm, fit, places, heights, 4)

    assert emulate(1).run(verdict) == [wrong == 0]
    assert ("NOT equal" in capsys.readouterr().out) == (wrong != 0)


@pytest.mark.parametrize(("option", "least"), [("--measurements", 1), ("--grid", 1), ("--max-steps", 1), ("--seed", 0)])
def test_numbers_that_are_too_small_are_refused(cgls, option, least, capsys):
    cgls.parse_options([option, str(least)])
    with pytest.raises(SystemExit):
        cgls.parse_options([option, str(least - 1)])
    assert f"argument {option}: must be a whole number of at least {least}, got " in capsys.readouterr().err
