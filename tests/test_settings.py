"""The table of environment variables, and what `read` makes of them."""

import ctypes
import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nvcoll import settings
from nvcoll.backends import agreement, device_area, emulated
from nvcoll.errors import ArgumentError

NAMES = {variable.field: variable.name for variable in settings.TABLE}


def read_one(field, text, **others):
    return getattr(settings.read({NAMES[field]: text, **others}), field)


def test_table_and_settings_have_the_same_fields():
    assert [variable.field for variable in settings.TABLE] == [f.name for f in dataclasses.fields(settings.Settings)]


@pytest.mark.parametrize("variable", settings.TABLE, ids=lambda variable: variable.name)
def test_every_row_is_complete(variable):
    assert variable.name == f"NVCOLL_{variable.field.upper()}"
    assert variable.kind in settings.KINDS
    assert variable.doc.endswith(".")


def test_the_table_tells_what_memory_is_taken():
    docs = {variable.field: variable.doc for variable in settings.TABLE}
    assert f"on GPUs at least {device_area.SCRATCH >> 20}M" in docs["scratch"]
    assert f"for COMM_SELF and emulated ranks {emulated.EXTENT >> 30}G at most" in docs["heap"]
    assert agreement.SHARE == 4
    assert "on GPUs a quarter of the GPU" in docs["heap"]


def test_defaults():
    found = settings.read({"HOME": "/home/someone"})
    assert found.bootstrap == found.backend == "auto"
    assert found.timeout == 600.0
    assert found.scratch == 8 << 20
    assert found.cache_dir == Path("~/.cache/nvcoll").expanduser()
    assert found.rules is found.ranks_per_node is found.heap is found.spin is found.device is None
    assert found.rank is found.size is found.rendezvous is found.key is None


@pytest.mark.parametrize("variable", settings.TABLE, ids=lambda variable: variable.name)
def test_empty_is_unset(variable):
    assert settings.read({variable.name: " "}) == settings.read({})


def test_reads_the_environment_of_the_process(monkeypatch):
    monkeypatch.setenv("NVCOLL_TIMEOUT", "7")
    assert settings.read().timeout == 7.0


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.read({}).timeout = 1.0


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("bootstrap", "torchrun", "torchrun"),
        ("backend", "nvshmem", "nvshmem"),
        ("device", "3", 3),
        ("device", "Auto", None),
        ("timeout", "0.25", 0.25),
        ("timeout", " 1e3 ", 1000.0),
        ("rules", "/etc/rules.json", Path("/etc/rules.json")),
        ("rules", "~/rules.json", Path.home() / "rules.json"),
        ("ranks_per_node", "3", 3),
        ("scratch", "4096", 4096),
        ("scratch", "16k", 16 << 10),
        ("scratch", "2MiB", 2 << 20),
        ("heap", "3G", 3 << 30),
        ("heap", "4K", 4096),
        ("heap", "auto", None),
        ("spin", "0", 0.0),
        ("spin", "2.5", 2.5),
        ("spin", "AUTO", None),
        ("rank", "0", 0),
        ("size", "4", 4),
        ("rendezvous", "127.0.0.1:4000", "127.0.0.1:4000"),
        ("rendezvous", "[::1]:4000", "[::1]:4000"),
        ("key", "00ff", b"\x00\xff"),
    ],
)
def test_accepted(field, text, value):
    assert read_one(field, text) == value


@pytest.mark.parametrize(
    ("field", "text", "accepted"),
    [
        ("bootstrap", "slurm", "one of auto, run, torchrun, mpi, single"),
        ("backend", "cuda", "one of auto, shm, nvshmem"),
        *[("device", text, "0 or more, or auto") for text in ("-1", "cuda:0")],
        *[("timeout", text, "seconds above 0") for text in ("0", "-1", "nan", "inf", "1e7", "soon", "5s")],
        *[("ranks_per_node", text, "1 or more") for text in ("0", "-2", "1.5", "two", "\u0661")],
        *[("scratch", text, "K, M or G") for text in ("0", "8T", "1.5M", "M", "-8M", "9" * 18 + "G", "auto")],
        *[("heap", text, "4096 or more, with K, M or G for powers of 1024, or auto") for text in ("0", "4095", "big")],
        *[("spin", text, "microseconds, or auto") for text in ("-1", "nan", "fast")],
        *[("rank", text, "0 or more") for text in ("-1", "x")],
        *[("rendezvous", text, "host:port") for text in ("localhost", ":80", "host:0", "host:65536", "host:http")],
        ("key", "xyz", "hexadecimal"),
    ],
)
def test_refused(field, text, accepted):
    with pytest.raises(ArgumentError) as caught:
        read_one(field, text)
    assert str(caught.value).startswith(f"{NAMES[field]}: expected ")
    assert accepted in str(caught.value)
    assert "change or unset it" in str(caught.value)
    assert (repr(text) in str(caught.value)) == (field != "key")  # the key is a secret


def test_cache_follows_xdg():
    assert settings.read({"XDG_CACHE_HOME": "/var/cache"}).cache_dir == Path("/var/cache/nvcoll")
    assert read_one("cache_dir", "/elsewhere", XDG_CACHE_HOME="/var/cache") == Path("/elsewhere")


def test_without_a_home_nothing_is_refused_that_the_user_has_not_said(homeless):
    assert settings.read({}).cache_dir is None
    assert settings.read({"XDG_CACHE_HOME": "/var/cache"}).cache_dir == Path("/var/cache/nvcoll")
    with pytest.raises(ArgumentError, match="NVCOLL_CACHE_DIR: expected a path, got '~/kernels'; change or unset it"):
        read_one("cache_dir", "~/kernels")


def test_a_home_that_is_unknown_is_refused():
    with pytest.raises(ArgumentError, match="NVCOLL_RULES: expected a path, got '~nobody-of-that-name/rules'"):
        read_one("rules", "~nobody-of-that-name/rules")


@pytest.mark.parametrize(
    ("name", "hint"), [("NVCOLL_TIMEUOT", "did you mean NVCOLL_TIMEOUT?"), ("NVCOLL_ZZZZ", "nvcoll info")]
)
def test_unknown_variables_give_a_warning(name, hint):
    with pytest.warns(RuntimeWarning, match=f"{name} is no setting") as caught:
        settings.read({name: "1"})
    assert hint in str(caught[0].message)


def test_a_program_hears_of_an_unknown_variable_once(run_command):
    code = "from nvcoll import COMM_SELF, COMM_WORLD, emulate; COMM_SELF.Barrier(); COMM_WORLD.Barrier(); emulate(2)"
    status, output = run_command([sys.executable, "-c", code], env={"NVCOLL_TIMOUT": "3"})
    assert status == 0, output
    assert output.count("RuntimeWarning: NVCOLL_TIMOUT is no setting of nvcoll; did you mean NVCOLL_TIMEOUT?") == 1


def test_ranks_of_nvcoll_run_leave_unknown_variables_to_it(monkeypatch):
    monkeypatch.setattr(settings, "INHERITED", {"NVCOLL_TIMOUT"})
    found = [
        text.split()[0] for text in settings.unknown({"NVCOLL_TIMOUT": "3", "NVCOLL_HAEP": "1M", "NVCOLL_RANK": "0"})
    ]
    assert found == ["NVCOLL_HAEP"]  # the program has set it
    assert len([*settings.unknown({"NVCOLL_TIMOUT": "3"})]) == 1


def test_known_and_foreign_variables_give_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings.read({variable.name: "" for variable in settings.TABLE} | {"NVCC": "1", "XNVCOLL_A": "2"})


def test_what_is_lent_to_other_libraries_is_what_the_user_left_unset():
    environ = {"SET": "theirs", "EMPTY": ""}
    with settings.lend({"SET": "ours", "EMPTY": "1", "NEW": "2"}, environ):
        assert environ == {"SET": "theirs", "EMPTY": "1", "NEW": "2"}
    assert environ == {"SET": "theirs", "EMPTY": ""}


def test_what_is_lent_is_seen_by_native_code_and_goes_after_an_error(monkeypatch):
    monkeypatch.delenv("OF_SOMEBODY_ELSE", raising=False)
    seen = []

    def use():
        with settings.lend({"OF_SOMEBODY_ELSE": "here"}):
            seen.append(ctypes.string_at(getenv(b"OF_SOMEBODY_ELSE")))
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert seen == [b"here"]
    assert settings.foreign("OF_SOMEBODY_ELSE") is None
    assert getenv(b"OF_SOMEBODY_ELSE") is None


def getenv(name):
    """What native code finds."""
    find = ctypes.CDLL(None).getenv
    find.restype = ctypes.c_void_p
    return find(name)


def test_the_leaves_import_nothing_of_nvcoll():
    # run as a file: `import nvcoll.settings` would import the package first
    code = f"import runpy, sys; runpy.run_path({settings.__file__!r}); print(*[m for m in sys.modules if 'numpy' in m])"
    stub = "import sys, types; m = types.ModuleType('nvcoll'); m.__path__ = [{!r}]; sys.modules['nvcoll'] = m; "
    stub = stub.format(str(Path(settings.__file__).parent))
    run = subprocess.run([sys.executable, "-c", stub + code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
