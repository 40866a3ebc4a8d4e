"""Fit a surface to scattered measurements: least squares by conjugate gradients, rows spread over the ranks.

    nvcoll run -n 4 examples/cgls.py
    mpiexec -n 4 python examples/cgls.py
    python examples/cgls.py                     one rank

Heights of a hilly country were measured at many random places, with noise. The surface sought is a sum of bumps on a
grid, and their heights x minimise |A x - b|, where A has one row per measurement and one column per bump:

              bumps
            +-------+          +-+
    rank 0  |       |          | |          What has one entry per measurement (b, A's rows, residuals) is spread over
            +-------+   +-+    +-+          the ranks. What has one entry per bump (x, and the directions of the search)
    rank 1  |   A   |   |x| ~  |b|          is small, and whole on every rank.
            +-------+   +-+    +-+
    rank 2  |       |          | |
            +-------+          +-+

CGLS (Hestenes & Stiefel 1952) is the method of conjugate gradients on A^T A x = A^T b without ever forming A^T A. Each
step needs one product with A, for which a rank needs its own rows only, and one with A^T, which is a sum over all rows:
an all-reduce of a vector. Lengths of spread vectors are sums over all rows too: an all-reduce of one number.

Rank 0 then solves the whole problem with numpy.linalg.lstsq. The program exits with 1 if the two answers differ by more
than the tolerance that it prints.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from time import perf_counter

# The ranks share the machine's cores, and NumPy reads this once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from nvcoll import COMM_WORLD, MAX, MIN, SUM, Comm, Op

Array = NDArray[np.float64]

NOISE = 0.05  # standard deviation of a measured height, in units of the highest hill
STOP = 1e-13  # length of the gradient that counts as zero, relative to the first: little above what rounding leaves
TOLERANCE = 1e-9  # between the two answers, relative to the highest bump; 1e-11 is usual


@dataclass(frozen=True)
class Fit:
    """Heights of the bumps (whole on every rank), residuals of this rank's rows, and the steps taken."""

    x: Array
    residuals: Array
    steps: int


def cgls(comm: Comm, matrix: Array, b: Array, max_steps: int) -> Fit:
    """Minimise |matrix x - b| over the rows of all ranks.

    Parameters
    ----------
    comm : Comm
        All its ranks call this together.
    matrix : numpy.ndarray
        This rank's rows, shape (rows, n); ranks may hold different numbers of rows, or none.
    b : numpy.ndarray
        This rank's right-hand side, shape (rows,).
    max_steps : int
        Give up after so many steps.

    Returns
    -------
    Fit

    Raises
    ------
    RuntimeError
        If the gradient is still too large after `max_steps` steps; on all ranks alike.
    """
    x = np.zeros(matrix.shape[1])
    r = b.copy()
    with comm.empty(len(x), np.float64) as gradient:
        comm.Allreduce(matrix.T @ r, gradient)
        p = gradient.copy()
        length = first_length = gradient @ gradient
        for step in range(1, max_steps + 1):
            q = matrix @ p
            alpha = length / over_ranks(comm, float(q @ q), SUM)
            x += alpha * p
            r -= alpha * q
            comm.Allreduce(matrix.T @ r, gradient)
            previous, length = length, gradient @ gradient
            # An all-reduce leaves the same bits on all ranks: they come to the same decision without asking.
            if length <= STOP**2 * first_length:
                return Fit(x, r, step)
            p = gradient + length / previous * p
    raise RuntimeError(
        f"cgls: no convergence in {counted(max_steps, 'step')}; give more measurements, fewer bumps or more steps"
    )


def counted(count: int, noun: str) -> str:
    """2 and "step" as "2 steps", 1 as "1 step"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def over_ranks(comm: Comm, value: float, op: Op) -> float:
    """Sum, smallest or largest of one number per rank."""
    result = np.empty(1)
    comm.Allreduce(np.array([value], np.float64), result, op=op)
    return float(result[0])


def measure(count: int, seed: int) -> tuple[Array, Array]:
    """Places in the unit square, shape (count, 2), and the heights measured there; the same on every rank."""
    random = np.random.default_rng(seed)
    places = random.random((count, 2))
    east, north = places.T
    hills = np.sin(7 * east) * np.cos(5 * north) * np.exp(east - 1)
    return places, hills + NOISE * random.standard_normal(count)


def bumps_at(places: Array, grid: int) -> Array:
    """Rows of the matrix: the bumps of a grid x grid lattice at the given places, shape (len(places), grid**2)."""
    centres = np.linspace(0, 1, grid)
    width = 1 / grid
    east, north = (np.exp(-(((at[:, None] - centres) / width) ** 2)) for at in places.T)
    rows: Array = (east[:, :, None] * north[:, None, :]).reshape(len(places), grid**2)
    return rows


def rows_of(rank: int, size: int, count: int) -> slice:
    """The measurements of a rank; where `size` does not divide `count`, some ranks hold one more than others."""
    return slice(count * rank // size, count * (rank + 1) // size)


def report(comm: Comm, fit: Fit, seconds: float, count: int) -> None:
    """Print what came out; collective, since the residuals are spread over the ranks."""
    rows = len(fit.residuals)
    fewest, most = over_ranks(comm, rows, MIN), over_ranks(comm, rows, MAX)
    # A rank without rows has no residual: it gives what changes neither the smallest nor the largest.
    lowest = over_ranks(comm, fit.residuals.min(initial=np.inf), MIN)
    highest = over_ranks(comm, fit.residuals.max(initial=-np.inf), MAX)
    mean_square = over_ranks(comm, float(fit.residuals @ fit.residuals), SUM) / count
    slowest = over_ranks(comm, seconds, MAX)
    if comm.rank == 0:
        print(f"{counted(count, 'measurement')}, {fewest:.0f} to {most:.0f} a rank; {counted(len(fit.x), 'bump')}")
        print(f"{counted(fit.steps, 'step')} in {slowest:.3f} s on the slowest rank")
        print(f"residuals {lowest:+.3f} to {highest:+.3f}, root mean square {mean_square**0.5:.4f} (noise {NOISE})")


def agrees_with_lstsq(comm: Comm, fit: Fit, places: Array, heights: Array, grid: int) -> bool:
    """Solve the whole problem on rank 0 and compare; all ranks come to the same verdict."""
    error = 0.0
    if comm.rank == 0:
        expected = np.linalg.lstsq(bumps_at(places, grid), heights, rcond=None)[0]
        error = float(np.abs(fit.x - expected).max() / np.abs(expected).max())
    error = over_ranks(comm, error, MAX)
    same = error <= TOLERANCE  # False for NaN
    if comm.rank == 0:
        verdict = "equal" if same else "NOT equal"
        print(f"differs by {error:.1e} from numpy.linalg.lstsq: {verdict} to the tolerance of {TOLERANCE:.0e}")
    return same


def natural(text: str, least: int = 0) -> int:
    """An argument that must be a whole number of at least zero."""
    value = int(text) if text.removeprefix("-").isdecimal() else None
    if value is None or value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return value


def positive(text: str) -> int:
    """An argument that must be a whole number of at least one."""
    return natural(text, 1)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--help` says what each option does."""
    parser = argparse.ArgumentParser(description="Fit a surface to scattered measurements by least squares.")
    parser.add_argument("--measurements", type=positive, default=8000, help="rows of the matrix (%(default)s)")
    parser.add_argument("--grid", type=positive, default=12, help="bumps along each side (%(default)s)")
    parser.add_argument("--max-steps", type=positive, default=2000, help="give up after so many (%(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of places and noise (%(default)s)")
    parser.add_argument("--no-check", action="store_true", help="do not compare with numpy.linalg.lstsq")
    return parser.parse_args(arguments)


def main() -> int:
    """Fit, report, compare; 0 if the spread answer is NumPy's."""
    options = parse_options()
    comm = COMM_WORLD
    places, heights = measure(options.measurements, options.seed)
    mine = rows_of(comm.rank, comm.size, options.measurements)
    # The matrix is what is large: every rank makes its own rows only.
    matrix = bumps_at(places[mine], options.grid)

    # The first calls compile kernels if the cache lacks them, and wait for the last rank to start: not timed.
    comm.Allreduce(np.zeros(options.grid**2))
    over_ranks(comm, 0, SUM)
    start = perf_counter()
    try:
        fit = cgls(comm, matrix, heights[mine], options.max_steps)
    except RuntimeError as failure:  # on all ranks alike, so one message is enough
        sys.exit(str(failure) if comm.rank == 0 else 1)
    report(comm, fit, perf_counter() - start, options.measurements)

    return 0 if options.no_check or agrees_with_lstsq(comm, fit, places, heights, options.grid) else 1


if __name__ == "__main__":
    sys.exit(main())
