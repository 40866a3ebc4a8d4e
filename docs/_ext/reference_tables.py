"""Text of the reference, made from the package's own tables, so that it cannot differ from the code."""

import argparse
import importlib
import os
from unittest import mock

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
    """Tell of each algorithm that a call may name what its file says: docstring with picture, order, source."""
    parts = []
    for algorithm in ALGORITHMS.values():
        if algorithm.verb == "allreduce":
            facts = table(("order of reduction", "source"), [(algorithm.order, algorithm.source)])
            parts.append(f"## `{algorithm.name}`\n\n{algorithm.__doc__}\n\n{facts}\n")
    return "\n".join(parts)


def helpers_text():
    """Tell of the kernels that are parts of an all-reduce, a file once."""
    docs = {algorithm.__doc__: algorithm for algorithm in ALGORITHMS.values() if algorithm.verb != "allreduce"}
    return "\n\n".join(docs)


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
    parser = argparse.ArgumentParser(prog="nvcoll")
    subparsers = parser.add_subparsers()
    for name in cli.commands():
        importlib.import_module(f"nvcoll.cli.{name}").add_parser(subparsers)
    with mock.patch.dict(os.environ, COLUMNS="100"):  # argparse fills lines to the width of the terminal
        helps = {name: command.format_help() for name, command in subparsers.choices.items()}
    return "\n".join(f"## `nvcoll {name}`\n\n```text\n{text}```\n" for name, text in helps.items())


TABLES = {
    "algorithms": algorithms_text,
    "cli": cli_text,
    "datatypes": datatypes_table,
    "internal-settings": lambda: settings_table(internal=True),
    "helpers": helpers_text,
    "operators": operators_table,
    "settings": lambda: settings_table(internal=False),
}
