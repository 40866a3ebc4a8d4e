"""Files of compiled code among processes that stand still, and where something else is in their place."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvcoll import codecache

# Makes a file, and does not end.
MAKER = """
import sys, pathlib
from nvcoll import codecache

def make():
    print("ready", flush=True)
    sys.stdin.read()

codecache.CodeCache(pathlib.Path(sys.argv[1])).get("one.o", make)
"""


@pytest.fixture
def get(tmp_path):
    """Ask for one file as a process that knows nothing of earlier calls; what is made is the number of the call."""
    made = []

    def make():
        made.append(None)
        return b"%d" % len(made)

    return lambda: codecache.CodeCache(tmp_path).get("one.o", make)


@pytest.fixture
def maker(tmp_path):
    """A process that makes that file, and stands still meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-c", MAKER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_who_stands_still_is_not_waited_for_for_ever(get, maker, monkeypatch):
    monkeypatch.setattr(codecache, "PATIENCE", 0.5)
    begun = time.monotonic()
    assert get() == b"1"
    assert 0.5 <= time.monotonic() - begun < 10
    begun = time.monotonic()
    assert get() == b"1"  # it was kept
    assert time.monotonic() - begun < 0.5


def test_who_has_ended_is_not_waited_for_any_more(get, maker):
    maker.kill()
    assert get() == b"1"


def held():
    return sorted(str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


@pytest.mark.parametrize(
    "place",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.with_name("elsewhere")),
    ],
    ids=["pipe", "device", "link"],
)
def test_what_is_no_file_is_replaced(get, tmp_path, place):
    assert get() == b"1"
    (tmp_path / "one.o").rename(tmp_path / "elsewhere")
    place(tmp_path / "one.o")
    before = held()
    assert get() == get() == b"2"
    assert held() == before


def test_a_file_under_another_name_is_made_anew(get, tmp_path):
    """A group that may write in the folder could give a kernel the name of another one."""
    other = codecache.CodeCache(tmp_path).get("two.o", lambda: b"two")
    assert (other, get()) == (b"two", b"1")
    (tmp_path / "two.o").replace(tmp_path / "one.o")
    assert get() == b"2"


def test_a_folder_in_place_of_a_file_costs_time_only(get, tmp_path):
    (tmp_path / "one.o").mkdir()
    before = held()
    assert [get(), get()] == [b"1", b"2"]
    assert held() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lock", "one.o"]


def test_a_lock_that_is_a_link_is_not_followed(get, tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    assert get() == get() == b"1"
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_folder_it_is_made_every_time_and_told_why():
    codecache._warn_no_cache.cache_clear()
    cache = codecache.CodeCache(None)
    with pytest.warns(
        RuntimeWarning, match=r"anew in every process: this user has no home .*; point NVCOLL_CACHE_DIR to"
    ):
        assert cache.get("one.o", lambda: b"1") == b"1"
    assert cache.get("one.o", lambda: b"2") == b"2"
    codecache._warn_no_cache.cache_clear()
