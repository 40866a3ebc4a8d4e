"""`nvcoll info`, and what all subcommands have in common."""

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

import pytest

from nvcoll import cli, settings
from nvcoll.cli import info
from tests.fake_cuda import FakeDriver, install
from tests.fake_nvshmem import FakeNvshmem

NVCOLL = str(Path(sys.executable).with_name("nvcoll"))


@pytest.fixture
def told(capsys, monkeypatch):
    """Run `nvcoll info` in this process with these variables; return (exit status, output, errors)."""

    def run(*words, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        status = cli.main(["info", *words])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def facts(told):
    """As `told`, with the JSON that it wrote."""

    def run(**variables):
        status, output, _ = told("--json", **variables)
        return status, json.loads(output)

    return run


def test_json_has_all_sections(facts):
    status, found = facts()
    assert status == 0
    assert list(found) == ["versions", "settings", "bootstrap", "hardware", "gpus", "cache"]


def test_text_has_all_sections(told):
    status, output, errors = told()
    assert (status, errors) == (0, "")
    titles = [line for line in output.splitlines() if not line.startswith(" ")]
    assert titles == ["Versions", "Settings", "Ranks", "Hardware", "GPUs", "Compiled kernels"]
    assert re.search(r"^  NVCOLL_TIMEOUT +600 \(default\)$", output, re.MULTILINE)
    assert re.search(r"^  bootstrap +single \(no launcher's variables are set\)$", output, re.MULTILINE)


def test_versions(facts):
    _, found = facts()
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["numpy"] == importlib.metadata.version("numpy")
    assert set(info.PACKAGES) < set(found["versions"])


def test_a_package_that_is_missing(told, monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("nvcoll", "no-such-package-of-that-name"))
    assert info.versions()["no-such-package-of-that-name"] is None
    assert re.search("no-such-package-of-that-name +not installed", told()[1])


def test_every_setting_with_its_source(facts):
    _, found = facts(NVCOLL_TIMEOUT="5", NVCOLL_SCRATCH="")
    rows = {row["name"]: row for row in found["settings"]}
    assert list(rows) == [variable.name for variable in settings.TABLE if not variable.internal]
    assert (rows["NVCOLL_TIMEOUT"]["value"], rows["NVCOLL_TIMEOUT"]["source"]) == ("5", "environment")
    assert (rows["NVCOLL_SCRATCH"]["value"], rows["NVCOLL_SCRATCH"]["source"]) == ("8M", "default")
    assert (rows["NVCOLL_KEY"]["value"], rows["NVCOLL_KEY"]["source"]) == (None, "default")
    assert all(row["doc"] and row["error"] is None for row in rows.values())


def test_a_wrong_setting_is_told_and_the_rest_too(facts, told):
    status, found = facts(NVCOLL_TIMEOUT="soon")
    [row] = [row for row in found["settings"] if row["error"]]
    assert (status, row["name"], row["value"]) == (1, "NVCOLL_TIMEOUT", "soon")
    assert row["error"] == "expected a number of seconds above 0, at most 1,000,000, got 'soon'; change or unset it"
    assert found["bootstrap"]["kind"] is None
    assert re.search(r"^  NVCOLL_TIMEOUT +soon \(expected a number", told()[1], re.MULTILINE)


def test_an_unknown_setting_is_told_once(told):
    status, _, errors = told(NVCOLL_TIMOUT="3")
    assert (status, errors) == (
        0,
        "nvcoll info: NVCOLL_TIMOUT is no setting of nvcoll; did you mean NVCOLL_TIMEOUT?\n",
    )


@pytest.mark.parametrize(
    ("text", "fact"),
    [(None, "No such file or directory"), ('{"hosts": []}', "hosts: not known; known are host, cuda, launch")],
)
def test_rules_that_cannot_be_used(facts, told, tmp_path, text, fact):
    path = tmp_path / "rules.json"
    if text is not None:
        path.write_text(text)
    status, found = facts(NVCOLL_RULES=str(path))
    [row] = [row for row in found["settings"] if row["error"]]
    assert (status, row["name"], row["value"]) == (1, "NVCOLL_RULES", str(path))
    assert fact in row["error"]
    assert row["error"].endswith("; correct the file or unset the variable")
    assert re.search(rf"^  NVCOLL_RULES +{re.escape(str(path))} \(.*{fact}", told()[1], re.MULTILINE)


def test_inside_of_a_run_the_key_stays_secret(facts, told):
    inside = {
        "NVCOLL_RANK": "1",
        "NVCOLL_SIZE": "2",
        "NVCOLL_RENDEZVOUS": "127.0.0.1:5",
        "NVCOLL_KEY": "c0ffee",
    }
    _, found = facts(**inside)
    assert found["bootstrap"]["kind"] == "run"
    assert {row["name"]: row["value"] for row in found["settings"]}["NVCOLL_RANK"] == "1"
    assert {row["name"]: row["value"] for row in found["settings"]}["NVCOLL_KEY"] == "(hidden)"
    assert "c0ffee" not in json.dumps(found)
    assert "c0ffee" not in told()[1]


def test_launchers_variables_that_make_no_sense(facts):
    status, found = facts(PMI_RANK="0", PMI_SIZE="many")
    assert (status, found["bootstrap"]["kind"]) == (1, None)
    assert "PMI_SIZE should be a whole number" in found["bootstrap"]["reason"]


def test_hardware(facts):
    _, found = facts()
    assert found["hardware"]["host"] == platform.node()
    assert found["hardware"]["usable_cpus"] <= len(os.sched_getaffinity(0))


def test_text_where_nothing_is_known(told, monkeypatch, tmp_path):
    from nvcoll import _topology

    monkeypatch.setattr(_topology, "hardware", lambda find=_topology.hardware: find(tmp_path))
    status, output, _ = told()
    assert status == 0
    assert re.search("CPU +unknown; unknown cores, unknown CPUs", output)
    assert re.search("memory +unknown; /dev/shm unknown, unknown free", output)
    assert re.search("GPUs +none", output)


def test_text_of_a_machine_with_gpus(told, monkeypatch):
    machine = info.hardware() | {"gpus": ["NVIDIA H200"] * 2, "gpu_driver": "580.1", "shm_bytes": 1536}
    monkeypatch.setattr(info, "hardware", lambda: machine | {"nics": ["mlx5_0", "mlx5_1"]})
    _, output, _ = told()
    assert re.search(r"network adapters +mlx5_0, mlx5_1$", output, re.MULTILINE)
    assert re.search(r"GPUs +NVIDIA H200, NVIDIA H200; driver 580\.1", output)
    assert re.search(r"memory +.*; /dev/shm 1\.5 KiB,", output)


class TestGpus:
    @pytest.fixture
    def driver(self, monkeypatch, tmp_path):
        driver = FakeDriver()
        install(monkeypatch, driver)
        FakeNvshmem(driver, tmp_path).install(monkeypatch)
        return driver

    def test_what_there_is(self, facts, told, driver):
        _, found = facts()
        first = found["gpus"]["devices"][0]
        assert (first["name"], first["arch"], first["memory_bytes"]) == ("Fake 0", "sm_90", 64 << 20)
        assert (found["gpus"]["problem"], found["gpus"]["driver_cuda"]) == (None, "13.0")
        assert found["gpus"]["nvshmem"]["library"] == "3.8.0"
        assert found["gpus"]["backend"]["kind"] == "nvshmem"
        assert driver.contexts == []
        output = told()[1]
        assert re.search(r"^  GPU 1 +Fake 1, 64\.0 MiB, sm_90, GPU-01010101-0101-", output, re.MULTILINE)
        assert re.search(r"^  CUDA of the driver +13\.0$", output, re.MULTILINE)
        assert re.search(r"^  NVSHMEM +3\.8\.0, nvshmem4py 0\.4\.1; /lib/libnvshmem_host\.so\.3$", output, re.MULTILINE)

    def test_why_there_is_nothing(self, facts, told, monkeypatch):
        install(monkeypatch, None)
        monkeypatch.setitem(sys.modules, "nvshmem", None)
        status, found = facts()
        assert status == 0
        assert (found["gpus"]["devices"], found["gpus"]["backend"]["kind"]) == ([], "shm")
        output = told()[1]
        assert re.search(r"^  CUDA of the driver +cuda-python is not installed", output, re.MULTILINE)
        assert re.search(r"^  NVSHMEM +nvshmem4py is not installed", output, re.MULTILINE)
        assert re.search(r"^  backend +shm \(", output, re.MULTILINE)

    def test_a_backend_that_cannot_be_had(self, facts, monkeypatch):
        install(monkeypatch, None)
        _, found = facts(NVCOLL_BACKEND="nvshmem")
        assert found["gpus"]["backend"]["kind"] is None
        assert found["gpus"]["backend"]["reason"].startswith("NVCOLL_BACKEND=nvshmem: ")


def test_compiled_kernels(facts, tmp_path):
    (tmp_path / "cache/of").mkdir(parents=True)
    (tmp_path / "cache/of/kernel.o").write_bytes(bytes(100))
    (tmp_path / "cache/other.o").write_bytes(bytes(23))
    _, found = facts(NVCOLL_CACHE_DIR=str(tmp_path / "cache"))
    assert found["cache"] == {"folder": str(tmp_path / "cache"), "files": 2, "bytes": 123, "writable": True}


def test_a_user_without_a_home(homeless, facts, told):
    _, found = facts()
    assert found["cache"] == {"folder": None, "files": 0, "bytes": 0, "writable": False}
    assert all(row["error"] is None for row in found["settings"])
    assert "none: this user has no home directory; set NVCOLL_CACHE_DIR" in told()[1]


def test_a_file_that_vanishes_meanwhile(facts, tmp_path, monkeypatch):
    (tmp_path / "kernel.o").write_bytes(bytes(100))
    monkeypatch.setattr(os, "walk", lambda folder: [(folder, [], ["kernel.o", "kernel.o.part"])])
    _, found = facts(NVCOLL_CACHE_DIR=str(tmp_path))
    assert found["cache"] == {"folder": str(tmp_path), "files": 1, "bytes": 100, "writable": True}


def test_a_cache_that_is_not_there_yet(facts, tmp_path):
    _, found = facts(NVCOLL_CACHE_DIR=str(tmp_path / "not/yet"))
    assert found["cache"] == {"folder": str(tmp_path / "not/yet"), "files": 0, "bytes": 0, "writable": True}


class TestCommandLine:
    def test_every_module_is_a_subcommand_and_has_help(self, capsys):
        assert {"run", "info"} <= set(cli.commands())
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--help"])
        text = capsys.readouterr().out
        assert all(re.search(rf"^    {name} +\w", text, re.MULTILINE) for name in cli.commands())

    def test_version(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--version"])
        assert capsys.readouterr().out == f"nvcoll {importlib.metadata.version('nvcoll')}\n"

    @pytest.mark.parametrize("words", [[], ["nosuch"], ["info", "--nosuch"]])
    def test_mistakes(self, capsys, words):
        with pytest.raises(SystemExit, match="2"):
            cli.main(words)
        assert "usage: nvcoll" in capsys.readouterr().err

    def test_only_the_module_asked_for_is_imported(self, run_command):
        code = (
            "import sys; from nvcoll.cli import main; main(['info'])\n"
            "print(*[name for name in sys.modules if name.startswith('nvcoll.cli')])"
        )
        status, output = run_command([sys.executable, "-c", code])
        assert (status, output.splitlines()[-1]) == (0, "nvcoll.cli nvcoll.cli.info")

    def test_a_reader_that_leaves(self, run_command):
        text = f"unset PYTHONUNBUFFERED; {NVCOLL} info | true; echo ${{PIPESTATUS[0]}}"
        status, output = run_command(["bash", "-c", text])
        assert (status, output) in {(0, "141\n"), (0, "0\n")}  # 0: all was written before the reader left

    @pytest.mark.parametrize("words", ["info", "info --json"])
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    def test_output_that_cannot_be_written(self, run_command, words, unbuffered):
        status, output = run_command(
            ["sh", "-c", f"{NVCOLL} {words} > /dev/full"], env={"PYTHONUNBUFFERED": unbuffered}
        )
        text = "nvcoll info: cannot write the output (No space left on device); make room, or redirect it\n"
        assert (status, output) == (1, text)

    @pytest.mark.parametrize("words", ["info", "info --json"])
    def test_output_that_is_closed(self, run_command, words):
        assert run_command(["sh", "-c", f"{NVCOLL} {words} >&-"]) == (0, "")

    def test_as_a_module_of_python(self, run_command):
        status, output = run_command([sys.executable, "-m", "nvcoll", "--version"], cwd="/")
        assert (status, output) == (0, f"nvcoll {importlib.metadata.version('nvcoll')}\n")
