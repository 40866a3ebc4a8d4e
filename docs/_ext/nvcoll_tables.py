"""The directive ``nvcoll-table``: text made from the package's own tables, so that the reference cannot differ."""

import argparse
import importlib
import os

from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from nvcoll import cli, ops, settings
from nvcoll.algorithms import ALGORITHMS


def table(header, rows):
    """Lay out a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_table(internal):
    """Tell of each row of `settings.TABLE`: those for users, or those that `nvcoll run` sets."""
    rows = [
        (f"`{v.name}`", settings.KINDS[v.kind][0], f"`{settings.default_text(v, {})}`" if v.default else "unset", v.doc)
        for v in settings.TABLE
        if v.internal == internal
    ]
    return table(("variable", "value", "default", "meaning"), rows)


def algorithms_text():
    """Tell of each algorithm in the registry what its file says: docstring with picture, order, source."""
    parts = []
    for algorithm in ALGORITHMS.values():
        facts = table(("verb", "order of reduction", "source"), [(algorithm.verb, algorithm.order, algorithm.source)])
        parts.append(f"## `{algorithm.name}`\n\n{algorithm.__doc__}\n\n{facts}\n")
    return "\n".join(parts)


def operators_table():
    """Tell which datatypes each operator takes."""
    rows = [
        (f"`{op.name}`", ", ".join(f"`{d.name}`" for d in ops.DATATYPES.values() if op.supports(d) is None))
        for op in ops.OPS.values()
    ]
    return table(("operator", "datatypes"), rows)


def datatypes_table():
    """Tell each datatype's size, what sums are kept in, and its names in MPI."""
    rows = []
    for datatype in ops.DATATYPES.values():
        names = ", ".join(f"`{name}`" for name, value in ops.MPI_NAMES.items() if value is datatype)
        rows.append((f"`{datatype.name}`", datatype.itemsize, f"`{datatype.accumulate}`", names))
    return table(("datatype", "bytes", "accumulates in", "constants"), rows)


def cli_text():
    """Show the help of every subcommand."""
    os.environ["COLUMNS"] = "100"  # argparse fills lines to the width of the terminal
    parser = argparse.ArgumentParser(prog="nvcoll")
    subparsers = parser.add_subparsers()
    for name in cli.commands():
        importlib.import_module(f"nvcoll.cli.{name}").add_parser(subparsers)
    return "\n".join(f"## `nvcoll {name}`\n\n```text\n{p.format_help()}```\n" for name, p in subparsers.choices.items())


TABLES = {
    "algorithms": algorithms_text,
    "cli": cli_text,
    "datatypes": datatypes_table,
    "internal-settings": lambda: settings_table(internal=True),
    "operators": operators_table,
    "settings": lambda: settings_table(internal=False),
}


class Table(SphinxDirective):
    """``{nvcoll-table} NAME``: the Markdown that the function called NAME in `TABLES` returns."""

    required_arguments = 1

    def run(self):
        [name] = self.arguments
        if name not in TABLES:
            raise ExtensionError(f"nvcoll-table: no table {name!r}; there are {', '.join(TABLES)}")
        return self.parse_text_to_nodes(TABLES[name](), allow_section_headings=True)


def setup(app):
    app.add_directive("nvcoll-table", Table)
    return {"parallel_read_safe": True}
