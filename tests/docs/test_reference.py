"""The reference tells everything there is: variables, algorithms, commands, public names, links."""

import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import nvcoll
from nvcoll import cli, ops, settings
from nvcoll.algorithms import ALGORITHMS, one_shot

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    """The texts that pages of the reference ask for by name."""
    sys.path.insert(0, str(DOCS / "_ext"))
    import reference_tables

    sys.path.pop(0)
    return {name: make() for name, make in reference_tables.TABLES.items()}


def test_every_table_is_on_one_page(tables):
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    used = re.findall(r"^```{nvcoll-table} (\S+)", text, re.MULTILINE)
    assert sorted(used) == sorted(tables)


@pytest.mark.parametrize("variable", settings.TABLE, ids=lambda variable: variable.name)
def test_variables_are_in_the_reference(variable, tables):
    text = tables["internal-settings" if variable.internal else "settings"]
    assert f"| `{variable.name}` |" in text
    assert variable.doc in text


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_are_in_the_reference(name, tables):
    if ALGORITHMS[name].verb == "allreduce":
        assert f"## `{name}`" in tables["algorithms"]
    assert str(ALGORITHMS[name].__doc__) in tables["algorithms"] + tables["helpers"]


def test_commands_are_in_the_reference(tables):
    assert re.findall(r"^## `nvcoll (\w+)`", tables["cli"], re.MULTILINE) == cli.commands()


def test_public_names_are_in_the_reference(tables):
    text = (DOCS / "reference/api.md").read_text() + tables["operators"] + tables["datatypes"]
    errors = {name for name, value in vars(nvcoll.errors).items() if isinstance(value, type)}  # by automodule
    told = set(re.findall(r"\w+", text)) | errors
    assert not set(nvcoll.__all__) - told


def test_every_operator_takes_some_datatype(tables):
    for op in ops.OPS:
        assert re.search(rf"^\| `{op}` \| `\w+`", tables["operators"], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_schedule_in_the_explanation_is_one_shot():
    shown = re.search(r"```python\n(def kernel.*?)```", (DOCS / "explanation/design.md").read_text(), re.DOTALL)
    stands = re.search(r" {4}def kernel.*?(?=\n {4}return kernel)", Path(one_shot.__file__).read_text(), re.DOTALL)
    assert shown[1].strip() == dedent(stands[0]).strip()
