"""Every program in README, tutorials and how-to pages runs, and prints what the page says.

A page says how its block runs in a comment above it, which readers do not see:

    <!-- run: ranks=4 -->                 under `nvcoll run -n 4` (2 ranks without a comment)
    <!-- run: launcher=mpiexec -->        under mpiexec
    <!-- run: fails=TimeoutError -->      ends with that error
    <!-- run: needs=gpu,torch -->         skipped where there is no GPU, or a module is missing
    <!-- run: env=NVCOLL_TIMEOUT=2 -->    with that variable

A ```text block after it holds what the program prints, ranks in any order.
"""

import importlib.util
import os
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.conftest import without_gpu

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("tutorials/*.md")),
    *sorted((ROOT / "docs").glob("how-to/*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- run: (?P<options>.*?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)

# What a reader types to install, and the tests themselves: .ci/run runs both.
INSTALL = re.compile(r"pip install (-e )?(\"[^\"]+\"|\S+)")
# Programs that a test machine lacks.
UNTRIED = {"srun": "Slurm", "torchrun": "PyTorch", "docker": "Docker"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text, options, and the text block that follows."""

    page: Path
    line: int
    language: str
    text: str
    options: dict[str, str]
    output: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    for match, after in zip_longest(found, found[1:]):
        options = dict(option.split("=", 1) for option in shlex.split(match["options"] or ""))
        output = after["text"] if after and after["language"] == "text" else None
        line = text.count("\n", 0, match.start("text")) + 1
        yield Block(page, line, match["language"], match["text"], options, output)


ALL = [block for page in PAGES for block in blocks(page)]
PROGRAMS = [pytest.param(block, id=str(block)) for block in ALL if block.language == "python"]
SHELL = [pytest.param(block, id=str(block)) for block in ALL if block.language == "sh"]


@pytest.mark.parametrize("block", PROGRAMS)
def test_program_runs(block, run_ranks):
    options = dict(block.options)
    needed, launcher = options.pop("needs", "").split(","), options.pop("launcher", "nvcoll")
    if "gpu" in needed and (reason := without_gpu()):
        pytest.skip(reason)
    for module in set(needed) - {"", "gpu"}:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    error = options.pop("fails", None)
    env = dict([options.pop("env").split("=")]) if "env" in options else {}
    env |= {"NVCOLL_BACKEND": "nvshmem"} if "gpu" in needed else {}
    size = int(options.pop("ranks", 2))
    assert not options, f"{block}: unknown options {options}"
    ranks = run_ranks(block.text, size, launcher=launcher, env=env, check=error is None)
    if error:
        assert ranks.returncode, f"{block} was to fail with {error}"
        assert error in ranks.stderr, str(ranks)
    elif block.output is not None:
        lines = [line for text in ranks.stdout for line in text.splitlines()]
        assert Counter(lines) == Counter(block.output.splitlines()), str(ranks)


@pytest.mark.parametrize("block", SHELL)
def test_shell_lines_run(block, tmp_path, run_command):
    """Run a shell block in a folder that holds the programs of its page, under the names in their first lines."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for other in ALL:
        name = other.text.partition("\n")[0].removeprefix("# ").strip()
        if other.page == block.page and other.language == "python" and name.endswith(".py"):
            (tmp_path / name).write_text(other.text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in commands(block.text):
        status, output = run_command(["bash", "-c", command], timeout=110, cwd=tmp_path, env={"PATH": path})
        if error := block.options.get("fails"):
            assert error in output, f"{block}: {command}\n{output}"
        assert bool(status) == bool(error), f"{block}: {command}\n{output}"


def commands(text):
    """Return the command lines of a shell block that can be tried here."""
    parts = [part.strip() for line in text.splitlines() for part in line.partition("#")[0].split("&&")]
    tried_elsewhere = [part for part in parts if INSTALL.fullmatch(part) or part == "pytest"]
    return [part for part in parts if part and part not in tried_elsewhere and part.split()[0] not in UNTRIED]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples/README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_extras_are_installed_from_a_checkout(page):
    """The package is on no index, where its bare name would be looked for."""
    assert "nvcoll" not in {what.strip('"').partition("[")[0] for _, what in INSTALL.findall(page.read_text())}


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80
