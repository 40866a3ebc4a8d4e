"""The exception classes, and what is said where the compiled extensions are missing."""

import builtins
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from nvcoll import errors

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


def test_an_unbuilt_checkout_says_what_to_type(tmp_path, run_command):
    shutil.copytree(PACKAGE, tmp_path / "nvcoll", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # -S: no .pth files, so that an editable install does not lend its extensions
    code = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); import nvcoll"
    status, output = run_command([sys.executable, "-S", "-c", code], cwd=tmp_path)
    assert status == 1
    assert "BuildError" in output.splitlines()[-1]
    assert "pip install -e ." in output.splitlines()[-1]
