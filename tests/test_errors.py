"""The exception classes, and what is said where the compiled extensions are missing."""

import builtins
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

import nvcoll
from nvcoll import COMM_SELF, errors

PACKAGE = Path(errors.__file__).parent
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.Error)]


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("TimeoutError", builtins.TimeoutError),
        ("PeerLostError", ConnectionError),
        ("MismatchError", RuntimeError),
        ("ArgumentError", ValueError),
        ("DatatypeError", TypeError),
        ("AllocationError", MemoryError),
        ("BootstrapError", RuntimeError),
        ("DeviceError", RuntimeError),
        ("StateError", RuntimeError),
        ("BuildError", ImportError),
    ],
)
def test_each_is_an_error_of_ours_and_of_pythons(name, builtin):
    with pytest.raises(builtin, match="text") as caught:
        raise getattr(errors, name)("text")
    assert isinstance(caught.value, errors.Error)


def test_a_wrong_datatype_is_a_wrong_argument():
    assert issubclass(errors.DatatypeError, errors.ArgumentError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_says_when_it_is_raised(cls):
    assert "__doc__" in vars(cls)
    assert cls.__doc__.endswith(".")


def test_missing_extension_names_the_module_and_the_command():
    error = errors.missing_extension(ModuleNotFoundError("No module named 'nvcoll._plan'", name="nvcoll._plan"))
    assert isinstance(error, errors.BuildError)
    assert error.name == "nvcoll._plan"
    assert "no module nvcoll._plan" in str(error)
    assert "pip install -e ." in str(error)


def test_an_extension_that_does_not_load_tells_why():
    cause = ImportError("undefined symbol: shm_open", name="nvcoll._bootstrap", path="/somewhere/_bootstrap.so")
    error = errors.missing_extension(cause)
    assert "nvcoll._bootstrap: undefined symbol: shm_open" in str(error)
    assert error.path == "/somewhere/_bootstrap.so"


VERBS = (
    "; nvcoll's verbs are Abort, Allreduce, Allreduce_init, Barrier, Clone, Compare, Dup, Free, Iallreduce, "
    "Split, Split_type, and their data are arrays, which empty, zeros, full and array make, or others: take mpi4py for "
    "all else"
)


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        (COMM_SELF, "bcast", "'Comm' object has no attribute 'bcast'"),
        (COMM_SELF, "allreduce", "'Comm' object has no attribute 'allreduce'"),
        (nvcoll, "MPI", "module 'nvcoll' has no attribute 'MPI'"),
        (nvcoll, "MAXLOC", "module 'nvcoll' has no attribute 'MAXLOC'"),
    ],
)
def test_names_that_mpi4py_has_say_where_to_find_them(owner, name, told):
    assert not hasattr(owner, name)
    assert getattr(owner, name, 5) == 5
    with pytest.raises(AttributeError, match="^" + re.escape(told + VERBS)) as caught:
        getattr(owner, name)
    assert "beside nvcoll on ranks that mpiexec or srun starts" in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        (nvcoll, "Allreduce", "communicators have it: COMM_WORLD.Allreduce"),
        (nvcoll, "barrier", "communicators have it: COMM_WORLD.barrier"),
        (nvcoll, "Waitall", "requests have it: Request.Waitall"),
        (COMM_SELF, "wait", "requests have it: Request.wait"),
    ],
)
def test_verbs_are_asked_of_what_has_them(owner, name, told):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; {re.escape(told)}$"):
        getattr(owner, name)


def test_names_of_pythons_own_protocols_say_nothing_of_mpi():
    for owner in (COMM_SELF, nvcoll):
        with pytest.raises(AttributeError, match=r"has no attribute '__array__'$"):
            getattr(owner, "__array__")  # noqa: B009 - the look-up is what is tried


@pytest.mark.parametrize(
    ("what", "hint"),
    [("nvcoll.COMM_SELF.allreduce(1)", None), ("nvcoll.COMM_SELF.Alreduce", "Allreduce"), ("nvcoll.SUMM", "SUM")],
)
def test_python_s_own_hint_comes_where_it_helps(run_command, what, hint):
    status, output = run_command([sys.executable, "-c", f"import nvcoll; {what}"])
    assert status == 1
    assert output.splitlines()[-1].startswith("AttributeError: ")
    assert ("Did you mean" in output) == (hint is not None)
    assert hint is None or f"Did you mean: '{hint}'?" in output


def test_mpi4py_s_name_of_the_base_class_stands_only_where_it_is_asked_for():
    assert nvcoll.Exception is nvcoll.Error
    with pytest.raises(nvcoll.Exception, match="Split: color"):
        COMM_SELF.Split(-1)
    named = {}
    exec("from nvcoll import *", named)
    assert "Exception" not in named
    assert named["Wtime"] is nvcoll.Wtime


def test_mpi_is_not_a_module():
    with pytest.raises(
        ImportError, match=r"^cannot import name 'MPI' .* `import nvcoll as MPI`, .* COMM_WORLD, SUM`; .* mpi4py"
    ):
        from nvcoll import MPI  # noqa: F401


def test_an_unbuilt_checkout_says_what_to_type(tmp_path, run_command):
    shutil.copytree(PACKAGE, tmp_path / "nvcoll", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # -S: no .pth files, so that an editable install does not lend its extensions
    code = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); import nvcoll"
    status, output = run_command([sys.executable, "-S", "-c", code], cwd=tmp_path)
    assert status == 1
    assert "BuildError" in output.splitlines()[-1]
    assert "no module nvcoll._bootstrap" in output.splitlines()[-1]
    assert "pip install -e ." in output.splitlines()[-1]
