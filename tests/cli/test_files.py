"""Files that commands write: what is in the way is told before the measurement, or at the latest after it."""

import errno
import os
from pathlib import Path

import pytest

from nvcoll.cli import _files
from nvcoll.errors import ArgumentError


def test_what_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").touch()
    for name in ("old.json", "new.json"):
        _files.check("--json", tmp_path / name)
        _files.check("--json", (tmp_path / name).relative_to(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


def test_a_folder(tmp_path):
    with pytest.raises(ArgumentError, match=rf"^--json: {tmp_path} is a folder; name a file in it$"):
        _files.check("--json", tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ArgumentError, match=r"^--json: there is no folder .*/no for x.json; make it first$"):
        _files.check("--json", tmp_path / "no" / "x.json")


@pytest.mark.parametrize("there", [True, False])
def test_what_may_not_be_written(tmp_path, monkeypatch, there):
    path = tmp_path / "x.json"
    if there:
        path.touch()
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != (path if there else tmp_path))
    with pytest.raises(ArgumentError, match=r"^--json: .*/x.json may not be written; name another file$"):
        _files.check("--json", path)


def test_what_the_system_does_not_even_look_at(tmp_path):
    with pytest.raises(ArgumentError, match=r"^--json: cannot write .* \(File name too long\); name another file$"):
        _files.check("--json", tmp_path / ("x" * 1000))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"), (OSError("odd"), "odd")],
)
def test_what_turns_out_at_the_end(tmp_path, error, reason):
    with (
        pytest.raises(ArgumentError, match=rf"^--json: cannot write .*/x \({reason}\); the table is above$"),
        _files.refusing("--json", tmp_path / "x", "the table is above"),
    ):
        raise error


class TestReplace:
    def test_a_file_that_is_there(self, tmp_path):
        path = tmp_path / "rules.json"
        path.write_text("old")
        path.chmod(0o640)
        (tmp_path / "link").symlink_to(path)
        _files.replace(tmp_path / "link", "new")
        assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o640)
        assert (tmp_path / "link").is_symlink()
        assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "rules.json"]

    def test_it_stays_if_the_new_one_cannot_be_written(self, tmp_path):
        path = tmp_path / "rules.json"
        path.write_text("old")
        with pytest.raises(UnicodeEncodeError):
            _files.replace(path, "new \udcff")
        assert path.read_text() == "old"
        assert [one.name for one in tmp_path.iterdir()] == ["rules.json"]

    def test_what_is_no_file(self):
        _files.replace(Path(os.devnull), "new")
        assert not Path(os.devnull).is_file()
