"""Not a module: it is found by ``from nvcoll import MPI``, a habit of mpi4py's users, and says what to type."""  # noqa: N999

raise ImportError(
    "cannot import name 'MPI' from 'nvcoll': what mpi4py has in MPI is in nvcoll itself; type `import nvcoll as MPI`, "
    "or `from nvcoll import COMM_WORLD, SUM`; for all that nvcoll has not, `from mpi4py import MPI`",
    name=__name__,
    path=__file__,
)
