"""The list of examples is complete, and its commands name files that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "README.md").read_text()


def test_every_example_is_listed_with_a_command():
    files = (ROOT / "examples").glob("*.py")
    programs = sorted(path.name for path in files if "__main__" in path.read_text())
    assert (
        sorted(re.findall(r"^\| \[(\S+)\]\(\1\) \| .+ \| `nvcoll run -n 4 examples/\1` \|$", README, re.MULTILINE))
        == programs
    )


def test_every_command_names_a_file_that_exists():
    for path in re.findall(r"\bexamples/\S+?\.py\b", README):
        assert (ROOT / path).is_file(), path
